"""Whether modules are as they were when they were read: reading a ResNet takes as long as launching it on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_

from torch import nn

from .guards import HOOKS
from .plan import forwards_as_defined

_CONTENTS = ("_parameters", "_buffers", "_modules", "return_layers", *HOOKS)
"""Attributes that are changed in place."""


class Watch:
    """Remembers what reading `roots`, and all modules in them, depends on: by identity, so that it is quick.

    An attribute that was set anew counts as changed, though it may equal what it was.  Of the tensors this says that
    they are the same, not that their values are.
    """

    def __init__(self, roots: Sequence[nn.Module | None]) -> None:
        self._roots = list(roots)
        self._modules = list(dict.fromkeys(part for root in roots if root is not None for part in root.modules()))
        self._types = [type(module) for module in self._modules]
        self._attributes = [list(vars(module).values()) for module in self._modules]
        found = (vars(module).get(name) for module in self._modules for name in _CONTENTS)
        contents = [content for content in found if content is not None]
        self._filled = [(content, list(content.values())) for content in contents if content]
        self._empty = [content for content in contents if not content]

    def holds(self, roots: Sequence[nn.Module | None]) -> bool:
        """Whether reading these would find the same."""
        return (
            _same(roots, self._roots)
            and not any(self._empty)
            and all(map(is_, map(type, self._modules), self._types))
            and all(_same(content.values(), values) for content, values in self._filled)
            and all(
                _same(vars(module).values(), values)
                for module, values in zip(self._modules, self._attributes, strict=True)
            )
            and forwards_as_defined()
        )


def _same(found, known: list) -> bool:
    return len(found) == len(known) and all(map(is_, found, known))
