"""The conv-head's training step: what it asks of the host, what it leaves out, and that a CUDA graph can record it."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from doublehead.config import HeadConfig, NonLocalConfig
from doublehead.exporting.program import exact_float32
from doublehead.models.conv_tower import ConvTower
from doublehead.ops import _triton
from doublehead.ops.non_local import kernel as non_local_kernel

SMALL = HeadConfig(conv_dim=32, conv_blocks=3, non_local=NonLocalConfig(groups=1))  # the kernels serve 16 a group


def tower(config: HeadConfig = SMALL, fused: bool = True) -> ConvTower:
    torch.manual_seed(0)
    made = ConvTower(16, config).train()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    made.fused = fused
    return made


def maps(number: int = 3, device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(number, 16, 5, 4, generator=torch.Generator().manual_seed(number))
    return x.to(device, dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


def step(model: ConvTower, x: torch.Tensor, amp: bool = False) -> None:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp, cache_enabled=False):
        y = model(x)
    y.float().square().mean().backward()


def forget(model: ConvTower, x: torch.Tensor) -> None:
    """Without gradients of an earlier step, which another would be added to."""
    for tensor in (x, *model.parameters()):
        tensor.grad = None


def results(model: ConvTower, x: torch.Tensor, amp: bool = False) -> dict[str, torch.Tensor]:
    """Gradients and running statistics after a step."""
    forget(model, x)
    step(model, x, amp)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"x": x.grad, **gradients, **dict(model.named_buffers())}


def assert_same(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name] is value is None or actual[name].equal(value), name


class Operators(TorchDispatchMode):
    """Notes the operators that run, and the devices of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.devices: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        result = function(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves((args, result)):
            if isinstance(value, torch.Tensor):
                self.devices.add(value.device.type)
        return result


# ---------------------------------------------------------------------------------------------
# The host's work


def frames(call) -> int:
    """Functions of Python that are called, without those that Triton calls to launch."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def test_the_hosts_work(triton_kernels, monkeypatch):
    """The whole head, K = 5.  Before a block was one function: 75 launches, 477 operators, 3,767 calls of Python."""
    launched = []
    monkeypatch.setattr(_triton.Launcher, "__call__", lambda self, kind, grid, *rest: launched.append(self.kernel))
    monkeypatch.setattr(non_local_kernel, "_launch", lambda kernel, *rest: launched.append(kernel))
    config = HeadConfig(conv_dim=32, non_local=NonLocalConfig(groups=1))
    model = tower(config).to(triton_kernels)
    x = maps(1, triton_kernels, torch.bfloat16)
    step(model, x, amp=True)
    launched.clear()
    forget(model, x)
    calls = frames(lambda: step(model, x, amp=True))
    assert len(launched) == 75
    forget(model, x)
    with Operators() as seen:
        step(model, x, amp=True)
    assert len(seen.names) <= 320 and calls <= 1300
    assert {name: seen.names.count(name) for name in ("lerp_", "clamp_", "_foreach_lerp_", "_foreach_add_")} == {
        "lerp_": 0, "clamp_": 1, "_foreach_lerp_": 1, "_foreach_add_": 1,
    }  # the running statistics of 11 norms  # fmt: skip


def test_operators_and_direct_calls_give_the_same_bits(triton_kernels, poisoned):
    """A mode that watches makes the step call operators; otherwise it calls what serves them."""
    model, x = tower().to(triton_kernels), maps(2, triton_kernels)
    watched, again = copy.deepcopy(model), x.detach().clone().requires_grad_()
    with Operators() as seen:
        expected = results(watched, again)
    assert "batch_norm_act" in seen.names and "non_local_attention_backward" in seen.names
    assert_same(results(model, x), expected)


def test_recomputing_gives_the_same_bits(triton_kernels, poisoned):
    model, x = tower().to(triton_kernels), maps(2, triton_kernels)
    least, again = copy.deepcopy(model), x.detach().clone().requires_grad_()
    least.recompute = True
    assert_same(results(least, again), results(model, x))


@pytest.mark.parametrize("shortcut_relu", [False, True])
def test_what_is_frozen_costs_nothing(shortcut_relu):
    """No gradient for weights that want none, and the other gradients are the same."""
    config = HeadConfig(conv_dim=32, conv_blocks=3, shortcut_relu=shortcut_relu)
    model, x = tower(config), maps()
    frozen, again = copy.deepcopy(model), x.detach().clone()
    for block in frozen.blocks:
        for layer in block.modules():
            if isinstance(layer, nn.Conv2d):
                layer.requires_grad_(False)
    with Operators() as every:
        expected = results(model, x)
    with Operators() as few:
        actual = results(frozen, again)
    kept = {name: value for name, value in actual.items() if value is not None}
    assert not any(name.endswith(("theta.weight", "residual.0.weight", "x")) for name in kept)
    assert_same(kept, {name: expected[name] for name in kept})
    assert len(kept) > 20

    def products(names: list[str]) -> int:
        return sum(name in ("mm", "addmm_", "sum") for name in names)

    # Both blocks behind the first: a product a convolution less, and of the first block the shortcut's two.
    assert products(few.names) <= products(every.names) - 8


def test_norms_alike_are_updated_together(monkeypatch):
    groups = []
    lerp = torch._foreach_lerp_
    monkeypatch.setattr(
        torch, "_foreach_lerp_", lambda running, *rest: groups.append(len(running)) or lerp(running, *rest)
    )
    model = tower()
    model[1].norm.momentum = 0.3
    model[2].residual[1].eps = 1e-3
    plain, x = copy.deepcopy(model), maps()
    plain.fused = False
    step(plain, x)
    step(model, x)
    assert sorted(groups) == [2, 2, 10]  # mean and variance of each norm: one, one, and the five others
    for name, value in plain.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], value, rtol=1e-4, atol=1e-5)


def test_a_norm_in_two_places_is_updated_once_after_the_other(monkeypatch):
    """A GPU writes to all tensors of a list at the same time: none may be in it twice."""
    for name in ("_foreach_lerp_", "_foreach_add_"):
        function = getattr(torch, name)

        def once(tensors, *rest, function=function):
            assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
            return function(tensors, *rest)

        monkeypatch.setattr(torch, name, once)
    model = tower()
    model[2].residual[4] = model[2].residual[1]
    plain, x = copy.deepcopy(model), maps()
    plain.fused = False
    step(plain, x)
    step(model, x)
    for name, value in plain.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_a_norm_without_a_bias_runs_itself(training):
    model = tower().train(training)
    for norm in (model[1].norm, model[2].residual[1]):
        norm.bias = None
        plain = copy.deepcopy(model)
        plain.fused = False
        torch.testing.assert_close(model(maps()), plain(maps()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_on_layers_run(register):
    model, seen = tower(), []
    getattr(model[2].residual[0], register)(lambda *_: seen.append(1))
    step(model, maps())
    assert seen == [1]


def test_no_cells_are_refused():
    with pytest.raises(ValueError, match=r"x must have shape \[M, C\] with M, C > 0"):
        tower()(maps(0))


# ---------------------------------------------------------------------------------------------
# CUDA graphs

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "item", "is_nonzero", "equal"}


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_in_a_step_waits_or_leaves_the_device(monkeypatch, recompute):
    """Then a CUDA graph can record it.  Tensors without contents stand in for a GPU's."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # which refuses them
    with torch.device("meta"):
        model = ConvTower(16, SMALL).train()
        model.recompute = recompute
        x = torch.empty(3, 16, 5, 4, requires_grad=True)
    with Operators() as seen:
        model(x).square().mean().backward()
    assert x.grad.shape == x.shape and not WAITS & set(seen.names)
    assert seen.devices == {"meta"}
    assert {"batch_norm_act", "batch_norm_act_backward", "non_local_attention_backward"} <= set(seen.names)


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_a_graphed_step_is_the_same_step(recompute):
    """Both under autocast: a graph goes on computing in the dtype that it was recorded in."""
    with exact_float32():  # of some convolutions cuDNN has algorithms that are not deterministic
        check_graphed_step(recompute)


def check_graphed_step(recompute: bool) -> None:
    model, x = tower().cuda(), maps(8, "cuda")
    model.recompute = recompute
    expected = copy.deepcopy(model)
    state = copy.deepcopy(model.state_dict())
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        torch.cuda.make_graphed_callables(model, (x.detach().clone().requires_grad_(),))
    model.load_state_dict(state)  # recording runs the step some times, which moves the running statistics
    for _ in range(2):
        again = x.detach().clone().requires_grad_()
        actual, wanted = results(model, again, amp=True), results(expected, x, amp=True)
        assert_same(actual, wanted)
