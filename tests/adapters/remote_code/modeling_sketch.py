"""A model of a repository on the hub that transformers knows nothing of: one class for all, parts under its own names.

Its kinds: "plain" is right; in "shifted" each token of a layer sees the one before it in the row, whatever a mask says;
in "scaled" pictures enter the decoder at twice the size of the features that are asked for.
"""

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from .configuration_sketch import SketchConfig


class ShiftedLayer(LlamaDecoderLayer):
    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(hidden_states + hidden_states.roll(1, 1), *args, **kwargs)


class SketchForAnswers(PreTrainedModel, GenerationMixin):
    config_class = SketchConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.eyes = AutoModel.from_config(config.vision_config)
        self.bridge = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.llm = AutoModelForCausalLM.from_config(config.text_config)
        if config.kind == "shifted":
            count = config.text_config.num_hidden_layers
            self.llm.model.layers = nn.ModuleList(ShiftedLayer(self.llm.config, index) for index in range(count))
        self.post_init()

    def get_input_embeddings(self):
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self):
        return self.llm.get_output_embeddings()

    def get_image_features(self, pixel_values):
        return self.bridge(self.eyes(pixel_values).last_hidden_state[:, 1:])

    def forward(
        self, input_ids=None, pixel_values=None, attention_mask=None, position_ids=None, inputs_embeds=None, **kwargs
    ):
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = self.get_image_features(pixel_values)
            if self.config.kind == "scaled":
                features = 2 * features
            places = (input_ids == self.config.image_token_id)[..., None].expand_as(inputs_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(places, features.to(inputs_embeds.dtype))
        return self.llm(inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, **kwargs)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        given = super().prepare_inputs_for_generation(*args, **kwargs)
        ids = given.get("input_ids")
        if ids is not None and not bool(torch.any(ids == self.config.image_token_id)):
            given["pixel_values"] = None
        return given
