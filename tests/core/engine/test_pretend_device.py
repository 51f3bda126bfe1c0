"""On a pretend device nothing differs from the CPU, and the host reads what docs/kernels.md says and nothing else.

`pytest tests/core/engine/test_pretend_device.py --reads docs/kernels.md` writes the table there. The device
replaces functions of torch, so every test here starts a process.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest
from _paths import ROOT, TESTS

DOCS = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- host reads: written by test_pretend_device.py -->\n", "<!-- end of host reads -->\n"

IDS, MASK, SIZES = "the ids", "the mask, and position ids where they are given, in one move", "sizes of pictures"
READS = {
    ("prompt_reader.py", "_placeholders"): IDS,
    ("prompt_reader.py", "_rows"): MASK,
    ("_qwen.py", "visuals"): SIZES,
    ("_anyres.py", "visuals"): SIZES,
    ("llava_onevision.py", "visuals"): SIZES,
    ("smolvlm.py", "_tiles"): SIZES,
    ("_qwen.py", "_bounds"): "a cut inside the tower: boundaries of frames and windows",
    ("_qwen.py", "drop_tokens"): "a cut inside the tower: what stays, all pictures at once",
    ("_cell_cuts.py", "leave"): "a cut inside the tower, by cells: what stays, all pictures at once",
    ("prompt_reader.py", "tiles"): "a cut inside the tower of tiles: the ids that say which make a picture",
    ("tower_pass.py", "_alive_on_host"): "a cut inside the tower of pictures in crops: what is left, all at once",
    ("_deepstack.py", "deepstack_kwargs"): "which of the features that are added in the decoder stay",
    ("vision.py", "sink_attention"): "how many sinks a picture has at most, for pictures of one size",
    ("attention.py", "finish"): "samples that an intervention changes",
    ("prompt_selection.py", "_choose_beside"): "sinks that are not ranked, all pictures at once",
    ("flowcut.py", "select"): "a number of tokens that the picture decides",
    ("pixelprune.py", "select"): "numbers of tokens that the pictures decide, those of one shape at once",
    ("todre.py", "select"): "whether all tokens of a picture leave, for pictures of one size",
    ("tower_recording.py", "sources_of"): "features that `generate` repeated for beams, known again by what they hold",
    ("prompt_state.py", "picture_keys"): "discovery of sink channels, on its first prompts only",
    ("_sinks.py", "begin"): "discovery, on its first prompts only",
    ("_sinks.py", "look"): "discovery, on its first prompts only",
    ("_sinks.py", "listen"): "discovery, on its first prompts only",
    ("_sinks.py", "_flags"): "discovery, on its first prompts only",
    ("a_vl.py", "_window"): "how long the longest window of text is",
    ("a_vl.py", "watch_flops"): "how many keys of pictures are read, for the FLOPs that are counted",
    ("cache_policies.py", "_places"): "how many keys the row that keeps most has left in a layer",
    ("cache_policies.py", "_alike"): "whether two layers hold keys of the same places",
    ("cache_policies.py", "_mark"): "whether a row has fewer keys than another",
    ("cache_policies.py", "_held"): "how many keys each row has left, for the report",
}
"""Every place that may read the device while a prompt comes in, and what it reads."""
IN_STEPS = {("cache_policies.py", function) for function in ("_places", "_alike", "_mark")}
"""Places that read it in decode steps too: where a policy takes keys out of the cache. No other may."""


def python(*args: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(TESTS), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths.rstrip(os.pathsep), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=environment, timeout=900)


def by_place(line: dict[str, Any]) -> dict[tuple[str, str], int]:
    """Reads of a prompt by (file, function): the larger of a forward and of `generate`."""
    found: dict[str, collections.Counter[tuple[str, str]]] = collections.defaultdict(collections.Counter)
    for part, step, file, function, _, _, _, count in line.get("reads", []):
        if step == "prompt":
            found[part][file, function] += count
    places = {place for counter in found.values() for place in counter}
    return {place: max(counter[place] for counter in found.values()) for place in places}


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row a place that read the device."""
    ran = [line for line in lines if "refused" not in line]
    rows = []
    for (file, function), what in READS.items():
        where = [(line, by_place(line)[file, function]) for line in ran if (file, function) in by_place(line)]
        if not where:
            continue
        families = sorted({line["family"] for line, _ in where})
        able = {line["method"] for line in ran if line["family"] in families}
        methods = sorted({line["method"] for line, _ in where})
        kinds = "all" if set(methods) == able else ", ".join(methods)
        if kinds != "all" and len(methods) > 6:
            kinds = f"{len(methods)} of {len(able)}"
        named = "all" if len(families) == len({line["family"] for line in ran}) else ", ".join(families)
        most = max(count for _, count in where)
        rows.append(f"| `{file}`, `{function}` | {what} | {most} | {named} | {kinds} |")
    head = ["| where | what | most a prompt | families | methods and plans |", "|---|---|---:|---|---|"]
    return "\n".join([*head, *rows]) + "\n"


def committed(text: str) -> str:
    return text.partition(BEGIN)[2].partition(END)[0]


@pytest.mark.slow
def test_on_the_pretend_device_nothing_differs_and_little_is_read(request: pytest.FixtureRequest, capsys: Any) -> None:
    sampled = request.config.getoption("--sampled")
    done = python(str(TESTS / "pretend_cells.py"), *(["--sampled"] if sampled else []))
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    ran = [line for line in lines if "refused" not in line]
    wrong = [{**line, "reads": None} for line in ran if line["differences"]]
    counts = collections.Counter(READS.get(place) for line in ran for place in by_place(line))
    decoded = [
        (line["family"], line["method"], read)
        for line in ran
        for read in line["reads"]
        if read[1] == "decode" and not (line["method"].startswith("a_vl") and (read[2], read[3]) in IN_STEPS)
    ]
    with capsys.disabled():
        print(
            f"\npretend device: {len(ran)} cells of {len({line['family'] for line in ran})} families "
            f"({len(lines) - len(ran)} refused on both devices), {len(wrong)} differences, "
            f"{sum(line['exact'] for line in ran if not line['differences'])} equal to the last bit of their logits; "
            f"host reads at {len(counts)} kinds of places, {len(decoded)} in decode steps; "
            f"{sum(line['seconds'] for line in lines):.0f} s"
        )
    assert len(ran) > 100 and not wrong
    assert not decoded, "a decode step waits for the device"
    unknown = {
        (*place, line["family"], line["method"]) for line in ran for place in by_place(line) if place not in READS
    }
    assert not unknown, "a read that READS does not name"
    for line in ran:
        check_once(line)
    if sampled:
        return
    check_cells(lines)
    path = request.config.getoption("--reads")
    if path is not None:
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(BEGIN + committed(text) + END, BEGIN + table(lines) + END), encoding="utf-8")
    assert table(lines) == committed(DOCS.read_text(encoding="utf-8")), (
        "docs/kernels.md says otherwise: pytest tests/core/engine/test_pretend_device.py --reads docs/kernels.md"
    )
    assert {place for line in ran for place in by_place(line)} == set(READS), "READS names a place that reads nothing"


def check_cells(lines: list[dict[str, Any]]) -> None:
    """Every family with every method and `var`, and every layout of a family, are among them; refusals are those that
    `apply` or a pooled picture's cut inside the tower explains."""
    from _families import BUILDERS, layouts, pairs

    from tokenprune.registry import METHODS

    seen = {(line["family"], line["method"]) for line in lines}
    assert {(name, method) for name in BUILDERS for method in [*METHODS.names(), "var"]} <= seen
    able = {(line["family"], line["method"]) for line in lines if "refused" not in line}
    assert set(pairs(True)) <= able, "a pair that goes together ran on no layout"
    ran = {(line["family"], line["layout"]) for line in lines if "refused" not in line}
    assert {(name, layout) for name in BUILDERS for layout in layouts(name)} == ran


def check_once(line: dict[str, Any]) -> None:
    """One read each of ids, mask and sizes, the latter for pictures and for videos."""
    kinds: collections.Counter[str] = collections.Counter()
    for place, count in by_place(line).items():
        kinds[READS[place]] += count
    assert kinds[IDS] == 1, line
    assert kinds[MASK] <= 1, line
    assert kinds[SIZES] <= (2 if line["layout"].startswith("mixed") else 1), line


PROBE = """
    import json, torch, pretend_device as sim
    import tokenprune
    from tokenprune.methods.uniform import Uniform
    from pretend_cells import device_model, batch_of, run

    batch = {name: sim.put(value) for name, value in batch_of("llava", "one_left").items()}
    select, found = Uniform.select, {}

    def planted(what):
        def changed(self, view):
            what(view.features)
            return select(self, view)
        return changed

    # planted in a file of the library, as far as the counter can tell
    def compiled(text):
        space = {"torch": torch}
        exec(compile("def what(x):\\n    " + text, sim.library[0] + "planted.py", "exec"), space)
        return space["what"]

    for text in %r:
        Uniform.select = planted(compiled(text))
        try:
            reads = run(device_model("llava"), "uniform", 9, batch)["forward reads"]
            found[text] = [read.operation for read in reads if read.file == "planted.py"]
        except RuntimeError as error:
            found[text] = str(error)
    print(json.dumps(found))
"""
READING = {
    "bool(x.isnan().any())": "_local_scalar_dense",
    "float(x.mean())": "_local_scalar_dense",
    "x.tolist()": "tolist",
    "x.cpu()": "to the CPU",
    "x.nonzero()": "nonzero",
    "x[x > 0]": "index by a mask",
    "x.index_put_((x > 0,), x.new_zeros(1))": "index by a mask",
    "x.masked_select(x > 0)": "masked_select",
    "torch.unique(x.long())": "_unique2",
    "torch.zeros(x.shape).copy_(x)": "copy_",
    "torch.tensor([x.sum(), x.sum()])": "values into a new tensor",
    "x.flatten().repeat_interleave(x.flatten().long().clamp(0, 2))": "repeat_interleave",
    "torch.arange(x.long().sum().clamp(1, 3))": "a length",
}
MIXING = [
    "x + torch.zeros(x.shape)",
    "torch.cat([x, torch.zeros(x.shape)])",
    "torch.stack([x.sum(), torch.tensor(1.0)])",
    "torch.zeros(x.shape)[x.long().clamp(0, 0)]",
    "x.index_select(0, torch.zeros(1, dtype=torch.int64))",
    "torch.nn.functional.linear(x, torch.zeros(3, x.shape[-1]))",
]
HARMLESS = [
    "x + torch.tensor(1.0)",
    "x[torch.zeros(1, dtype=torch.int64)]",
    "torch.zeros(3).to(x.device)",
    "x.shape[0]",
]


@pytest.mark.slow
def test_the_pretend_device_finds_reads_and_mixing() -> None:
    """The matrix can fail: reads are counted where they are made, and mixing raises, as on a GPU."""
    texts = [*READING, *MIXING, *HARMLESS]
    done = python("-c", textwrap.dedent(PROBE) % (texts,))
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    for text, operation in READING.items():
        assert operation in found[text], f"{text}: {found[text]}"
    for text in MIXING:
        assert "must be on one device" in found[text], f"{text}: {found[text]}"
    for text in HARMLESS:
        assert found[text] == [], f"{text}: {found[text]}"


def test_a_wrong_token_and_a_wrong_logit_are_differences() -> None:
    code = """
        import json, torch
        from pretend_cells import differences
        one = {"logits": [torch.ones(3)], "tokens": [torch.arange(3)], "scores": [torch.ones(3)], "kept": [torch.arange(3)]}
        changes = {"logits": torch.ones(3) + 1e-4, "tokens": torch.arange(3) + 1, "scores": torch.ones(4), "kept": torch.arange(2)}
        found = {name: differences(one, {**one, name: [value]}) for name, value in changes.items()}
        found["rounding"] = differences(one, {**one, "logits": [torch.ones(3) + 1e-7]})
        found["none"] = differences(one, one)
        print(json.dumps(found))
    """  # noqa: E501
    done = python("-c", textwrap.dedent(code))
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found.pop("rounding") == [[], False] and found.pop("none") == [[], True]
    assert found == {name: [[name], False] for name in ("logits", "tokens", "scores", "kept")}
