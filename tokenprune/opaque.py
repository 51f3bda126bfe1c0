"""Hooks that `torch.compile` does not look into: it runs them as they are, between two compiled graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def opaque(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The same callable, kept out of compiled graphs: what it does depends on the prompt, on the host."""
    return torch.compiler.disable(hook, reason="tokenprune's bookkeeping runs on the host")
