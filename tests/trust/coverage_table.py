"""Coverage by room, as a table: `python tests/trust/coverage_table.py` behind `make coverage`.

A share is of lines and branches together, as coverage.py counts them; the branches alone stand beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("covered_lines", "num_statements", "covered_branches", "num_branches")
ROOMS = (
    ("tokenprune, without vllm, and adapters", lambda file: _under(file, "tokenprune", "adapters") and not _vllm(file)),
    ("tokenprune/vllm", lambda file: _vllm(file)),
    ("kernels", lambda file: _under(file, "kernels")),
    ("evals, without pocket_training, learned and lmms", lambda file: _under(file, "evals") and not _apart(file)),
    ("evals/pocket_training, learned and lmms", lambda file: _apart(file)),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "tests/trust/coverage.ini")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "coverage.json"
        command = [sys.executable, "-m", "coverage", "json", "-q", f"--rcfile={args.config}", "-o", str(found)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        print(table(json.loads(found.read_text(encoding="utf-8"))["files"]))
    return 0


def table(files: dict[str, Any]) -> str:
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for name, measured in files.items():
        path = Path(name)
        file = (path.relative_to(ROOT) if path.is_absolute() else path).as_posix()
        for room, has in ROOMS:
            if has(file):
                sums[room] = [have + measured["summary"][one] for have, one in zip(sums[room], NAMES)]
    rows = ["| part | lines | lines and branches | branches |", "|---|---:|---:|---:|"]
    for room, _ in ROOMS:
        lines, of_lines, branches, of_branches = sums[room]
        if of_lines:
            both, alone = (lines + branches) / (of_lines + of_branches), branches / max(1, of_branches)
            rows.append(f"| {room} | {of_lines:,} | {both:.1%} | {alone:.1%} |")
    return "\n".join(rows)


def _under(file: str, *folders: str) -> bool:
    return file.split("/")[0] in folders


def _vllm(file: str) -> bool:
    return file.startswith("tokenprune/vllm/")


def _apart(file: str) -> bool:
    return file.startswith(("evals/pocket_training/", "evals/learned/", "evals/lmms/"))


if __name__ == "__main__":
    sys.exit(main())
