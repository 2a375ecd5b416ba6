"""The heads' towers against the same modules in plain PyTorch, side by side, and a whole double head.

The conv-head is the paper's (K = 5, non-local), the fc-head has two layers of 1024.  On a CPU their inference is also
timed in bf16, where the processor has it, and in int8.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import harness
import pytest
import torch
from heads import (
    close,
    fc_towers,
    in_int8,
    inference,
    lively,
    maps,
    off_by,
    precision,
    step_near,
    towers,
    training_step,
)
from inputs import DEVICE
from torch import nn

from doublehead.config import DetectionConfig, HeadConfig, RoIConfig
from doublehead.models.heads import Heads
from doublehead.models.inference import run_heads
from doublehead.models.readout import ReadOut, Sources
from doublehead.models.structures import Proposals

ROIS = 1000 if DEVICE == "cuda" else 200
SURVIVORS = ROIS // 4
MFLOP = 748  # per RoI, counted: K = 5 with two non-local blocks
FC_MFLOP = 28  # 2 * (12544 * 1024 + 1024 * 1024)
PRECISION = "bfloat16" if DEVICE == "cuda" else "float32"
DETAILS = {"rois": ROIS, "precision": PRECISION}


def compiled(compare, module: nn.Module) -> nn.Module | None:
    """Compiling takes a minute or so: only for the records."""
    wanted = DEVICE == "cuda" and compare.full
    return torch.compile(module, mode="max-autotune-no-cudagraphs") if wanted else None


NOT_COMPILED = "torch.compile is timed on a GPU only, with --full"


BF16, INT8 = "doublehead, bf16", "doublehead, int8"
OFF = {BF16: 0.02, INT8: 0.05}
"""How far the whole output may be from fp32's, relative to it: of a wrong weight or scale it is off by 0.1 and more."""


def cheaper(tower: nn.Module, x: torch.Tensor) -> dict[str, Callable | str]:
    """On a CPU: the same tower in bf16 and in int8, or why not."""
    if DEVICE != "cpu":
        return {}
    short, eight = copy.deepcopy(tower), in_int8(copy.deepcopy(tower), x)
    return {
        BF16: harness.lacks_bf16() or named(BF16, inference(short, x, torch.bfloat16)),
        INT8: eight if isinstance(eight, str) else named(INT8, inference(eight, x)),
    }


def named(name: str, call: Callable) -> Callable:
    """The call with its name before its result, by which `near_enough` knows what to expect."""
    return lambda: (name, *call())


def near_enough(actual: tuple, expected: tuple) -> None:
    if isinstance(actual[0], str):
        name, value = actual
        assert (off := off_by(value, expected[0])) < OFF[name], f"{name}: off by {off:.3g} of the whole"
    else:
        close(actual, expected)


def test_inference(compare):
    plain, fused = (tower.eval() for tower in towers())
    x, by_compiler = maps(ROIS, 256), compiled(compare, plain)

    compare(
        op="conv_head",
        case="conv-head inference",
        details=DETAILS | {"gflop": MFLOP * ROIS / 1e3},
        check=near_enough,
        graphs=True,
        providers={
            "reference": inference(plain, x),
            "torch.compile": inference(by_compiler, x) if by_compiler else NOT_COMPILED,
            "doublehead": inference(fused, x),
            **cheaper(fused, x),
        },
    )


def test_fc_inference(compare):
    plain, ours = (tower.eval() for tower in fc_towers())
    x = maps(ROIS, 256)

    compare(
        op="conv_head",
        case="fc-head inference",
        details=DETAILS | {"gflop": FC_MFLOP * ROIS / 1e3},
        check=near_enough,
        graphs=True,
        providers={"reference": inference(plain, x), "doublehead": inference(ours, x), **cheaper(ours, x)},
    )


def graphed(tower: nn.Module, x: torch.Tensor) -> Callable | str:
    """A training step whose forward and backward are CUDA graphs, of a copy."""
    if DEVICE != "cuda":
        return "CUDA graphs need CUDA"
    with precision():
        module = torch.cuda.make_graphed_callables(copy.deepcopy(tower), (x.detach().clone().requires_grad_(),))
    return training_step(module, x)


@pytest.mark.parametrize("recompute", [False, True])
def test_training_step(compare, recompute):
    plain, fused = (tower.train() for tower in towers())
    fused.recompute = recompute
    x = maps(ROIS, 256).requires_grad_()
    # Compiled once, without recompute, which changes ours alone.
    by_compiler = None if recompute else compiled(compare, plain)

    compare(
        op="conv_head",
        case="conv-head training step" + (", recompute" if recompute else ""),
        details=DETAILS | {"gflop": 3 * MFLOP * ROIS / 1e3},
        check=step_near,
        providers={
            "reference": training_step(plain, x),
            "torch.compile": training_step(by_compiler, x) if by_compiler else NOT_COMPILED,
            "doublehead": training_step(fused, x),
            "doublehead, graphs": graphed(fused, x),
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
    x = maps(ROIS, 256)
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
    readout = ReadOut(Sources(("fc",), "conv"), DetectionConfig())
    plain = copy.deepcopy(heads)
    plain["conv"].tower.plain()
    survivors = run(heads, pooling, proposals, readout)[2]
    assert 0.9 * SURVIVORS < survivors.item() < 1.1 * SURVIVORS, survivors
    by_compiler = compiled(compare, plain)

    def outputs(model):
        logits, deltas, _ = run(model, pooling, proposals, readout)
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


def run(heads, pooling, proposals, readout):
    with torch.inference_mode(), precision():
        if isinstance(heads, Heads):
            result = run_heads(heads, pooling, [pooling.pooled], proposals, readout)
            return result.outputs["fc"].logits, result.outputs["conv"].deltas, result.box_rois
        found = heads(pooling([], None))
        return found["fc"].logits, found["conv"].deltas, None
