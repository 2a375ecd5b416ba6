"""Where a detector's time goes: stage by stage, of torchvision's models and of ours."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from inputs import DEVICE
from torch import nn

from doublehead.models import detector


def stages(model: nn.Module) -> list[tuple[object, str, str]]:
    """(class or module of code, its function, stage); of nested ones the time counts for the innermost.

    Never an instance's: fast paths step aside where a module's own `forward` was replaced.
    """
    if hasattr(model, "roi_heads"):
        transform, heads = type(model.transform), type(model.roi_heads)
        return [
            (transform, "forward", "transform"), (transform, "postprocess", "transform"),
            (type(model.backbone), "forward", "backbone"), (type(model.rpn), "forward", "rpn"),
            (heads, "forward", "roi, heads"), (heads, "postprocess_detections", "post-processing"),
        ]  # fmt: skip
    transform = type(model.transform)
    return [
        (transform, "forward", "transform"), (transform, "detections", "transform"),
        (type(model.detector.backbone), "forward", "backbone"), (type(model.detector.rpn), "forward", "rpn"),
        (detector, "run_heads", "roi, heads"), (detector, "detect", "post-processing"),
    ]  # fmt: skip


@contextmanager
def timed(functions: Iterable[tuple[object, str, str]]) -> Iterator[dict[str, float]]:
    """Seconds in each stage while this is open."""
    seconds: dict[str, float] = {}
    inner = [0.0]

    def watch(function: Callable, stage: str) -> Callable:
        def run(*args, **kwargs):
            inner.append(0.0)
            started = now()
            try:
                return function(*args, **kwargs)
            finally:
                spent = now() - started
                seconds[stage] = seconds.get(stage, 0.0) + spent - inner.pop()
                inner[-1] += spent

        return run

    with pytest.MonkeyPatch.context() as patch:
        for owner, name, stage in functions:
            patch.setattr(owner, name, watch(getattr(owner, name), stage))
        yield seconds


def now() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def shares(model: nn.Module, call: Callable[[], Any], calls: int = 2) -> dict[str, float]:
    """Milliseconds of each stage, mean of so many calls."""
    with timed(stages(model)) as seconds:
        for _ in range(calls):
            call()
    return {stage: round(value * 1e3 / calls, 2) for stage, value in seconds.items()}
