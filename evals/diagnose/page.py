"""diagnosis.html: one page that opens from disk, in the style of the report; charts are SVG in the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tokenprune.evals.diagnose.drawing import heat_map, line_chart, stacked_bars
from tokenprune.evals.diagnose.measures import stage_layers
from tokenprune.evals.diagnose.prompt_tokens import GROUPS
from tokenprune.evals.diagnose.samples import Shown
from tokenprune.evals.diagnose.words import FOOT
from tokenprune.evals.report import html

HERE = Path(__file__).parent
REPORT = Path(html.__file__).parent
LINKS = {
    "dominance": "text dominance", "image": "image", "heads": "heads", "lookback": "lookback", "sinks": "sinks",
    "flow": "flow", "pictures": "pictures",
}  # fmt: skip
SAID = {
    "writing": "rows that write the answer", "generated": "rows of the answer's tokens",
}  # fmt: skip
_MAPS = {"image": "attention to the image", "concentration": "concentration", "region": "share of it on the boxes"}
_KINDS = {name: f"k-{name}" for name in ("image", "question", "template", "first", "answer")}
Runs = Mapping[str, Mapping[str, Any]]


def write_page(path: Path, found: Mapping[str, Any], pictures: Mapping[str, Sequence[Shown]]) -> Path:
    """Write the page of a diagnosis; `found` is what `diagnosis.json` holds."""
    runs: Runs = found["runs"]
    blocks = (
        ("dominance", "Text dominance", _dominance(runs)),
        ("image", "Attention to the image", _image(runs)),
        ("heads", "Visual heads", _heads(runs)),
        ("lookback", "Looking back while the answer is written", _lookback(runs)),
        ("sinks", "Visual sinks", _sinks(runs, found["sink_channels"])),
        ("flow", "Information flow", _flow(runs)),
        ("pictures", "Where the first token is looked up", _pictures(pictures)),
    )
    key = "".join(f'<span><i class="{_look(i)}"></i>{escape(name)}</span>' for i, name in enumerate(runs))
    cards = f'<div class="cards">{"".join(_card(name, run) for name, run in runs.items())}</div>'
    parts = {
        "style": (REPORT / "page.css").read_text("utf-8") + (HERE / "diagnosis.css").read_text("utf-8"),
        "lead": _lead(found),
        "bar": f'  <div class="key">{key}</div>',
        "main": cards
        + "".join(
            f'<div class="block" id="{name}"><div class="head"><h3>{title}</h3></div>{body}</div>'
            for name, title, body in blocks
        ),
        "origin": _origin(found),
        "script": (REPORT / "table.js").read_text("utf-8") + (HERE / "diagnosis.js").read_text("utf-8"),
    }
    title = f"{found['model']} on {found['task']}: what it looks at"
    return html.write_framed(path, title, _notes(found), LINKS, parts)


def _lead(found: Mapping[str, Any]) -> str:
    first, decoder = next(iter(found["runs"].values())), found["decoder"]
    facts = (
        f"{first['samples']} of {found['of']} samples", f"{decoder['layers']} layers",
        f"{decoder['heads']} heads over {decoder['key_heads']} key heads", "greedy answers",
        found["settings"]["dtype"], found["date"][:10],
    )  # fmt: skip
    return " · ".join(escape(fact) for fact in facts)


def _notes(found: Mapping[str, Any]) -> list[str]:
    heads = next(iter(found["runs"].values()))["heads"]["writing"]
    notes = []
    if not heads["enough"]:
        notes.append(f"Heads are scored on {heads['samples']} samples; 200 are wanted before a ranking is relied on.")
    if not heads["right_only"]:
        notes.append("No sample is known to be answered right, so heads are scored on all of them.")
    return notes


def right_words(run: Mapping[str, Any]) -> str:
    """How many answers of a run are right, of those that can be marked."""
    if run["accuracy"] is None:
        return f"{run['samples']} samples, no answer of which could be marked"
    return f"{run['accuracy']:.1%} of {run['marked']} right"


def _look(number: int) -> str:
    return "after" if number else "before"


def _card(name: str, run: Mapping[str, Any]) -> str:
    dominance, heads = run["text_dominance"]["writing"], run["heads"]["writing"]
    best = ", ".join(f"{layer}.{head}" for layer, head in heads["visual"][:4])
    lines = (
        f"MDI {_round(dominance['mdi_geometric_stages']['middle'])} in the middle layers (geometric mean), "
        f"{_round(dominance['mdi_question_geometric_stages']['middle'])} with the question alone as text",
        f"{_mean(run['image_attention']['writing']):.1%} of attention on the image, mean over layers",
        f"visual heads (layer.head): {best}",
    )
    share, _, rest = right_words(run).partition(" ")
    answered = f"{share}<small> {rest}</small>"
    listed = "".join(f"<li>{line}</li>" for line in lines)
    tokens = run["tokens"]["image"]
    said = f"{tokens[0]:.0f} image tokens in the first layer, {tokens[-1]:.0f} in the last"
    title = f'<div class="big">{escape(name)} <span>{answered}</span></div>'
    return f'<div class="card"><div class="soft">{said}</div>{title}<ul>{listed}</ul></div>'


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# --- blocks -----------------------------------------------------------------------------------------------------------


def _dominance(runs: Runs) -> str:
    titles = (
        ("MDI", "mdi", "attention of a text token over that of an image token; above 1 text dominates"),
        ("MDI geometric", "mdi_geometric", "its geometric mean over samples, which one that hardly looks moves less"),
        ("MDI question", "mdi_question_geometric", "the geometric mean with the question's tokens alone as text"),
        ("AEI text", "aei_text", "share of attention on text over its share of tokens"),
    )
    stages = stage_layers(len(next(iter(runs.values()))["tokens"]["image"]))
    columns = [html.Column("run"), html.Column("rows", "which rows are looked at")]
    columns += [html.Column(f"{title} {stage}", means) for title, _, means in titles for stage in stages]
    rows = []
    for name, run in runs.items():
        for kind, each in run["text_dominance"].items():
            cells = [html.Cell(escape(name), name), html.Cell(SAID[kind], kind)]
            cells += [_number(each[f"{key}_stages"][stage]) for _, key, _ in titles for stage in stages]
            rows.append(("", cells))
    charts = []
    for kind, rows_said in SAID.items():
        chart = line_chart(_series(runs, "text_dominance", kind, "mdi_geometric"), log=True)
        charts.append(_figure(f"MDI by layer, geometric mean <small>{rows_said}</small>", chart))
    said = "; ".join(f"{stage}: layers {', '.join(map(str, layers))}" for stage, layers in stages.items())
    return f"{html.table(columns, rows)}{_two(charts)}{_foot('dominance', f'Stages: {said}.')}"


def _image(runs: Runs) -> str:
    charts = []
    for kind, rows_said in SAID.items():
        chart = line_chart(_series(runs, "image_attention", kind))
        charts.append(_figure(f"Attention to the image <small>{rows_said}</small>", chart))
    rolled = line_chart(_series(runs, "rollout", "writing", "image"))
    charts.append(_figure(f"Rollout: share of the image <small>{SAID['writing']}</small>", rolled))
    charts.append(_figure("Image tokens", line_chart(_series(runs, "tokens", "image"))))
    return _two(charts) + _foot("image")


def _heads(runs: Runs) -> str:
    parts = []
    for kind, rows_said in SAID.items():
        maps = []
        scale = max(max(map(max, run["heads"][kind]["score"])) for run in runs.values())
        for key, most in (("score", scale), ("image", 1.0), ("concentration", 1.0), ("region", 1.0)):
            for name, run in runs.items():
                heads = run["heads"][kind]
                if heads[key] is not None:
                    title = heads["score_of"] if key == "score" else _MAPS[key]
                    drawn = heat_map(heads[key], heads["visual"], most)
                    maps.append(_figure(f"{escape(name)} <small>{title}</small>", drawn))
        title = f"{rows_said[0].upper()}{rows_said[1:]}"
        parts.append(f"<h2>{title} <small>the first of them</small></h2>{_two(maps, maps=True)}")
    said = "; ".join(f"{name} {_split(run['heads']['writing']['split_half'])}" for name, run in runs.items())
    return "".join(parts) + _foot("heads", f"Two halves of the samples rank the heads alike (Spearman): {said}.")


def _split(value: float | None) -> str:
    return "too few to say" if value is None else f"{value:.2f}"


def _lookback(runs: Runs) -> str:
    parts, chart = [], ""
    for kind, rows_said in SAID.items():
        for name, run in runs.items():
            drawn = heat_map(run["lookback"][kind]["share"], largest=1.0)
            parts.append(_figure(f"{escape(name)} <small>{rows_said}</small>", drawn))
    if any(len(run["lookback_by_step"]) > 1 for run in runs.values()):
        series = {
            name: (_look(i), [_mean(each) for each in run["lookback_by_step"]])
            for i, (name, run) in enumerate(runs.items())
        }
        counts = next(iter(runs.values()))["lookback_samples"]
        said = f"mean over layers; {', '.join(map(str, counts))} answers have so many"
        chart = _two([_figure(f"By token of the answer <small>{said}</small>", line_chart(series, x="token"))])
    return _two(parts, maps=True) + chart + _foot("lookback")


def _sinks(runs: Runs, channels: Mapping[str, Any]) -> str:
    numbers = ", ".join(map(str, channels["numbers"])) or "none"
    table = channels["table"]
    said = (
        f"Sink channels in use: <b>{escape(numbers)}</b> ({escape(channels['used'])}). "
        f"On this model's own prompts: {escape(channels['found'])}. "
        + (f"By the model's sizes, the committed table: {escape(table)}." if table else "")
        + ("" if table else "The committed table has no row for these sizes.")
    )
    charts = []
    kinds = [("outlier", "attended over ten times the mean")]
    kinds += [("channel", "marked by the channels")] if channels["numbers"] else []
    for kind, words in kinds:
        tokens, taken = (line_chart(_series(runs, "sinks", f"{kind}_{part}")) for part in ("tokens", "attention"))
        charts.append(_figure(f"Share of image tokens <small>{words}</small>", tokens))
        charts.append(_figure(f"Attention that they take <small>of what text gives the image; {words}</small>", taken))
    return f"<p>{said}</p>{_two(charts)}{_foot('sinks')}"


def _flow(runs: Runs) -> str:
    parts = []
    for name, run in runs.items():
        layers = range(len(run["tokens"]["image"]))
        for title, shares in (
            ("attention of question tokens", run["flow"]["question"]),
            ("attention of image tokens", run["flow"]["image"]),
            ("what writes the answer is made of <small>rollout</small>", run["rollout"]["writing"]),
        ):
            rows = [(str(layer), {to: shares[to][layer] for to in GROUPS}) for layer in layers]
            parts.append(_figure(f"{escape(name)}: {title}", stacked_bars(rows, _KINDS)))
    key = "".join(f'<span><i class="{css}"></i>{kind}</span>' for kind, css in _KINDS.items())
    return f'<div class="key">{key}</div>{_two(parts)}{_foot("flow")}'


def _pictures(pictures: Mapping[str, Sequence[Shown]]) -> str:
    by_sample: dict[str, list[tuple[str, Shown]]] = {}
    for name, shown in pictures.items():
        for one in shown:
            by_sample.setdefault(one.sample_id, []).append((name, one))
    if not by_sample:
        return '<p class="soft">None of the samples that would be shown lies on one grid of tokens.</p>'
    parts = []
    for shown in by_sample.values():
        strips = "".join(_strip(name, one) for name, one in shown)
        first = shown[0][1]
        title = f"<h4>{escape(first.question)} <small>{escape(first.answer)}</small></h4>"
        parts.append(f'<div class="shown">{title}{strips}</div>')
    return "".join(parts) + _foot("pictures")


def _strip(name: str, one: Shown) -> str:
    figures = [("as seen", None), *((f"layer {layer}", heat) for layer, heat in zip(one.layers, one.maps, strict=True))]
    drawn = "".join(
        f"<figure>{_overlay(one, heat)}<figcaption>{title}</figcaption></figure>" for title, heat in figures
    )
    kind = {True: "right", False: "wrong", None: ""}[one.right]
    said = f'<span class="said {kind}">{escape(one.said or "nothing")}</span>'
    return f'<div>{escape(name)}: {said}</div><div class="strip">{drawn}</div>'


def _overlay(one: Shown, heat: str | None) -> str:
    width, height = one.size
    size = f'width="{width}" height="{height}"'
    over = (
        "" if heat is None else f'<rect {size} class="veil"/><image href="{heat}" {size} preserveAspectRatio="none"/>'
    )
    return f'<svg viewBox="0 0 {width} {height}"><image href="{one.picture}" {size}/>{over}</svg>'


def _series(runs: Runs, *path: str) -> dict[str, tuple[str, Sequence[float]]]:
    """By run, its look and the numbers that stand at a path of its keys."""
    series = {}
    for number, (name, run) in enumerate(runs.items()):
        values: Any = run
        for key in path:
            values = values[key]
        series[name] = (_look(number), values)
    return series


def _two(figures: Sequence[str], maps: bool = False) -> str:
    return f'<div class="two{" maps" if maps else ""}">{"".join(figures)}</div>'


def _foot(part: str, more: str = "") -> str:
    return f'<p class="soft foot">{escape(f"{FOOT[part]} {more}".strip())}</p>'


def _figure(title: str, drawn: str) -> str:
    return f'<div class="fig"><h4>{title}</h4>{drawn}</div>'


def _number(value: float) -> html.Cell:
    return html.Cell(_round(value), value)


def _round(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _origin(found: Mapping[str, Any]) -> str:
    kept = {name: found[name] for name in ("settings", "version", "hardware", "date", "sink_channels")}
    text = json.dumps(kept, indent=2, ensure_ascii=False, default=str)
    return (
        f"<p><code>{escape(found['command'])}</code></p><details><summary>settings and hardware</summary>"
        f"<pre>{escape(text)}</pre></details>"
    )
