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
    from tokenprune._siblings import place_of

    __path__.append(place_of(_here.parent))

if TYPE_CHECKING:
    # the names of `_public` once more, for type checkers (`as` says that they are exported); a test compares the two
    from tokenprune.calls import applied as applied
    from tokenprune.calls import apply as apply
    from tokenprune.frame_questions import frame_scores as frame_scores
    from tokenprune.handle import Handle as Handle
    from tokenprune.interfaces.adapter import Adapter as Adapter
    from tokenprune.interfaces.budget import Budget as Budget
    from tokenprune.interfaces.cache_policy import CachePolicy as CachePolicy
    from tokenprune.interfaces.intervention import Intervention as Intervention
    from tokenprune.interfaces.pruner import ModelDepths as ModelDepths
    from tokenprune.interfaces.pruner import Pruner as Pruner
    from tokenprune.interfaces.pruner import Stage as Stage
    from tokenprune.interfaces.selection import Selection as Selection
    from tokenprune.interfaces.signals import Signal as Signal
    from tokenprune.interfaces.signals import TowerInfo as TowerInfo
    from tokenprune.interfaces.view import View as View
    from tokenprune.interfaces.visual import Raster as Raster
    from tokenprune.interfaces.visual import Visual as Visual
    from tokenprune.regions import zoomed as zoomed
    from tokenprune.registry import MethodName as MethodName
    from tokenprune.registry import list_cache_policies as list_cache_policies
    from tokenprune.registry import list_interventions as list_interventions
    from tokenprune.registry import list_methods as list_methods
    from tokenprune.registry import list_models as list_models
    from tokenprune.registry import register_cache_policy as register_cache_policy
    from tokenprune.registry import register_intervention as register_intervention
    from tokenprune.registry import register_method as register_method
    from tokenprune.registry import register_model as register_model
    from tokenprune.relevance import clip_relevance as clip_relevance

# The public names and their modules. They load on first use, so that `tokenprune --help` and `ls` never import torch.
_public = {
    "Adapter": "tokenprune.interfaces.adapter",
    "Budget": "tokenprune.interfaces.budget",
    "CachePolicy": "tokenprune.interfaces.cache_policy",
    "Handle": "tokenprune.handle",
    "Intervention": "tokenprune.interfaces.intervention",
    "MethodName": "tokenprune.registry",
    "ModelDepths": "tokenprune.interfaces.pruner",
    "Pruner": "tokenprune.interfaces.pruner",
    "Raster": "tokenprune.interfaces.visual",
    "Selection": "tokenprune.interfaces.selection",
    "Signal": "tokenprune.interfaces.signals",
    "Stage": "tokenprune.interfaces.pruner",
    "TowerInfo": "tokenprune.interfaces.signals",
    "View": "tokenprune.interfaces.view",
    "Visual": "tokenprune.interfaces.visual",
    "applied": "tokenprune.calls",
    "apply": "tokenprune.calls",
    "clip_relevance": "tokenprune.relevance",
    "frame_scores": "tokenprune.frame_questions",
    "list_cache_policies": "tokenprune.registry",
    "list_interventions": "tokenprune.registry",
    "list_methods": "tokenprune.registry",
    "list_models": "tokenprune.registry",
    "register_cache_policy": "tokenprune.registry",
    "register_intervention": "tokenprune.registry",
    "register_method": "tokenprune.registry",
    "register_model": "tokenprune.registry",
    "zoomed": "tokenprune.regions",
}
__all__ = sorted([*_public, "__version__"])  # type: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _public:
        from importlib import import_module

        return getattr(import_module(_public[name]), name)
    raise AttributeError(f"module 'tokenprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
