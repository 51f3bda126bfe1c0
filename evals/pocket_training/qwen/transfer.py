"""The decoder of pocket-qwen starts as pocket-llava's, behind one new layer that writes each visual token's place.

pocket-llava's tokens bring their place from the tower's position table. A Qwen2.5-VL tower has none, only M-RoPE in the
decoder tells places. So the new first layer starts with four heads in which a visual token weighs the prompt's second
token against the marker before the picture, by its own row or column; the weight is a code of that row or column. Words
look at the first token there, which tells them nothing.
"""

from __future__ import annotations

# layers of transformers models are untyped modules to pyright, and the recipe handles nothing else
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
import math

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, Qwen2_5_VLForConditionalGeneration

from tokenprune.evals.pocket.scenes import PATCH, SPLIT_SEED, make_scene
from tokenprune.evals.pocket_training.packing import tokenizer as llava_tokenizer
from tokenprune.evals.pocket_training.qwen.model import END, IMAGE, START, TEACHER_DIR, VIDEO, build_tokenizer
from tokenprune.evals.pocket_training.vision import GRID, run_tower, to_pixels

FIRST = 3  # tokens before the picture: <s>, "USER:" and the marker
_BACK = FIRST - 1  # from the first row or column to "USER:"
_LIKE = {START: "\u0120", END: "\u010a", IMAGE: "<image>", VIDEO: "<image>", "\u0120up": "\u0120above",
         "\u0120down": "\u0120below", "up": "above", "down": "below"}  # fmt: skip
# by head: rotary pair, amplitude and phase of the score of the first token; two heads a group, columns then rows
_HEADS = ((6, 2.5, 0.0), (6, 5.0, 0.9), (5, 2.5, 0.0), (5, 5.0, -0.84))


def load_teacher() -> LlavaForConditionalGeneration:
    """pocket-llava, frozen."""
    return LlavaForConditionalGeneration.from_pretrained(TEACHER_DIR, dtype="float32").eval().requires_grad_(False)


def rows_and_columns(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Row and column [rows * cols] of each visual token."""
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    return row.flatten(), col.flatten()


def teacher_tokens(teacher: LlavaForConditionalGeneration, images) -> Tensor:
    """What pocket-llava makes of pictures [B, H, W, 3] at the top left of its table -> [B, rows * cols, width]."""
    rows, cols = images.shape[1] // PATCH, images.shape[2] // PATCH
    row, col = rows_and_columns(rows, cols)
    ids = torch.cat([torch.zeros(1, dtype=torch.long), 1 + row * GRID + col]).expand(len(images), -1)
    states = run_tower(teacher.model.vision_tower, to_pixels(images), ids, last=False)[0]
    return teacher.model.multi_modal_projector(states[:, 1:])


def token_map() -> Tensor:
    """[len(qwen's tokenizer)]: the token of pocket-llava that each token starts as, -1 for those that it never had."""
    old, new = llava_tokenizer().get_vocab(), build_tokenizer().get_vocab()
    table = torch.full((len(new),), -1)
    for name, index in new.items():
        table[index] = old.get(_LIKE.get(name, name), -1)
    return table


def transfer(
    model: Qwen2_5_VLForConditionalGeneration, teacher: LlavaForConditionalGeneration, scenes: int = 48
) -> None:
    """Copy the decoder and the words; set up the new first layer, from so many validation scenes."""
    core, old = model.model.language_model, teacher.model.language_model
    table = token_map()
    known = table >= 0
    with torch.no_grad():
        for new_rows, old_rows in ((core.embed_tokens, old.embed_tokens), (model.lm_head, teacher.lm_head)):
            used = old_rows.weight[: len(llava_tokenizer())]
            new_rows.weight.copy_(used.mean(0) + used.std(0) * torch.randn(new_rows.weight.shape))
            new_rows.weight[: len(table)][known] = old_rows.weight[table[known]]
        for name in ("\u0120up", "\u0120down", START):
            row = build_tokenizer().convert_tokens_to_ids(name)
            core.embed_tokens.weight[row] += 0.3 * core.embed_tokens.weight.std() * torch.randn(core.config.hidden_size)
        for layer, source in zip(core.layers[1:], old.layers, strict=True):
            missing = layer.load_state_dict(source.state_dict(), strict=False).missing_keys
            for name in missing:  # the biases of queries, keys and values
                layer.get_parameter(name).zero_()
        core.norm.load_state_dict(old.norm.state_dict())
    place_layer(model, teacher, scenes)


@torch.no_grad()
def place_layer(model: Qwen2_5_VLForConditionalGeneration, teacher: LlavaForConditionalGeneration, scenes: int) -> None:
    """Start the first layer as the module's docstring says; to words it adds next to nothing."""
    core = model.model.language_model
    layer, config = core.layers[0], core.config
    attn, head = layer.self_attn, config.hidden_size // config.num_attention_heads
    half, group = head // 2, config.num_attention_heads // config.num_key_value_heads
    drawn = [make_scene(SPLIT_SEED["val"] + 900_000 + i, GRID * PATCH, (5, 9)) for i in range(scenes)]
    tokens = torch.cat([teacher_tokens(teacher, s.image[None]) for s in drawn])
    empty = torch.stack([torch.from_numpy(s.owner).unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH) for s in drawn])
    empty = (empty.flatten(3) == 0).all(-1).flatten(1)[..., None]
    code = (tokens * empty).sum(0) / empty.sum(0).clamp(min=1)  # [576, width]: what pocket-llava says of an empty place

    def unit(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    ids = build_tokenizer().convert_tokens_to_ids
    words = unit(core.embed_tokens.weight[: len(build_tokenizer())])
    ends = words[ids(["USER:", START, "<s>"])]
    others = torch.ones(len(words), dtype=torch.bool)
    others[ids(["<s>", "USER:", START, END, IMAGE, VIDEO, "<pad>"])] = False
    rest = torch.cat([words[others], unit(tokens[:, ::7].flatten(0, 1))])
    inverse = torch.linalg.inv(rest.T @ rest / len(rest) + 1e-3 * torch.eye(rest.shape[1]))
    # readers [3, width]: 1 on its own token and 0 on the other two, small on everything else
    readers = torch.linalg.solve(ends @ inverse @ ends.T, ends @ inverse)
    constant = words[others][:, 0].mean()

    for module in (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj):
        module.weight.normal_(std=0.02)
        if module.bias is not None:
            module.bias.zero_()
    q, k = attn.q_proj.weight.view(-1, head, config.hidden_size), attn.k_proj.weight.view(-1, head, config.hidden_size)
    v, bias = attn.v_proj.weight.view(-1, head, config.hidden_size), attn.q_proj.bias.view(-1, head)
    q *= 0.2
    k *= 0.2
    v *= 0.2
    size = math.sqrt(head)
    for g in range(config.num_key_value_heads):
        # the last pairs hardly turn: what is compared there has the same score at any distance
        k[g, half - 1], k[g, half - 2] = 12 * readers[:2].sum(0), 12 * readers[2]
        k[g, _HEADS[g * group][0]] = size * readers[0]
        v[g, 0] = readers[0]
    for h, (pair, amplitude, phase) in enumerate(_HEADS):
        bias[h, half - 1] = size
        bias[h, pair], bias[h, half + pair] = amplitude * math.cos(phase), amplitude * math.sin(phase)
        q[h, :, 0] = -bias[h] / constant
        q[h, half - 2, 0] = size / constant
    row, col = rows_and_columns(GRID, GRID)
    turns = 1e6 ** (-torch.arange(half) / half)
    weights = [
        torch.sigmoid(a * torch.cos(turns[p] * (_BACK + (col if h < group else row)) + f))
        for h, (p, a, f) in enumerate(_HEADS)
    ]
    features = torch.stack([*weights, torch.ones(GRID * GRID)], 1)
    found = torch.linalg.lstsq(features, code).solution  # [5, width]
    for h in range(len(_HEADS)):
        attn.o_proj.weight[:, h * head] = found[h]
    model.model.visual.merger.mlp[-1].bias.copy_(found[-1])
    width, inner = config.hidden_size, config.intermediate_size
    layer.mlp.gate_proj.weight.normal_(std=width**-0.5)
    layer.mlp.up_proj.weight.normal_(std=width**-0.5)
    layer.mlp.down_proj.weight.normal_(std=0.02 * inner**-0.5)
