"""The non-local block against its modules run one after the other, as the second stage of a detector has it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from heads import DTYPE, FORMS, SIDE, WIDE, block_inference, block_step, blocks, maps, near
from inputs import DEVICE
from torch import nn

ROIS = 1000 if DEVICE == "cuda" else 100


def compare_blocks(compare, form: str, work: str, call: Callable[[nn.Module], Callable]) -> None:
    found = blocks(form, ("reference", "torch.compile", "doublehead"))
    providers = {name: call(block) for name, block in found.items()}
    if DEVICE == "cuda" and compare.full:
        # Without CUDA graphs of its own: the harness captures all providers or none.
        providers["torch.compile"] = call(torch.compile(found["torch.compile"], mode="max-autotune-no-cudagraphs"))
    else:
        providers["torch.compile"] = "only timed on a GPU, where max-autotune makes Triton kernels, with --full"
    compare(
        op="non_local",
        case=f"non-local block, {form}, {work}",
        details={
            "rois": ROIS,
            "channels": WIDE,
            "map": f"{SIDE}x{SIDE}",
            "dtype": str(DTYPE).removeprefix("torch."),
        },
        providers=providers,
        check=near,
        graphs=work == "inference",
    )


@pytest.mark.parametrize("form", FORMS)
def test_inference(compare, form):
    x = maps(ROIS, WIDE, seed=1)
    compare_blocks(compare, form, "inference", lambda block: block_inference(block, x))


@pytest.mark.parametrize("form", FORMS)
def test_training(compare, form):
    x = maps(ROIS, WIDE, seed=1).requires_grad_()
    grad = maps(ROIS, WIDE, seed=2)
    compare_blocks(compare, form, "training", lambda block: block_step(block, x, grad))
