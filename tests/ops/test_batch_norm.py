"""batch_norm_act: every kernel against the definition in float64, and against torch's own modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.library import opcheck

from doublehead.ops import batch_norm_act
from doublehead.ops.batch_norm import batch_norm_act_backward, reference
from doublehead.ops.batch_norm.arguments import BackwardArguments, ForwardArguments
from tests.support.precision import assert_as_exact
from tests.support.triton_compile import Case, compile_cases

OPS = torch.ops.doublehead
SIZES = [(1, 5), (7, 1), (49, 64), (333, 72)]  # 333 rows: parts of unequal length


def inputs(rows: int, channels: int, dtype: torch.dtype, offset: float = 0.5):
    generator = torch.Generator().manual_seed(rows * channels)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    x, residual, grad = (normal(rows, channels).to(dtype) for _ in range(3))
    return (x * 1.5 + offset).to(dtype), normal(channels), normal(channels), residual, grad


def with_gradients(function, x, weight, bias, residual, grad, relu):
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    leaves += [residual.clone().requires_grad_()] if residual is not None else []
    y, mean, invstd = function(*leaves, *([] if residual is not None else [None]), relu=relu, eps=1e-5)
    return [y, mean, invstd, *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def definition(*arguments, **options):
    return reference.batch_norm_act(ForwardArguments(*arguments, **options))


def torch_modules(x, weight, bias, residual, relu, eps):
    """What a user of plain PyTorch writes, on a channels-last map; the statistics are the definition's."""
    maps = x[None, :, None].permute(0, 3, 1, 2)
    y = nn.functional.batch_norm(maps, None, None, weight, bias, training=True, eps=eps)
    y = y.permute(0, 2, 3, 1).reshape(x.shape)
    y = y if residual is None else y + residual
    return y.relu() if relu else y, *definition(x, weight, bias, None, False, eps)[1:]


def check(device, rows, channels, dtype, relu, has_residual, peer=definition):
    x, weight, bias, residual, grad = (tensor.to(device) for tensor in inputs(rows, channels, dtype))
    residual = residual if has_residual else None
    given = x, weight, bias, residual
    wide = [tensor.double() if tensor is not None else None for tensor in given]
    y, mean, invstd, *gradients = with_gradients(batch_norm_act, *given, grad, relu)
    exact, exact_mean, exact_invstd = definition(*wide, relu, 1e-5)
    assert_as_exact(y, peer(*given, relu, 1e-5)[0], exact, "y")
    # Each value of x may count with a rounding error of its own; plain PyTorch sums in higher precision on the CPU.
    spread = 4 * torch.finfo(torch.float32).eps * (x.double().abs().max() + 1).item()
    torch.testing.assert_close(mean.double(), exact_mean, rtol=0, atol=spread)
    torch.testing.assert_close(invstd.double(), exact_invstd, rtol=spread, atol=0)
    # ReLU's slope jumps at 0, where rounding decides the side: all are told the side our result is on.
    grad = torch.where(y > 0, grad, 0) if relu else grad
    plain = with_gradients(peer, *given, grad, False)[3:]
    exact = with_gradients(definition, *wide, grad.double(), False)[3:]
    for name, *values in zip(("x", "weight", "bias", "residual"), gradients, plain, exact, strict=False):
        assert_as_exact(*values, what=f"gradient of {name}")


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("rows", "channels"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_triton(triton_kernels, poisoned, rows, channels, dtype, relu, has_residual):
    check(triton_kernels, rows, channels, dtype, relu, has_residual)


def test_triton_many_rows(triton_kernels, poisoned):
    check(triton_kernels, 4500, 8, torch.float32, True, True)  # several tiles a part


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("rows", "channels"), [*SIZES[1:], (4500, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu(rows, channels, dtype, relu, has_residual):
    check("cpu", rows, channels, dtype, relu, has_residual, peer=torch_modules)


@pytest.mark.parametrize("offset", [100.0, -1000.0])
def test_small_variance_beside_a_large_mean(triton_kernels, offset):
    x, weight, bias, *_ = inputs(4500, 8, torch.float32, offset)
    exact = definition(x.double(), weight.double(), bias.double(), None, False, 1e-5)
    actual = batch_norm_act(*(t.to(triton_kernels) for t in (x, weight, bias)), relu=False)
    torch.testing.assert_close(actual[2].cpu().double(), exact[2], rtol=1e-5, atol=0)
    # The mean is rounded to float32 once: by half a unit in its last place, which the scale then magnifies.
    rounding = torch.finfo(torch.float32).eps
    scale = (weight.double() * exact[2]).abs().max().item()
    atol = rounding * (scale * exact[1].abs().max().item() + 4 * exact[0].abs().max().item())
    torch.testing.assert_close(actual[0].cpu().double(), exact[0], rtol=0, atol=atol)


def test_a_first_row_unlike_all_others(triton_kernels):
    x, weight, bias, *_ = inputs(4500, 8, torch.float32)
    x[0] += 300  # every sum is taken of what is left without this row
    exact = definition(x.double(), weight.double(), bias.double(), None, False, 1e-5)
    _, mean, invstd = batch_norm_act(*(t.to(triton_kernels) for t in (x, weight, bias)))
    spread = 4 * torch.finfo(torch.float32).eps * 300
    torch.testing.assert_close(mean.cpu().double(), exact[1], rtol=0, atol=spread)
    torch.testing.assert_close(invstd.cpu().double(), exact[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("relu", [False, True])
def test_the_gradient_of_the_residual_only_where_asked(triton_kernels, poisoned, relu):
    x, weight, bias, residual, grad = (tensor.to(triton_kernels) for tensor in inputs(333, 72, torch.float32))
    y, mean, invstd = batch_norm_act(x, weight, bias, residual, relu=relu)
    arguments = grad, x, y if relu else None, mean, invstd, weight, 1e-5
    *expected, grad_residual = batch_norm_act_backward(*arguments)
    *actual, nothing = batch_norm_act_backward(*arguments, residual=False)
    assert all(a.equal(b) for a, b in zip(actual, expected, strict=True))
    assert grad_residual.equal(torch.where(y > 0, grad, 0) if relu else grad) and nothing.shape == (0,)


def test_the_gradient_of_the_residual_only_where_asked_on_the_cpu():
    x, weight, bias, _, grad = inputs(33, 8, torch.float32)
    y, mean, invstd = batch_norm_act(x, weight, bias)
    arguments = grad, x, y, mean, invstd, weight, 1e-5
    assert batch_norm_act_backward(*arguments, residual=False)[3].shape == (0,)
    assert reference.batch_norm_act_backward(BackwardArguments(*arguments, residual=False))[3].shape == (0,)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("backward", [reference.batch_norm_act_backward, OPS.batch_norm_act_backward])
def test_the_gradient_of_the_residual_is_nobody_elses(backward, relu):
    """Others get the same gradient of the result, and ours is added to in place."""
    x, weight, bias, residual, grad = inputs(33, 8, torch.float32)
    y, mean, invstd = batch_norm_act(x, weight, bias, residual, relu=relu)
    arguments = BackwardArguments(grad, x, y if relu else None, mean, invstd, weight, 1e-5, True)
    found = backward(arguments) if backward is reference.batch_norm_act_backward else backward(*arguments)
    assert found[3].data_ptr() != grad.data_ptr()


def test_the_recomputed_result_is_the_same_to_the_bit(triton_kernels):
    x, weight, bias, residual, _ = (tensor.to(triton_kernels) for tensor in inputs(333, 72, torch.float16))
    y, mean, invstd = batch_norm_act(x, weight, bias, residual)
    assert OPS.batch_norm_act_apply(x, mean, invstd, weight, bias, residual, True).equal(y)


def test_equals_torch_modules():
    x, weight, bias, *_ = inputs(4 * 49, 16, torch.float64)
    norm = nn.BatchNorm2d(16, eps=1e-3).double()
    norm.load_state_dict({"weight": weight, "bias": bias}, strict=False)
    maps = x.view(4, 7, 7, 16).permute(0, 3, 1, 2)
    expected = norm(maps).relu().permute(0, 2, 3, 1).reshape(-1, 16)
    torch.testing.assert_close(batch_norm_act(x, weight.double(), bias.double(), eps=1e-3)[0], expected)


@pytest.mark.parametrize("relu", [False, True])
def test_closed_form_of_the_gradient(relu):
    wide = [tensor.double() for tensor in inputs(49, 6, torch.float64)]
    y, mean, invstd, *expected = with_gradients(definition, *wide, relu)
    x, weight, _, _, grad = wide
    actual = reference.batch_norm_act_backward(
        BackwardArguments(grad, x, y if relu else None, mean, invstd, weight, 1e-5)
    )
    for value, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, wanted)


def test_gradient_of_the_definition():
    x, weight, bias, residual, _ = (tensor.double().requires_grad_() for tensor in inputs(6, 3, torch.float64))
    torch.autograd.gradcheck(lambda *t: definition(*t, True, 1e-5)[0], (x, weight, bias, residual))
    torch.autograd.gradcheck(lambda *t: batch_norm_act(*t)[0], (x, weight, bias, residual))
    torch.autograd.gradcheck(lambda *t: batch_norm_act(*t, relu=False)[0], (x, weight, bias))


@pytest.mark.parametrize("has_residual", [False, True])
def test_opcheck(has_residual):
    x, weight, bias, residual, grad = inputs(33, 8, torch.float32)
    residual = residual.requires_grad_() if has_residual else None
    leaves = (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), residual)
    opcheck(OPS.batch_norm_act.default, (*leaves, True, 1e-5))
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    y, mean, invstd = batch_norm_act(x, weight, bias)
    opcheck(OPS.batch_norm_act_apply.default, (x, mean, invstd, weight, bias, None, True))
    opcheck(OPS.batch_norm_act_backward.default, (grad, x, y, mean, invstd, weight, 1e-5))
    opcheck(OPS.batch_norm_act_backward.default, (grad, x, y, mean, invstd, weight, 1e-5, False))


def test_compiles_in_one_graph():
    def loss(x, weight, bias):
        return batch_norm_act(x, weight, bias)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (20, 33):
        x, weight, bias, *_ = (tensor.requires_grad_() for tensor in inputs(rows, 8, torch.float32)[:3])
        expected = torch.autograd.grad(loss(x, weight, bias), (x, weight, bias))
        torch.testing.assert_close(torch.autograd.grad(compiled(x, weight, bias), (x, weight, bias)), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(0, 4)}, "x must have shape .M, C. with M, C > 0, got .0, 4."),
        ({"x": torch.zeros(3, 4, 5)}, "x must have shape"),
        ({"weight": torch.ones(5)}, "weight must have shape .C. = .4., got .5."),
        ({"residual": torch.zeros(3, 4, dtype=torch.float16)}, "residual must be like x"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"x": torch.zeros(3, 4), "weight": torch.ones(4), "bias": torch.zeros(4)} | change
    with pytest.raises(ValueError, match=message):
        batch_norm_act(**arguments)


def cases() -> list[Case]:
    kernel = "doublehead.ops.batch_norm.kernel"
    x, f, i = "*bf16", "*fp32", "i32"
    sums, apply, join = {"ROWS": 32, "CHANNELS": 64}, {"ROWS": 16, "CHANNELS": 128}, {"CHANNELS": 32, "PARTS": 128}

    def case(name, constants, **signature):
        return Case(kernel, name, signature, constants, 4, 3, ("channels",))

    return [
        case("statistics_kernel", sums, x=x, sums=f, rows=i, channels=i, part_rows=i, parts=i),
        case(
            "join_statistics_kernel", join, x=x, sums=f, mean_out=f, invstd_out=f, rows=i, channels=i, part_rows=i,
            parts=i, eps="fp32",
        ),
        case(
            "apply_kernel", {"RESIDUAL": True, "RELU": True, **apply}, x=x, residual=x, mean=f, invstd=f, weight=f,
            bias=f, y=x, rows=i, channels=i,
        ),
        case(
            "gradient_sums_kernel", {"RELU": True, **sums}, grad=x, x=x, y=x, mean=f, sums=f, rows=i, channels=i,
            part_rows=i, parts=i,
        ),
        case(
            "join_gradients_kernel", join, sums=f, invstd=f, grad_weight=f, grad_bias=f, channels=i, parts=i,
        ),
        case(
            "gradient_kernel", {"RELU": True, **apply}, grad=x, x=x, y=x, mean=f, invstd=f, weight=f, grad_weight=f,
            grad_bias=f, grad_x=x, grad_residual=x, rows=i, channels=i,
        ),
    ]  # fmt: skip


def test_compiles_without_spills():
    pytest.importorskip("triton")
    for compiled in compile_cases(cases()):
        assert compiled.stack == compiled.local == 0, compiled
        assert compiled.registers <= 128 and compiled.shared <= 48 * 1024, compiled
