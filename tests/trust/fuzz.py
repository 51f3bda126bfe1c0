"""Wrong input by the thousand: what the library says must be a result or a sentence of its own, and no code runs.

    python tests/trust/fuzz.py --cases 100000
    python tests/trust/fuzz.py --kind plan --case 1234

A sentence is an exception whose last frame is a `raise` of the library; errors that fall out of Python or of another
package are findings, and so are files executed, processes started and pickles opened. Ends with status 1 if there are
any. The last line is the count, as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "evals"), str(TESTS.parent)]

SHARES = {"plan": 0.4, "task": 0.2, "request": 0.25, "sweep": 0.1, "run": 0.03, "prompt": 0.02}
"""Of the cases, by kind: what takes longer has fewer."""


def main() -> int:
    """Run the cases; 1 if there is a finding."""
    from _fuzz import judge
    from _fuzz_cases import KINDS, case
    from _fuzz_prompts import prompt

    KINDS["prompt"] = prompt
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="of all kinds together (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each kind (%(default)s)")
    parser.add_argument("--kind", choices=sorted(KINDS), action="append", help="only these")
    parser.add_argument("--case", type=int, help="this one alone, its traceback shown")
    parser.add_argument("--minutes", type=float, default=60, help="end after so many (%(default)s)")
    args = parser.parse_args()
    kinds = args.kind or list(SHARES)
    whole = sum(SHARES[kind] for kind in kinds)
    counts: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "case"
        folder.mkdir()
        if args.case is not None:
            case(kinds[0], args.case, folder)()
            print("No error.")
            return 0
        for kind in kinds:
            for number in range(args.first, args.first + round(args.cases * SHARES[kind] / whole)):
                if time.monotonic() - started > 60 * args.minutes:
                    break
                finding = judge(kind, number, case(kind, number, folder))
                counts[kind] += 1
                if finding is not None:
                    last = finding.where.splitlines()[-3:]
                    key = f"{finding.why} | {last[0].strip() if last else ''}"
                    seen[key] += 1
                    if seen[key] <= 2:
                        print(f"{kind} {number}: {finding.why}\n{finding.where}\n", flush=True)
    for key, times in seen.most_common():
        print(f"{times:6d}  {key}")
    said = {"cases": sum(counts.values()), "by_kind": dict(counts), "findings": sum(seen.values())}
    print(json.dumps({**said, "seconds": round(time.monotonic() - started)}))
    return 1 if seen else 0


if __name__ == "__main__":
    sys.exit(main())
