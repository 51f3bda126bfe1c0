"""Classes that take pictures and have no rows of visual tokens to prune, or none that tokens can leave, by name, and
why."""

from __future__ import annotations

_CROSS = "its decoder looks at pictures by cross-attention, so no visual tokens stand in its rows"
_ENCODER = "it is an encoder-decoder: pictures are read by its encoder, and its decoder's rows hold text alone"
_LATENTS = "a Q-Former makes a few latents of each picture, which is a pruning of its own"
_CAPTIONS = "it is a captioner: its text model looks at all of a picture in every layer or in front of the text"
_BLOCKS = "its layers choose keys by blocks of places in the row, which are others once tokens left"
_BY_MASK = (
    "its text model puts the latents of a resampler where a mask of the prompt says, with no id for a placeholder"
)
_ALONG = "its layers see distances in the row, and convolutions that go along it"

NOT_APPLICABLE = {
    "MllamaForConditionalGeneration": _CROSS,
    "IdeficsForVisionText2Text": _CROSS,
    "EvollaForProteinText2Text": "it reads proteins, by cross-attention",
    "Florence2ForConditionalGeneration": _ENCODER,
    "T5Gemma2ForConditionalGeneration": _ENCODER,
    "UdopForConditionalGeneration": _ENCODER,
    "Pix2StructForConditionalGeneration": _ENCODER,
    "PPFormulaNetForConditionalGeneration": _ENCODER,
    "VisionEncoderDecoderModel": _ENCODER,
    "BlipForConditionalGeneration": _CAPTIONS,
    "GitForCausalLM": _CAPTIONS,
    "Blip2ForConditionalGeneration": _LATENTS,
    "InstructBlipForConditionalGeneration": _LATENTS,
    "InstructBlipVideoForConditionalGeneration": _LATENTS,
    "DiffusionGemmaForBlockDiffusion": "it fills in blocks by diffusion, with no tokens one after the other",
    "Glm5NextForConditionalGeneration": _BLOCKS,
    "Qwen4ExpForConditionalGeneration": f"{_BLOCKS}, and it adds embeddings of each token with those before it",
    "UnlimitedOcrForConditionalGeneration": "how far an answer sees is counted from the end of the whole prompt",
    "PI0ForConditionalGeneration": "it answers with movements, not with text",
    "Kosmos2ForConditionalGeneration": _BY_MASK,
    "Kosmos2_5ForConditionalGeneration": _BY_MASK,
    "Mistral4ForCausalLM": "it takes text alone",
}
"""By class of transformers, the end of a sentence."""

FAILS_THE_TRIAL = {
    "InklingForConditionalGeneration": _ALONG,
    "Inkling2ForConditionalGeneration": _ALONG,
    "Inkling2LoopForConditionalGeneration": _ALONG,
    "MiniMaxM3SparseForConditionalGeneration": f"{_BLOCKS}; with layers that see all it is pruned as any other",
    "NemotronH_Omni_Reasoning_V3": (
        "its decoder mixes Mamba's layers, whose states go along the row, with attention that has no positions, which "
        "the engine does not know"
    ),
}
"""Classes that are not refused by name: their decoders are when they are tried, by the kinds of their layers or because
hiding tokens differs from removing them."""


def why_not(model: type) -> str:
    """Why a class, or one that derives from it, cannot be pruned; "" for any other."""
    return next((NOT_APPLICABLE[cls.__name__] for cls in model.__mro__ if cls.__name__ in NOT_APPLICABLE), "")
