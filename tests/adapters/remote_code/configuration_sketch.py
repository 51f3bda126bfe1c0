"""Configuration of the model beside this file, as a repository on the hub brings one."""

from transformers import AutoConfig, PretrainedConfig


class SketchConfig(PretrainedConfig):
    """`kind` says what is odd about the model: see `modeling_sketch.py`."""

    model_type = "sketch_vl"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012

    def __init__(self, vision_config=None, text_config=None, image_token_id=5, kind="plain", **kwargs):
        self.vision_config = AutoConfig.for_model(**(vision_config or {"model_type": "clip_vision_model"}))
        self.text_config = AutoConfig.for_model(**(text_config or {"model_type": "llama"}))
        self.image_token_id, self.kind = image_token_id, kind
        super().__init__(**kwargs)
