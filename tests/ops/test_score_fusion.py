"""Score fusion: the formulas, the kernels against the definition in float64, gradients, torch, errors."""

from __future__ import annotations

import pytest
import torch

from doublehead.ops import fuse_scores
from doublehead.ops.score_fusion import FUSIONS, op, reference
from tests.support.triton_compile import Case, compile_cases

OPERATORS = torch.ops.doublehead
METHODS = list(FUSIONS)
SHAPES = [(1, 1), (3, 2), (5, 81), (4, 365), (2, 1204)]


def two_logits(rows, classes, dtype=torch.float32, seed=0, scale=4.0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(rows, classes, generator=generator) * scale).to(dtype) for _ in range(2)]


# ---------------------------------------------------------------------------------------------
# The definition


def test_formulas():
    logits = two_logits(5, 4)
    fc, conv = (item.softmax(1) for item in logits)
    expected = {
        "complementary": 1 - (1 - fc) * (1 - conv),
        "max": torch.stack([fc, conv]).amax(0),
        "average": torch.stack([fc, conv]).mean(0),
        "none": fc,
    }
    assert list(expected) == METHODS
    for method, scores in expected.items():
        torch.testing.assert_close(fuse_scores(*logits, method), scores)
    torch.testing.assert_close(fuse_scores(*logits), expected["complementary"])


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck(method):
    logits = [item.double().requires_grad_() for item in two_logits(3, 5, scale=1.0)]
    assert torch.autograd.gradcheck(lambda *a: fuse_scores(*a, method), logits)


def test_dtypes_of_results():
    for dtypes, expected in {
        (torch.float16, torch.float16): torch.float32,
        (torch.bfloat16, torch.float32): torch.float32,
        (torch.float32, torch.float64): torch.float64,
    }.items():
        logits = [x.to(d).requires_grad_() for x, d in zip(two_logits(3, 5), dtypes, strict=True)]
        scores = fuse_scores(*logits)
        assert scores.dtype == expected
        scores.sum().backward()
        assert [x.grad.dtype for x in logits] == list(dtypes)


# ---------------------------------------------------------------------------------------------
# Every implementation


@pytest.fixture(params=["cpu", "triton"])
def device(request, monkeypatch):
    """Where `fuse_scores` runs; in Triton as the operator, since the function takes plain PyTorch for gradients."""
    if request.param == "cpu":
        return "cpu"
    operator = OPERATORS.fuse_scores
    monkeypatch.setitem(globals(), "fuse_scores", lambda fc, conv, method="complementary": operator(fc, conv, method))
    return request.getfixturevalue("triton_kernels")


@pytest.fixture
def poison(monkeypatch):
    """New memory is full of NaN: what a kernel leaves out shows."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def full(*arguments, make=make, **options):
            made = make(*arguments, **options)
            return made.fill_(float("nan") if made.is_floating_point() else 7)

        monkeypatch.setattr(torch, name, full)


def plain(fc_logits, conv_logits, method):
    """Plain PyTorch, computed and differentiated in the logits' own dtype."""
    fc, conv = fc_logits.softmax(-1), conv_logits.softmax(-1)
    return FUSIONS[method](fc, conv)


def results(function, logits, grad, device="cpu"):
    """Scores and both gradients."""
    leaves = [item.detach().to(device).requires_grad_() for item in logits]
    scores = function(*leaves)
    grads = torch.autograd.grad(scores, leaves, grad.to(device, scores.dtype), materialize_grads=True)
    return [item.detach().double().cpu() for item in (scores, *grads)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_twice_that_of_plain_pytorch(device, poison, shape, method, dtype):
    logits = two_logits(*shape, dtype)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    exact = results(lambda *a: plain(*a, method), [item.double() for item in logits], grad)
    naive = results(lambda *a: plain(*(x.float() for x in a), method), logits, grad)
    ours = results(lambda *a: fuse_scores(*a, method), logits, grad, device)
    for index, (a, n, e) in enumerate(zip(ours, naive, exact, strict=True)):
        ulp = torch.finfo(dtype if index else torch.float32).eps * e.abs().max()
        if index:  # a gradient is a difference of numbers as large as `grad`, computed in float32
            ulp += torch.finfo(torch.float32).eps * grad.abs().max()
        assert (a - e).abs().max() <= 2 * (n - e).abs().max() + ulp, ("scores", "grad of fc", "grad of conv")[index]


@pytest.mark.parametrize("method", METHODS)
def test_large_logits_stay_finite(device, method):
    logits = [torch.tensor([[1e4, -1e4, 0.0], [6e4, 6e4, -6e4]]), torch.tensor([[-1e4, 1e4, 0.0], [-6e4, 6e4, 0.0]])]
    expected = {
        "complementary": [[1.0, 1, 0], [0.5, 1, 0]],
        "max": [[1.0, 1, 0], [0.5, 1, 0]],
        "average": [[0.5, 0.5, 0], [0.25, 0.75, 0]],
        "none": [[1.0, 0, 0], [0.5, 0.5, 0]],
    }[method]
    for dtype in (torch.float32, torch.float16):
        scores, *grads = results(
            lambda *a: fuse_scores(*a, method), [x.to(dtype) for x in logits], torch.ones(2, 3), device
        )
        assert scores.tolist() == expected
        assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_plain_pytorchs_and_the_same(triton_kernels, monkeypatch, method):
    logits, grad = two_logits(5, 81), torch.randn(5, 81, generator=torch.Generator().manual_seed(1))
    calls = []
    operator = op._fuse_scores
    monkeypatch.setattr(op, "_fuse_scores", lambda *arguments: calls.append(arguments) or operator(*arguments))
    with torch.no_grad():
        alone = fuse_scores(*(item.to(triton_kernels) for item in logits), method)
    assert len(calls) == 1
    found = results(lambda *a: fuse_scores(*a, method), logits, grad, triton_kernels)
    assert len(calls) == (2 if method == "none" else 1)
    torch.testing.assert_close(found[0], alone.double().cpu(), rtol=1e-6, atol=1e-7)
    defined = results(lambda *a: reference.fuse_scores(*a, method), logits, grad, triton_kernels)
    kernels = results(lambda *a: OPERATORS.fuse_scores(*a, method), logits, grad, triton_kernels)
    for actual, expected, fused in zip(found, defined, kernels, strict=True):
        assert actual.equal(expected) or method == "none"
        torch.testing.assert_close(actual, fused, rtol=1e-5, atol=1e-6)


def test_at_a_tie_of_max_each_gets_half(device):
    fc, conv = two_logits(3, 6)
    conv[1] = fc[1]
    grad = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    expected = results(lambda *a: plain(*a, "max"), (fc, conv), grad)
    ours = results(lambda *a: fuse_scores(*a, "max"), (fc, conv), grad, device)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(ours[1][1], ours[2][1]) and ours[1][1].abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_a_bad_row_is_nan_and_disturbs_no_other(device, method):
    fc, conv = two_logits(7, 5)
    grad = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    clean = results(lambda *a: fuse_scores(*a, method), (fc, conv), grad, device)
    fc[0, 2], fc[1, 0], fc[2] = float("nan"), float("inf"), -float("inf")
    conv[3, 4], conv[4, 1] = float("nan"), float("inf")
    fc[5, 3] = -float("inf")  # one class is excluded, which is no error
    scores, *grads = results(lambda *a: fuse_scores(*a, method), (fc, conv), grad, device)
    bad = 3 if method == "none" else 5
    assert scores[:bad].isnan().all() and scores[bad:].isfinite().all()
    assert method == "max" or (scores[5, 3] == 0 if method == "none" else scores[5, 3] > 0)
    expected = results(lambda *a: plain(*a, method), (fc, conv), grad)
    torch.testing.assert_close([scores, *grads], expected, atol=1e-6, rtol=1e-5, equal_nan=True)
    for ours, before in zip((scores, *grads), clean, strict=True):
        assert torch.equal(ours[6], before[6])
        if method == "none":
            assert torch.equal(ours[3:5], before[3:5])


def test_strides_and_mixed_dtypes(device):
    fc, conv = two_logits(6, 14)
    fc, conv = fc.t()[:6, :5], conv[:, ::2][:6, :5].half()
    grad = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).t()
    expected = results(lambda f, c: plain(f.contiguous(), c.float(), "complementary"), (fc, conv), grad)
    ours = results(fuse_scores, (fc, conv), grad, device)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-3)


def test_what_the_kernel_does_not_serve_the_reference_does(device):
    cases = [two_logits(2, 5, torch.float64), two_logits(2, 5000), two_logits(0, 5), two_logits(3, 0)]
    for logits in cases:
        grad = torch.ones_like(logits[0])
        expected = results(lambda *a: plain(*a, "complementary"), logits, grad)
        tolerance = dict(atol=1e-15, rtol=1e-12) if logits[0].dtype == torch.float64 else dict(atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(results(fuse_scores, logits, grad, device), expected, **tolerance)


# ---------------------------------------------------------------------------------------------
# Inside torch


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(method, dtype):
    logits = two_logits(4, 6, dtype)
    torch.library.opcheck(OPERATORS.fuse_scores_backward.default, (torch.randn(4, 6), *logits, method))
    torch.library.opcheck(OPERATORS.fuse_scores.default, (*(item.requires_grad_() for item in logits), method))


@pytest.mark.parametrize("method", ["complementary", "max"])
def test_compiled_with_dynamic_shapes(method):
    def loss(fc, conv):
        return (fuse_scores(fc, conv, method) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, classes in ((6, 5), (9, 3), (1, 2)):
        logits = [item.requires_grad_() for item in two_logits(rows, classes)]
        expected = loss(*logits)
        grads = torch.autograd.grad(expected, logits)
        found = compiled(*logits)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, logits), grads)


def test_autocast_changes_nothing():
    logits = [item.requires_grad_() for item in two_logits(4, 6)]
    expected = fuse_scores(*logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = fuse_scores(*logits)
        scores.sum().backward()
    assert scores.dtype == torch.float32 and torch.equal(scores, expected)
    for key in ("AutocastCPU", "AutocastCUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key("doublehead::fuse_scores", key)


@pytest.mark.parametrize("method", FUSIONS)
def test_shapes_without_data(method):
    fc, conv = (torch.zeros(4, 6, device="meta", dtype=torch.float16, requires_grad=True) for _ in range(2))
    scores = fuse_scores(fc, conv, method)
    assert (scores.shape, scores.dtype, scores.device.type) == ((4, 6), torch.float32, "meta")
    scores.sum().backward()
    assert fc.grad.shape == (4, 6)
    with torch.no_grad():
        assert fuse_scores(fc, conv, method).shape == (4, 6)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(fc_logits=torch.zeros(5)), ValueError, r"fc_logits must have shape \[N, C\], got \[5\]"),
        (dict(conv_logits=torch.zeros(2, 4)), ValueError, r"conv_logits must have the shape.*\[2, 3\], got \[2, 4\]"),
        (dict(fc_logits=torch.zeros(2, 3, dtype=torch.int64)), TypeError, "fc_logits must be float16.*torch.int64"),
        (dict(conv_logits=torch.zeros(2, 3, dtype=torch.int8)), TypeError, "conv_logits must be float16.*torch.int8"),
        (dict(conv_logits=torch.zeros(2, 3, device="meta")), ValueError, "conv_logits must be on.*cpu, got meta"),
        (dict(method="sum"), ValueError, "method must be one of complementary, max, average, none, got 'sum'"),
    ],
)
def test_errors(change, error, message):
    arguments = dict(fc_logits=torch.zeros(2, 3), conv_logits=torch.zeros(2, 3)) | change
    with pytest.raises(error, match=message):
        fuse_scores(**arguments)


# ---------------------------------------------------------------------------------------------
# Compiled for GPUs that are not here


def test_compiled_kernels_do_not_spill():
    pytest.importorskip("triton")
    from doublehead.ops.score_fusion.kernel import MAX_CLASSES, warps

    module = "doublehead.ops.score_fusion.kernel"
    forward = {"fc_logits": "*bf16", "conv_logits": "*bf16", "scores": "*fp32", "classes": "i32"}
    backward = {
        "grad_scores": "*fp32", "fc_logits": "*fp32", "conv_logits": "*fp32", "grad_fc_logits": "*fp32",
        "grad_conv_logits": "*fp32", "classes": "i32",
    }  # fmt: skip
    cases = []
    for block in (128, MAX_CLASSES):
        constants = {"METHOD": "max", "BLOCK": block}
        cases.append(Case(module, "_forward", forward, constants, warps(block), 3))
        cases.append(Case(module, "_backward", backward, constants, warps(block), 3))
    for compiled in compile_cases(cases):
        assert compiled.stack == compiled.local == 0, compiled
        assert compiled.registers <= 128 and compiled.shared <= 1024, compiled
