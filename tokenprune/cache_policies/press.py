"""Lets a press of kvpress thin the cache that a pruned prompt leaves (H2O, SnapKV, StreamingLLM, TOVA, ...).

Source: NVIDIA/kvpress (Apache-2.0), which is called and not copied: `compress` of a press makes of the keys and values
of a prompt those that stay, by the same number in each head. It is asked in every layer, behind a prompt of an empty
cache; tokens that left earlier are not among its keys.

- `apply(model, ["holov@64", Press(press=SnapKVPress(compression_ratio=0.5))])`, or by name where kvpress is installed:
  `holov@64+press(press=SnapKVPress,ratio=0.5)`. Importing kvpress wraps transformers' attention functions for good.
- The report counts the prompt's keys that stay behind both.

Deviations:
- `with press(model)` of kvpress 0.5.5 asks for arguments of attention modules (`cache_position`) that no release of
  transformers passes which is supported here; its `compress` does not need its own hook, and that is what is called.
- Presses with a hook or a context of their own (decoding presses, KVzip, those that mask by head) are refused.
- Presses know nothing of padding: rows of a batch must be as long as each other after pruning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tokenprune.interfaces.cache_policy import CachePolicy
from tokenprune.interfaces.intervention import DecoderInfo, Facts
from tokenprune.registry import near, register_cache_policy

_OWN = ("forward_hook", "__call__")


@register_cache_policy("press")
@dataclass
class Press(CachePolicy):
    """A press at work behind a prompt.

    Attributes:
        press: what has `compress(module, hidden_states, keys, values, attentions, kwargs)`, or the name of a class of
            kvpress.
        ratio: its compression_ratio, where it is named: the share of keys that leaves.
    """

    published: ClassVar[str] = "NVIDIA/kvpress"
    visual_only: ClassVar[bool] = False

    press: Any = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.press, str):
            self.press = _named(self.press, self.ratio)
        elif self.ratio is not None:
            raise ValueError("ratio goes with the name of a press; set it on the object, or give a name.")
        if not callable(getattr(self.press, "compress", None)):
            raise ValueError(
                f"press must be a press of kvpress or its name, got {self.press!r}: it has no compress(module, "
                "hidden_states, keys, values, attentions, kwargs)."
            )
        base = next((cls for cls in type(self.press).__mro__ if cls.__name__ == "BasePress"), None)
        own = [name for name in _OWN if base is not None and getattr(type(self.press), name) is not getattr(base, name)]
        if own:
            raise ValueError(
                f"{type(self.press).__name__} has a {own[0]} of its own, so its compress() is not all that it does. "
                "Use a press that scores keys once (SnapKVPress, KnormPress, StreamingLLMPress)."
            )

    def prepare(self, decoder: DecoderInfo) -> tuple[int, ...]:
        return () if getattr(self.press, "compression_ratio", None) == 0 else super().prepare(decoder)

    def asked(self, step: int) -> bool:
        return False

    def compress(
        self, module: Any, hidden: Tensor, key: Tensor, value: Tensor, weights: Any, given: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        return self.press.compress(module, hidden, key, value, weights, dict(given))

    def summary(self, noted: Mapping[int, Facts]) -> str:
        ratio = getattr(self.press, "compression_ratio", None)
        return type(self.press).__name__ + (f", {ratio:g} of the keys leave" if isinstance(ratio, (int, float)) else "")


def _named(name: str, ratio: float | None) -> Any:
    try:
        import kvpress  # pyright: ignore[reportMissingImports] # an extra of nobody's: its pins exclude our transformers
    except ImportError as error:
        raise ValueError(
            f"press={name!r} names a class of kvpress, which cannot be imported ({error}). Install it with `pip "
            "install --no-deps kvpress`, or give an object that has compress()."
        ) from None
    known = [each for each in dir(kvpress) if each.endswith("Press")]
    if name not in known:
        raise ValueError(f"kvpress has no {name!r}.{near(name, known)}")
    return getattr(kvpress, name)(**({} if ratio is None else {"compression_ratio": ratio}))
