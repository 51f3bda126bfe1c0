"""The ledger that takes every hook away again."""

from __future__ import annotations

import pytest

from tokenprune.hooks import Ledger


def test_the_ledger_undoes_in_reverse_and_finishes_even_if_an_entry_fails():
    class Thing:
        value = 1

    thing, ledger, order = Thing(), Ledger(), []
    ledger.set(thing, "value", 2)
    ledger.set(thing, "value", 3)
    ledger.add(lambda: order.append(thing.value))

    def fail():
        raise RuntimeError("first")

    ledger.add(fail)
    with pytest.raises(RuntimeError, match="first"):
        ledger.undo()
    assert order == [3] and thing.value == 1 and "value" not in vars(thing) and len(ledger) == 0
