"""fused_conv: the Triton kernel against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from doublehead.ops import fused_conv
from doublehead.ops._fallback import fallbacks
from doublehead.ops._triton import UNALIGNED
from doublehead.ops.fused_conv import reference
from doublehead.ops.fused_conv.arguments import FusedConvArguments
from tests.support.precision import assert_as_exact, convolution_eps
from tests.support.triton_bfloat16 import upcast_products  # noqa: F401  (a fixture)
from tests.support.triton_compile import ARCHS, Case, compile_cases


def arguments(maps, size, channels, out, dtype=torch.float32, *, kernel=1, second=0, bias=True, residual=True):
    generator = torch.Generator().manual_seed(maps + channels + out)
    cells = maps * size[0] * size[1]

    def normal(*shape, spread=1.0):
        return (torch.randn(*shape, generator=generator) * spread).to(dtype)

    inputs = (channels + second) * kernel**2
    shape = (out, channels + second) if kernel == 1 else (out, channels, 3, 3)
    return {
        "x": normal(cells, channels),
        "weight": normal(*shape, spread=inputs**-0.5),
        "bias": normal(out) if bias else None,
        "second": normal(cells, second) if second else None,
        "residual": normal(cells, out) if residual else None,
        "size": size,
    }


def moved(given: dict, device=None, dtype=None) -> dict:
    return {
        name: value.to(device, dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }


def check(device: str, given: dict, **options) -> None:
    dtype = given["x"].dtype
    order = ("x", "weight", "bias", "second", "residual")
    count = options.pop("count", None)
    count = None if count is None else torch.tensor(count, device=device)
    more = (count, given["size"], options.get("relu", False), options.get("mean", False))
    given = moved(given, device=device)
    plain = reference.fused_conv(FusedConvArguments(*(given[name] for name in order), *more))
    wide = moved(given, dtype=torch.float64)
    exact = reference.fused_conv(FusedConvArguments(*(wide[name] for name in order), *more))
    actual = fused_conv(**given, count=count, **options)
    assert actual.shape == plain.shape
    assert_as_exact(actual, plain, exact.to(torch.float64), f"{dtype}", eps=convolution_eps(device, dtype))


CASES = {
    "1x1": dict(channels=32, out=64),
    "1x1, no bias, no residual": dict(channels=64, out=16, bias=False, residual=False),
    "no multiples of a tile": dict(channels=48, out=144),
    "two inputs": dict(channels=32, second=48, out=64),
    "3x3": dict(channels=32, out=48, kernel=3),
    "3x3, no multiples of a tile": dict(channels=80, out=16, kernel=3),
}


@pytest.mark.usefixtures("upcast_products")
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_triton(triton_kernels, poisoned, dtype, case, mean):
    with fallbacks() as heard:
        check(triton_kernels, arguments(3, (7, 7), dtype=dtype, **CASES[case]), relu=True, mean=mean)
    assert not heard


UNALIGNED_CASES = {
    "channels": dict(channels=40, out=64),
    "second": dict(channels=32, second=24, out=64),
    "out": dict(channels=32, out=75),
    "3x3": dict(channels=19, out=32, kernel=3),
}


@pytest.mark.parametrize("case", UNALIGNED_CASES)
def test_channels_that_are_no_multiple_of_16_take_the_reference(triton_kernels, case):
    with fallbacks() as heard:
        check(triton_kernels, arguments(2, (7, 7), **UNALIGNED_CASES[case]), relu=True)
    assert heard == [("fused_conv", UNALIGNED)]


@pytest.mark.parametrize("name", ["x", "weight", "bias", "residual"])
def test_unaligned_pointers_take_the_reference(triton_kernels, name):
    given = moved(arguments(2, (7, 7), 32, 64), device=triton_kernels)
    memory = torch.empty(given[name].numel() + 1, device=triton_kernels)
    given[name] = memory[1:].view_as(given[name]).copy_(given[name])
    with fallbacks() as heard:
        check(triton_kernels, given)
    assert heard == [("fused_conv", UNALIGNED)]


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (8, 8), (9, 8), (14, 14)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_sizes_of_maps(triton_kernels, poisoned, size, kernel):
    for mean in (False, True):
        check(triton_kernels, arguments(2, size, 16, 16, kernel=kernel), mean=mean)


@pytest.mark.parametrize("count", [0, 1, 3, 5, 9])
@pytest.mark.parametrize("mean", [False, True])
def test_count_is_read_on_the_device(triton_kernels, poisoned, count, mean):
    check(triton_kernels, arguments(5, (7, 7), 16, 32), count=count, relu=True, mean=mean)


def test_no_maps(triton_kernels):
    assert fused_conv(**moved(arguments(0, (7, 7), 16, 24), device=triton_kernels)).shape == (0, 24)


def test_nan_stays_nan_and_in_its_place(triton_kernels):
    given = moved(arguments(3, (7, 7), 16, 32, residual=False), device=triton_kernels)
    given["x"][60] = torch.nan
    result = fused_conv(**given, relu=True)
    assert result[60].isnan().all() and result.isnan().sum() == 32


@pytest.mark.parametrize("kernel", [1, 3])
def test_opcheck_and_fullgraph(kernel):
    given = arguments(2, (7, 7), 16, 24, kernel=kernel)
    order = ("x", "weight", "bias", "second", "residual")
    opcheck(
        torch.ops.doublehead.fused_conv.default,
        (*(given[name] for name in order), torch.tensor(1), [7, 7], True, False),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic"),
    )
    compiled = torch.compile(lambda x, w: fused_conv(x, w, size=(7, 7)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(given["x"], given["weight"]), fused_conv(given["x"], given["weight"], size=(7, 7))
    )


def test_there_is_no_gradient_and_it_says_so():
    given = arguments(2, (7, 7), 16, 24)
    given["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="fused_conv has no gradient"):
        fused_conv(**given).sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(50, 16)}, ValueError, r"x must have shape \[N \* H \* W, C\]"),
        ({"weight": torch.zeros(24, 15)}, ValueError, r"weight must have shape \[out, 16\]"),
        ({"weight": torch.zeros(24, 16, 5, 5)}, ValueError, "weight must have shape"),
        ({"bias": torch.zeros(23)}, ValueError, r"bias must have shape \[24\]"),
        (
            {"weight": torch.zeros(24, 19), "second": torch.zeros(97, 3)},
            ValueError,
            r"second must have shape \[98, 3\], got \[97, 3\]",
        ),
        ({"residual": torch.zeros(98, 23)}, ValueError, "residual must have shape"),
        ({"bias": torch.zeros(24, dtype=torch.float16)}, TypeError, "bias must have the dtype of x"),
        ({"count": torch.tensor(1.0)}, ValueError, "count must be a Tensor"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        fused_conv(**arguments(2, (7, 7), 16, 24) | change)


def cases(arch: int) -> list[Case]:
    from doublehead.ops.fused_conv.kernel import most_registers, tile_of

    pointers = ("x", "second", "weight", "bias", "residual", "count", "out")
    numbers = ("rows", "channels", "second_channels", "out_channels", "height", "width")

    def case(dtype, precision="ieee", taps=1, mean=False, without=(), ones=()):
        tile = tile_of(dtype, mean, (arch // 10, 0))
        name = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
        signature = {key: name for key in pointers} | {"count": "*i64"} | {key: "i32" for key in numbers}
        constants = {key: None for key in without} | {key: 1 for key in ones}  # a launch makes a 1 a constant
        constants |= {"TAPS": taps, "RELU": True, "MEAN": mean, "FILL": False, "PRECISION": precision}
        constants |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
        given = ("residual" not in without, "count" not in without)
        return Case(
            "doublehead.ops.fused_conv.kernel", "fused_conv_kernel", signature, constants, tile.warps, tile.stages,
            ("channels", "second_channels", "out_channels"), most_registers(dtype, mean, *given, (arch // 10, 0)),
        )  # fmt: skip

    return [
        case(torch.bfloat16, without=("second",)),
        case(torch.bfloat16, without=("residual",)),
        case(torch.bfloat16, taps=9, without=("second", "residual")),
        case(torch.bfloat16, mean=True, without=("second",)),
        case(torch.bfloat16, without=("second", "count"), ones=("height", "width")),  # as the non-local block calls it
        case(torch.float32, "tf32", without=("second",)),
        case(torch.float32, "tf32", without=("residual",)),
        case(torch.float32, "tf32", taps=9, without=("second", "residual")),
        case(torch.float32, "tf32", mean=True, without=("second",)),
        case(torch.float32, "tf32", without=("second", "count"), ones=("height", "width")),
    ]


def test_compiles_without_spills():
    pytest.importorskip("triton")
    done = [compiled for arch in ARCHS for compiled in compile_cases(cases(arch), (arch,))]
    assert {(compiled.arch, compiled.case.maxnreg) for compiled in done} >= {(90, 128), (90, None), (80, None)}
    for compiled in done:
        assert compiled.stack == compiled.local == 0, compiled
        assert compiled.shared <= (163 if compiled.arch == 80 else 227) * 1024, compiled
        assert compiled.registers <= (compiled.case.maxnreg or 255), compiled
        assert compiled.wgmma or compiled.arch != 90, compiled  # bfloat16 and tf32 alike are on the tensor cores
