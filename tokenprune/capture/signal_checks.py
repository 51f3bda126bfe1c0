"""Which signals of the decoder a stage may ask for."""

from __future__ import annotations

from tokenprune.interfaces.signals import (
    BRANCH_LOGITS,
    DECODER_SIGNALS,
    MAX_SIGNALS,
    PROMPT_SIGNALS,
    RATER_ATTENTION,
    TEXT_PIVOT_COSINE,
    TRANSITION_SIGNALS,
    Signal,
)


def check_decoder_signal(signal: Signal, site: str, depth: int) -> None:
    """Raise ValueError if a stage cannot have this signal.

    Args:
        depth: K of "layer:K"; 0 at "input", where what enters layer 0 is there; negative elsewhere.
    """
    if signal.name in PROMPT_SIGNALS and site != "input":
        raise ValueError(f"{signal.name} is there at 'input' only, and was asked for at {site!r}.")
    if signal.name in DECODER_SIGNALS and depth < 0:
        raise ValueError(
            f"{signal.name} of decoder layers is there at 'layer:K' and, of layer 0, at 'input' only, and was asked "
            f"for at {site!r}."
        )
    if signal.name in DECODER_SIGNALS and depth == 0 and signal.layer != 0:
        raise ValueError(
            f"{signal.name} of decoder layer {signal.layer} was asked for at {site!r}; a stage there reads layer 0."
        )
    if signal.name in DECODER_SIGNALS and signal.layer not in (depth - 1, depth):
        raise ValueError(
            f"{signal.name} of decoder layer {signal.layer} was asked for at {site!r}; a stage there reads layers "
            f"{depth - 1} and {depth}."
        )
    if signal.name == TEXT_PIVOT_COSINE and (signal.layer != depth or not site.startswith("layer") or depth == 0):
        raise ValueError(
            f"{signal.name} of decoder layer {signal.layer} was asked for at {site!r}; it is there at 'layer:K' from "
            "K = 1 on, of layer K."
        )
    if signal.name in (RATER_ATTENTION, *MAX_SIGNALS) and signal.layer != depth - 1:
        raise ValueError(
            f"{signal.name} of decoder layer {signal.layer} was asked for at {site!r}; it is there at 'layer:K', of "
            "layer K - 1."
        )
    if signal.name == BRANCH_LOGITS and (signal.layer != depth or not site.startswith("layer")):
        raise ValueError(f"{signal.name} of a branch at decoder layer {signal.layer} was asked for at {site!r}.")
    if signal.name in TRANSITION_SIGNALS and not 0 <= signal.layer < depth:
        raise ValueError(
            f"{signal.name} of decoder layer {signal.layer} was asked for at {site!r}; a stage at 'layer:K' reads what "
            "layers before K did to the tokens."
        )
