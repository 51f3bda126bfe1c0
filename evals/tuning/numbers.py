"""What a search may go by: numbers."""

from __future__ import annotations

from torch import Tensor


def finite(values: Tensor) -> Tensor:
    """`values` as they are.

    Raises:
        ValueError: there is a NaN or +inf among them; -inf is a logit that is ruled out. Comparisons with NaN are all
            false, so that a search would take whatever it tries first for the best.
    """
    if bool((values.isnan() | (values == float("inf"))).any()):
        kind = str(values.dtype).removeprefix("torch.")
        raise ValueError(
            f"The model says NaN or infinity ({kind}), so that nothing can be found from its answers. Where that is an "
            "overflow, another --dtype helps: bfloat16 or float32."
        )
    return values
