"""Runs a plan on channels-last maps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import max_pool2d

from .layers import Layer, Weights
from .plan import Pool, ProposalHead, Pyramid, Residual, Stage, Steps


def run_steps(steps: Steps, weights: Sequence[Weights], x: Tensor, owned: bool) -> Tensor:
    """`owned`: nobody else needs `x`, so that its memory may become the result's."""
    for step in steps:
        if isinstance(step, Layer):
            x = weights[step.index].convolve(step, x)
        elif isinstance(step, Pool):
            x = max_pool2d(x, step.kernel, step.stride, step.padding, step.dilation, step.ceil)
        else:
            x = _residual(step, weights, x, owned)
        owned = True
    return x


def _residual(block: Residual, weights: Sequence[Weights], x: Tensor, owned: bool) -> Tensor:
    *layers, last = block.layers
    if block.shortcut is not None:
        total = weights[block.shortcut.index].convolve(block.shortcut, x)
    else:
        total = x if owned or not weights[last.index].adds_in_place else x.clone()
    for layer in layers:
        x = weights[layer.index].convolve(layer, x)
    return weights[last.index].add_to(last, total, x)


def run_body(stages: Sequence[Stage], weights: Sequence[Weights], x: Tensor) -> dict[str, Tensor]:
    """The maps that the body gives out, by name."""
    maps = {}
    for stage in stages:
        x = run_steps(stage.steps, weights, x, owned=False)
        if stage.name is not None:
            maps[stage.name] = x
    return maps


def run_pyramid(pyramid: Pyramid, weights: Sequence[Weights], maps: Sequence[Tensor]) -> list[Tensor]:
    """Maps of the body -> maps of the pyramid, finest first."""
    *finer, coarsest = pyramid.lateral
    merged = weights[coarsest.index].convolve(coarsest, maps[-1])
    outputs = [merged]
    for layer, x in zip(reversed(finer), reversed(maps[:-1]), strict=True):
        merged = weights[layer.index].merge(layer, merged, x)
        outputs.insert(0, merged)
    outputs = [weights[layer.index].convolve(layer, x) for layer, x in zip(pyramid.output, outputs, strict=True)]
    return [*outputs, max_pool2d(outputs[-1], 1, 2, 0)] if pyramid.pooled else outputs


def run_proposal_head(
    head: ProposalHead, weights: Sequence[Weights], maps: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and deltas of each map, channels-last."""
    pairs = []
    for x in maps:
        hidden = run_steps(head.hidden, weights, x, owned=False)
        found = [weights[layer.index].convolve(layer, hidden) for layer in head.outputs]
        if len(found) == 1:
            found = weights[head.outputs[0].index].parts(found[0], head.channels)
        pairs.append(found)
    logits, deltas = (list(parts) for parts in zip(*pairs, strict=True))
    return logits, deltas
