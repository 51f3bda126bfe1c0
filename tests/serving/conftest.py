"""`pytest tests/serving --classes docs/guides/serving_vllm.md` writes what works on which of vLLM's classes into the
guide, from the tests that were run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HEADS = ("vLLM's class", "pictures", "videos", "methods", "equal to transformers on")
MODELS = {
    "InternVLForConditionalGeneration": "InternVL, Hugging Face's form",
    "LlavaForConditionalGeneration": "LLaVA-1.5 with a CLIP tower",
    "LlavaNextForConditionalGeneration": "LLaVA-NeXT with a CLIP tower",
    "LlavaOnevisionForConditionalGeneration": "LLaVA-OneVision",
    "Qwen2VLForConditionalGeneration": "Qwen2-VL",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2.5-VL",
    "Qwen3VLForConditionalGeneration": "Qwen3-VL, DeepStack features cut alike",
}


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--classes", type=Path, help="write what works on which class into this file")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Of the methods on the pocket models, those cells that `test_models` asks."""
    name = "test_every_method_answers_as_in_transformers"
    cells = [item for item in items if getattr(item, "originalname", "") == name]
    left = {
        item.nodeid
        for item in cells
        if (item.callspec.params["model"], item.callspec.params["method"]) not in item.module.CELLS
    }
    config.hook.pytest_deselected(items=[item for item in cells if item.nodeid in left])
    items[:] = [item for item in items if item.nodeid not in left]


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    path = config.getoption("--classes")
    found: dict[str, dict[str, str]] = {}
    refused = 0
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            said = {str(name): str(value) for name, value in getattr(report, "user_properties", ())}
            refused = int(said.get("refused", refused))
            if "class" in said:
                of_class = found.setdefault(said["class"], {"videos": "", "failed": ""})
                failed = "" if outcome == "passed" else f"{report.nodeid.rpartition('::')[2]} "
                given = [of_class.get("given", ""), said.pop("given", "")]
                of_class.update(said, failed=of_class["failed"] + failed, given=", ".join(filter(None, given)))
    if path is None:
        return
    from tokenprune.evals.report.readme import between

    text = path.read_text(encoding="utf-8")
    path.write_text(between(text, "classes", table(found, refused, text.splitlines())), encoding="utf-8")


def table(found: dict[str, dict[str, str]], refused: int, before: list[str]) -> str:
    """Markdown: a row a class; classes that were not run keep the rows that they had before."""
    from tokenprune.vllm.families import FAMILIES

    def earlier(start: str) -> list[str]:
        return [line for line in before if line.startswith(start)]

    lines = [
        "Written by `make test-vllm CLASSES=docs/guides/serving_vllm.md` from the tests in `tests/serving`.",
        "",
        "| " + " | ".join(HEADS) + " |",
        "|---" * len(HEADS) + "|",
    ]
    for name, model in MODELS.items():
        if "on" not in found.get(name, {}):
            lines += earlier(f"| `{name}`") or [f"| `{name}` ({model}) | not run | | | |"]
            continue
        of_class, family = found[name], FAMILIES[name]
        refusal = f"refused: {family.no_videos}" if family.no_videos else "it takes none"
        videos = of_class["videos"] or ("not run" if "video" in family.kinds else refusal)
        ran = of_class["on"]
        ran += f"; given the same choice, where another token stayed: {of_class['given']}" if of_class["given"] else ""
        ran += f"; FAILED: {of_class['failed']}" if of_class["failed"] else ""
        methods = of_class["methods"]
        lines.append(f"| `{name}` ({model}) | yes | {videos} | {len(methods.split(', '))}: {methods} | {ran} |")
    if refused:
        lines.append(f"| all others, {refused} of them | refused at start | refused at start | none: not built | |")
    else:
        lines += earlier("| all others")
    return "\n".join(lines)
