"""Time and memory against the number of pictures or frames of a prompt, unpruned and pruned, weights random:

python -m tokenprune.evals.bench.growth --out docs/bench/growth-GPU-DATE.csv
"""

from __future__ import annotations

from typing import Any

import torch

from tokenprune.evals.bench.end_to_end import default_sizes, method_row, parser, unpruned_row
from tokenprune.evals.bench.sizes import SizedModel, build, find_size
from tokenprune.evals.bench.table import Table
from tokenprune.evals.config.points import NONE, check_method_name

COLUMNS = (
    "model", "images", "frames", "method", "keep", "visual_tokens", "kept_tokens", "tower_ms", "selection_ms",
    "unpruned_ms", "pruned_ms", "ideal_ms", "speedup", "to_ideal", "to_ideal_q25", "to_ideal_q75", "selection_share",
    "selection_flops_share", "decode_ms", "unpruned_decode_ms", "peak_mib", "unpruned_peak_mib", "ideal_peak_mib",
    "kv_mib", "unpruned_kv_mib", "rounds", "dtype", "error",
)  # fmt: skip
FRAME = (448, 448)  # pixels of a video frame: 256 tokens for each pair of frames


def _cases(images: list[int], frames: list[int], sizes: list[str]) -> list[tuple[str, dict[str, Any]]]:
    cases: list[tuple[str, dict[str, Any]]] = []
    for name in sizes:
        if find_size(name).config["model_type"] == "qwen2_5_vl":
            picture = FRAME if not name.startswith("tiny") else (112, 112)
            cases += [(name, {"images": 0, "frames": count, "picture": picture}) for count in frames]
        elif find_size(name).config["model_type"] == "llava":
            cases += [(name, {"images": count}) for count in images]
    return cases


def main(argv: list[str] | None = None) -> None:
    """Measure and write the CSV."""
    asked = parser(__doc__, "runs/bench/growth.csv")
    asked.add_argument("--sizes", nargs="*", default=default_sizes(), help="model sizes (%(default)s)")
    asked.add_argument("--methods", nargs="*", default=["random", "vtc_cls", "divprune", "todre"], help="%(default)s")
    asked.add_argument("--images", nargs="*", type=int, default=[1, 2, 4, 8, 16, 32, 64], help="%(default)s")
    asked.add_argument("--frames", nargs="*", type=int, default=[2, 4, 8, 16, 32, 64, 128, 256], help="%(default)s")
    asked.add_argument("--keep", type=float, default=1 / 9, help="kept fraction of the tokens (%(default).3f)")
    options = asked.parse_args(argv)
    for name in options.methods:
        check_method_name(name)
    table, loaded = Table(options.out, COLUMNS), ("", None)
    for name, prompt in _cases(options.images, options.frames, options.sizes):
        if loaded[0] != name:
            loaded = ("", None)  # one model at a time in memory
            loaded = (name, build(name, options.dtype, options.device))
        sized = SizedModel(name, loaded[1], **prompt)
        shared = {"model": name, "images": sized.images, "frames": sized.frames, "dtype": options.dtype}
        plain: dict[str, Any] = {}
        try:
            plain = unpruned_row(sized, options.rounds, options.decode)
        except torch.OutOfMemoryError:  # the pruned model may still fit
            table.add({**shared, "method": NONE, "error": "out of memory"})
        else:
            table.add({**shared, "method": NONE, **plain})
        for method in options.methods:
            row = {**shared, **plain, "method": method, "keep": options.keep}
            try:
                row |= method_row(sized, method, options.keep, options.rounds, options.decode)
            except (ValueError, torch.OutOfMemoryError) as error:
                row["error"] = str(error).partition("\n")[0]
            table.add(row)
            print(
                {key: row.get(key) for key in ("model", "images", "frames", "method", "speedup", "error")}, flush=True
            )
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
