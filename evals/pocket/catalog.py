"""Names and files of the pocket suites; imports nothing heavy, so that `tokenprune ls tasks` answers at once."""

from __future__ import annotations

from pathlib import Path

from tokenprune.evals.io.digest import file_digest

POCKET_FAMILIES = ("exist", "attribute", "count", "relation", "read", "global", "easy_vqa")
CROWD_FAMILIES = ("exist", "relation")
HALLUCINATION_FAMILIES = ("random", "popular", "adversarial", "listing")
SUITES = {
    "pocket": POCKET_FAMILIES, "pocket-mixed": (*POCKET_FAMILIES, "video"),
    "pocket-crowd": CROWD_FAMILIES, "pocket-mixed-crowd": CROWD_FAMILIES,
    "pocket-hallucination": HALLUCINATION_FAMILIES, "pocket-mixed-hallucination": HALLUCINATION_FAMILIES,
}  # fmt: skip
FILES = {
    "pocket": "test.parquet", "pocket-mixed": "test_mixed.parquet",
    "pocket-crowd": "test_crowd.parquet", "pocket-mixed-crowd": "test_mixed_crowd.parquet",
    "pocket-hallucination": "test_hallucination.parquet",
    "pocket-mixed-hallucination": "test_mixed_hallucination.parquet",
}  # fmt: skip
TEST_ONLY = tuple(name for name in SUITES if name not in ("pocket", "pocket-mixed"))


def refuse_test_only(data: str, aim: str) -> None:
    """Raise if the task `data` is of a suite that has a test split only; `aim`: what it was wanted for."""
    suite = data.partition(":")[0]
    if suite in TEST_ONLY:
        other = "pocket-mixed" if suite.startswith("pocket-mixed") else "pocket"
        raise ValueError(
            f"{data} has a test split only, so there is nothing {aim} that would not spoil it; use {other} instead."
        )


def suite_file(suite: str) -> Path:
    """Where the samples of a pocket suite are."""
    return Path(__file__).parent / "data" / FILES[suite]


def suite_fingerprint(suite: str) -> str:
    """Of a pocket suite: its file."""
    return file_digest(suite_file(suite))
