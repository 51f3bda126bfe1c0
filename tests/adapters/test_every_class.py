"""Every image-text class of transformers is covered, refused by name, or named here with what stands in its way."""

from __future__ import annotations

import yaml
from _capabilities import FILE
from _zoo_all import FAMILIES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MAPPING

from tokenprune.adapters._not_applicable import NOT_APPLICABLE
from tokenprune.registry import MODELS

NOT_SHOWN = {
    "Apertus1p5ForConditionalGeneration": "no model of it is built in the tests: words of a codebook, as in Emu3",
    "HYV4VLForConditionalGeneration": "no model of it is built in the tests",
    "InklingForConditionalGeneration": "its decoder is refused when it is tried: distances and convolutions in the row",
    "Inkling2ForConditionalGeneration": "as Inkling",
    "Inkling2LoopForConditionalGeneration": "no model of it is built in the tests",
    "Kosmos2ForConditionalGeneration": "its text model merges the pictures, at places that a mask names",
    "Kosmos2_5ForConditionalGeneration": "as Kosmos-2",
    "MiniMaxM3SparseForConditionalGeneration": "no model of it is built in the tests",
    "Mistral4ForCausalLM": "takes text alone",
    "NemotronH_Omni_Reasoning_V3": "no model of it is built in the tests: layers that are Mamba's among others",
}
"""Classes that are read off the loaded model if at all: what is known of each."""


def test_no_class_of_transformers_is_forgotten() -> None:
    named = {one for value in MAPPING.values() for one in ([value] if isinstance(value, str) else value)}
    covered = {*yaml.safe_load(FILE.read_text(encoding="utf-8"))}
    with_files = {cls for name in MODELS.names() if name in FAMILIES for cls in MODELS.get(name).classes}
    known = covered | with_files | {*NOT_APPLICABLE} | {*NOT_SHOWN}
    assert named <= known, f"neither covered nor refused by name: {sorted(named - known)}"
    assert not {*NOT_SHOWN} & (covered | with_files | {*NOT_APPLICABLE}), "said to be missing, and is not"
