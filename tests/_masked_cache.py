"""How many keys each layer of a pruned model must hold."""

from __future__ import annotations

from typing import Any


def check_cache(run: dict[str, Any]) -> None:
    """Each layer that has keys holds as many as its longest row has tokens left (one more where rows end in padding),
    or the last ones that fit its window."""
    longest = list(run["attended"].sum(1).tolist())
    tails = [int(not bool(mask[-1])) for mask in run["full_mask"]]
    layout = run["layout"]

    def held(rows: list[int]) -> int:
        return max(row + tail for row, tail in zip(rows, tails))

    lengths = {0: run["fed"].shape[1]}
    counts, before = [span.num_tokens for span in layout.spans], [None] * len(layout.spans)
    for site, kept in run["cuts"]:
        now = [span.num_tokens if tokens is None else len(tokens) for span, tokens in zip(layout.spans, kept)]
        if site.startswith("layer"):
            for i, span in enumerate(layout.spans):
                was = span.visual.length if before[i] is None else counts[i]
                longest[span.sample] -= was - (span.visual.length if kept[i] is None else now[i])
            lengths[int(site.partition(":")[2])] = held(longest)
        counts, before = now, kept
    with_keys = {i: own for i, own in enumerate(run["cache"].layers) if getattr(own, "keys", None) is not None}
    for layer, cached in with_keys.items():
        first = max(begin for begin in lengths if begin <= layer)
        window = cached.sliding_window - 1 if cached.is_sliding else lengths[first]
        assert cached.keys.shape[2] == min(lengths[first], window), f"layer {layer}"
    assert with_keys
