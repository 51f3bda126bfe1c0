"""Models that transformers does not bring: code from the folder of a checkpoint, and classes derived from ours."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from _families import batch_of, family
from _masked_whole import compare_whole
from _tiny import IMAGE, TEXT
from _zoo import SPECIAL, VIT, Rows, fixed
from _zoo_all import zoo_batch, zoo_model
from masked_reference import compare, run_pruned
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText

import tokenprune
from tokenprune.adapters._generic import Generic
from tokenprune.api import adapter_for
from tokenprune.registry import MODELS

CODE = Path(__file__).parent / "remote_code"
KEEP = 4
_SECOND = "self.more = AutoModel.from_config(config.text_config)"


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers copies code of checkpoints to, in place of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.setattr(sys, "path", list(sys.path))
        yield
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
            del sys.modules[name]


@pytest.fixture
def remote(tmp_path: Path, modules: None) -> Callable[..., Any]:
    """A checkpoint with code of its own, saved and loaded as one from the hub is; `renamed` changes names in it."""

    def load(kind: str = "plain", renamed: tuple[str, str] = ("", "")) -> Any:
        folder = tmp_path / f"sketch_{kind}_{renamed[1]}"
        folder.mkdir()
        for file in CODE.glob("*.py"):
            shutil.copy(file, folder)
        modeling = folder / "modeling_sketch.py"
        code = modeling.read_text(encoding="utf-8")
        modeling.write_text(code.replace(*renamed) if renamed[0] else code, encoding="utf-8")
        _write_config(folder, kind)
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype="float32")
        assert type(model).__module__.startswith("transformers_modules."), "it is the code of the folder that runs"
        return model.eval()

    return load


def _write_config(folder: Path, kind: str) -> None:
    vision = {"model_type": "clip_vision_model", **VIT, "image_size": 24, "patch_size": 4}
    described = {
        "model_type": "sketch_vl", "architectures": ["SketchForAnswers"], "kind": kind, "image_token_id": IMAGE,
        "vision_config": vision, "text_config": {"model_type": "llama", **TEXT},
        "auto_map": {
            "AutoConfig": "configuration_sketch.SketchConfig",
            "AutoModelForImageTextToText": "modeling_sketch.SketchForAnswers",
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0.0, weight[0].numel() ** -0.5 * 1.5)
    save_file(
        {name: value.clone() for name, value in model.state_dict().items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def _batch() -> dict[str, torch.Tensor]:
    return fixed(36, 24)(Rows(5, [1, 2]))


@pytest.mark.parametrize("method", ["divprune", {"at": "layer:2", "prune": "random", "keep": KEEP}, "fastv"])
def test_code_of_a_checkpoint_is_pruned_as_the_masked_model_says(method: Any, remote: Callable[..., Any]) -> None:
    """Flat, its decoder called `llm`, its tower `eyes`: known by name is only how pictures are asked for."""
    model, batch = remote(), _batch()
    assert adapter_for(model).name == "generic"
    run = run_pruned(model, method, KEEP if isinstance(method, str) else None, batch, tokens=6, silent=SPECIAL)
    compare_whole(run, batch, 1e-5, SPECIAL)
    assert run["report"].kept_tokens < run["report"].visual_tokens


def test_code_in_which_a_hidden_token_is_still_seen_is_refused(remote: Callable[..., Any]) -> None:
    with pytest.raises(
        ValueError, match=r"SketchForAnswers has no input cuts: taking tokens out .* is not hiding them"
    ):
        tokenprune.apply(remote("shifted"), "divprune", keep=KEEP)


def test_code_that_changes_features_on_their_way_is_refused_at_the_first_prompt(remote: Callable[..., Any]) -> None:
    model = remote("scaled")
    refused = pytest.raises(ValueError, match=r"SketchForAnswers.* no input cuts")
    with tokenprune.applied(model, "divprune", keep=KEEP), torch.no_grad(), refused:
        model(**_batch())
    assert model(**_batch()).logits.isfinite().all(), "nothing is left behind"


@pytest.mark.parametrize(
    ("renamed", "says"),
    [
        (("get_image_features", "look_at"), "no module that makes features of pictures .get_image_features."),
        (
            ("self.llm = ", "self.more = AutoModel.from_config(config.text_config)\n        self.llm = "),
            "no decoder stack .* but several",
        ),
        (("pixel_values", "pixels"), "no placeholders for visual tokens"),
    ],
    ids=["features", "decoder", "placeholder"],
)
def test_code_with_other_names_for_what_must_be_found_is_refused(
    renamed: tuple[str, str], says: str, remote: Callable[..., Any]
) -> None:
    with pytest.raises(TypeError, match=f"SketchForAnswers has {says}"):
        tokenprune.apply(remote(renamed=renamed), "divprune", keep=KEEP)


def test_a_short_file_of_the_users_says_what_is_called_otherwise(remote: Callable[..., Any]) -> None:
    """The file of docs/guides/adding_a_family.md."""

    @tokenprune.register_model("sketch")
    class Sketch(Generic):
        """`SketchForAnswers`, as its repository has it."""

        classes = ("SketchForAnswers",)
        feature_names: ClassVar[dict[str, str]] = {"image": "look_at", "video": "watch"}
        id_names = ("picture_mark",)

    try:
        model, batch = remote(renamed=("get_image_features", "look_at")), _batch()
        model.config.picture_mark = IMAGE
        assert adapter_for(model).name == "sketch"
        run = run_pruned(model, "random", KEEP, batch, tokens=4, silent=SPECIAL)
        compare_whole(run, batch, 1e-5, SPECIAL)
    finally:
        MODELS.unregister("sketch")


# --- classes derived from one that is covered -------------------------------------------------------------------------


def _derived(model: Any) -> Any:
    """A model of a class derived from that of `model`, under a model type of its own, whose forward does more."""

    class MineConfig(type(model.config)):
        model_type = "mine"

    class MineForAnswers(type(model)):
        config_class = MineConfig

        @functools.wraps(type(model).forward)  # transformers asks for the names of arguments
        def forward(self, *args, mood="", **kwargs):
            """Counts its calls, and takes an argument of its own."""
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(*args, **kwargs)

    settings = {key: value for key, value in model.config.to_dict().items() if key != "model_type"}
    config = MineConfig(**settings)
    config._attn_implementation = "sdpa"
    mine = MineForAnswers(config).eval()
    mine.load_state_dict(model.state_dict())
    mine.generation_config = model.generation_config
    assert mine.config.model_type == "mine"
    return mine


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_a_class_derived_from_one_with_a_file_is_pruned_as_that_is(name: str) -> None:
    mine, batch = _derived(family(name)), batch_of(name, "one_left")
    assert adapter_for(mine).name == name
    run = run_pruned(mine, "vtc_cls", 9, batch, tokens=4)
    compare(run, batch, 1e-5)
    assert mine.calls > 4


@pytest.mark.parametrize("name", ["mistral3", "janus"])
def test_a_class_derived_from_one_without_a_file_is_read_off_the_model(name: str) -> None:
    mine, batch = _derived(zoo_model(name)), zoo_batch(name, "derived")
    assert adapter_for(mine).name == "generic"
    run = run_pruned(mine, "random", KEEP, batch, tokens=4, silent=SPECIAL)
    compare_whole(run, batch, 1e-5, SPECIAL)
    with tokenprune.applied(mine, "random", KEEP), torch.no_grad():
        assert torch.equal(mine(**batch, mood="good").logits, mine(**batch).logits)
