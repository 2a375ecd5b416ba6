"""What the processor has for 16-bit and 8-bit products."""

import pytest
import torch

from doublehead.ops.processor import processor, read_capabilities

ZEN2 = {"architecture": "x86_64", "cpu_name": "AMD EPYC", "avx2": True, "num_logical_cores": 2, "avx512_f": False}
ZEN4 = ZEN2 | {"avx512_f": True, "avx512_bf16": True, "avx512_vnni": True}


@pytest.mark.parametrize(
    "found, listed",
    [
        (ZEN2, "AVX2; no AVX-512, no bf16, no fp16, no VNNI, no AMX"),
        (ZEN4, "AVX2, AVX-512, bf16, VNNI; no fp16, no AMX"),
        (
            ZEN4 | dict.fromkeys(["amx_tile", "amx_int8", "amx_bf16", "avx512_fp16"], True),
            "AVX2, AVX-512, bf16, fp16, VNNI, AMX",
        ),
        (ZEN2 | {"avx_vnni": True}, "AVX2, VNNI; no AVX-512, no bf16, no fp16, no AMX"),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, "bf16; no fp16"),
        ({}, "no bf16, no fp16"),
    ],
)
def test_what_it_has_and_what_it_lacks(found, listed):
    assert read_capabilities(found).listed() == listed


def test_sizes_are_no_instructions():
    assert not read_capabilities({"architecture": "x86_64", "l2_cache_size": 1, "avx_vnni_int16": 1}).vnni


def test_this_machine():
    assert processor() == read_capabilities(torch.cpu.get_capabilities())
    assert processor().avx2 == torch.cpu._is_avx2_supported()
    assert processor().avx512 <= torch.cpu._is_avx512_supported()
