"""The Triton kernels of the non-local block, compiled for GPUs that are not there: no spills, and tensor cores."""

from __future__ import annotations

import pytest
import torch

from tests.support.triton_compile import ARCHS, Case, compile_cases

pytest.importorskip("triton")

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
POINTERS = {
    "forward": ("qkv", "out", "count"),
    "backward_whole": ("qkv", "grad", "grad_qkv"),
    "backward_queries": ("qkv", "grad", "grad_qkv", "statistics"),
    "backward_keys": ("qkv", "grad", "grad_qkv", "statistics"),
}


def case(function: str, cells: int, dtype: str, width: int, softmax: bool, precision: str = "ieee") -> Case:
    """The kernel as its launcher would have it."""
    from doublehead.ops.non_local import kernel

    table = function if function in ("forward", "backward_whole") else "backward_blocks"
    chosen = kernel.configuration(table, cells, DTYPES[dtype])
    others = {"statistics": "*fp32", "count": "*i64"}
    signature = {name: others.get(name, f"*{dtype}") for name in POINTERS[function]}
    signature |= {"cells": "i32", "groups": "i32", "scale": "fp32"}
    constants = kernel.constants(chosen, width, softmax, precision)
    if width == 512:  # a single group: Triton makes a constant of every integer that is 1
        del signature["groups"]
        constants["groups"] = 1
    return Case("doublehead.ops.non_local.kernel", function, signature, constants, chosen.num_warps, chosen.num_stages)


@pytest.mark.parametrize(
    ("cells", "dtype", "archs", "variants"),
    [
        (49, "bf16", ARCHS, [(512, True), (128, False)]),
        (100, "bf16", (90,), [(512, True)]),
        (196, "bf16", ARCHS, [(512, True)]),
        (196, "bf16", (90,), [(128, False)]),
        (49, "fp32", (90,), [(512, True)]),
        (196, "fp32", (80,), [(512, True)]),
    ],
)
def test_no_spills(cells, dtype, archs, variants):
    functions = ["forward", "backward_whole"] if cells <= 64 else ["forward", "backward_queries", "backward_keys"]
    cases = [case(function, cells, dtype, *variant) for function in functions for variant in variants]
    for compiled in compile_cases(cases, archs):
        about = f"{compiled.case.kernel} {compiled.case.constants} sm_{compiled.arch}"
        assert compiled.stack == compiled.local == 0, about
        assert compiled.shared <= SHARED_LIMIT[compiled.arch], about
        assert compiled.wgmma == (compiled.arch == 90 and dtype == "bf16"), about


def test_tf32_does_not_spill():
    for compiled in compile_cases(
        [case(name, 49, "fp32", 128, False, "tf32") for name in ("forward", "backward_whole")]
    ):
        assert compiled.stack == compiled.local == 0, compiled
        assert compiled.shared <= SHARED_LIMIT[compiled.arch], compiled
