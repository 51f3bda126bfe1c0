"""TRL's trainers on a pruned model: each loss is that of the masked model, and so are the weights after two steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from _trainers import METHODS, PLAIN, QUESTIONS, compare, pictures, processor_of, pruned_and_masked, say

trl = pytest.importorskip("trl")
pytest.importorskip("torchvision")  # pictures of Qwen2-VL's processor

# TRL's own settings speak of gradient checkpointing by its older name
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")
FAMILIES = ["llava", "qwen2_vl"]


@pytest.fixture(scope="module")
def processors(folders: dict[str, Path]) -> dict[str, Any]:
    return {name: processor_of(name, folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tmp_path_factory.mktemp("hub") / name for name in FAMILIES}


def data(columns: Any) -> Any:
    from datasets import Dataset

    rows = zip(QUESTIONS, pictures(len(QUESTIONS)))
    return Dataset.from_list([{"images": [picture], **columns(i, text)} for i, (text, picture) in enumerate(rows)])


def towers(name: str) -> list[str]:
    """Methods that the family's tower takes: Qwen2-VL's has no CLS token."""
    return METHODS if name == "llava" else METHODS[1:]


CELLS = [(name, method) for name in FAMILIES for method in towers(name)]


@pytest.mark.parametrize(("name", "method"), CELLS)
def test_sft(name: str, method: str, processors: dict[str, Any], tmp_path: Path) -> None:
    """Labels on every token, pictures among them; rows padded on the right; gradient checkpointing, TRL's default."""
    rows = data(lambda i, text: {"messages": [*say("user", text), *say("assistant", "yes red" if i % 2 else "no")]})

    def make(model: Any, folder: Path) -> Any:
        settings = trl.SFTConfig(output_dir=str(folder), max_length=None, **PLAIN)
        return trl.SFTTrainer(model, settings, train_dataset=rows, processing_class=processors[name])

    pruned, truth, passes = pruned_and_masked(name, method, make, tmp_path)
    compare(pruned, truth, ("entropy", "mean_token_accuracy"))
    assert len(passes) == 2 and all(len(kept) == 9 for view in passes for row in view.kept for kept in row)


@pytest.mark.parametrize("method", METHODS)
def test_sft_of_completions_with_label_smoothing(method: str, processors: dict[str, Any], tmp_path: Path) -> None:
    """Label smoothing takes the loss out of the model: logits are asked for without labels."""
    rows = data(lambda i, text: {"prompt": say("user", text), "completion": say("assistant", "yes red"[: 3 + 4 * i])})

    def make(model: Any, folder: Path) -> Any:
        settings = trl.SFTConfig(output_dir=str(folder), max_length=None, label_smoothing_factor=0.1, **PLAIN)
        return trl.SFTTrainer(model, settings, train_dataset=rows, processing_class=processors["llava"])

    pruned, truth, passes = pruned_and_masked("llava", method, make, tmp_path)
    compare(pruned, truth, ("entropy",))
    assert len(passes) == 4  # one for the loss and one for the numbers in the log


@pytest.mark.parametrize(("name", "method"), CELLS)
def test_dpo(name: str, method: str, processors: dict[str, Any], tmp_path: Path) -> None:
    """Against a reference that sees every token."""
    from _families import BUILDERS

    rows = data(
        lambda i, text: {
            "prompt": say("user", text),
            "chosen": say("assistant", "yes red one" if i % 2 else "two"),
            "rejected": say("assistant", "no" if i % 2 else "blue three no"),
        }
    )

    def make(model: Any, folder: Path) -> Any:
        settings = trl.DPOConfig(output_dir=str(folder), max_length=None, **PLAIN)
        reference = BUILDERS[name](seed=1)
        return trl.DPOTrainer(model, reference, settings, train_dataset=rows, processing_class=processors[name])

    pruned, truth, passes = pruned_and_masked(name, method, make, tmp_path)
    compare(pruned, truth, ("logps/chosen", "logps/rejected", "entropy"))
    assert len(passes) == 2 and all(len(kept) == 9 for view in passes for row in view.kept for kept in row)


@pytest.mark.parametrize(("name", "method"), CELLS)
def test_grpo(name: str, method: str, processors: dict[str, Any], folders: dict[str, Path], tmp_path: Path) -> None:
    """Prompts padded on the left, answers that end early on the right; answers come of generate() in between.

    The loss holds the distance to a reference that sees every token, which the trainer loads by itself: without it, a
    first step's loss says nothing of the model.
    """
    rows = data(lambda i, text: {"prompt": say("user", text)})
    answers: list[list[list[int]]] = []

    def reward(completion_ids: list[list[int]], **rest: Any) -> list[float]:
        answers.append(completion_ids)
        return [float(sum(ids) % 7) for ids in completion_ids]

    def make(model: Any, folder: Path) -> Any:
        model.generation_config.eos_token_id = [1, *range(8, 24)]  # answers end early, not all at once
        settings = trl.GRPOConfig(
            output_dir=str(folder), num_generations=2, max_completion_length=5, beta=0.1,
            **{**PLAIN, "per_device_train_batch_size": 4},
        )  # fmt: skip
        model.config._name_or_path = str(folders[name])
        return trl.GRPOTrainer(model, reward, settings, train_dataset=rows, processing_class=processors[name])

    pruned, truth, passes = pruned_and_masked(name, method, make, tmp_path)
    half = len(answers) // 2
    assert answers[:half] == answers[half:], "the masked model answers otherwise"
    assert len({len(ids) for batch in answers for ids in batch}) > 1, "no answer ended early"
    compare(pruned, truth, ("reward", "entropy"))
    assert all(len(kept) == 9 for view in passes for row in view.kept for kept in row)
    assert torch.tensor([log["reward_std"] for log in truth.logs]).max() > 0
