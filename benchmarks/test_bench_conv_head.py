"""The conv-head (K = 5, non-local) against the same modules in plain PyTorch, side by side, and a whole double head."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from inputs import DEVICE
from torch import nn

from doublehead.config import DetectionConfig, HeadConfig, RoIConfig
from doublehead.models.conv_tower import ConvTower
from doublehead.models.detections import Sources
from doublehead.models.heads import Heads
from doublehead.models.inference import run_heads
from doublehead.models.structures import Proposals

ROIS = 1000 if DEVICE == "cuda" else 200
SURVIVORS = ROIS // 4
MFLOP = 748  # per RoI, counted: K = 5 with two non-local blocks
PRECISION = "bfloat16" if DEVICE == "cuda" else "float32"
DETAILS = {"rois": ROIS, "precision": PRECISION}


def lively(module: nn.Module) -> nn.Module:
    """Batch norms and last weights that are not zero, so that a wrong result shows."""
    torch.manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.running_mean, std=0.1)
        elif isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    return module.to(DEVICE, memory_format=torch.channels_last)


def towers() -> tuple[ConvTower, ConvTower]:
    """Module by module, and fused; the same weights."""
    fused = lively(ConvTower(256, HeadConfig()))
    plain = copy.deepcopy(fused)
    plain.fused = False
    return plain, fused


def maps() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROIS, 256, 7, 7, generator=generator)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    return x.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


def precision():
    return torch.autocast("cuda", torch.bfloat16) if DEVICE == "cuda" else nullcontext()


def close(actual, expected) -> None:
    """Within a few roundings of the largest value: the layers in between round differently."""
    scale = max(value.abs().max().item() for value in expected)
    tolerance = 0.05 if DEVICE == "cuda" else 1e-4
    for value, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=tolerance * scale)


def compiled(module: nn.Module) -> nn.Module | None:
    return torch.compile(module, mode="max-autotune-no-cudagraphs") if DEVICE == "cuda" else None


NOT_COMPILED = "torch.compile is timed on a GPU only"


def test_inference(compare):
    plain, fused = (tower.eval() for tower in towers())
    x, by_compiler = maps(), compiled(plain)

    def run(tower):
        with torch.inference_mode(), precision():
            return (tower(x).float(),)

    compare(
        op="conv_head",
        case="conv-head inference",
        details=DETAILS | {"gflop": MFLOP * ROIS / 1e3},
        check=close,
        providers={
            "reference": lambda: run(plain),
            "torch.compile": (lambda: run(by_compiler)) if by_compiler else NOT_COMPILED,
            "doublehead": lambda: run(fused),
        },
    )


@pytest.mark.parametrize("recompute", [False, True])
def test_training_step(compare, recompute):
    plain, fused = (tower.train() for tower in towers())
    fused.recompute = recompute
    x, by_compiler = maps().requires_grad_(), compiled(plain)

    def run(tower):
        tower.zero_grad(set_to_none=True)
        x.grad = None
        with precision():
            y = tower(x)
        y.float().square().mean().backward()
        return y.detach().float(), x.grad.float()

    compare(
        op="conv_head",
        case="conv-head training step" + (", recompute" if recompute else ""),
        details=DETAILS | {"gflop": 3 * MFLOP * ROIS / 1e3},
        check=close,
        providers={
            "reference": lambda: run(plain),
            "torch.compile": (lambda: run(by_compiler)) if by_compiler else NOT_COMPILED,
            "doublehead": lambda: run(fused),
        },
    )


class Pooled:
    """In the place of RoIPooling: maps pooled beforehand, the RoIs that pass first."""

    def __init__(self, pooled: torch.Tensor) -> None:
        self.pooled = pooled

    def __call__(self, features, boxes, box_scales=(1.0, 1.3)):
        return dict.fromkeys(box_scales, self.pooled)


def test_double_head_with_the_exact_skip(compare):
    # RoIs that pass come first here, so that their maps need not be pooled anew: RoIAlign has its own benchmark.
    heads = lively(Heads(HeadConfig("double_head"), RoIConfig(), 256, 81)).eval()
    classifier = heads["fc"].classifier
    nn.init.zeros_(classifier.weight)
    x = maps()
    with torch.no_grad():  # a detector's scores: the first quarter says something, the rest background
        classifier.bias.copy_(torch.tensor([8.0] + [0.0] * 80))
        x[:SURVIVORS, :, 0, 0] = 10
        probe = heads["fc"].tower.float()(x.float())
        direction = probe[:SURVIVORS].mean(0) - probe[SURVIVORS:].mean(0)
        classifier.weight[1] = direction * 16 / direction.square().sum()
        shift = classifier(probe)[:, 1]
        classifier.bias[1] -= (shift[:SURVIVORS].min() + shift[SURVIVORS:].max()) / 2 - 8
    boxes = torch.rand(1, ROIS, 4, device=DEVICE).cumsum(2) * 100
    proposals = Proposals(boxes, torch.ones(1, ROIS, dtype=torch.bool, device=DEVICE))
    pooling = Pooled(x)
    sources = Sources(("fc",), "conv")
    plain = copy.deepcopy(heads)
    plain["conv"].tower.fused = False
    survivors = run(heads, pooling, proposals, sources)[2]
    assert 0.9 * SURVIVORS < survivors.item() < 1.1 * SURVIVORS, survivors
    by_compiler = compiled(plain)

    def outputs(model):
        logits, deltas, _ = run(model, pooling, proposals, sources)
        return logits, deltas[:SURVIVORS]

    compare(
        op="conv_head",
        case="double_head with the exact skip",
        details=DETAILS | {"survivors": survivors.item()},
        check=close,
        providers={
            "reference": lambda: outputs(plain),
            "torch.compile": (lambda: outputs(by_compiler)) if by_compiler else NOT_COMPILED,
            "doublehead": lambda: outputs(heads),
        },
    )


def run(heads, pooling, proposals, sources):
    with torch.inference_mode(), precision():
        if isinstance(heads, Heads):
            result = run_heads(heads, pooling, [pooling.pooled], proposals, sources, DetectionConfig())
            return result.outputs["fc"].logits, result.outputs["conv"].deltas, result.box_rois
        found = heads(pooling([], None))
        return found["fc"].logits, found["conv"].deltas, None
