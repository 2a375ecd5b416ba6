"""Replaces functions and methods of an installed package, and puts them back."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType


def import_or_explain(name: str, caller: str, advice: str) -> ModuleType:
    """Import a module of another project.

    Raises:
        ImportError: it cannot be imported; the message says what to do.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{caller}: {name} cannot be imported ({error}); {advice}") from error


def replace_everywhere(packages: Sequence[str], functions: Mapping[Callable, Callable]) -> None:
    """Rebind every name of an old function to the new one, in all loaded modules of these packages.

    Replacing a function only where it is defined would miss the modules that imported it (`from x import f`).

    Args:
        packages: names of top-level packages.
        functions: old -> new.
    """
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in packages or not isinstance(module, ModuleType):
            continue
        for attribute, value in list(vars(module).items()):
            for old, new in functions.items():
                if value is old:
                    setattr(module, attribute, new)


class Patch:
    """Replacements for functions and methods of a package.

    Args:
        packages: names of the top-level packages in which functions are replaced.
        functions: original -> replacement.
        methods: (class, name of the method) -> replacement; existing instances get it too.
    """

    def __init__(
        self,
        packages: Sequence[str],
        functions: Mapping[Callable, Callable],
        methods: Mapping[tuple[type, str], Callable],
    ) -> None:
        self.packages = packages
        self.functions = dict(functions)
        self.methods = dict(methods)
        self.original_methods = {(kind, name): vars(kind)[name] for kind, name in methods}

    def apply(self) -> None:
        replace_everywhere(self.packages, self.functions)
        for (kind, name), ours in self.methods.items():
            setattr(kind, name, ours)

    def undo(self) -> None:
        """Put the originals back, also in modules loaded since `apply`."""
        replace_everywhere(self.packages, {ours: theirs for theirs, ours in self.functions.items()})
        for (kind, name), theirs in self.original_methods.items():
            setattr(kind, name, theirs)


def renamed(old: str, new: Callable[[], None]) -> Callable[[], None]:
    """The function `new` under its former name: the first call gives a DeprecationWarning that names the new one.

    Args:
        old: the former name, dotted; the new one differs in its last part.
    """
    warned = False

    @functools.wraps(new)
    def alias() -> None:
        nonlocal warned
        if not warned:
            warned = True
            better = f"{old.rpartition('.')[0]}.{new.__name__}"
            warnings.warn(f"{old} is now called {better}", DeprecationWarning, stacklevel=2)
        new()

    return alias
