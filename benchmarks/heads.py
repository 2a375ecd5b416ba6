"""Shared by the benchmarks of the heads: the conv-head (K = 5, two non-local blocks), a non-local block, maps."""

from __future__ import annotations

import contextlib
import copy

import torch
from inputs import DEVICE, generator
from torch import Tensor, nn

from doublehead.config import HeadConfig
from doublehead.models.conv_tower import ConvTower
from doublehead.models.quantized import int8_support, observe, use_int8
from doublehead.models.towers import FCTower
from doublehead.ops import NonLocalBlock

SIDE = 7
WIDE = 1024
"""Channels inside the conv-head, which are those of its non-local blocks; 256 come in."""
ON_GPU = DEVICE == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
FORMS = {
    "dot_product, 4 groups": dict(pairwise="dot_product", groups=4, relu_after=True),
    "embedded_gaussian, 1 group": dict(pairwise="embedded_gaussian", groups=1, scale=True),
}


def maps(rois: int, channels: int, dtype: torch.dtype = DTYPE, seed: int = 0) -> Tensor:
    """Pooled features, channels-last, drawn on the device."""
    x = torch.randn(rois, SIDE, SIDE, channels, generator=generator(seed), device=DEVICE)
    return x.to(dtype).permute(0, 3, 1, 2)


def precision(dtype: torch.dtype = DTYPE) -> contextlib.AbstractContextManager:
    """Autocast in 16 bits, nothing in 32. Without autocast's cache, which a captured graph must not fill."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(DEVICE, dtype, cache_enabled=False)


# ---------------------------------------------------------------------------------------------
# The conv-head


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


def fc_towers() -> tuple[nn.Module, FCTower]:
    """Module by module, and as it runs in a detector; the same weights."""
    torch.manual_seed(0)
    ours = FCTower(256, SIDE, WIDE).to(DEVICE)
    return nn.Sequential(*copy.deepcopy(ours)), ours


def in_int8(module: nn.Module, inputs: Tensor | list[Tensor]) -> nn.Module | str:
    """A tower or a detector, in place, its heads' products in int8, calibrated on `inputs`; or why it cannot be."""
    support = int8_support()
    if support.level == "none":
        return support.reason
    with observe(module) as observed, torch.inference_mode():
        module(inputs)
    use_int8(module, observed.scales())
    return module


def off_by(actual: Tensor, expected: Tensor) -> float:
    """The difference's norm, relative to what is expected."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Within a few roundings of the largest value: the layers in between round differently."""
    scale = max(value.abs().max().item() for value in expected)
    tolerance = 0.05 if ON_GPU else 1e-4
    for value, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=tolerance * scale)


def inference(tower: nn.Module, x: Tensor, dtype: torch.dtype | None = None):
    """A call that gives the tower's output in float32; computed in `dtype`, or else in that of `x`."""

    def run() -> tuple[Tensor]:
        with torch.inference_mode(), precision(dtype or x.dtype):
            return (tower(x).float(),)

    return run


def training_step(tower: nn.Module, x: Tensor):
    """A call that gives the output and the input's gradient of one step; x must want a gradient."""

    def run() -> tuple[Tensor, Tensor]:
        tower.zero_grad(set_to_none=True)
        x.grad = None
        with precision(x.dtype):
            y = tower(x)
        y.float().square().mean().backward()
        return y.detach().float(), x.grad.float()

    return run


# ---------------------------------------------------------------------------------------------
# The non-local block


def blocks(form: str, names: tuple[str, ...] = ("reference", "doublehead")) -> dict[str, NonLocalBlock]:
    """Name -> a block with parameters of its own, all alike; the one named doublehead is fused."""
    torch.manual_seed(0)
    state = None
    modules = {}
    for name in names:
        block = NonLocalBlock(WIDE, **FORMS[form])
        if state is None:
            for parameter in block.parameters():
                nn.init.normal_(parameter, std=0.02)
            nn.init.ones_(block.norm.weight)
            state = block.state_dict()
        block.load_state_dict(state)
        block.to(DEVICE, memory_format=torch.channels_last)
        block.fused = name == "doublehead"
        modules[name] = block
    return modules


def block_inference(block: nn.Module, x: Tensor):
    block.eval()

    def infer() -> Tensor:
        with torch.no_grad(), precision(x.dtype):
            return block(x)

    return infer


def block_step(block: nn.Module, x: Tensor, grad: Tensor):
    """A call that gives the output and all gradients; x must want one."""
    names, parameters = zip(*block.named_parameters(), strict=True)
    # Softmax and batch norm take constants off again: these gradients are 0 (or can be), computed as noise.
    noise = ("phi.bias", "g.bias", "out.bias")

    def step() -> list[Tensor]:
        with precision(x.dtype):
            y = block(x)
        grads = torch.autograd.grad(y, (x, *parameters), grad)
        return [y.detach(), grads[0], *(g for n, g in zip(names, grads[1:], strict=True) if not n.endswith(noise))]

    return step


def near(actual: Tensor | list[Tensor], expected: Tensor | list[Tensor]) -> None:
    """Relative to the whole: single entries next to the ReLU's kink may differ, whose gradient is then another.

    Gradients of both sides are 0.16 % apart in float32, 1e-15 in float64, and 5.5 % in bfloat16 on an H200; the
    tests hold both against float64.
    """
    both = [(actual, expected)] if isinstance(actual, Tensor) else zip(actual, expected, strict=True)
    for a, e in both:
        allowed = (0.1 if ON_GPU else 5e-3) * e.double().norm()
        error = (a.double() - e.double()).norm()
        assert error <= allowed, f"off by {error:.3g}, {allowed:.3g} allowed"


def step_near(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Output and input's gradient of a training step, relative to the whole.

    In bfloat16 plain PyTorch's gradient is itself off by an eighth (ReLUs turn with the rounding), so twice that.
    """
    for value, wanted, allowed in zip(actual, expected, (0.02, 0.25) if ON_GPU else (1e-4, 1e-2), strict=True):
        error = ((value.double() - wanted.double()).norm() / wanted.double().norm()).item()
        assert error <= allowed, f"off by {error:.3g} of the whole, {allowed} allowed"
