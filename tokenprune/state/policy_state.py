"""What a cache policy knows of the keys of a cache, and what waits beside it; it travels with the cache."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Aside:
    """Keys of one layer that wait beside the cache.

    Attributes:
        key, value: `[B, Hk, A, d]`.
        image: `[B, A]` int64, of which picture of its row each is.
        real: `[B, A]` bool, False where a row has fewer.
    """

    key: Tensor
    value: Tensor
    image: Tensor
    real: Tensor

    def rows(self, index: Tensor) -> Aside:
        """The same for the rows in `index`, in that order."""
        index = index.to(self.key.device)
        return Aside(self.key[index], self.value[index], self.image[index], self.real[index])


@dataclass
class PolicyLayer:
    """The keys of one layer, as they stand in its cache.

    Attributes:
        image, text, real: `[B, K]`, see `LayerKeys`.
        noted: by name, `[B, Hk, K]`.
        known: by name, `[B, ...]`.
        aside: what waits; None: nothing.
        shift: `[B]` int64, what positions of later tokens shrink by, and whether that differs from layer 0.
    """

    image: Tensor
    text: Tensor
    real: Tensor
    shift: tuple[Tensor, bool]
    noted: dict[str, Tensor] = field(default_factory=dict)
    known: dict[str, Tensor] = field(default_factory=dict)
    aside: Aside | None = None

    def rows(self, index: Tensor) -> PolicyLayer:
        """The same for the rows in `index`, in that order."""
        index = index.to(self.image.device)
        return PolicyLayer(
            self.image[index],
            self.text[index],
            self.real[index],
            (self.shift[0][index.to(self.shift[0].device)], self.shift[1]),
            {name: values[index] for name, values in self.noted.items()},
            {name: values[index] for name, values in self.known.items()},
            None if self.aside is None else self.aside.rows(index),
        )

    def grown(self, image: Tensor, text: Tensor, real: Tensor) -> None:
        """New keys came, `[B, S]` each."""
        self.image = torch.cat([self.image, image], dim=1)
        self.text = torch.cat([self.text, text], dim=1)
        self.real = torch.cat([self.real, real], dim=1)
        new = image.shape[1]
        self.noted = {name: torch.nn.functional.pad(values, (0, new)) for name, values in self.noted.items()}


@dataclass(frozen=True)
class PolicyState:
    """What a policy knows of one cache.

    Attributes:
        name: of the policy.
        layers: by decoder layer.
        has: `[B]` bool, rows with a picture.
        pictures: how many a row has at most.
        step: tokens decoded since the last call of several tokens.
    """

    name: str
    layers: dict[int, PolicyLayer]
    has: Tensor
    pictures: int
    step: int = 0

    def rows(self, index: Tensor) -> PolicyState:
        """The same for the rows in `index`, in that order."""
        layers = {layer: keys.rows(index) for layer, keys in self.layers.items()}
        return replace(self, layers=layers, has=self.has[index.to(self.has.device)])
