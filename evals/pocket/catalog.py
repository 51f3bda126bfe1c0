"""Names and files of the pocket suites; imports nothing heavy, so that `tokenprune ls tasks` answers at once."""

from __future__ import annotations

from pathlib import Path

from tokenprune.evals.io.digest import file_digest

POCKET_FAMILIES = ("exist", "attribute", "count", "relation", "read", "global", "easy_vqa")


SUITES = {"pocket": POCKET_FAMILIES, "pocket-mixed": (*POCKET_FAMILIES, "video")}


FILES = {"pocket": "test.parquet", "pocket-mixed": "test_mixed.parquet"}


def suite_file(suite: str) -> Path:
    """Where the samples of a pocket suite are."""
    return Path(__file__).parent / "data" / FILES[suite]


def suite_fingerprint(suite: str) -> str:
    """Of a pocket suite: its file."""
    return file_digest(suite_file(suite))
