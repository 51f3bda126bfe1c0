"""What the page says below each part."""

FOOT = {
    "dominance": (
        "MDI: attention per text token over attention per image token, by sample and layer, then the mean over "
        "samples and the layers of a stage; all text of the prompt counts, attention to generated tokens does "
        "not. MDI falls by itself where image tokens leave and their attention does not fall alike, and the first "
        "token alone may take most of the attention: compare the question's own, and read both beside accuracy. "
        "Rows that write the answer predict its tokens (ours); rows of the answer's tokens are the published "
        "choice, and of an answer of one word they say how the end is predicted."
    ),
    "image": (
        "Mean over heads, rows and samples. Rollout: half of the attention, averaged over heads, and half of the "
        "residual, multiplied up from the first layer; what is shown is the share of the state that comes from "
        "image tokens after each layer. It knows attention alone: no values, no MLP."
    ),
    "heads": (
        "Layers down, heads across; framed are the visual heads, the top 5 percent by score (at least one). "
        "Concentration is 1 minus the entropy over the image, in shares of the largest possible; image tokens "
        "that more than half of the heads of layer 2 attend ten times the mean are left out of it. The score is a "
        "reconstruction. Attention is no proof of use: only ablation is."
    ),
    "lookback": (
        "The share of each head's attention that goes to the image, mean over all rows of an answer. Layers down, "
        "heads across."
    ),
    "sinks": (
        "Attention of the text behind the picture, of the prompt. Attended over ten times the mean: in more than "
        "half of the heads of a layer (our extension of the guard of the visual heads to all layers)."
    ),
    "flow": (
        "Layers down. Where the attention of the rows of a kind goes, mean over rows, heads and samples; first is "
        "the first token of the prompt, template what the prompt has with an empty question too."
    ),
    "pictures": (
        "Attention of the last row of the prompt, mean over heads, on the image tokens that are there in a layer; "
        "the strongest cell of each map is full, opacity goes with the root."
    ),
}
