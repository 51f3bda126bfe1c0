"""What a method may ask for, by name, before the forward pass runs.

A signal is recorded while the model runs anyway; only the layers that were asked for are recorded, and never a full
attention matrix. Methods name signals; adapters know how to record them.
"""

from __future__ import annotations

from dataclasses import dataclass

CLS_ATTENTION = "cls_attention"
"""Attention of the vision tower's [CLS] query to each patch in one block: softmax over [CLS] and patches in fp32, mean
over heads, the [CLS] column dropped and the rest not renormalised. `[M, N]`."""

MEAN_QUERY_ATTENTION = "mean_query_attention"
"""Attention of the mean of all patch queries of an image to each of its patches, as above. Where the tower merges
patches into tokens, their mean. `[M, N]`."""

CLS_WIDE_ATTENTION = "cls_wide_attention"
"""As `CLS_ATTENTION`, with all heads taken as one: products over the tower's whole width, over its square root.
`[M, N]`."""

CLS_VALUE_SIMILARITY = "cls_value_similarity"
"""Softmax over [CLS] and patches of the unscaled product of [CLS]'s value vector with each value vector, mean over
heads, the [CLS] column dropped. `[M, N]`."""

VALUE_NORM = "value_norm"
"""L1 norm of each patch's value vector, averaged over heads before the norm. `[M, N]`."""

CLS_PATCH_ATTENTION = "cls_patch_attention"
"""As `CLS_ATTENTION`, with the softmax over the patches alone: each head's row sums to 1 over them. `[M, N]`."""

CLS_PATCH_SIMILARITY = "cls_patch_similarity"
"""As `CLS_VALUE_SIMILARITY`, with the product over the square root of a head's width and the softmax over the patches
alone. `[M, N]`."""

MEAN_VALUE_SIMILARITY = "mean_value_similarity"
"""The same with the mean value vector of all patches of an image in place of [CLS]'s, on any tower. `[M, N]`."""

PATCH_SIGNALS = (CLS_PATCH_ATTENTION, CLS_PATCH_SIMILARITY, MEAN_VALUE_SIMILARITY)
"""Those that read no [CLS] key."""

SINK_ATTENTION = "sink_attention"
"""Mean of the attention rows of the patches that receive much: those whose column mean is above t times the mean over
all columns, or the one with the largest if there is none. Attention as above, rows and columns of patches only. The
setting is t. `[M, N]`."""

SINK_ATTENTION_SUM = "sink_attention_sum"
"""The sum of those rows in place of their mean. `[M, N]`."""

GREY_ENTROPY = "grey_entropy"
"""Softmax over a picture's patches of the entropy of their grey levels (256 bins), mean over the patches of a token. Of
the pixels, not of a block (layer 0). The settings are the base of the logarithm and the mean and standard deviation of
red, green and blue with which the pixels were normalised (0..1 before). `[M, N]`."""

PIXEL_SIGNALS = (GREY_ENTROPY,)

TOWER_STATES = "tower_states"
"""Hidden states behind one block of the tower, as the block leaves them, mean over the patches of a token.
`[M, N, C]`, C the tower's width."""

TOWER_KEYS = "tower_keys"
"""Key vectors of the patches in one block as its attention multiplies them (behind norms, and behind the rotation where
the tower rotates), heads side by side, mean over the patches of a token. `[M, N, H d]`."""

ATTENTION_BY_HEAD = "attention_by_head"
"""`CLS_ATTENTION` of each head, and on a tower without [CLS] the attention that a patch gets from all patches of its
picture, by head. `[M, N, H]`."""

VECTOR_SIGNALS = (TOWER_STATES, TOWER_KEYS, ATTENTION_BY_HEAD)
"""Those with a vector for each token. They are fp32, as all others."""

VISION_SIGNALS = (
    CLS_ATTENTION,
    CLS_WIDE_ATTENTION,
    MEAN_QUERY_ATTENTION,
    CLS_VALUE_SIMILARITY,
    VALUE_NORM,
    *PATCH_SIGNALS,
    SINK_ATTENTION,
    SINK_ATTENTION_SUM,
    GREY_ENTROPY,
    *VECTOR_SIGNALS,
)

INSTRUCTION_EMBEDDING = "instruction_embedding"
"""Mean of the embeddings of a prompt's text after its last visual token, as the decoder is given them; of the text
before, where none follows. At "input" only. `[M, D]`, the same for all images of a prompt; ask for layer 0."""

PROMPT_SIGNALS = (INSTRUCTION_EMBEDDING,)

LAST_ATTENTION = "last_attention"
"""Attention of a prompt's last token to each visual token in one decoder layer: softmax over all tokens that it sees,
in fp32, mean over heads. At "layer:K", layer K - 1 is read as it ran and layer K is tried on what would enter it; at
"input", layer 0 is tried.
`[M, N]`."""

TEXT_TO_VISUAL = "text_to_visual"
"""Share of the attention of a prompt's text tokens after its first visual token that goes to its visual tokens, in one
decoder layer, mean over heads; its last token is taken where there is no such text. `[M]`, the same for all images of
a prompt."""

VISUAL_TO_TEXT = "visual_to_text"
"""Share of the attention of a prompt's visual tokens that goes to text between or after its visual tokens, in one
decoder layer, mean over heads; zero where all that text follows the visual tokens. `[M]`."""

INSTRUCTION_ATTENTION = "instruction_attention"
"""Attention of the text after a prompt's last visual token to each visual token in one decoder layer: softmax over all
tokens that a row sees, in fp32, mean over heads and then over those rows. The prompt's last token is taken where no
text follows. Layers as for `LAST_ATTENTION`. `[M, N]`."""

LAST_VISUAL_ATTENTION = "last_visual_attention"
"""Attention of a prompt's last token to the tokens of one visual in one decoder layer: softmax over those tokens alone,
in fp32, mean over heads. Layers as for `LAST_ATTENTION`. `[M, N]`."""

LAST_VALUE_SIMILARITY = "last_value_similarity"
"""The same between value vectors: that of the last token with those of the visual's tokens, over the square root of a
head's width. `[M, N]`."""

DECODER_VALUE_NORM = "decoder_value_norm"
"""L1 norm of each visual token's value vector in one decoder layer, averaged over heads before the norm. Layers as for
`LAST_ATTENTION`. `[M, N]`."""

DECODER_KEY_NORM = "decoder_key_norm"
"""L1 norm of each visual token's key after rotation, over all heads, in one decoder layer. Layers as for
`LAST_ATTENTION`. `[M, N]`."""

FINAL_STATES = "final_states"
"""What enters one decoder layer, as the norm behind the decoder's last layer makes it. Layers as for `LAST_ATTENTION`.
`[M, N, D]`."""

TEXT_PIVOT_COSINE = "text_pivot_cosine"
"""Cosine, after that norm, of what enters layer K at each visual token with the same at some tokens of the text behind
the prompt's last visual token: those with the largest L1 norm of the key in layer K - 1, in falling order, the earlier
of equals first. Where there are fewer, they come again in turn; where no text follows, the last token is taken.
At "layer:K" only, of layer K, from a stage that asks for `DECODER_KEY_NORM` of layer K - 1 too; the setting is how
many. `[M, N, P]`."""

RATER_ATTENTION = "rater_attention"
"""Attention of a prompt's text raters to each visual token in one decoder layer, as `INSTRUCTION_ATTENTION` with the
raters for rows, each head's divided by what rotation alone makes of it: the product of vectors of ones, rotated to both
places, over the square root of a head's width. Mean over the raters and over the heads that have most of it for the
visual's tokens; the settings are how many heads, 0 for 14 or half of fewer than 28 and -1 for all, and whether to
divide (1 or 0). Raters are those tokens of the text
behind the prompt's last visual token that get more than the mean, over the visual's tokens, of a softmax over that text
of products between what enters layer 0; all of that text where none does. At "layer:K", of layer K - 1. `[M, N]`."""

VISUAL_MAX_ATTENTION = "visual_max_attention"
"""Attention of a visual's tokens to each of them in one decoder layer: softmax over all tokens that a row sees, in
fp32, the largest over heads, mean over those rows. At "layer:K", of layer K - 1. `[M, N]`."""

TEXT_MAX_ATTENTION = "text_max_attention"
"""The same with the text behind the prompt's last visual token for rows, and their sum; its last token, where none
follows. `[M, N]`."""

MAX_SIGNALS = (VISUAL_MAX_ATTENTION, TEXT_MAX_ATTENTION)

BRANCH_LOGITS = "branch_logits"
"""Products of a prompt's last token with each visual token at the end of a branch of decoder layers that were trained
to find regions: what enters layer K goes through all of them but the last, of which queries and keys alone are taken,
over the square root of a head's width, mean over heads, no softmax. At "layer:K" only. The source is the folder of the
branch's weights, or `OWN_LAYERS`; the setting is how many layers it has. `[M, N]`."""

OWN_LAYERS = "own"
"""The source of a branch that is the model's own layers from K on, untrained."""

DECODER_SIGNALS = (
    LAST_ATTENTION,
    TEXT_TO_VISUAL,
    VISUAL_TO_TEXT,
    INSTRUCTION_ATTENTION,
    LAST_VISUAL_ATTENTION,
    LAST_VALUE_SIMILARITY,
    DECODER_VALUE_NORM,
    DECODER_KEY_NORM,
    FINAL_STATES,
    TEXT_PIVOT_COSINE,
    RATER_ATTENTION,
    *MAX_SIGNALS,
    BRANCH_LOGITS,
)

ATTENTION_GAIN = "attention_gain"
"""Length of what the attention branch of one decoder layer makes of a token, over the length of what enters it after
its norm; the residual counts in neither. At "layer:K" any layer before K. `[M, N]`."""

ATTENTION_COSINE = "attention_cosine"
"""Cosine between the same two vectors. `[M, N]`."""

ATTENTION_TURN = "attention_turn"
"""Softmax of 1 - `ATTENTION_COSINE` over all tokens of the prompt in this call, text included and padding not. They are
the tokens that the layer saw: cuts after it do not change the values. `[M, N]`."""

MLP_GAIN = "mlp_gain"
"""As `ATTENTION_GAIN`, of the MLP branch. `[M, N]`."""

MLP_COSINE = "mlp_cosine"
"""As `ATTENTION_COSINE`, of the MLP branch. `[M, N]`."""

MLP_TURN = "mlp_turn"
"""As `ATTENTION_TURN`, of the MLP branch. `[M, N]`."""

TRANSITION_SIGNALS = (ATTENTION_GAIN, ATTENTION_COSINE, ATTENTION_TURN, MLP_GAIN, MLP_COSINE, MLP_TURN)


@dataclass(frozen=True)
class Signal:
    """A request: the signal called `name`, of vision block or decoder layer `layer` (0-based); `settings` are numbers
    that some signals are computed with, `source` a folder of weights that some are."""

    name: str
    layer: int
    settings: tuple[float, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class TowerInfo:
    """What a method may know of the vision tower.

    Attributes:
        num_layers: transformer blocks.
        feature_layer: 0-based block whose output becomes the visual tokens (LLaVA-1.5: 22 of 0..23).
        has_cls: whether it has a [CLS] token.
        num_heads: attention heads a block.
        hidden_size: width.
        pixel_mean, pixel_std: of red, green and blue, what the family's published processors normalise pixels (0..1)
            with. A model does not know its processor, so methods that read pixels take others as options.
    """

    num_layers: int
    feature_layer: int
    has_cls: bool
    num_heads: int
    hidden_size: int
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)


def summary_attention(tower: TowerInfo, layer: int) -> Signal:
    """Which patches a block of the tower finds important: [CLS] attention, and on a tower without [CLS] the attention
    that each patch gets from all patches of its picture (the mean of all rows)."""
    return Signal(CLS_ATTENTION, layer) if tower.has_cls else Signal(SINK_ATTENTION, layer, (0.0,))
