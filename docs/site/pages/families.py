"""A page a model family, and one of all classes."""

from __future__ import annotations

from pathlib import Path

from pages import published, support
from pages.boards import BOARDS
from pages.docstring import described, escaped, module_docstring
from tokenprune.registry import MODELS

POCKET = {"llava": "pocket-llava", "qwen2_5_vl": "pocket-qwen"}
PAPERS = {"llava": "LLaVA-1.5-7B", "llava_next": "LLaVA-NeXT-7B", "qwen2_5_vl": "Qwen2.5-VL-7B"}
CHECKPOINTS = {
    "llava": "llava-hf/llava-1.5-7b-hf", "llava_next": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "qwen2_5_vl": "Qwen/Qwen2.5-VL-7B-Instruct",
}  # fmt: skip


def names() -> list[str]:
    """Families with a file here, those with a table of cells first."""
    tested = list(next(iter(support.cells().values())))
    others = [name for name in MODELS.names() if MODELS.file_of(name) and name not in (*tested, "generic")]
    return [*tested, *others, "generic"]


def pages() -> dict[str, str]:
    """Markdown by path."""
    return {"families/index.md": overview(), **{f"families/{name}.md": page(name) for name in names()}}


def classes_of(name: str) -> list[str]:
    """Classes of transformers that the family's file covers."""
    return list(getattr(MODELS.get(name), "classes", ()))


def snippet(name: str) -> str:
    """Python that prunes a model of the family: one that ships here, or one of the hub's."""
    source = POCKET.get(name)
    if source:
        return "\n".join(
            [
                "import tokenprune",
                "from tokenprune.evals.models.load import load_model",
                "",
                f'model = load_model("{source}").model',
                'handle = tokenprune.apply(model, "divprune", keep=0.25)',
                "print(handle)",
                "handle.remove()",
            ]
        )
    cls = next(iter(classes_of(name)), "AutoModelForImageTextToText")
    return "\n".join(
        [
            f"from transformers import {cls}",
            "",
            "import tokenprune",
            "",
            f'model = {cls}.from_pretrained("{CHECKPOINTS.get(name, "PATH")}")',
            'handle = tokenprune.apply(model, "divprune", keep=0.25)',
        ]
    )


def overview() -> str:
    """All families and classes."""
    lines = [
        "# Families", "",
        "A model is pruned in its stock `transformers` class. Nine families have every method tested on them, cell by cell; more "
        "have a file that says what is special about them; any other image-text class is read off the loaded model and "
        "tried before it is pruned. `tokenprune check-model PATH` says what works on yours.", "",
        '<div class="wordy" markdown>', "", "| family | what it is | classes |", "|---|---|---|",
    ]  # fmt: skip
    for name in names():
        classes = "<br>".join(f"`{cls}`" for cls in classes_of(name)) or "any other"
        lines.append(f"| [{name}]({name}.md) | {escaped(MODELS.describe(name))} | {classes} |")
    lines += ["", "</div>", "", "## Every tested class", "", support.of_classes(list(support.capabilities())), ""]
    lines += [
        "Input cuts: tokens leave before the decoder (\"without a grid\": its tokens are latents, so methods that work on a "
        "grid are refused). Layer cuts: before a decoder layer. Decoder signals: methods that read the decoder's attention. "
        "Tower signals: methods that read the vision tower's. Written by the tests ([support](../support.md)).", "",
    ]  # fmt: skip
    return "\n".join(lines)


def page(name: str) -> str:
    """One family."""
    doc = module_docstring(Path(str(MODELS.file_of(name))))
    parts = described(doc)
    classes = classes_of(name)
    lines = [f"# {name}", "", parts.does, ""]
    if parts.how:
        lines += [parts.how, ""]
    for heading, body in parts.notes:
        lines += [f"### {escaped(heading)}", "", body, ""]
    lines += ["## Use it", "", "```python", snippet(name), "```", ""]
    lines += ["```", f"tokenprune check-model {POCKET.get(name, 'PATH')}", "```", ""]
    table = support.of_classes(classes)
    if table:
        lines += ["## What works on its classes", "", table, "", "What the columns mean: [families](index.md).", ""]
    cells = {method: row[name] for method, row in support.cells().items() if name in row}
    if cells:
        runs = [f"[`{method}`](../methods/{method}.md)" for method, said in cells.items() if said != "-"]
        refused = [f"[`{method}`](../methods/{method}.md)" for method, said in cells.items() if said == "-"]
        lines += [
            "## Methods",
            "",
            f"Tested against the masked model ([support](../support.md)): {', '.join(runs)}.",
            "",
        ]
        if refused:
            lines += [f"Refused, with a sentence that says why: {', '.join(refused)}.", ""]
    pocket = POCKET.get(name)
    if pocket:
        lines += ["## Measured here", "", f"`{pocket}`, a small model of this family, ships with the project:", ""]
        lines += [
            f"- [{board.title}](../leaderboards/{board.file}.md): unpruned "
            f"{100 * float(board.unpruned['accuracy']):.1f} percent of {board.unpruned['n']} questions"
            for board in BOARDS
            if board.model == pocket
        ]
        lines += [""]
    if name in PAPERS:
        lines += [
            f"## Published for {PAPERS[name]}", "",
            "Value of the unpruned model's, MME in points, else percent. None was run again here; `tokenprune sweep` with the "
            "file of `configs/papers/` and `tokenprune parity` do that where there is a GPU.", "",
            published.of_model(PAPERS[name]), "",
        ]  # fmt: skip
    return "\n".join(lines)
