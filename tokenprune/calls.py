"""`apply` and `applied` as users call them.

At run time they are those of `api`. Type checkers read `calls.pyi` beside this file, which has an overload for each
method, written by .ci/type_stubs.py: `apply(model, "hollov", keep=64)` and `apply(model, "holov", keep=64,
varant="paper")` are errors to them. A name that only the user knows is written `MethodName("mine")` for them, or
given as an object; a text with everything in it ("holov@64", "tuned.yaml") is read when it runs.
"""

from __future__ import annotations

from tokenprune.api import applied as applied
from tokenprune.api import apply as apply
