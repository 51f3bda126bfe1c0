"""A branch beside the decoder: a few layers of its kind that say which visual tokens an answer will look at.

The branch of SD-RPN (arXiv 2509.16944): what enters decoder layer K goes through T - 1 copies of the layers from K on;
of the T-th copy only the input norm and the projections of queries and keys are used.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.signals import OWN_LAYERS

WEIGHTS, CONFIG = "branch.safetensors", "config.json"


class Branch(nn.Module):
    """T layers of a decoder's kind; without gradients unless they are trained.

    Args:
        adapter: the family.
        layer: K, where they branch off; their first weights are those of layers K to K + T - 1.
        count: T.

    Attributes:
        rotates: whether queries and keys of the last layer are rotated: on families with 3-D positions, as published.
    """

    def __init__(self, adapter: Adapter, layer: int, count: int) -> None:
        super().__init__()
        total = len(adapter.layers)
        if not 1 <= count <= total - layer:
            raise ValueError(
                f"A branch of {count} layer(s) cannot begin at layer {layer} of a decoder of {total}: T goes from 1 to "
                f"{total - layer} there."
            )
        config = copy.deepcopy(adapter.language_model.config)
        config._attn_implementation = "sdpa"
        self.layers = nn.ModuleList()
        for number in range(layer, layer + count):
            theirs = adapter.layers[number]
            weights = dict(theirs.named_parameters())
            some = next(iter(weights.values()))
            if any(weight.is_meta or hasattr(weight, "placements") for weight in weights.values()):
                raise ValueError(
                    f"The weights of decoder layer {number} are sharded or offloaded, so no branch can be made of it."
                )
            with torch.device("meta"):
                mine = type(theirs)(config, number)
            mine.to_empty(device=some.device).to(some.dtype)
            mine.load_state_dict(theirs.state_dict())
            self.layers.append(mine)
        self.rotates = adapter.mrope
        self._read = adapter.reading
        self.requires_grad_(False).eval()

    def logits(
        self, hidden: Tensor, rotation: tuple[Tensor, Tensor], attended: Tensor | None, asking: Tensor
    ) -> tuple[Tensor, int]:
        """`[B, P]` fp32, and how many operations its matrix products took.

        Args:
            hidden: `[B, P, D]`, what enters layer K.
            rotation: cos and sin `[1 or B, P, d]`.
            attended: `[B, P]` bool, False at padding; None: there is none.
            asking: `[B]` int64, the token whose query is taken.
        """
        batch, length = hidden.shape[:2]
        mask = _mask(hidden, attended)
        flops = 0
        for layer in list(self.layers)[:-1]:
            output = layer(hidden, attention_mask=mask, position_embeddings=rotation)
            hidden = output[0] if isinstance(output, tuple) else output
            flops += 2 * batch * length * sum(w.numel() for w in layer.parameters() if w.dim() == 2)
            reading = self._read(layer)
            width = reading.heads(hidden[:1, :1], "q").shape[1] * reading.width
            flops += 4 * batch * length * length * width
        reading = self._read(self.layers[-1])
        rows = asking[:, None, None].expand(-1, 1, hidden.shape[-1])
        query, key = reading.heads(hidden.gather(1, rows), "q"), reading.heads(hidden, "k")
        flops += 2 * (query.numel() + key.numel()) * hidden.shape[-1] + 2 * query.numel() * length
        if self.rotates:
            cos, sin = (part.expand(batch, -1, -1) for part in rotation)
            at = asking[:, None, None].expand(-1, 1, cos.shape[-1])
            query, key = reading.rotate(query, (cos.gather(1, at), sin.gather(1, at))), reading.rotate(key, rotation)
        groups = query.shape[1] // key.shape[1]
        mean = query.float().unflatten(1, (-1, groups)).sum(dim=2) / query.shape[1]  # heads that share a key, together
        products = torch.einsum("bhqd,bhpd->bp", mean, key.float())
        return products * reading.width**-0.5, flops


def _mask(hidden: Tensor, attended: Tensor | None) -> Tensor:
    """`[1 or B, 1, P, P]` of the states' dtype, to be added to products: causal, padding hidden from all but itself."""
    length = hidden.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()[None]
    if attended is not None:
        allowed = (allowed & attended[:, None]) | torch.eye(length, dtype=torch.bool, device=hidden.device)
    low = torch.finfo(hidden.dtype).min
    return torch.zeros(allowed.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(~allowed, low)[:, None]


def load_branch(adapter: Adapter, layer: int, count: int, source: str) -> Branch:
    """A branch with the weights in the folder `source`, or the model's own (`OWN_LAYERS`).

    Raises:
        ValueError: there are none, or they are of another model.
    """
    branch = Branch(adapter, layer, count)
    if source == OWN_LAYERS:
        return branch
    from safetensors.torch import load_file

    weights = load_file(Path(source).expanduser() / WEIGHTS)
    wanted = dict(branch.named_parameters())
    if {name: value.shape for name, value in weights.items()} != {name: value.shape for name, value in wanted.items()}:
        raise ValueError(
            f"{source} holds the weights of a branch of another model: {len(weights)} tensors that are not those of "
            f"{count} layer(s) of {type(adapter.layers[layer]).__name__}."
        )
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(weights[name])
    return branch


def save_branch(branch: Any, path: Path) -> None:
    """Write the weights of a branch."""
    from safetensors.torch import save_file

    save_file({name: value.detach().cpu().contiguous() for name, value in branch.named_parameters()}, path)
