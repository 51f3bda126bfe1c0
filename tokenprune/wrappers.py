"""What others do to a model around us: wrappers over it, graphs compiled of it, modules that replace its modules."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from typing import Any

from torch import nn

from tokenprune.hooks import Ledger

_DEEPEST = 8  # wrappers over wrappers


def unwrap(model: Any) -> Any:
    """The transformers model inside what `torch.compile`, peft, DDP, FSDP or DataParallel make of one."""
    for _ in range(_DEEPEST):
        inner = _inside(model)
        if inner is None or inner is model:
            return model
        model = inner
    return model


def _inside(model: Any) -> Any:
    if not isinstance(model, nn.Module):
        return None
    modules = model._modules
    if isinstance(modules.get("_orig_mod"), nn.Module):  # torch.compile
        return modules["_orig_mod"]
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model") and "base_model" in modules:
        return model.get_base_model()  # type: ignore[operator]
    for name in ("module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"):
        if isinstance(modules.get(name), nn.Module) and len(modules) == 1:
            return modules[name]
    return None


def runs_again(root: nn.Module, module: nn.Module) -> bool:
    """Whether a `checkpoint_wrapper` of torch.distributed, below `root`, is around `module`, so that the module and
    its hooks run a second time in the backward pass. Hooks of the wrapper itself do not."""
    return any(
        isinstance(outer._modules.get("_checkpoint_wrapped_module"), nn.Module)
        and outer is not module
        and any(inner is module for inner in outer.modules())
        for outer in root.modules()
    )


def drop_graphs(ledger: Ledger) -> None:
    """Make compiled code see the hooks of a model, now and until `ledger` is undone.

    Graphs that Dynamo compiled before know no hooks, also those of other objects of the class, so they are dropped;
    graphs that it compiles from now on are told to check for hooks. Undoing drops them again.
    """
    if "torch._dynamo" not in sys.modules:  # opaque() has loaded it; without it nothing is compiled
        return
    import torch._dynamo

    config = torch._dynamo.config
    with _lock:
        if not _at_work:
            _at_work.append(config.skip_nnmodule_hook_guards)
        _at_work.append(True)
        config.skip_nnmodule_hook_guards = False
        torch._dynamo.reset()

    def undo() -> None:
        with _lock:
            _at_work.pop()
            torch._dynamo.reset()
            if len(_at_work) == 1:  # no other model has hooks
                config.skip_nnmodule_hook_guards = _at_work.pop()

    ledger.add(undo)


_at_work: list[bool] = []  # what the setting was, then an entry for each method at work
_lock = threading.Lock()


class Links:
    """Remembers which module is where, and notices when one was replaced.

    Args:
        root: the model.
        modules: those that matter; what leads to them from the root matters too.
    """

    def __init__(self, root: nn.Module, modules: Iterable[nn.Module]) -> None:
        wanted = set(map(id, modules))
        self._links: dict[tuple[int, str], tuple[str, nn.Module, str, nn.Module]] = {}
        self._walk(root, "", wanted)

    def _walk(self, parent: nn.Module, path: str, wanted: set[int]) -> bool:
        """Note the links below `parent` that lead to a wanted module; whether there are any."""
        leads_there = False
        for name, child in parent._modules.items():
            if child is None:
                continue
            below = f"{path}.{name}" if path else name
            if self._walk(child, below, wanted) or id(child) in wanted:
                self._links[id(parent), name] = below, parent, name, child
                leads_there = True
        return leads_there

    def check(self) -> None:
        """Raise RuntimeError if a module was replaced."""
        for path, parent, name, child in self._links.values():
            if parent._modules.get(name) is not child:
                now = type(parent._modules.get(name)).__name__
                raise RuntimeError(
                    f"{path} of the model was a {type(child).__name__} when the method was applied and is another "
                    f"{now} now (adapters, quantizers and checkpoint wrappers replace modules), so the method would "
                    "read what the model no longer computes. Call the handle's remove() and apply the method again."
                )


class AsConfigured:
    """An attention module as attention functions see it, with its own config in place of the one that names ours: flash
    functions look up there which of them they are."""

    def __init__(self, module: Any, config: Any) -> None:
        self._module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
