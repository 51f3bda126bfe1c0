"""A page a method: what it is, a call that runs, how it works, options, published and own numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pages import published, support
from pages.boards import BOARDS, Board, method_table
from pages.docstring import described, escaped, module_docstring
from tokenprune.commands._methods import budget_words, method_details
from tokenprune.registry import METHODS

PLACES = {
    "pixels": "before the vision tower", "vision": "inside the vision tower", "input": "before the decoder",
    "layer": "inside the decoder",
}  # fmt: skip
COMMON = ("positions", "scope", "key_bias")
HINTED = {
    "oracle": "It needs to be told where to look, so it runs in evaluations of tasks that come with boxes.",
}


def board_of(method: str) -> Board:
    """The board whose model the snippet runs: the first that has the method."""
    return next((board for board in BOARDS if board.of(method)), BOARDS[0])


def budget_of(board: Board) -> str:
    """The budget of the snippets: a ninth of the tokens."""
    return "64" if board.model == "pocket-llava" else "0.111"


def settings(method: str) -> dict[str, str]:
    """Options without which a method does not run on the board's model, as the leaderboard has them."""
    rows = board_of(method).of(method)
    if not rows or any(not row["options"] for row in rows):
        return {}
    return dict(pair.split("=") for pair in rows[0]["options"].split(" "))


def snippet(method: str) -> str:
    """Python that runs the method on a model that ships here."""
    board = board_of(method)
    inner = ", ".join(f"{key}={value}" for key, value in settings(method).items())
    plan = f'"{method}{f"({inner})" if inner else ""}@{budget_of(board)}"'
    return runnable(board.model, plan)


def runnable(model: str, plan: str) -> str:
    """Python that generates with `plan` applied to a model that ships here."""
    return "\n".join(
        [
            "import torch",
            "from PIL import Image",
            "",
            "import tokenprune",
            "from tokenprune.evals.models.load import load_model",
            "",
            f'loaded = load_model("{model}")',
            'picture = Image.new("RGB", (336, 336), "white")',
            'inputs = loaded.inputs(["what does the sign say?"], [picture])',
            "",
            f"with tokenprune.applied(loaded.model, {plan}) as handle, torch.no_grad():",
            "    output = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)",
            "    print(handle.report())",
        ]
    )


def command(method: str) -> str:
    """The same from the command line, over questions."""
    board = board_of(method)
    options = "".join(f" --set {key}={value}" for key, value in settings(method).items())
    return (
        f"tokenprune eval --model {board.model} --tasks {board.rows[0]['task']} --method {method}{options} "
        f"--keep {budget_of(board)} --limit 30 --output runs/{method}"
    )


def pages() -> dict[str, str]:
    """Markdown by path."""
    names = METHODS.names()
    made = {f"methods/{name}.md": page(name) for name in names if METHODS.file_of(name)}
    return {"methods/index.md": overview(), **made}


def overview() -> str:
    """All methods in tables, by where they act."""
    lines = [
        "# Methods",
        "",
        "Names that `tokenprune.apply(model, name, keep=...)` takes. *Text-aware* methods read the question; methods that are "
        "not choose the same tokens whatever is asked, so that a picture's choice can be kept between questions. Where a method "
        "acts decides what it saves: a cut before the tower saves all that follows, a cut inside the decoder only the layers "
        "behind it. What they reach here, and which to take: [choosing](../choosing.md).",
    ]
    details = {name: method_details(name) for name in METHODS.names() if METHODS.file_of(name)}
    for place, words in PLACES.items():
        mine = [one for one in details.values() if one["site"] == place]
        if not mine:
            continue
        lines += [
            "",
            f"## {words[0].upper()}{words[1:]}",
            "",
            '<div class="wordy" markdown>',
            "",
            "| method | what it does | text-aware | merges | budget |",
        ]
        lines += ["|---|---|---|---|---|"]
        for one in mine:
            yes = {True: "yes", False: "no", None: ""}
            lines.append(
                f"| [`{one['name']}`]({one['name']}.md) | {escaped(one['does'])} | {yes[one['text_aware']]} | "
                f"{yes[one['merges']]} | {budget_words(one['adaptive'])} |"
            )
        lines += ["", "</div>"]
    return "\n".join(lines) + "\n"


def page(name: str) -> str:
    """One method."""
    file = METHODS.file_of(name)
    assert_file(file, name)
    details = method_details(name)
    parts = described(module_docstring(Path(str(file))))
    lines = [f"# {name}", "", parts.does, "", *_facts(details), "", "## Use it", ""]
    if name in HINTED:
        lines += [HINTED[name], ""]
    elif name in ("quota",):
        lines += [
            "Scores of the frames are a hint; without one, `scores=\"uniform\"` gives every frame the same share.", ""
        ]  # fmt: skip
    if name not in HINTED:
        lines += ["```python", snippet(name), "```", ""]
    lines += ["```", command(name), "```", "", "## How it works", "", parts.how or parts.does, ""]
    for heading, body in parts.notes:
        lines += [f"### {escaped(heading)}", "", body, ""]
    lines += ["## Options", "", option_table(details["options"]), ""]
    said = [text for kind, text in parts.sources if kind == "Published"]
    lines += ["## Source", "", *(f"- {kind}: {text}" for kind, text in parts.sources if kind != "Published"), ""]
    lines += _published(name, details, said) + _own(name)
    lines += ["## Where it runs", "", _runs(name), ""]
    return "\n".join(lines)


def assert_file(file: Path | None, name: str) -> None:
    """Raise where a method is no file of the package, as one of an installed plug-in."""
    if file is None:
        raise ValueError(f"{name} is no file of tokenprune/methods, so there is no page for it.")


def _facts(details: dict[str, Any]) -> list[str]:
    yes = {True: "yes", False: "no"}
    rows = {
        "acts": PLACES[details["site"]],
        "reads the question": yes[details["text_aware"]],
        "budget": {"exact": "exact", "adaptive": "it decides itself; `keep` is a cap"}.get(
            budget_words(details["adaptive"]), budget_words(details["adaptive"])
        ),
        "merges tokens": yes[details["merges"]],
        "positions of what stays": details["published_positions"],
        "source": escaped(details["published"]),
    }
    if details["variants"]:
        rows["variants"] = ", ".join(f"`{one}`" for one in details["variants"])
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]


def option_table(options: list[dict[str, Any]]) -> str:
    """Options with their defaults and meanings, a method's own first."""
    lines = ['<div class="options" markdown>', "", "| option | default | meaning |", "|---|---|---|"]
    ordered = sorted(options, key=lambda option: option["name"] in COMMON)
    for option in ordered:
        lines.append(f"| `{option['name']}` | `{option['default']!r}` | {cell(option['means'])} |")
    return "\n".join([*lines, "", "</div>"])


def cell(text: str) -> str:
    """Text inside a table."""
    return escaped(text).replace("|", "\\|")


def _published(name: str, details: dict[str, Any], said: list[str]) -> list[str]:
    lines = ["## Published numbers", ""]
    if details["reproduces"]:
        lines += [f"The number that it should give: {escaped(details['reproduces'])}.", ""]
    for text in said:
        lines += [text, ""]
    tables = published.of_method(name)
    if tables:
        lines += [tables, ""]
    if not (tables or said or details["reproduces"]):
        return [*lines, "None is known to us for this method.", ""]
    return [*lines, "None of these was run again here: that needs a GPU and the checkpoints.", ""]


def _own(name: str) -> list[str]:
    lines = ["## Our numbers", ""]
    found = [(board, method_table(board, name)) for board in BOARDS]
    if not any(table for _, table in found):
        return [*lines, "It stands on no leaderboard yet.", ""]
    for board, table in found:
        if table:
            unpruned = board.unpruned
            lines += [
                f"**{board.title}**; unpruned {100 * float(unpruned['accuracy']):.1f} percent of {unpruned['n']} questions "
                f"([leaderboard](../leaderboards/{board.file}.md), [CSV](../leaderboards/{board.file}.csv)).",
                "",
                table,
                "",
            ]
    return [
        *lines,
        "Intervals are 95 percent. These are models of a few million parameters on drawn pictures: they rank methods on "
        "*these* models, and say nothing of a 7B model. FLOPs and prefill are up to the first token, in percent of the "
        "unpruned model's; most of what is left is the tower.",
        "",
    ]


def _runs(name: str) -> str:
    table = support.of_method(name)
    if not table:
        return "Its cells are not in the table of [support](../support.md) yet."
    return (
        f"{table}\n\nLayouts of prompts that agree with the masked model ([support](../support.md)). Other classes are tried "
        "when the method is applied: `tokenprune check-model PATH`."
    )
