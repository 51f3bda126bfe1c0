"""Classes that take pictures and have no rows of visual tokens to prune, or none that tokens can leave, by name, and
why."""

from __future__ import annotations

_CROSS = "its decoder looks at pictures by cross-attention, so no visual tokens stand in its rows"
_ENCODER = "it is an encoder-decoder: pictures are read by its encoder, and its decoder's rows hold text alone"
_LATENTS = "a Q-Former makes a few latents of each picture, which is a pruning of its own"
_CAPTIONS = "it is a captioner: its text model looks at all of a picture in every layer or in front of the text"
_BLOCKS = "its layers choose keys by blocks of places in the row, which are others once tokens left"

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
}
"""By class of transformers, the end of a sentence."""


def why_not(model: type) -> str:
    """Why a class, or one that derives from it, cannot be pruned; "" for any other."""
    return next((NOT_APPLICABLE[cls.__name__] for cls in model.__mro__ if cls.__name__ in NOT_APPLICABLE), "")
