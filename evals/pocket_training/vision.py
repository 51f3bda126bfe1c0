"""The vision tower of pocket-llava: its construction, its training targets and losses (stage A of ``train.py``).

Stage A teaches the tower before any language model sees it: heads on every patch (shape, colour, sign symbol and its
place in the sign, object centre, position) keep patch features local and readable, and a head on the [CLS] token, at
the penultimate and at the last hidden state, makes [CLS] look for everything that matters. The heads are thrown away.
"""

from __future__ import annotations

# layers of transformers models are untyped modules to pyright, and the recipe handles nothing else
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from tokenprune.evals.pocket.easy_vqa import EASY_COLOURS, EASY_SHAPES
from tokenprune.evals.pocket.scenes import COLOURS, PATCH, PATTERNS, SHAPES, SIGN_LENGTH, SIZE, SYMBOLS, Scene

GRID = SIZE // PATCH  # 24 patches a side
IMAGE_MEAN, IMAGE_STD = 0.5, 0.27
_N_COMBOS = len(SHAPES) * len(COLOURS)
_N_SYMBOLS = len(SYMBOLS) + 1  # the last class is "none"
_PATCH_SPLIT = (len(SHAPES) + 1, len(COLOURS) + 1, SIGN_LENGTH * _N_SYMBOLS, 1, 2, 3, len(PATTERNS))
_MASK = 7  # a patch's silhouette is asked at 7 x 7
_CLS_SPLIT = (_N_COMBOS, SIGN_LENGTH * _N_SYMBOLS, len(PATTERNS), len(EASY_SHAPES), len(EASY_COLOURS))


def build_tower(width: int = 192, layers: int = 6, heads: int = 6) -> CLIPVisionModel:
    """A CLIP tower whose first two blocks start with heads that look at one neighbouring patch each.

    The position table starts as 2-D sines and cosines in its first ``width // heads`` dimensions; a query that rotates
    them by an offset finds the patch at that offset. Everything stays trainable; only the start is structured.
    """
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
        image_size=SIZE, patch_size=PATCH, projection_dim=width,
    )  # fmt: skip
    tower = CLIPVisionModel(config)
    head = width // heads
    waves = 2 * math.pi / torch.logspace(math.log10(3.0), math.log10(60.0), head // 4)  # radians a patch
    with torch.no_grad():
        row, col = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
        angles = torch.cat([col.reshape(-1, 1) * waves, row.reshape(-1, 1) * waves], 1)  # [576, head / 2]
        table = torch.zeros(GRID * GRID + 1, width)
        table[1:, :head] = torch.cat([angles.cos(), angles.sin()], 1)
        tower.embeddings.position_embedding.weight.copy_(table)
        tower.embeddings.patch_embedding.weight.normal_(std=0.03)
        tower.embeddings.patch_embedding.weight[:head] *= 0.1
        for layer in tower.encoder.layers:
            layer.self_attn.v_proj.weight.normal_(std=width**-0.5)
            layer.self_attn.q_proj.weight.normal_(std=0.7 * width**-0.5)
            layer.self_attn.k_proj.weight.normal_(std=0.7 * width**-0.5)
            layer.self_attn.out_proj.weight.normal_(std=width**-0.5 / math.sqrt(2))
            layer.mlp.fc1.weight.normal_(std=width**-0.5)
            layer.mlp.fc2.weight.normal_(std=(4 * width) ** -0.5 / math.sqrt(2))
        around = (
            [(-1, 0), (1, 0), (0, -1), (0, 1), (1, 1), (-1, -1)],
            [(-2, 0), (2, 0), (1, -1), (-1, 1), (0, 1), (0, -1)],
        )
        for layer, offsets in zip(tower.encoder.layers, around, strict=False):
            for h, (dx, dy) in enumerate(offsets[:heads]):
                turn = torch.cat([dx * waves, dy * waves])
                rows = slice(h * head, (h + 1) * head)
                query, key = torch.zeros(head, width), torch.zeros(head, width)
                half = head // 2
                index = torch.arange(half)
                query[index, index], query[index, half + index] = turn.cos(), -turn.sin()
                query[half + index, index], query[half + index, half + index] = turn.sin(), turn.cos()
                key[torch.arange(head), torch.arange(head)] = 1.0
                layer.self_attn.q_proj.weight[rows] = 2.0 * query + 0.1 * layer.self_attn.q_proj.weight[rows]
                layer.self_attn.k_proj.weight[rows] = 2.0 * key + 0.1 * layer.self_attn.k_proj.weight[rows]
    return tower


def window_positions(windows: Tensor, side: int) -> Tensor:
    """Position ids [B, 1 + side * side] of square windows whose top left patches are ``windows`` [B, 2] (x, y)."""
    step = torch.arange(side)
    rows = windows[:, 1, None, None] + step[None, :, None]
    cols = windows[:, 0, None, None] + step[None, None, :]
    ids = 1 + (rows * GRID + cols).flatten(1)
    return torch.cat([torch.zeros(len(ids), 1, dtype=ids.dtype), ids], 1)


def run_tower(tower: CLIPVisionModel, pixels: Tensor, positions: Tensor, last: bool = True) -> list[Tensor]:
    """Penultimate hidden state [B, 1 + N, width] of ``pixels`` [B, 3, S, S] with given position ids [B, 1 + N].

    With ``last`` also the final one, of the [CLS] token alone ([B, 1, width]), as nothing reads the final patch states,
    and the state after the second block [B, 1 + N, width].
    """
    emb = tower.embeddings
    x = emb.patch_embedding(pixels).flatten(2).transpose(1, 2)
    x = torch.cat([emb.class_embedding.expand(len(x), 1, -1), x], 1) + emb.position_embedding(positions)
    x = tower.pre_layrnorm(x)
    early = x
    for i, layer in enumerate(tower.encoder.layers[:-1]):
        x = layer(x, None)
        early = x if i == 1 else early
    return [x, _last_cls(tower.encoder.layers[-1], x), early] if last else [x]


def _last_cls(layer: nn.Module, x: Tensor) -> Tensor:
    """What the final block makes of the [CLS] token: its one query against all keys."""
    attn, y = layer.self_attn, layer.layer_norm1(x)
    heads = (attn.num_heads, attn.head_dim)
    q, k, v = attn.q_proj(y[:, :1]), attn.k_proj(y), attn.v_proj(y)
    q, k, v = (t.unflatten(-1, heads).transpose(1, 2) for t in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    cls = x[:, :1] + attn.out_proj(mixed)
    return cls + layer.mlp(layer.layer_norm2(cls))


def to_pixels(images: np.ndarray) -> Tensor:
    """[B, S, S, 3] uint8 -> normalised [B, 3, S, S] float32, as the processor does it."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous()
    return x.mul_(1 / (255 * IMAGE_STD)).sub_(IMAGE_MEAN / IMAGE_STD)


class Heads(nn.Module):
    """The throw-away heads of stage A."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(_PATCH_SPLIT)))
        self.early = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, _MASK * _MASK))
        self.cls = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(_CLS_SPLIT))) for _ in range(2)
        )


def patch_targets(scene: Scene) -> dict[str, np.ndarray]:
    """What each patch (raster order, N of them) shows, from the pixels that each thing owns; -1 means "do not ask"."""
    side, rows = scene.width // PATCH, scene.height // PATCH
    cells = scene.owner.reshape(rows, PATCH, side, PATCH).transpose(0, 2, 1, 3).reshape(rows * side, -1)
    n = len(scene.things)
    shape = np.full(rows * side, len(SHAPES), np.int64)
    colour = np.full(rows * side, len(COLOURS), np.int64)
    best = np.zeros(rows * side, np.int64)
    for i, thing in enumerate(scene.things):
        seen = (cells == i + 1).sum(1)
        take = (seen > best) & (seen >= 10)
        # a sliver shows its colour and not its shape: do not ask a patch for what its neighbourhood must tell too early
        shape[take], colour[take] = SHAPES.index(thing.shape), COLOURS.index(thing.colour)
        best = np.maximum(best, seen)
    sign = np.full((rows * side, SIGN_LENGTH), len(SYMBOLS), np.int64)
    for j, symbol in enumerate(scene.sign or ""):
        sign[(cells == 200 + j).sum(1) >= 56, j] = SYMBOLS.index(symbol)
    centre = np.zeros(rows * side, np.float32)
    for thing in scene.things:
        x, y = thing.centre
        centre[int(y) // PATCH * side + int(x) // PATCH] = 1
    middle = np.zeros((rows * side, 3), np.float32)  # from the patch's centre to its object's, and the object's side
    y0, x0 = np.divmod(np.arange(rows * side), side)
    for i, thing in enumerate(scene.things):
        mine = (cells == i + 1).sum(1) >= 10
        x, y = thing.centre
        middle[mine, 0] = (x / PATCH - x0 - 0.5)[mine]
        middle[mine, 1] = (y / PATCH - y0 - 0.5)[mine]
        middle[mine, 2] = (max(thing.box[2] - thing.box[0], thing.box[3] - thing.box[1]) - 25) / 5
    solid = (cells > 0) & (cells < 200)
    half = PATCH // _MASK
    mask = solid.reshape(-1, _MASK, half, _MASK, half).mean((2, 4), dtype=np.float32).reshape(rows * side, -1)
    text = [SYMBOLS.index(s) for s in scene.sign] if scene.sign else [len(SYMBOLS)] * SIGN_LENGTH
    combos = np.zeros(_N_COMBOS, np.float32)
    for t in scene.things:
        combos[SHAPES.index(t.shape) * len(COLOURS) + COLOURS.index(t.colour)] = 1
    return {
        "shape": shape, "colour": colour, "sign": sign, "centre": centre, "combos": combos, "n": np.array(n),
        "middle": middle, "mask": mask, "text": np.array(text), "pattern": np.array(PATTERNS.index(scene.pattern)),
    }  # fmt: skip


def vision_losses(
    heads: Heads, states: list[Tensor], positions: Tensor, target: dict[str, Tensor], shape_weight: float = 1.0
) -> tuple[Tensor, dict[str, float]]:
    """Sum of all stage-A losses, and accuracies for the log; ``states`` as `run_tower` gives them."""
    shape_l, colour_l, sign_l, centre_l, place_l, middle_l, local_l = heads.patch(states[0][:, 1:]).split(
        _PATCH_SPLIT, -1
    )
    sign_l = sign_l.unflatten(-1, (SIGN_LENGTH, _N_SYMBOLS))
    shape, colour, sign = target["shape"], target["colour"], target["sign"]
    loss = shape_weight * _balanced(shape_l, shape, len(SHAPES)) + _balanced(colour_l, colour, len(COLOURS))
    loss = loss + 1.5 * _balanced(sign_l, sign, len(SYMBOLS))
    loss = loss + F.binary_cross_entropy_with_logits(
        centre_l.squeeze(-1), target["centre"], pos_weight=torch.tensor(5.0)
    )
    ids = positions[:, 1:] - 1
    place = torch.stack([ids % GRID, ids // GRID], -1).float() / GRID * 2 - 1
    loss = loss + F.smooth_l1_loss(place_l * (GRID / 2), place * (GRID / 2))  # in patches
    on_thing = (shape != len(SHAPES)).float()
    off = F.smooth_l1_loss(middle_l, target["middle"], reduction="none").mean(-1)
    loss = loss + 2 * (off * on_thing).sum() / on_thing.sum().clamp(min=1)
    wide = target["pattern"][:, None].expand(-1, local_l.shape[1])
    loss = loss + 0.5 * F.cross_entropy(local_l.flatten(0, 1), wide.flatten())
    log = {}
    if len(states) == 3:
        mask_l = heads.early(states[2][:, 1:])
        mask = F.binary_cross_entropy_with_logits(mask_l, target["mask"], reduction="none").mean(-1)
        weight = 0.1 + target["mask"].amax(-1).gt(0).float()
        mask = (mask * weight).sum() / weight.sum()
        loss = loss + 4 * mask
        log["mask"] = mask.item()
    with torch.no_grad():
        for name, logits, truth, none in (
            ("shape", shape_l, shape, len(SHAPES)),
            ("colour", colour_l, colour, len(COLOURS)),
            ("sign", sign_l, sign, len(SYMBOLS)),
        ):
            fore = truth != none
            log[name] = (logits.argmax(-1)[fore] == truth[fore]).float().mean().item()
        log["place"] = (place_l - place).abs().mean().item() * GRID / 2
        log["pattern"] = (local_l.argmax(-1) == wide).float().mean().item()
    for i, state in enumerate(states[:2]):
        combos_l, text_l, pattern_l, _, _ = heads.cls[i](state[:, 0]).split(_CLS_SPLIT, -1)
        text_l = text_l.unflatten(-1, (SIGN_LENGTH, _N_SYMBOLS))
        loss = loss + F.binary_cross_entropy_with_logits(combos_l, target["combos"], pos_weight=torch.tensor(3.0)) * 4
        loss = loss + F.cross_entropy(text_l.flatten(0, 1), target["text"].flatten()) * 0.5
        loss = loss + F.cross_entropy(pattern_l, target["pattern"]) * 0.5
        with torch.no_grad():
            name = ("penultimate", "last")[i]
            hit, truth = combos_l > 0, target["combos"] > 0
            log[f"{name}_f1"] = (2 * (hit & truth).sum() / (hit.sum() + truth.sum()).clamp(min=1)).item()
            log[f"{name}_text"] = (text_l.argmax(-1) == target["text"]).float().mean().item()
            log[f"{name}_pattern"] = (pattern_l.argmax(-1) == target["pattern"]).float().mean().item()
    return loss, log


def easy_losses(heads: Heads, states: list[Tensor], shape: Tensor, colour: Tensor) -> Tensor:
    """The [CLS] losses of easy-VQA images [B], which have one shape, one colour and no patch labels."""
    loss = states[0].new_zeros(())
    for i, state in enumerate(states[:2]):
        parts = heads.cls[i](state[:, 0]).split(_CLS_SPLIT, -1)
        for logits, truth in ((parts[3], shape), (parts[4], colour)):
            # a plain mean would be NaN where no image of the batch has the label
            loss = loss + F.cross_entropy(logits, truth, reduction="sum") / len(truth)
    return loss


def _balanced(logits: Tensor, target: Tensor, none: int) -> Tensor:
    """Cross entropy with foreground patches weighing about as much as the many background ones."""
    losses = F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none")
    fore = (target.flatten() != none).float()
    return (losses * fore).sum() / fore.sum().clamp(min=1) + 0.5 * (losses * (1 - fore)).mean()
