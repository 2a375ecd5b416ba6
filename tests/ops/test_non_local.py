"""The non-local block against its plain PyTorch definition: operator, function, and both under torch.compile."""

from __future__ import annotations

import pytest
import torch

from doublehead.ops import BatchNorm, non_local, onednn
from doublehead.ops.non_local import cpu, reference
from tests.support.non_local_cases import OPERATORS, check_twice, exact, qkv_and_grad, rounded
from tests.support.precision import assert_as_exact

FORMS = [
    dict(pairwise="dot_product"),
    dict(pairwise="dot_product", groups=4, relu=True),
    dict(pairwise="embedded_gaussian", groups=2),
    dict(pairwise="embedded_gaussian", scale=True, relu=True),
]
NAMES = ("x", "qkv_weight", "qkv_bias", "out_weight", "out_bias", "norm_weight", "norm_bias")


def block_inputs(channels=12, inner=8, size=(3, 5, 4), dtype=torch.float64, seed=0):
    """x, weights and biases as `non_local` takes them, then a batch norm's weight and bias."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(dtype)

    x = normal(size[0], channels, *size[1:], std=1.0).contiguous(memory_format=torch.channels_last)
    weights = normal(3 * inner, channels, std=0.4), normal(3 * inner, std=0.4)
    out = normal(channels, inner, std=0.4), normal(channels, std=0.4)
    return [x, *weights, *out, 1 + normal(channels, std=0.3), normal(channels, std=0.3)]


def batch_norm(weight: torch.Tensor, bias: torch.Tensor, momentum: float = 0.1) -> BatchNorm:
    generator = torch.Generator().manual_seed(1)
    mean, variance = torch.randn(len(weight), generator=generator), 0.5 + torch.rand(len(weight), generator=generator)
    return BatchNorm(weight, bias, mean.to(weight.dtype), variance.to(weight.dtype), 1e-3, momentum)


def results(function, inputs, norm: bool, training: bool, **form):
    """Output, then the gradient of every input."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    *arguments, norm_weight, norm_bias = inputs
    normed = batch_norm(norm_weight, norm_bias) if norm else None
    y = function(*arguments, norm=normed, training=training, **form)
    wanted = inputs if norm else inputs[:-2]
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    return y.detach(), *torch.autograd.grad(y, wanted, weight)


def check_all_twice(actual, plain, expected, training: bool, outputs_alone: bool = False) -> None:
    """The 2x rule for the output and the gradients.

    Behind a ReLU only for the output: which outputs next to 0 it lets through, so whose gradient, is up to rounding.
    """
    for name, *tensors in zip(("y", *NAMES), actual, plain, expected, strict=True):
        if name == "out_bias" and training:
            continue  # batch norm takes the mean off again: the gradient is 0, and both give mere rounding noise
        if name == "y" or not outputs_alone:
            # Gradients of weights are sums over all cells; in how many roundings depends on the processor.
            check_twice(*tensors, roundings=1 if name in ("y", "x") else 8)


# ---------------------------------------------------------------------------------------------
# The operator


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_attention_is_the_formula(groups, softmax):
    qkv, grad = qkv_and_grad(2, 7, 12, torch.float64)
    attention = groups, softmax, 0.3
    for actual, expected in zip(rounded(qkv, grad, *attention), exact(qkv, grad, *attention), strict=True):
        torch.testing.assert_close(actual, expected)
    qkv.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: OPERATORS.non_local_attention(t, *attention), qkv)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_attention_bears_large_products(dtype):
    qkv, grad = qkv_and_grad(1, 9, 64, dtype, size=100.0)
    assert (qkv[0, :, :64].float() @ qkv[0, :, 64:128].float().T).abs().max() > 1e5  # not in float16
    for actual in rounded(qkv, grad, 1, True, 1.0):
        assert actual.dtype == dtype and actual.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("softmax", [False, True])
def test_opcheck(dtype, softmax):
    qkv, grad = qkv_and_grad(2, 5, 8, dtype)
    torch.library.opcheck(OPERATORS.non_local_attention.default, (qkv.requires_grad_(), 2, softmax, 0.3))
    torch.library.opcheck(OPERATORS.non_local_attention_backward.default, (grad, qkv.detach(), 2, softmax, 0.3))
    torch.library.opcheck(OPERATORS.non_local_attention.default, (qkv.detach()[:0], 2, softmax, 0.3))


def test_second_gradient_is_an_error():
    qkv = torch.randn(1, 3, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(
        OPERATORS.non_local_attention(qkv, 1, True, 1.0).square().sum(), qkv, create_graph=True
    )
    with pytest.raises(RuntimeError, match="gradient of its gradient"):
        grad.sum().backward()


@pytest.mark.parametrize("key", ["AutocastCPU", "AutocastCUDA", "CompositeExplicitAutograd"])
def test_behaviour_is_registered_explicitly(key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key("doublehead::non_local_attention", key)


# ---------------------------------------------------------------------------------------------
# The function


@pytest.mark.parametrize(("norm", "training"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("form", FORMS)
def test_function_is_its_definition(form, norm, training):
    inputs = block_inputs()
    actual = results(non_local, inputs, norm, training, **form)
    expected = results(reference.non_local, inputs, norm, training, **form)
    for name, a, e in zip(("y", *NAMES), actual, expected, strict=False):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    assert actual[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_function_is_as_exact_as_pytorch(form, training, dtype):
    inputs = block_inputs(64, 32, (4, 7, 7), dtype)
    arguments = inputs, True, training
    actual, plain = (results(function, *arguments, **form) for function in (non_local, reference.non_local))
    wide = [tensor.double() for tensor in inputs]
    expected = results(reference.non_local, wide, True, training, **form)
    check_all_twice(actual, plain, expected, training, outputs_alone=form.get("relu", False))


@pytest.mark.parametrize("training", [False, True])
def test_function_without_biases_and_affine(training):
    x, qkv_weight, _, out_weight, *_ = block_inputs()
    mean, variance = torch.randn(12).double(), 0.5 + torch.rand(12).double()
    norm = BatchNorm(None, None, mean, variance)
    expected = reference.non_local(x, qkv_weight, None, out_weight, None, norm=norm, training=training)
    torch.testing.assert_close(non_local(x, qkv_weight, None, out_weight, None, norm=norm, training=training), expected)
    untracked = BatchNorm(None, None, None, None)
    of_batch = reference.non_local(x, qkv_weight, None, out_weight, None, norm=untracked, training=True)
    torch.testing.assert_close(
        non_local(x, qkv_weight, None, out_weight, None, norm=untracked, training=training), of_batch
    )


def test_any_strides_and_no_rois():
    inputs = block_inputs()
    expected = non_local(*inputs[:-2])
    torch.testing.assert_close(non_local(inputs[0].contiguous(), *inputs[1:-2]), expected)
    torch.testing.assert_close(
        non_local(inputs[0].transpose(2, 3).contiguous().transpose(2, 3), *inputs[1:-2]), expected
    )
    x = inputs[0][:0].requires_grad_()
    y = non_local(x, *inputs[1:-2])
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape == (0, 12, 5, 4)


def test_the_input_is_left_alone():
    inputs = block_inputs()
    before = [tensor.clone() for tensor in inputs]
    for norm, training in ((False, False), (True, False), (True, True)):
        non_local(*inputs[:-2], relu=True, norm=batch_norm(*inputs[-2:]) if norm else None, training=training)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("given", ["float32", "amp"])
def test_autocast_is_that_of_the_convolutions(given, training, amp):
    inputs = block_inputs(64, 32, (4, 7, 7), torch.float32)
    if given == "amp":
        inputs[0] = inputs[0].to(amp)
    form = dict(pairwise="embedded_gaussian", groups=2)
    with torch.autocast("cpu", dtype=amp):
        actual, plain = (results(f, inputs, True, training, **form) for f in (non_local, reference.non_local))
    expected = results(reference.non_local, [tensor.double() for tensor in inputs], True, training, **form)
    assert actual[0].dtype == plain[0].dtype == (torch.float32 if given == "float32" else amp)
    check_all_twice(actual, plain, expected, training)


def test_autocast_of_the_operator():
    qkv = torch.randn(2, 5, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert OPERATORS.non_local_attention(qkv, 1, True, 1.0).dtype == torch.bfloat16
        assert OPERATORS.non_local_attention(qkv.double(), 1, True, 1.0).dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(2, 12, 5)), ValueError, r"x must have shape \[N, C, H, W\], got \[2, 12, 5\]"),
        (dict(x=torch.zeros(2, 12, 5, 4, dtype=torch.int64)), TypeError, "x must be floating point, got torch.int64"),
        (dict(qkv_weight=torch.zeros(25, 12)), ValueError, r"qkv_weight must have shape \[3 \* D, C\] = \[24, 12\]"),
        (dict(qkv_weight=torch.zeros(24, 13)), ValueError, r"qkv_weight must .* got \[24, 13\]"),
        (dict(qkv_bias=torch.zeros(8)), ValueError, r"qkv_bias must have shape \[3 \* D\] = \[24\], got \[8\]"),
        (dict(out_weight=torch.zeros(8, 12)), ValueError, r"out_weight must have shape \[C, D\] = \[12, 8\]"),
        (dict(out_bias=torch.zeros(8)), ValueError, r"out_bias must have shape \[C\] = \[12\], got \[8\]"),
        (dict(pairwise="gaussian"), ValueError, "pairwise must be one of dot_product, embedded_gaussian"),
        (dict(groups=3), ValueError, "groups must be at least 1 and divide D = 8, got 3"),
        (dict(groups=0), ValueError, "groups must be at least 1"),
    ],
)
def test_errors(change, error, message):
    arguments = dict(zip(NAMES, block_inputs()[:-2], strict=False)) | change
    with pytest.raises(error, match=message):
        non_local(**arguments)


# ---------------------------------------------------------------------------------------------
# torch.compile


@pytest.fixture(autouse=True)
def no_compiled_code_of_other_tests():
    torch.compiler.reset()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", [FORMS[1], FORMS[3]])
def test_compiled_with_dynamic_shapes(form, training):
    compiled = torch.compile(non_local, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((3, 5, 4), (2, 7, 7), (4, 6, 3)):
        inputs = block_inputs(size=size)
        expected = results(non_local, inputs, True, training, **form)
        for actual, eager in zip(results(compiled, inputs, True, training, **form), expected, strict=True):
            torch.testing.assert_close(actual, eager)


def test_compiled_under_autocast():
    inputs = block_inputs(64, 32, (4, 7, 7), torch.float32)
    compiled = torch.compile(non_local, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(compiled(*inputs[:-2]), non_local(*inputs[:-2]))


@pytest.mark.skipif(not onednn.is_available(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("number", [1, 3, 4, 7, 8])  # 3 maps at a time
@pytest.mark.parametrize("size", [(7, 7), (5, 3), (1, 1)])
@pytest.mark.parametrize("relu", [False, True])
def test_inference_in_float32_on_a_cpu(monkeypatch, poisoned, number, size, relu):
    monkeypatch.setattr(cpu, "CELLS", 3 * size[0] * size[1] + 1)
    ran, run = [], cpu.non_local
    monkeypatch.setattr(cpu, "non_local", lambda *arguments: ran.append(1) or run(*arguments))
    generator = torch.Generator().manual_seed(0)
    x, *weights = (torch.randn(s, generator=generator) for s in ((number, 20, *size), (36, 20), (36,), (20, 12), (20,)))
    if number == 3:
        weights[1::2] = None, None
    if number != 4:
        x = x.contiguous(memory_format=torch.channels_last)
    options = {"groups": 2, "pairwise": "embedded_gaussian", "scale": True, "relu": relu}
    before, expected = x.clone(), []
    for dtype in (torch.float32, torch.float64):
        cast = (None if tensor is None else tensor.to(dtype) for tensor in (x, *weights))
        expected.append(reference.non_local(*cast, **options))
    found = non_local(x, *weights, **options)
    assert_as_exact(found, *expected, roundings=4)
    assert ran and x.equal(before) and found.is_contiguous(memory_format=torch.channels_last)
    x[0, 0, 0, 0] = torch.nan
    found = non_local(x, *weights, **options)
    assert found[0].isnan().all() and found[1:].isfinite().all()
