"""Stage P: image tokens are brought into the space of the words before the decoder learns anything.

A decoder of this size, started at random, needs most of its training to discover that a word can be looked up in the
picture. So the projector is first trained alone: the embedding of a patch shall be the sum of the embeddings of the
words that describe it (its colour, its shape, the sign's symbols, the background's pattern) and a code of its place.
And the decoder starts with heads that compare like with like, or look at the previous token, and pass on what they
find. Everything stays trainable; only the start is structured.
"""

from __future__ import annotations

# layers of transformers models are untyped modules to pyright, and the recipe handles nothing else
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
import math

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from tokenprune.evals.pocket.questions import PLURALS
from tokenprune.evals.pocket.scenes import COLOURS, PATTERNS, SHAPES, SIGN_LENGTH, SYMBOLS
from tokenprune.evals.pocket_training.packing import tokenizer
from tokenprune.evals.pocket_training.vision import GRID

_CONSTANT = 4.0  # dimension 0 of every word's embedding, which the previous-token heads read; 0 in image tokens
_WORDS = slice(1, 64)  # dimensions that hold words at the start
_COLUMN, _ROW, _CENTRE = slice(64, 72), slice(72, 80), 80  # and the place of a patch
_TURNING = 5  # rotary pairs that turn fast enough to tell one token from the next
_SCENE_WORDS = [*SHAPES, *COLOURS, *PATTERNS, "sign", "background"]


def structured_start(model: LlavaForConditionalGeneration) -> None:
    """Set the decoder's starting weights; see the module's docstring."""
    core, config = model.model.language_model, model.config.text_config
    width, kv = config.hidden_size, config.num_key_value_heads
    head = width // config.num_attention_heads
    group, half = config.num_attention_heads // kv, head // 2
    turns = 1e6 ** (-torch.arange(half) / half)  # radians a token
    # rotary pairs that barely turn; the last one tells words from image tokens
    still = torch.cat([torch.arange(half // 2, half - 1), torch.arange(half + half // 2, head)])
    with torch.no_grad():
        _start_words(model)
        names = ["\u0120" + name for name in SHAPES]
        named = core.embed_tokens.weight[tokenizer().convert_tokens_to_ids(names)].sum(0)
        named[0] = 0
        for depth, layer in enumerate(core.layers):
            attn = layer.self_attn
            q, k = attn.q_proj.weight.view(-1, head, width), attn.k_proj.weight.view(kv, head, width)
            v, o = attn.v_proj.weight.view(kv, head, width), attn.o_proj.weight.view(width, -1, head)
            layer.mlp.down_proj.weight *= 0.3
            o *= 0.3
            if depth > 4:
                continue
            # What a head finds it passes on as it is. First a word gathers the word before it; from the second layer
            # on, such pairs are looked up in the picture, and what is found there and where is added to the word.
            for g in range(kv):
                v[g] = 0
                v[g, torch.arange(head), torch.arange(head) + g * head] = 1.0
                v[g, :, 0] = 0
                for h in range(g * group, (g + 1) * group):
                    strong = h == 1 if depth == 0 else h % group == 0 if depth < 3 else True
                    o[:, h] *= 0.3
                    if strong:
                        o[:, h] = 0.5 * v[g].T
            q *= 0.3
            k *= 0.3
            for g in range(kv):
                k[g] = 0
                k[g, still, _WORDS] = 0.95 * torch.randn(len(still), 63) * 63**-0.5
                q[g * group] = k[g]  # compares like with like, at any distance
                k[g, half - 1, 0], q[g * group, half - 1, 0] = -2.0, 1.5  # and prefers image tokens to words
            if depth >= 3:
                # the other heads read what was added to the words of the question that name things
                for g in range(kv):
                    q[g * group + 1] = 0
                    q[g * group + 1, :, 0] = 0.8 * k[g] @ named
                    q[g * group + 1, half - 1, 0] = -3.0
                continue
            k[0, :_TURNING, 0] = 0.8
            q[1] = 0
            q[1, :_TURNING, 0] = 0.8 * turns[:_TURNING].cos()
            q[1, half : half + _TURNING, 0] = -0.8 * turns[:_TURNING].sin()


def _start_words(model: LlavaForConditionalGeneration) -> None:
    """Word embeddings: orthogonal for the words that describe scenes, and a plural like its singular."""
    words, ids = model.get_input_embeddings().weight, tokenizer().convert_tokens_to_ids
    words.zero_()
    words[:, _WORDS] = torch.randn(len(words), 63)
    first = ids(["\u0120" + word for word in _SCENE_WORDS] + list(SYMBOLS))
    naming = 63**0.5 * torch.linalg.qr(torch.randn(63, 63)).Q
    words[first, _WORDS] = naming[: len(first)]
    # words that name nothing must not look like names to the heads that read names
    others = torch.ones(len(words), dtype=torch.bool)
    others[first] = False
    names = naming[: len(SHAPES)].sum(0)
    words[others, _WORDS] -= (words[others, _WORDS] @ names)[:, None] * names / names.square().sum()
    for shape, plural in PLURALS.items():
        words[ids("\u0120" + plural), _WORDS] = words[ids("\u0120" + shape), _WORDS] + 0.2 * torch.randn(63)
    model.lm_head.weight.copy_(0.03 * words)
    words[:, 0] = _CONSTANT


def start_ground(weight: Tensor) -> None:
    """Let a head [50, width] on normalised hidden states read columns and rows off the code of `PatchWords`."""
    half = len(weight) // 2
    with torch.no_grad():
        weight *= 0.1
        weight[:GRID, _COLUMN] = 10 * _circle()
        weight[half : half + GRID, _ROW] = 10 * _circle()


def _circle() -> Tensor:
    """[24, 8]: a code of the numbers 0 to 23 by four periods, in which near numbers are near."""
    at = torch.arange(GRID)[:, None] * (2 * math.pi / torch.tensor([96.0, 48.0, 32.0, 24.0]))
    return torch.cat([at.cos(), at.sin()], 1)


class PatchWords:
    """The embedding that a patch shall get: the words for what it shows, and a fixed code of where it is."""

    def __init__(self, model: LlavaForConditionalGeneration, seed: int = 0) -> None:
        words = model.get_input_embeddings().weight.detach().clone()
        words[:, 0] = 0
        ids = tokenizer().convert_tokens_to_ids
        none = torch.zeros(1, words.shape[1])

        def table(names: list[str]) -> Tensor:
            return torch.cat([words[ids(names)], none])

        generator = torch.Generator().manual_seed(seed)
        self.shape, self.colour = table(["\u0120" + n for n in SHAPES]), table(["\u0120" + n for n in COLOURS])
        self.pattern = table(["\u0120" + n for n in PATTERNS])
        self.sign, self.background = words[ids("\u0120sign")], words[ids("\u0120background")]
        # a symbol's place in the sign is told by a rotation of its embedding
        self.symbols = []
        for _ in range(SIGN_LENGTH):
            symbol = table(list(SYMBOLS))
            turn = torch.linalg.qr(torch.randn(63, 63, generator=generator)).Q
            symbol[:, _WORDS] = symbol[:, _WORDS] @ turn
            self.symbols.append(symbol)
        self.weight = torch.ones(words.shape[1])
        self.weight[_COLUMN] = self.weight[_ROW] = 5.0
        self.column, self.row = torch.zeros(GRID, words.shape[1]), torch.zeros(GRID, words.shape[1])
        self.column[:, _COLUMN], self.row[:, _ROW] = _circle(), _circle()

    def __call__(self, target: dict[str, Tensor], positions: Tensor) -> Tensor:
        """Targets of `vision.patch_targets` stacked over B, tower position ids [B, 1 + N] -> [B, N, width]."""
        ids = positions[:, 1:] - 1
        out = self.shape[target["shape"]] + self.colour[target["colour"]]
        for j, symbol in enumerate(self.symbols):
            out = out + symbol[target["sign"][..., j]]
        signed = (target["sign"] != len(SYMBOLS)).any(-1, keepdim=True)
        empty = ~signed & (target["shape"] == len(SHAPES))[..., None]
        out = out + signed * self.sign
        out = out + empty * (0.5 * self.background + 0.5 * self.pattern[target["pattern"]][:, None])
        out = out + self.column[ids % GRID] + self.row[ids // GRID]
        out[..., _CENTRE] = 2 * target["centre"]
        return out


class SignWords:
    """Later targets for the sign's patches alone: its symbols as plain words, beside a marker of their place.

    The rotations of `PatchWords` proved too hard to undo. A marker can be asked for, and what is found can be spelled
    as it is. The first marker is the space that an answer begins with, so that token looks up the first symbol.
    """

    def __init__(self, model: LlavaForConditionalGeneration, seed: int = 1) -> None:
        words, ids = model.get_input_embeddings().weight.detach(), tokenizer().convert_tokens_to_ids
        generator = torch.Generator().manual_seed(seed)
        self.symbols = torch.cat([words[ids(list(SYMBOLS)), _WORDS], torch.zeros(1, 63)])
        self.sign = words[ids("\u0120sign"), _WORDS]
        self.markers = torch.randn(SIGN_LENGTH, 63, generator=generator)
        self.markers[0] = words[ids("\u0120"), _WORDS]
        with torch.no_grad():
            # what the output layer had learnt about symbols was that it cannot tell them
            model.lm_head.weight[ids(list(SYMBOLS)), _WORDS] += 0.05 * self.symbols[:-1]

    def __call__(self, present: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Embeddings now [B, N, width], targets -> embeddings wanted, and a mask [B, N] of the sign's patches."""
        there = target["sign"] != len(SYMBOLS)  # [B, N, 3]
        wanted = self.sign + self.symbols[target["sign"]].sum(-2) + there.float() @ self.markers
        out, signed = present.clone(), there.any(-1)
        out[..., _WORDS] = torch.where(signed[..., None], 1.2 * wanted, present[..., _WORDS])
        return out, signed
