"""The networks that can be folded, from modules to results; None: the caller runs the modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...ops._folded import STREAMING_DEVICES, has_global_hooks
from ..folding import FoldedWeights, layer_dtype
from .guards import is_bare, may_fold
from .layers import Weights, fold
from .on_cpu import OneDNNWeights
from .on_cuda import CudnnWeights
from .plan import ProposalHead, Reader, Unknown
from .run import run_body, run_proposal_head, run_pyramid, run_steps
from .watch import Watch

ENGINES: dict[str, type[Weights]] = {"cpu": OneDNNWeights, "cuda": CudnnWeights}
"""Type of device -> how layers run there."""

_FOLDED: WeakKeyDictionary[nn.Module, FoldedWeights] = WeakKeyDictionary()
"""Of each network what was folded.  Beside the modules, so that copies, pickles and `state_dict` know nothing of it."""


class _Read(NamedTuple):
    """What was read of a network."""

    watch: Watch
    reader: Reader
    plan: Any


_READ: WeakKeyDictionary[nn.Module, _Read] = WeakKeyDictionary()


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
        last = list(found)[-1]
        found[last] = weights[0].mark(maps[0], found[last])  # a pyramid carries it from here into all levels
        if levels is None:
            return found
        names = [*found, *(["pool"] if levels.pooled else [])]
        return dict(zip(names, run_pyramid(levels, weights, list(found.values())), strict=True))

    return _folded(owner, [body, pyramid], read, run, [pixels])


def sequence(owner: nn.Module, modules: Iterable[nn.Module], x: Tensor) -> Tensor | None:
    """Convolutions, pools and residual blocks that run one after the other: `Tensor[N, C, H, W]` -> the last map."""
    modules = list(modules)
    return _folded(
        owner,
        modules,
        lambda reader: reader.steps(modules),
        lambda plan, weights, maps: weights[0].mark(maps[0], run_steps(plan, weights, maps[0], owned=False)),
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
    hidden = list(hidden)

    def read(reader: Reader) -> ProposalHead:
        return reader.proposal_head(hidden, logits, deltas)

    return _folded(owner, [*hidden, logits, deltas], read, run_proposal_head, maps)


def constant(owner: nn.Module, tensors: Sequence[Tensor], kind: Any, make: Callable[[], Any]) -> Any:
    """`make()`, which calls `owner`: remembered at inference for these tensors and this `kind`, as folded weights are.

    Nothing is remembered where a call of `owner` may be noticed, or while a tracer works.
    """
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if tracing or has_global_hooks() or not is_bare(owner):
        return make()
    return remembered(owner).get(tensors, kind, make)


def held_tensors(network: nn.Module) -> list[Tensor]:
    """What is remembered of all modules of `network`, for a caller that keeps it alive."""
    found = (_FOLDED.get(module) for module in network.modules())
    return [tensor for weights in found if weights is not None for tensor in weights.tensors()]


def remembered(owner: nn.Module) -> FoldedWeights:
    """Where the weights folded for this network are kept."""
    return _FOLDED.setdefault(owner, FoldedWeights())


def forget(owner: nn.Module) -> None:
    """Free what was folded for this network; the next call folds again."""
    _FOLDED.pop(owner, None)
    _READ.pop(owner, None)


def _folded(
    owner: nn.Module,
    roots: Sequence[nn.Module | None],
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
    known = _READ.get(owner)
    if known is None or not known.watch.holds(roots):
        reader = Reader()
        try:
            plan = read(reader)
        except Unknown:
            return None
        known = _READ[owner] = _Read(Watch(roots), reader, plan)
    _, reader, plan = known
    if not reader.tensors or not may_fold(maps, reader.tensors):
        return None
    dtype, device = layer_dtype(maps[0]), maps[0].device
    engine = ENGINES[device.type]
    if not engine.accept(maps):
        return None
    kind = (dtype, engine.has_kernels(device, dtype), plan)
    sources = [*reader.tensors, *reader.counters]
    weights = remembered(owner).get(sources, kind, lambda: _fold(reader, engine, dtype, len(maps)))
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return run(plan, weights, [weights[0].enter(x, dtype) for x in maps])


def _fold(reader: Reader, engine: type[Weights], dtype: torch.dtype, sizes: int) -> list[Weights]:
    tensors = [fold(*source, dtype) for source in reader.sources]
    if not _are_finite(tensors):
        engine = Weights  # a broken model must be seen to be broken
    weights = [engine(layer, *found, sizes) for (layer, *_), found in zip(reader.sources, tensors, strict=True)]
    for last, shortcut in reader.sums:
        weights[last].take_bias_of(weights[shortcut])
    return weights


def _are_finite(tensors: list[tuple[Tensor, Tensor | None]]) -> bool:
    """Not asked while a graph is recorded, when nothing can be read back."""
    found = [tensor.isfinite().all() for pair in tensors for tensor in pair if tensor is not None]
    if found[0].device.type in STREAMING_DEVICES and torch.cuda.is_current_stream_capturing():
        return True
    return bool(torch.stack(found).all())
