"""report.html: one page with the table, the plot, the families and the pictures of a run. No network, no library."""

from __future__ import annotations

import base64
import json
from html import escape
from pathlib import Path
from typing import Any

from tokenprune.evals.config import NONE, RunConfig
from tokenprune.evals.results import flat_costs, replace_file
from tokenprune.evals.svgplot import svg_plot
from tokenprune.evals.tasks import cut_short

Record = dict[str, Any]
TEMPLATE = Path(__file__).with_name("report_page.html")


def write_report(
    path: Path, config: RunConfig, records: list[Record], pictures: list[Record], origin: Record, notes: list[str]
) -> Path:
    """Write the page.

    Args:
        records: see `results.summarise`.
        pictures: overlays: `file`, `series`, `keep`, `task` and the sample's row.
        origin: see `results.provenance`.
        notes: sentences that a reader must know.
    """
    body = [f"<h1>{escape(config.name)}</h1>", _lead(config, records, origin)]
    body += [f'<div class="note">{escape(note)}</div>' for note in notes]
    for model, task in dict.fromkeys((record["model"], record["task"]) for record in records):
        own = [record for record in records if (record["model"], record["task"]) == (model, task)]
        body.append(f"<h2>{escape(Path(model).name)} on {escape(task)}</h2>")
        body += ["<h3>Accuracy against the FLOPs that the kept tokens decide</h3>", svg_plot(own, decoder=True)]
        body.append(
            '<p class="soft">Bars are 95 percent bootstrap intervals over samples. Methods with one budget cost nearly '
            "the same, so their points are spread sideways. Point at a name to see it alone.</p>"
        )
        body += ["<h3>Results</h3>", _main_table(own), "<h3>Accuracy by question family, percent</h3>", _families(own)]
        body += _pictures([picture for picture in pictures if (picture["task"], picture["model"]) == (task, model)])
        body += ["<h3>Times of single prompts</h3>", _times_table(own)]
        body += ["<h3>Accuracy against all FLOPs to the first token</h3>", svg_plot(own, decoder=False)]
        body += ["<h3>FLOPs of one prompt by part</h3>", _flops_table(own)]
    body.append("<h2>Where this came from</h2>")
    body.append(f"<p class='soft'><code>{escape(str(origin['command']))}</code></p>")
    text = json.dumps(origin, indent=2, ensure_ascii=False, default=str)
    body.append(f"<details><summary>Settings, versions, hardware</summary><pre>{escape(text)}</pre></details>")
    page = TEMPLATE.read_text(encoding="utf-8")
    page = page.replace("@@title@@", f"tokenprune: {escape(config.name)}").replace("@@body@@", "\n".join(body))
    return replace_file(path, page)


def _lead(config: RunConfig, records: list[Record], origin: Record) -> str:
    counts = sorted({record["overall"]["n"] for record in records})
    hardware = origin["hardware"]
    machine = hardware["gpu"] or f"{hardware['cpu']}, {hardware['threads']} threads"
    short = cut_short(config.all_tasks, config.limit)
    limit = " A limit was set, so these are not all samples of the task." if short else ""
    many = ", ".join(map(str, counts))
    return (
        f'<p class="soft">{many} samples a point, greedy answers, {config.dtype}, seed {config.seed}; '
        f"{escape(machine)}; {origin['date'][:10]}.{limit} Times are medians over single prompts.</p>"
    )


def _cell(text: str, value: Any = None, extra: str = "") -> str:
    sort = "" if value is None else f"{value:.9g}" if isinstance(value, float) else str(value)
    return f'<td data-v="{escape(sort)}"{extra}>{text}</td>'


def _percent(value: float | None, low: float | None = None, high: float | None = None, sign: bool = False) -> str:
    if value is None:
        return ""
    form = "{:+.1f}" if sign else "{:.1f}"
    text = form.format(100 * value)
    if low is None or high is None:
        return text
    return f"{text} <small>{form.format(100 * low)} to {form.format(100 * high)}</small>"


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _main_table(records: list[Record]) -> str:
    heads = ("method", "tokens", "accuracy, %", "of unpruned, %", "vs random, points", "GFLOPs", "of unpruned, %",
             "KV cache, KiB", "of unpruned, %")  # fmt: skip
    rows = []
    for record in records:
        scores, costs = record["overall"], flat_costs(record)
        beats = ""
        if scores["vs_random_low"] is not None:
            beats = "good" if scores["vs_random_low"] > 0 else "bad" if scores["vs_random_high"] < 0 else ""
        vs_random = _percent(scores["vs_random"], scores["vs_random_low"], scores["vs_random_high"], sign=True)
        kv = None if costs["kv_bytes"] is None else costs["kv_bytes"] / 1024
        name = "unpruned" if record["method"] == NONE else record["series"]
        cells = [
            _cell(escape(name), name),
            _cell(f"{record['kept_tokens']:g}", float(record["kept_tokens"])),
            _cell(_percent(scores["accuracy"], scores["ci_low"], scores["ci_high"]), scores["accuracy"]),
            _cell(_percent(scores["relative"]), scores["relative"]),
            _cell(f'<span class="{beats}">{vs_random}</span>', scores["vs_random"]),
            _cell(_number(costs["gflops_total"], 3), costs["gflops_total"]),
            _cell(_percent(costs["flops_share"]), costs["flops_share"]),
            _cell(_number(kv, 0), kv),
            _cell(_percent(costs["kv_share"]), costs["kv_share"]),
        ]
        rows.append(f"<tr{' class=ref' if record['reference'] else ''}>{''.join(cells)}</tr>")
    return _table(heads, rows, sort=True)


def _times_table(records: list[Record]) -> str:
    heads = ("method", "prefill, ms", "of unpruned, %", "ideal prefill, ms", "of ideal, %", "selection, ms",
             "of unpruned prefill, %", "decode, ms/token")  # fmt: skip
    names = ("prefill", "to_unpruned", "ideal_prefill", "to_ideal", "selection", "selection_share", "decode")
    rows = []
    for record in records:
        times = record.get("times") or {}
        if not times:
            continue
        cells = [_cell(escape(record["label"] if record["method"] != NONE else "unpruned"), record["label"])]
        for name in names:
            if name not in times:
                cells.append(_cell("", ""))
                continue
            scale = 100 if name.startswith("to_") or name.endswith("_share") else 1000
            middle, low, high = (scale * times[name][part] for part in ("median", "q25", "q75"))
            cells.append(_cell(f"{middle:.3g} <small>{low:.3g} to {high:.3g}</small>", middle))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    if not rows:
        return '<p class="soft">No times were measured.</p>'
    explained = (
        '<p class="soft">Medians and quartiles. Ratios are taken within a round in which unpruned, pruned and ideal '
        "take turns, so they bear a noisy machine better than the times do. The ideal runs the tower and the projector "
        "on the same picture, then the decoder on a prompt with just the kept tokens.</p>"
    )
    return explained + _table(heads, rows, sort=True)


def _families(records: list[Record]) -> str:
    families = list(dict.fromkeys(family for record in records for family in record["families"]))
    unpruned = next((record for record in records if record["method"] == NONE), None)
    rows = []
    for record in records:
        cells = [_cell(escape(record["label"] if record["method"] != NONE else "unpruned"), record["label"])]
        for family in [*families, None]:
            scores = record["overall"] if family is None else record["families"].get(family)
            if scores is None:
                cells.append(_cell(""))
                continue
            base = None
            if unpruned is not None:
                base = unpruned["overall"] if family is None else unpruned["families"].get(family)
            lost = 0.0 if base is None else scores["accuracy"] - base["accuracy"]
            # red where accuracy was lost, green where it was won, full colour at 40 points
            strength = min(1.0, abs(lost) / 0.4) * 0.45
            tint = f"rgba({'196,49,75' if lost < 0 else '26,127,55'},{strength:.2f})"
            title = f"{100 * scores['ci_low']:.1f} to {100 * scores['ci_high']:.1f}, {scores['n']} questions"
            style = f' style="background:{tint}" title="{title}"'
            cells.append(_cell(f"{100 * scores['accuracy']:.1f}", scores["accuracy"], style))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return _table(("method", *families, "overall"), rows, sort=True)


def _flops_table(records: list[Record]) -> str:
    parts = ("vision", "projector", "selection", "prefill", "total", "decode")
    heads = ("method", *(f"{part}, G" for part in parts[:-1]), "decode, G/token", "paper formula, G", "measured off by")
    rows = []
    for record in records:
        flops = record.get("flops")
        if not flops:
            continue
        cells = [_cell(escape(record["label"]), record["label"])]
        for part in parts:
            value = flops["analytic"][part] / 1e9
            cells.append(_cell(f"{value:.4g}", value))
        cells.append(_cell(f"{flops['paper'] / 1e9:.4g}", flops["paper"]))
        worst = max(flops["difference"].values(), key=abs) if flops["difference"] else None
        cells.append(_cell("" if worst is None else f"{worst:+.2%}", worst))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    explained = (
        '<p class="soft">Matrix products only, 2 per multiply-add, attention as the full square, as torch counts them '
        "in FlopCounterMode. The last column is the largest difference of a part between the analytic and the "
        "measured count. The papers' simplified formula counts decoder layers only and a multiply-add once.</p>"
    )
    return explained + _table(heads, rows, sort=True)


def _table(heads: tuple[str, ...], rows: list[str], sort: bool = False) -> str:
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    kind = ' class="sort"' if sort else ""
    body = "\n".join(rows)
    return f'<div class="scroll"><table{kind}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _pictures(pictures: list[Record]) -> list[str]:
    if not pictures:
        return []
    keep = pictures[0]["keep"]
    parts = [f"<h3>What stays at {keep} tokens</h3>"]
    parts.append(
        '<p class="soft">Dropped patches are dark. <i>pool</i> averages every patch into the kept places, so nothing '
        "is really lost there; <i>downsample</i> keeps the whole picture with fewer pixels.</p>"
    )
    for sample_id in dict.fromkeys(picture["sample_id"] for picture in pictures):
        own = [picture for picture in pictures if picture["sample_id"] == sample_id]
        answer = own[0]["answer"]
        parts.append(
            f'<p><b>{escape(own[0]["question"])}</b> <span class="soft">answer: {escape(str(answer))} '
            f"({escape(own[0]['family'])})</span></p><div class=cards>"
        )
        for picture in own:
            data = base64.b64encode(picture["file"].read_bytes()).decode()
            right = picture["correct"] >= 0.5
            mark, kind = ("right", "good") if right else ("wrong", "bad")
            said = escape(picture["prediction"] or "(nothing)")
            name = "unpruned" if picture["series"] == NONE else escape(picture["series"])
            parts.append(
                f'<figure><img alt="{name}" src="data:image/png;base64,{data}"><figcaption><b>{name}</b><br>'
                f'<span class="{kind}">{said} · {mark}</span></figcaption></figure>'
            )
        parts.append("</div>")
    return parts
