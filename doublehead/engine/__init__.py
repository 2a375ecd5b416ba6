"""Training, evaluation and checkpoints; the command lines are thin shells around this.

Names are loaded when first used, so that `--help` and a mistyped option do not wait for PyTorch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "checkpoint": ("LoadedModel", "load_model", "save_model"),
    "distributed": ("World", "join_world"),
    "errors": ("CheckpointError", "NonFiniteLossError", "UserError"),
    "evaluator": ("evaluate",),
    "metrics_text": ("format_metrics",),
    "run": ("train",),
    "trainer": ("Hooks", "Trainer"),
}
__all__ = sorted(name for names in _HOME.values() for name in names)


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
