"""Names to classes: one registry each for methods, interventions, cache policies and model families.

A built-in is a file: `methods/NAME.py` is the method NAME, and it is imported the first time it is asked for, so that
listing names costs no import of torch. A user's own class joins with the decorator `register_method("name")`,
`register_intervention("name")`, `register_cache_policy("name")` or `register_model("name")`; that of an installed
package with an entry point `name = "module"` in the group `tokenprune.methods`, `tokenprune.interventions`,
`tokenprune.cache_policies` or `tokenprune.adapters`, and is then known to the command line too. A package that cannot
be imported switches itself off with a warning, and nothing else. The command line and the processes that it starts
import one's own files by `--import FILE.py`, see `user_files`.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import NewType, TypeVar

from tokenprune.user_files import import_named_files

T = TypeVar("T", bound=type)
MethodName = NewType("MethodName", str)
"""A name that type checkers take as it is, while they spell ours: `apply(model, MethodName("my_own"), keep=64)`."""


def near(name: str, known: Sequence[str]) -> str:
    """A ` Did you mean ...?` clause with the near matches of `name` in `known`, or an empty string."""
    matches = get_close_matches(str(name), known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""


@cache
def _installed(group: str) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))


class Registry:
    """Classes by name; a built-in is a file of `package` and has its name.

    Args:
        kind: what is registered, for error messages ("method").
        package: dotted name of the package whose files are the built-ins.
        base: `module:Class` that every class must derive from, imported when a class registers, not before; None: any
            class will do.
    """

    def __init__(self, kind: str, package: str, base: str | None = None) -> None:
        self.kind = kind
        self.package = package
        self._base = base
        self._classes: dict[str, type] = {}
        self._broken: dict[str, str] = {}

    def _files(self) -> dict[str, Path]:
        files: dict[str, Path] = {}
        for folder in import_module(self.package).__path__:
            for file in sorted(Path(folder).glob("*.py")):
                if not file.stem.startswith("_"):
                    files.setdefault(file.stem, file)
        return files

    def _plugins(self) -> dict[str, EntryPoint]:
        """What installed packages offer; a built-in of the same name wins, and what is broken is left out."""
        taken = {*self._files(), *self._broken}
        return {entry.name: entry for entry in _installed(self.package) if entry.name not in taken}

    def names(self) -> list[str]:
        """Every known name, sorted; imports nothing but the files that the command line named."""
        import_named_files()
        return sorted({*self._files(), *self._plugins(), *self._classes})

    def loaded(self) -> dict[str, type]:
        """Every class by name, all of them imported; packages that cannot be are left out, with a warning each."""
        for name, plugin in self._plugins().items():
            if name not in self._classes:
                self._load_plugin(name, plugin)
        return {name: self.get(name) for name in self.names()}

    def _load_plugin(self, name: str, plugin: EntryPoint) -> None:
        """Import what an installed package offers; where that fails, switch it off and warn."""
        before = set(self._classes)
        try:
            import_module(plugin.module)
        except Exception as error:
            why = f"{plugin.module} cannot be imported ({type(error).__name__}: {error})"
        else:
            if name in self._classes:
                return
            others = ", ".join(sorted(set(self._classes) - before))
            why = f"{plugin.module} registers no {self.kind} of that name" + (f", but {others}" if others else "")
        self._broken[name] = f"{why}; its package is {plugin.dist.name if plugin.dist else 'unknown'}"
        warnings.warn(
            f"The installed {self.kind} {name!r} is switched off: {self._broken[name]}. Mend it or uninstall it; "
            "everything else works.",
            RuntimeWarning,
            stacklevel=4,
        )

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: make the class known as `name` (lower snake case).

        Raises:
            ValueError: the name is not lower snake case, or another class has it.
            TypeError: what is registered does not derive from the registry's base class.
        """
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"A {self.kind} name must be lower snake case, got {name!r}.")

        def decorate(cls: T) -> T:
            self._check_base(name, cls)
            present = self._classes.get(name)
            if present is not None and present.__module__ != cls.__module__:
                raise ValueError(
                    f"The {self.kind} name {name!r} is taken by {present.__module__}.{present.__qualname__}; "
                    "choose another name."
                )
            file = self._files().get(name)
            if present is None and file is not None and cls.__module__ != f"{self.package}.{name}":
                raise ValueError(f"The {self.kind} name {name!r} is taken by the built-in {file}; choose another name.")
            self._classes[name] = cls
            cls.name = name  # type: ignore[attr-defined]
            return cls

        return decorate

    def _check_base(self, name: str, cls: object) -> None:
        if self._base is None:
            return
        module, _, wanted = self._base.partition(":")
        # the module of a class that derives from the base has imported it, so this costs nothing there
        if not isinstance(cls, type) or not issubclass(cls, getattr(import_module(module), wanted)):
            raise TypeError(
                f"The {self.kind} {name!r} must be a class that derives from tokenprune.{wanted}, got "
                f"{cls.__qualname__ if isinstance(cls, type) else repr(cls)}."
            )

    def unregister(self, name: str) -> None:
        """Forget a class that was registered by a user (built-ins stay)."""
        self._classes.pop(name, None)

    def get(self, name: str) -> type:
        """The class called `name`.

        Raises:
            KeyError: no such name; the message lists the near matches and all known names.
        """
        if name not in self._classes:
            plugin = self._plugins().get(name)
            if plugin is not None:
                self._load_plugin(name, plugin)
            if name in self._broken:
                raise UnknownName(f"The installed {self.kind} {name!r} is switched off: {self._broken[name]}.")
            if name not in self.names():
                raise UnknownName(
                    f"There is no {self.kind} called {name!r}.{near(name, self.names())} "
                    f"Known: {', '.join(self.names())}."
                )
            if name not in self._classes:
                module = f"{self.package}.{name}"
                import_module(module)
                if name not in self._classes:
                    raise ValueError(f"{module} registers no {self.kind} called {name!r}.")
        return self._classes[name]

    def registered(self, name: str) -> type | None:
        """The class called `name` if it is there already; imports nothing."""
        return self._classes.get(name)

    def file_of(self, name: str) -> Path | None:
        """The file of a built-in; None for what a user or an installed package registers."""
        return self._files().get(name)

    def class_name(self, name: str) -> str:
        """What the class of a built-in is called, read from its source."""
        file = self._files()[name]
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            calls = [call for call in getattr(node, "decorator_list", []) if isinstance(call, ast.Call)]
            if any(isinstance(arg, ast.Constant) and arg.value == name for call in calls for arg in call.args):
                return node.name  # type: ignore[attr-defined]
        raise ValueError(f"{file} registers no {self.kind} called {name!r}.")

    def class_called(self, name: str) -> type:
        """The built-in class called `name`, for `from tokenprune.methods import HoloV`; imports its file alone.

        Raises:
            AttributeError: there is none.
        """
        files = {} if name.startswith("_") else self._files()
        module = next((each for each in files if self.class_name(each) == name), None)
        if module is None:
            known = [self.class_name(each) for each in files]
            raise AttributeError(f"module {self.package!r} has no attribute {name!r}.{near(name, known)}")
        return self.get(module)

    def describe(self, name: str) -> str:
        """The first line of the docstring, read from the source: nothing is imported."""
        if name in self._classes and name not in self._files():
            doc = self._classes[name].__doc__
        elif name in self._plugins():
            doc = f"from the installed module {self._plugins()[name].module}"
        else:
            doc = ast.get_docstring(ast.parse(self._files()[name].read_text(encoding="utf-8")))
        return (doc or "").strip().split("\n")[0]


class UnknownName(KeyError):
    """A name that is in no registry; prints as the sentence that it was raised with."""

    def __str__(self) -> str:
        return str(self.args[0])


METHODS = Registry("method", "tokenprune.methods", "tokenprune.interfaces.pruner:Pruner")
INTERVENTIONS = Registry("intervention", "tokenprune.interventions", "tokenprune.interfaces.intervention:Intervention")
CACHE_POLICIES = Registry("cache policy", "tokenprune.cache_policies", "tokenprune.interfaces.cache_policy:CachePolicy")
MODELS = Registry("model family", "tokenprune.adapters", "tokenprune.interfaces.adapter:Adapter")

register_method = METHODS.register
register_intervention = INTERVENTIONS.register
register_cache_policy = CACHE_POLICIES.register
register_model = MODELS.register


def list_methods() -> list[MethodName]:
    """Names that `apply(model, name)` takes."""
    return [MethodName(name) for name in METHODS.names()]


def list_interventions() -> list[MethodName]:
    """Names of changes of attention that `apply(model, name)` takes, alone or together with a method."""
    return [MethodName(name) for name in INTERVENTIONS.names()]


def list_cache_policies() -> list[MethodName]:
    """Names of what stays in the KV cache that `apply(model, name)` takes, alone or together with a method."""
    return [MethodName(name) for name in CACHE_POLICIES.names()]


def beside_methods() -> dict[str, Registry]:
    """What a method may be written together with, and takes no budget: names of interventions and cache policies, and
    the registry of each."""
    return {name: registry for registry in (INTERVENTIONS, CACHE_POLICIES) for name in registry.names()}


def list_models() -> list[str]:
    """Model families with an adapter."""
    return MODELS.names()
