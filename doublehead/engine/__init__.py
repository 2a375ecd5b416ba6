"""Training, evaluation and checkpoints; the command lines are thin shells around this.

Names are loaded when first used, so that `--help` and a mistyped option do not wait for PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from doublehead.engine.checkpoint import LoadedModel, load_model, save_model
    from doublehead.engine.distributed import World, join_world
    from doublehead.engine.errors import CheckpointError, NonFiniteLossError, UserError
    from doublehead.engine.evaluator import evaluate, format_metrics
    from doublehead.engine.run import train
    from doublehead.engine.trainer import Hooks, Trainer

_HOME = {
    "LoadedModel": "checkpoint", "load_model": "checkpoint", "save_model": "checkpoint",
    "World": "distributed", "join_world": "distributed",
    "CheckpointError": "errors", "NonFiniteLossError": "errors", "UserError": "errors",
    "evaluate": "evaluator", "format_metrics": "evaluator",
    "train": "run",
    "Hooks": "trainer", "Trainer": "trainer",
}  # fmt: skip
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
