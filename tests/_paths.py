"""Where the checkout is: a test file that moves to another folder need not count its parents anew."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
