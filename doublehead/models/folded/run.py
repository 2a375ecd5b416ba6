"""Runs a plan on channels-last maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from .layers import Layer, Weights, add_to, convolve
from .plan import Pool, ProposalHead, Pyramid, Residual, Stage, Steps


def run_steps(steps: Steps, weights: Sequence[Weights], x: Tensor, owned: bool) -> Tensor:
    """`owned`: nobody else needs `x`, so that its memory may become the result's."""
    for step in steps:
        if isinstance(step, Layer):
            x = convolve(step, weights[step.index], x)
        elif isinstance(step, Pool):
            x = max_pool2d(x, step.kernel, step.stride, step.padding, step.dilation, step.ceil)
        else:
            x = _residual(step, weights, x, owned)
        owned = True
    return x


def _residual(block: Residual, weights: Sequence[Weights], x: Tensor, owned: bool) -> Tensor:
    *layers, last = block.layers
    if block.shortcut is not None:
        total = convolve(block.shortcut, weights[block.shortcut.index], x)
    else:
        total = x if owned else x.clone()
    for layer in layers:
        x = convolve(layer, weights[layer.index], x)
    return add_to(total, last, weights[last.index], x)


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
    merged = convolve(coarsest, weights[coarsest.index], maps[-1])
    outputs = [merged]
    for layer, x in zip(reversed(finer), reversed(maps[:-1]), strict=True):
        merged = interpolate(merged, size=x.shape[-2:], mode="nearest")
        merged = add_to(merged, layer, weights[layer.index], x)
        outputs.insert(0, merged)
    outputs = [convolve(layer, weights[layer.index], x) for layer, x in zip(pyramid.output, outputs, strict=True)]
    return [*outputs, max_pool2d(outputs[-1], 1, 2, 0)] if pyramid.pooled else outputs


def run_proposal_head(
    head: ProposalHead, weights: Sequence[Weights], maps: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and deltas of each map, channels-last."""
    pairs = []
    for x in maps:
        hidden = run_steps(head.hidden, weights, x, owned=False)
        found = [convolve(layer, weights[layer.index], hidden) for layer in head.outputs]
        if len(found) == 1:  # readers take the maps as rows, which without a copy of each would be one in every reader
            found = [part.contiguous(memory_format=torch.channels_last) for part in found[0].split(head.channels, 1)]
        pairs.append(found)
    logits, deltas = (list(parts) for parts in zip(*pairs, strict=True))
    return logits, deltas
