"""tokenprune: visual-token pruning for stock Hugging Face vision-language models.

`apply(model, "holov", keep=128)` wraps a model in one call, `generate()` stays the call it was, and
`handle.remove()` gives back the very same model. See README.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout adapters/, kernels/, evals/ and configs/ are our siblings; in a wheel they are inside this package.
_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():
    __path__.append(str(_here.parent))

if TYPE_CHECKING:
    from tokenprune.api import applied, apply
    from tokenprune.handle import Handle
    from tokenprune.interfaces.intervention import Intervention
    from tokenprune.interfaces.pruner import Pruner
    from tokenprune.registry import (
        list_interventions,
        list_methods,
        list_models,
        register_intervention,
        register_method,
    )

# Public names load on first use, so that `tokenprune --help` and `tokenprune ls` never import torch.
_public = {
    "apply": "tokenprune.api",
    "applied": "tokenprune.api",
    "Handle": "tokenprune.handle",
    "Pruner": "tokenprune.interfaces.pruner",
    "Intervention": "tokenprune.interfaces.intervention",
    "register_intervention": "tokenprune.registry",
    "register_method": "tokenprune.registry",
    "list_interventions": "tokenprune.registry",
    "list_methods": "tokenprune.registry",
    "list_models": "tokenprune.registry",
}
__all__ = [
    "Handle", "Intervention", "Pruner", "__version__", "applied", "apply", "list_interventions", "list_methods",
    "list_models", "register_intervention", "register_method",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _public:
        from importlib import import_module

        return getattr(import_module(_public[name]), name)
    raise AttributeError(f"module 'tokenprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
