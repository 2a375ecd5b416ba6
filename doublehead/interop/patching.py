"""Replacing functions and methods of an installed package, and putting them back."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType


def import_or_explain(name: str, caller: str, advice: str) -> ModuleType:
    """Import a module of somebody else's.

    Raises:
        ImportError: it cannot be imported; the message says what to do.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{caller}: {name} cannot be imported ({error}); {advice}") from error


def replace_everywhere(packages: Sequence[str], functions: Mapping[Callable, Callable]) -> None:
    """In all loaded modules of these packages, let names of the old functions mean the new ones.

    Modules hold functions under names of their own (`from x import f`), so replacing them where they are defined does
    not reach those that use them.

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
    """Some functions and methods of a package, and ours for them.

    Args:
        packages: names of the top-level packages in which functions are replaced.
        functions: theirs -> ours.
        methods: (class, name of the method) -> ours; an instance made before or after has it alike.
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
        """Also in modules loaded since."""
        replace_everywhere(self.packages, {ours: theirs for theirs, ours in self.functions.items()})
        for (kind, name), theirs in self.original_methods.items():
            setattr(kind, name, theirs)
