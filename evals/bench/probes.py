r"""What is tried at `apply` of a decoder, and at the first picture of a tower, of a class that has no file of its own,
in time and against the prefill of one prompt:

    python -m tokenprune.evals.bench.probes --size vip-llava-7b --layers 2 6 --rounds 1 --out FILE

The decoder has the widths of the size and as many layers as asked for, so that it fits where it runs. Of layers that
are alike a trial of `apply` runs two, or three with a cut before one of them, however many there are
(`engine/layer_sample.py`): with three layers or more it takes what it takes at full depth. The prefill, and
`check-model`, which tries every layer, grow with the layers. If several depths are given, rows of the whole decoder are
worked out from the first and the last, and `how` says so.

Times are of the processor on a CPU, so that company does not count, and of the clock elsewhere. `of_prefill` is a
trial's time beside that of the decoder's prefill of one prompt of the size (641 tokens for CLIP-L/14-336), or of the
tower's run of one picture. `first_s` is that of the first trial, which touches weights that nobody touched before.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

COLUMNS = (
    "model", "layers", "runs", "part", "trial", "first_s", "seconds", "beside_s", "of_prefill", "how", "rounds",
    "dtype",
)  # fmt: skip


def _times(work: Callable[[], Any], rounds: int, device: str) -> list[float]:
    from tokenprune.evals.profiling.timing import timed

    if device != "cpu":
        import torch

        return [timed(torch.device(device), work)[0] for _ in range(rounds + 1)]
    found = []
    for _ in range(rounds + 1):
        begin = time.process_time()
        work()
        found.append(time.process_time() - begin)
    return found


def measure(size: str, layers: int, dtype: str, device: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each trial, first the prefill and the tower alone."""
    import torch

    from tokenprune.evals.bench.sizes import SizedModel, build
    from tokenprune.evals.profiling.timing import prefill
    from tokenprune.evals.statistics.bootstrap import median_iqr

    sized = SizedModel(size, build(size, dtype, device, decoder_layers=layers))
    adapter, inputs = sized.adapter, sized.inputs()
    loaded: Any = sized
    features, pixels = adapter.entry.get_image_features, {"pixel_values": inputs["pixel_values"]}
    with torch.inference_mode():
        tower = min(_times(lambda: features(**pixels), 1, device))
        alone = _times(lambda: prefill(loaded, inputs), 0, device)[0] - tower
    common = {"model": size, "layers": layers, "how": "measured", "rounds": rounds, "dtype": dtype}
    rows = [
        common | {"runs": layers, "part": "decoder", "trial": "prefill", "seconds": alone, "rounds": 1},
        common | {"part": "tower", "trial": "one picture", "seconds": tower, "rounds": 1},
    ]
    for part, trial, runs, work in [*_of_decoder(adapter), *_of_tower(adapter, features, pixels)]:
        first, *others = _times(work, rounds, device)
        beside = alone if part == "decoder" else tower
        seconds = median_iqr(others)["median"]
        rows.append(
            common
            | {"part": part, "trial": trial, "runs": runs, "first_s": first, "seconds": seconds, "beside_s": beside}
            | {"of_prefill": seconds / beside}
        )
    return rows


def _of_decoder(adapter: Any) -> list[tuple[str, str, int, Callable[[], Any]]]:
    """Trials of the decoder: part, name, how many layers they run, and the work."""
    from tokenprune.engine.decoder_probe import removal_error
    from tokenprune.engine.layer_check import unread_layers
    from tokenprune.engine.layer_sample import only, sampled_layers

    middle, count = len(adapter.layers) // 2, len(adapter.layers)

    def some(cuts: tuple[int, ...]) -> None:
        with only(adapter, sampled_layers(adapter, cuts)):
            removal_error(adapter, cuts)

    return [
        ("decoder", "apply: cuts at the input", len(sampled_layers(adapter)), lambda: some(())),
        ("decoder", "apply: cuts before one layer", len(sampled_layers(adapter, (middle,))), lambda: some((middle,))),
        ("decoder", "check-model: cuts at the input", count, lambda: removal_error(adapter)),
        ("decoder", "check-model: reading every layer", count, lambda: unread_layers(adapter)),
    ]


def _of_tower(adapter: Any, features: Any, pixels: Any) -> list[tuple[str, str, Any, Callable[[], Any]]]:
    """Trials of the tower; none where a family's file says what it is."""
    import torch

    from tokenprune.engine.tower_probe import check_tower

    if not adapter.behind_tower or not adapter.vision.signals:
        return []
    with torch.no_grad():
        visuals = adapter.visuals_behind("image", pixels, features(**pixels))
    last = adapter.tower.feature_layer

    def tried(blocks: Sequence[int], short: Sequence[int], verify: bool = True) -> None:
        adapter.vision.known.clear()
        check_tower(adapter, "image", features, pixels, visuals, blocks, short, verify)

    return [
        ("tower", "order of its patches (verify=False)", "", lambda: tried((last,), (), False)),
        ("tower", "order, and signals of a block", "", lambda: tried((last,), ())),
        ("tower", "order, and cuts behind every second block", "", lambda: tried((), range(1, last + 1, 2))),
    ]


def at_full_depth(few: Sequence[dict[str, Any]], many: Sequence[dict[str, Any]], depth: int) -> list[dict[str, Any]]:
    """The decoder's rows for all its layers, worked out from those of two depths: a straight line through what grows
    with the layers, and the trials of a sample as they are.

    Args:
        few, many: the rows of `measure` at two depths.
        depth: of the whole decoder.
    """
    found: list[dict[str, Any]] = []
    for low, high in zip(few, many):
        if high["part"] != "decoder":
            continue
        row = high | {"layers": depth, "first_s": "", "how": f"worked out from {low['layers']} and {high['layers']}"}
        if high["runs"] == high["layers"]:  # all of them
            slope = (high["seconds"] - low["seconds"]) / (high["layers"] - low["layers"])
            row |= {"runs": depth, "seconds": high["seconds"] + slope * (depth - high["layers"])}
        if found:
            row |= {"beside_s": found[0]["seconds"], "of_prefill": row["seconds"] / found[0]["seconds"]}
        found.append(row)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny-vip-llava", help="model size (%(default)s)")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 6], help="of the decoder (%(default)s)")
    parser.add_argument("--dtype", default="float32", help="%(default)s")
    parser.add_argument("--device", default="cpu", help="%(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/probes.csv"), help="%(default)s")
    options = parser.parse_args(argv)
    from transformers import AutoConfig

    from tokenprune.evals.bench.sizes import find_size
    from tokenprune.evals.bench.table import Table

    text = dict(find_size(options.size).config["text_config"])
    depth = AutoConfig.for_model(text.pop("model_type", "llama"), **text).num_hidden_layers
    table, found = Table(options.out, COLUMNS), []
    for layers in options.layers:
        rows = measure(options.size, layers, options.dtype, options.device, options.rounds)
        for row in rows:
            _tell(table, row)
        found.append(rows)
    for row in at_full_depth(found[0], found[-1], depth) if len(found) > 1 else ():
        _tell(table, row)


def _tell(table: Any, row: dict[str, Any]) -> None:
    share = f", {row['of_prefill']:.3f} of a prefill" if row.get("of_prefill") else ""
    print(f"{row['layers']} layers, {row['part']}, {row['trial']}: {row['seconds']:.3f} s{share} ({row['how']})")
    table.add(row)


if __name__ == "__main__":
    main()
