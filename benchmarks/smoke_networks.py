"""What `smoke.py` runs of the networks before the heads: cuDNN's fused convolutions, and a backbone of them."""

from __future__ import annotations

import copy

import torch
from smoke_cases import FLOAT32, HALF, case, compare, convolution_eps, normal, weights
from torch.nn.functional import conv2d

from doublehead.config import BackboneConfig, RPNConfig
from doublehead.models.backbone import ResNetFPN
from doublehead.models.folded import networks
from doublehead.models.rpn import RPN
from doublehead.ops import cudnn

LAYERS = {
    "stem": (16, 64, 4, 1, (401, 673)),
    "stem, odd sides": (8, 64, 7, 2, (400, 672)),
    "1x1": (256, 64, 1, 1, (200, 336)),
    "1x1, residual": (64, 256, 1, 1, (200, 336)),
    "3x3": (256, 256, 3, 1, (100, 168)),
    "3x3, stride 2": (512, 512, 3, 2, (50, 84)),
    "3x3 of few cells": (256, 256, 3, 1, (13, 21)),
    "RoIs, residual": (256, 1024, 1, 1, (700, 7)),
}
"""Name -> channels, kernel, stride and height and width of the input."""


@case("cudnn", FLOAT32 + HALF)
def fused_convolutions(device, dtype):
    """New memory is full of NaN: cuDNN is given the result in a residual's place, times 0, where there is none."""
    for name, (inputs, outputs, kernel, stride, size) in LAYERS.items():
        if device == "cpu":
            inputs, outputs, size = 8, 16, (9, 7)
        x = normal(1, inputs, *size).to(device, dtype, memory_format=torch.channels_last)
        weight = weights(outputs, inputs, kernel, kernel, seed=1).to(device, dtype, memory_format=torch.channels_last)
        bias, options = (
            normal(outputs).to(device, dtype),
            {"stride": (stride,) * 2, "padding": ((kernel - 1) // 2,) * 2},
        )
        plain, exact = (conv2d(*(t.to(kind) for t in (x, weight, bias)), **options) for kind in (dtype, torch.float64))
        to = normal(*plain.shape).to(device, dtype, memory_format=torch.channels_last) if "residual" in name else None
        if to is not None:
            plain, exact = plain + to, exact + to.double()
        if device == "cuda":
            yield f"{name}: calls that are not fused", float(not cudnn.serves(x, weight, bias)), 0
            torch.full_like(plain, torch.nan)  # the allocator gives this memory out again
        if to is None:
            found = cudnn.convolution(x, weight, bias, relu=True, **options)
        else:
            found = cudnn.add_convolution(to, x, weight, bias, relu=True, **options)
        yield from compare(found, plain.relu(), exact.relu().cpu(), name, eps=convolution_eps(device, dtype))
    refused = len(cudnn._UNSERVED) if device == "cuda" else 0
    yield "calls without a kernel", float(refused), 0


@case("folded networks", FLOAT32 + HALF)
@torch.no_grad()
def folded_networks(device, dtype):
    """A backbone and an RPN's head under autocast, against their modules."""
    torch.manual_seed(0)
    backbone = ResNetFPN(BackboneConfig("resnet18", weights=None, fpn_channels=32)).eval().requires_grad_(False)
    rpn = RPN(RPNConfig(), 32).eval().requires_grad_(False)
    pixels = normal(2, 3, 64, 96).to(device)

    def run(backbone, rpn, pixels):
        maps = backbone(pixels)
        return [*maps, *(part for level in rpn._predict_all(maps) for part in level)]

    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        found = run(backbone.to(device), rpn.to(device), pixels)
        may_fold, networks.may_fold = networks.may_fold, lambda *_: False
        try:
            plain = [p.to(f.dtype) for p, f in zip(run(backbone, rpn, pixels), found, strict=True)]
        finally:
            networks.may_fold = may_fold
    exact = run(copy.deepcopy(backbone).double(), copy.deepcopy(rpn).double(), pixels.double())
    eps = convolution_eps(device, dtype) or torch.finfo(dtype).eps
    yield from compare(found, plain, [e.cpu() for e in exact], roundings=8, eps=eps)
