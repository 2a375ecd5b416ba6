"""The non-local block against its modules run one after the other, as the second stage of a detector has it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from inputs import DEVICE
from torch import Tensor, nn

from doublehead.ops import NonLocalBlock

CHANNELS, SIDE = 1024, 7
ROIS = 1000 if DEVICE == "cuda" else 100
FORMS = {
    "dot_product, 4 groups": dict(pairwise="dot_product", groups=4, relu_after=True),
    "embedded_gaussian, 1 group": dict(pairwise="embedded_gaussian", groups=1, scale=True),
}


def blocks(form: str) -> dict[str, nn.Module | str]:
    """Provider -> a module with parameters of its own, all alike; or why it is missing."""
    torch.manual_seed(0)
    state = None
    modules: dict[str, nn.Module | str] = {}
    for name in ("reference", "torch.compile", "doublehead"):
        block = NonLocalBlock(CHANNELS, **FORMS[form])
        if state is None:
            for parameter in block.parameters():
                nn.init.normal_(parameter, std=0.02)
            nn.init.ones_(block.norm.weight)
            state = block.state_dict()
        block.load_state_dict(state)
        block.to(DEVICE, memory_format=torch.channels_last)
        block.fused = name == "doublehead"
        modules[name] = block
    if DEVICE == "cuda":
        modules["torch.compile"] = torch.compile(modules["torch.compile"], mode="max-autotune")
    else:
        modules["torch.compile"] = "only timed on a GPU, where max-autotune makes Triton kernels"
    return modules


def maps() -> Tensor:
    x = torch.randn(ROIS, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return x.to(DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float32, memory_format=torch.channels_last)


def autocast() -> contextlib.AbstractContextManager:
    return torch.autocast("cuda", torch.bfloat16) if DEVICE == "cuda" else contextlib.nullcontext()


def check(actual: Tensor | list[Tensor], expected: Tensor | list[Tensor]) -> None:
    """Relative to the whole: single entries next to the ReLU's kink may differ, whose gradient is then another."""
    both = [(actual, expected)] if isinstance(actual, Tensor) else zip(actual, expected, strict=True)
    for a, e in both:
        allowed = (0.05 if DEVICE == "cuda" else 1e-3) * e.double().norm()
        error = (a.double() - e.double()).norm()
        assert error <= allowed, f"off by {error:.3g}, {allowed:.3g} allowed"


def compare_blocks(compare, form: str, work: str, call: Callable[[nn.Module], Callable]) -> None:
    compare(
        op="non_local",
        case=f"non-local block, {form}, {work}",
        details={
            "rois": ROIS,
            "channels": CHANNELS,
            "map": f"{SIDE}x{SIDE}",
            "dtype": "bfloat16" if DEVICE == "cuda" else "float32",
        },
        providers={name: block if isinstance(block, str) else call(block) for name, block in blocks(form).items()},
        check=check,
    )


@pytest.mark.parametrize("form", FORMS)
def test_inference(compare, form):
    x = maps()

    def call(block: nn.Module) -> Callable[[], Tensor]:
        block.eval()

        def infer() -> Tensor:
            with torch.no_grad(), autocast():
                return block(x)

        return infer

    compare_blocks(compare, form, "inference", call)


@pytest.mark.parametrize("form", FORMS)
def test_training(compare, form):
    x = maps().requires_grad_()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x)

    def call(block: nn.Module) -> Callable[[], list[Tensor]]:
        names, parameters = zip(*block.named_parameters(), strict=True)

        def step() -> list[Tensor]:
            with autocast():
                y = block(x)
            grads = torch.autograd.grad(y, (x, *parameters), grad)
            # Softmax and batch norm take constants off again: these gradients are 0 (or can be), computed as noise.
            noise = ("phi.bias", "g.bias", "out.bias")
            return [y.detach(), grads[0], *(g for n, g in zip(names, grads[1:], strict=True) if not n.endswith(noise))]

        return step

    compare_blocks(compare, form, "training", call)
