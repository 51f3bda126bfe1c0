"""Cells of families, methods and interventions on the pretend device against the same run on the CPU, in a process of
its own: `python tests/pretend_cells.py` prints a line of JSON a cell. See test_pretend_device.py."""

from __future__ import annotations

import json
import random
import sys
import time
import zlib
from collections.abc import Container
from typing import Any

import _files  # noqa: F401
import pretend_device as sim
import torch
from _families import BUILDERS, batch_of, family, layouts
from masked_reference import example_hints, relative_error

import tokenprune
from tokenprune.registry import METHODS

KEEP, TOKENS, SEED = 9, 4, 0
TOLERANCE = 1e-5  # relative, fp32: that of the masked model's tests
VAR = {"method": "var", "layers": [1, 2, 3], "channels": [3, 11], "tau": 2.6, "p": 0.6, "rho": 0.85, "s_min": 0.5}
BEHIND = {"at": "layer:2", "prune": "fastv", "keep": KEEP}
PLANS: dict[str, Any] = {
    "var": [VAR],
    "zerotuning": ["zerotuning(gamma=3.0)"],
    "cmai": ["cmai"],
    "act": ["act(theta=0.06, layers=[1, 2, 3])"],
    "gift": ["gift(alpha=3.0)"],
    "imbalance": ["imbalance"],
    "naavit": ["naavit"],
    "shortv": ["shortv(layers=[1, 2])"],
    "var behind fastv": ["fastv@9", {**VAR, "tau": 2.2}],
    "var(channels=discover)": ["var(channels=discover,calibrate=2)"],
    "var(visual_sinks=keep)": [BEHIND, {**VAR, "tau": 2.2, "visual_sinks": "keep"}],
    "var(visual_sinks=drop)": [BEHIND, {**VAR, "tau": 2.2, "visual_sinks": "drop"}],
    "input and two layers": [
        {"at": "input", "prune": "random", "keep": 20},
        {"at": "layer:2", "prune": "divprune", "keep": 10},
        {"at": "layer:3", "prune": "fastv", "keep": 4},
    ],
    "tower, input and layer": [
        {"at": "vision:0", "prune": "random", "keep": 14},
        {"at": "input", "prune": "divprune", "keep": 10},
        {"at": "layer:2", "prune": "random", "keep": 5},
    ],
    "a_vl": ["a_vl(secondary=0.5,core=0.2,refresh=2,text=0.7)"],
    "a_vl behind fastv": ["fastv@9", "a_vl(secondary=0.5,core=0.2,refresh=2,text=0.7)"],
}
GENERATED: dict[str, dict[str, Any]] = {
    "vtc_cls, beams": {"num_beams": 2},
    "vtc_cls, drafts": {"prompt_lookup_num_tokens": 2},
}
"""Ways to generate that a family is tried with once."""
ON_DEVICE: dict[str, Any] = {}


def _not_ours_either(make: Any) -> Any:
    """The same maker of candidate generators, whose reads are their own."""

    def making(*args: Any, **kwargs: Any) -> Any:
        generator = make(*args, **kwargs)
        generator.get_candidates = sim.not_ours(generator.get_candidates)
        return generator

    return making


def device_model(name: str) -> Any:
    """The tiny model of a family on the pretend device."""
    if name not in ON_DEVICE:
        model = ON_DEVICE[name] = sim.move(BUILDERS[name]())
        for method in ("get_image_features", "get_video_features"):
            if hasattr(model.model, method):
                setattr(model.model, method, sim.not_ours(getattr(model.model, method)))

        model.generate = sim.not_ours(model.generate)
        model.prepare_inputs_for_generation = sim.not_ours(model.prepare_inputs_for_generation)
        model._get_candidate_generator = _not_ours_either(model._get_candidate_generator)

        def begins(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            cache = kwargs.get("past_key_values", kwargs.get("cache"))
            held = cache is not None and cache.get_seq_length() > 0
            sim.step[-1] = "decode" if held else "prompt"

        model.register_forward_pre_hook(begins, with_kwargs=True)
    return ON_DEVICE[name]


@torch.no_grad()
def run(model: Any, plan: Any, keep: Any, batch: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A forward, and greedy tokens with their logits; on the pretend device with the reads of both."""
    found: dict[str, Any] = {}
    with tokenprune.applied(model, plan, keep=keep) as handle:
        for stage in handle.stages:
            if stage.pruner.needed_hints:
                handle.set_hints(**example_hints(stage.pruner, 64))
        for part in ("forward", "generate"):
            sim.reads.clear()
            sim.step[-1] = "prompt"
            if part == "forward":
                found["logits"] = [model(**batch).logits]
            else:
                out = model.generate(
                    **batch, max_new_tokens=TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True,
                    **more,
                )  # fmt: skip
                found["tokens"], found["scores"] = [out.sequences], list(out.logits)
            found[f"{part} reads"] = dict(sim.reads)
        found["kept"] = [tokens for row in handle.kept for tokens in row]
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> tuple[list[str], bool]:
    """Which results differ (tokens and kept tokens in any bit, logits by more than rounding), and whether logits are
    the same to the bit too. They need not be: kernels have a way of their own for batches on a CPU."""
    wrong, exact = [], True
    for part in ("logits", "tokens", "scores", "kept"):
        mine, theirs = [[sim.raw(value).cpu() for value in found[part]] for found in (one, other)]
        if len(mine) == len(theirs) and all(torch.equal(a, b) for a, b in zip(mine, theirs)):
            continue
        exact = False
        near = part in ("logits", "scores") and len(mine) == len(theirs)
        if not near or any(a.shape != b.shape or relative_error(a, b) > TOLERANCE for a, b in zip(mine, theirs)):
            wrong.append(part)
    return wrong, exact


def cells() -> list[tuple[str, str, str]]:
    """(family, method or plan, layout): every pair once and every layout of a family at least once, drawn by a seed."""
    drawn, found = random.Random(SEED), []
    for name in BUILDERS:
        own = layouts(name)
        order = drawn.sample(own, len(own))
        for number, method in enumerate([*METHODS.names(), *PLANS]):
            found.append((name, method, order[number % len(order)]))
            inside = method in METHODS.names() and METHODS.get(method).site in ("vision", "pixels")
            if inside and found[-1][2].startswith(("mixed", "interpolated")):  # which may be pooled, and refused
                found.append((name, method, "one_left"))
        found += [(name, way, "one_left") for way in GENERATED]
    return found


def cell(name: str, method: str, layout: str) -> dict[str, Any]:
    """One cell: its differences and reads, or the sentence of a refusal, which must be the same on both devices."""
    begin = time.process_time()
    plan, keep = PLANS.get(method, method.split(",")[0]), None if method in PLANS else KEEP
    more = GENERATED.get(method, {})
    batch = batch_of(name, layout)
    line: dict[str, Any] = {"family": name, "method": method, "layout": layout}
    results = []
    # as on the pretend device: a weight that could have a gradient is multiplied in another way, and rounds otherwise
    plain = family(name).requires_grad_(False)
    for model, own in ((plain, batch), (device_model(name), {k: sim.put(v) for k, v in batch.items()})):
        try:
            results.append(run(model, plan, keep, own, **more))
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
    cpu, device = results
    if isinstance(cpu, str) or isinstance(device, str):
        same = cpu == device and cpu.startswith("ValueError")
        line |= {"refused": cpu} if same else {"differences": [f"CPU: {cpu}"[:500], f"device: {device}"[:500]]}
    else:
        line["differences"], line["exact"] = differences(cpu, device)
        line["reads"] = [
            [part, *read, count]
            for part in ("forward", "generate")
            for read, count in sorted(device[f"{part} reads"].items())
        ]
    line["seconds"] = round(time.process_time() - begin, 2)
    return line


def sampled() -> list[tuple[str, str, str]]:
    """A third of the cells, drawn by their names."""
    return [cell for cell in cells() if zlib.crc32("-".join(cell).encode()) % 3 == 0]


def main(wanted: Container[str] | None = None) -> None:
    for name, method, layout in sampled() if wanted == ["--sampled"] else cells():
        if wanted in (None, ["--sampled"]) or name in wanted:
            print(json.dumps(cell(name, method, layout)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or None)
