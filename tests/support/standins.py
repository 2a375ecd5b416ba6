"""In place of hypothesis and tyro where they are not installed: files that use them are collected, tests skipped.

So the GPU tests in these files run on a machine that has little more than torch.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types

import pytest


class Anything:
    """Whatever is asked of it or done with it: itself."""

    def __getattr__(self, name: str) -> Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_, **__) -> Anything:
        return self

    def __or__(self, other) -> Anything:
        return self


def given(*_, **__):
    """The decorated test without arguments, skipped."""

    def skip(test):
        @pytest.mark.skip(reason="needs hypothesis, which is not installed")
        def skipped():
            pass

        skipped.__name__, skipped.__module__, skipped.__doc__ = test.__name__, test.__module__, test.__doc__
        skipped.pytestmark = [*getattr(test, "pytestmark", []), *skipped.pytestmark]
        return skipped

    return skip


def unchanged(*_, **__):
    """A decorator that does nothing: `settings`, `example`, ..."""
    return lambda test: test


def anything(name: str) -> Anything:
    """A module's attribute."""
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything()


def module(name: str) -> types.ModuleType:
    """A module with anything in it, which can be imported from now on."""
    made = sys.modules[name] = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)  # who asks whether there is one is told so
    made.__getattr__ = anything
    return made


def install() -> set[str]:
    """Makes the packages that are missing importable; returns their names."""
    missing = {package for package in ("hypothesis", "tyro") if importlib.util.find_spec(package) is None}
    if "hypothesis" in missing:
        hypothesis = module("hypothesis")
        hypothesis.strategies = module("hypothesis.strategies")
        hypothesis.given = given
        hypothesis.settings = hypothesis.example = hypothesis.seed = unchanged
    if "tyro" in missing:
        module("tyro")
    return missing
