"""The networks that can be folded, from modules to results; None: the caller runs the modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...ops import onednn
from ..folding import FoldedWeights, layer_dtype
from .guards import may_fold
from .layers import Weights, fold
from .plan import Reader, Unknown
from .run import run_body, run_proposal_head, run_pyramid, run_steps

_FOLDED: WeakKeyDictionary[nn.Module, FoldedWeights] = WeakKeyDictionary()
"""Of each network what was folded.  Beside the modules, so that copies, pickles and `state_dict` know nothing of it."""


def backbone(owner: nn.Module, body: nn.Module, pyramid: nn.Module | None, pixels: Tensor) -> dict[str, Tensor] | None:
    """Maps of a ResNet, through a feature pyramid if there is one.

    Args:
        owner: the module that is called; the weights are remembered as long as it lives.
        body: an `IntermediateLayerGetter` of a ResNet.
        pyramid: a `FeaturePyramidNetwork`, or None.
        pixels: `Tensor[B, 3, H, W]`.

    Returns:
        the maps by name as the modules name them, channels-last, in the dtype that convolutions run in.
    """

    def read(reader: Reader) -> tuple:
        return reader.body(body), None if pyramid is None else reader.pyramid(pyramid)

    def run(plan: tuple, weights: list[Weights], maps: list[Tensor]) -> dict[str, Tensor]:
        stages, levels = plan
        found = run_body(stages, weights, maps[0])
        if levels is None:
            return found
        names = [*found, *(["pool"] if levels.pooled else [])]
        return dict(zip(names, run_pyramid(levels, weights, list(found.values())), strict=True))

    return _folded(owner, read, run, [pixels])


def sequence(owner: nn.Module, modules: Iterable[nn.Module], x: Tensor) -> Tensor | None:
    """Convolutions, pools and residual blocks that run one after the other: `Tensor[N, C, H, W]` -> the last map."""
    return _folded(
        owner,
        lambda reader: reader.steps(modules),
        lambda plan, weights, maps: run_steps(plan, weights, maps[0], owned=False),
        [x],
    )


def rpn_head(
    owner: nn.Module, hidden: Iterable[nn.Module], logits: nn.Module, deltas: nn.Module, maps: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Objectness `Tensor[B, A, H, W]` and deltas `[B, 4 A, H, W]` of each map.

    Args:
        owner: as in `backbone`.
        hidden: the modules before the two outputs, one after the other.
        logits, deltas: the outputs' convolutions.
        maps: `Tensor[B, C, H, W]` each.
    """
    return _folded(owner, lambda reader: reader.proposal_head(hidden, logits, deltas), run_proposal_head, maps)


def remembered(owner: nn.Module) -> FoldedWeights:
    """Where the weights folded for this network are kept."""
    return _FOLDED.setdefault(owner, FoldedWeights())


def forget(owner: nn.Module) -> None:
    """Free what was folded for this network; the next call folds again."""
    _FOLDED.pop(owner, None)


def _folded(
    owner: nn.Module,
    read: Callable[[Reader], Any],
    run: Callable[[Any, list[Weights], list[Tensor]], Any],
    maps: Sequence[Tensor],
) -> Any:
    """Read the modules, fold them unless that is done, and run."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # nothing below is for a tracer
        return None
    if owner.training:
        forget(owner)
        return None
    reader = Reader()
    try:
        plan = read(reader)
    except Unknown:
        return None
    if not reader.tensors or not may_fold(maps, reader.tensors):
        return None
    if not all(bool(x.sum().isfinite()) for x in maps):  # fused ReLU would make 0 of NaN
        return None
    dtype = layer_dtype(maps[0])
    kind = (dtype, onednn.is_available(dtype), plan)
    sources = [*reader.tensors, *reader.counters]
    weights = remembered(owner).get(sources, kind, lambda: _fold(reader, dtype, len(maps)))
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return run(plan, weights, [x.to(dtype).contiguous(memory_format=torch.channels_last) for x in maps])


def _fold(reader: Reader, dtype: torch.dtype, sizes: int) -> list[Weights]:
    weights = [fold(*source, dtype, sizes) for source in reader.sources]
    if not all(layer.is_finite() for layer in weights):  # a broken model must be seen to be broken
        for layer in weights:
            layer.fused = False
    return weights
