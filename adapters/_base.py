"""What an adapter of a model family must say. Everything that differs between families stands in its one file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from tokenprune.signals import Signal, Tower

Emit = Callable[[Signal, Callable[[], Tensor]], None]


class Adapter:
    """Description of one loaded model.

    Attributes:
        classes: names of the transformers classes that the family covers.
        model: the model as the user holds it (has `generate`).
        entry: the module that is called with `input_ids` and `pixel_values` and calls the language model.
        language_model: the decoder stack, called with `inputs_embeds`.
        image_token_id: id of the placeholder token.
        tower: facts on the vision tower.
    """

    name: ClassVar[str] = ""
    classes: ClassVar[tuple[str, ...]] = ()

    model: Any
    entry: Any
    language_model: Any
    image_token_id: int
    tower: Tower

    def image_grids(self, pixel_values: Tensor) -> list[tuple[int, int]]:
        """(rows, cols) of the visual tokens that each image in `pixel_values` becomes, in tower order."""
        raise TypeError(f"{type(self).__name__} defines no image_grids().")

    def record(self, signal: Signal, emit: Emit) -> list[Any]:
        """Install hooks that call `emit(signal, compute)` each time the tower runs; `compute()` gives `[M, N]` fp32.

        Returns:
            The removable hook handles.
        """
        raise TypeError(f"{type(self).__name__} records no signals.")

    def check_signal(self, signal: Signal) -> None:
        """Raise ValueError if this tower cannot record `signal`."""
        raise TypeError(f"{type(self).__name__} records no signals.")

    def resize(self, pixel_values: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Mapping[str, Any]]:
        """Pixels shrunk so that the tower makes a raster of `grid` tokens, and extra arguments for the tower."""
        raise TypeError(f"{type(self).__name__} cannot run its tower at another size.")

    def cost_shape(self) -> Any:
        """The `tokenprune.cost.ModelShape` of this model."""
        raise TypeError(f"{type(self).__name__} defines no cost_shape().")


def decoder_of(module: Any, path: str) -> nn.Module:
    """The submodule at a dotted path, with a sentence if it is not there."""
    for part in path.split("."):
        module = getattr(module, part, None)
        if module is None:
            raise ValueError(f"The model has no submodule {path!r}; this transformers version lays it out differently.")
    return module
