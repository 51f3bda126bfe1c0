"""What the benches in docs/bench say, in the words of a table: every number is a cell of their CSV files."""

from __future__ import annotations

import csv

from pages.places import DOCS

END_TO_END = ("end-to-end-cpu-2026-11-29.csv", "end-to-end-cpu-llava-next-2026-11-29.csv")
HUGE = "end-to-end-cpu-12288-tokens-2026-11-29.csv"


def _rows(file: str) -> list[dict[str, str]]:
    with (DOCS / "bench" / file).open(encoding="utf-8") as stream:
        return [row for row in csv.DictReader(stream) if not row["error"]]


def end_to_end() -> str:
    """Prefill, decoding and memory at true prompt lengths on a CPU."""
    return _table([row for file in END_TO_END for row in _rows(file)])


def huge() -> str:
    """The same for one picture of 12,288 tokens before a model of toy width."""
    return _table(_rows(HUGE))


def _table(rows: list[dict[str, str]]) -> str:
    lines = [
        "| model | method | tokens kept | prefill, times as fast | of ideal | selection, % of unpruned prefill | tower, % of it | "
        "a decoded token, % of unpruned | peak, MiB | KV cache, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["method"] == "none":
            continue
        tower = float(row["tower_ms"]) / float(row["unpruned_ms"])
        decode = float(row["decode_ms"]) / float(row["unpruned_decode_ms"])
        lines.append(
            f"| {row['model']} | `{row['method']}` | {row['kept_tokens']} of {row['visual_tokens']} | {float(row['speedup']):.2f} | "
            f"{float(row['to_ideal']):.2f} | {100 * float(row['selection_share']):.1f} | {100 * tower:.0f} | {100 * decode:.0f} | "
            f"{float(row['unpruned_peak_mib']):.0f} to {float(row['peak_mib']):.0f} | "
            f"{float(row['unpruned_kv_mib']):.1f} to {float(row['kv_mib']):.1f} |"
        )
    return "\n".join(lines)


def speed_line() -> str:
    """One sentence of the same."""
    rows = [row for file in END_TO_END for row in _rows(file) if row["speedup"]]
    times = [float(row["speedup"]) for row in rows]
    shares = [100 * float(row["kept_tokens"]) / float(row["visual_tokens"]) for row in rows]
    return (
        f"At true prompt lengths on a CPU, with {min(shares):.0f} to {max(shares):.0f} percent of the tokens kept, prefill with a 0.5 B decoder is "
        f"{min(times):.1f} to {max(times):.1f} times as fast ([benches](bench/README.md#end-to-end-on-a-cpu))."
    )


TABLES = {"end-to-end": end_to_end, "huge": huge, "speed-line": speed_line}
