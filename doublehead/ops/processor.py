"""What the CPU has for products of 16-bit floats and of 8-bit integers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch


class Processor(NamedTuple):
    """Sets of instructions; False where PyTorch knows nothing of one."""

    name: str
    """As the processor calls itself, such as "AMD EPYC"; empty if it does not say."""
    x86: bool
    avx2: bool
    avx512: bool
    bf16: bool
    """Products of bfloat16: AVX512-BF16 or AMX on x86, BF16 on Arm."""
    fp16: bool
    """Products of float16: AVX512-FP16 or AMX on x86, half-precision arithmetic on Arm."""
    vnni: bool
    """Products of 8-bit integers with sums in 32 bits: AVX512-VNNI, AVX-VNNI or AMX."""
    amx: bool

    def listed(self) -> str:
        """What it has and what it lacks: "AVX2; no AVX-512, no bf16, no fp16, no VNNI, no AMX"."""
        named = {"bf16": self.bf16, "fp16": self.fp16}
        if self.x86:
            named = {"AVX2": self.avx2, "AVX-512": self.avx512} | named | {"VNNI": self.vnni, "AMX": self.amx}
        has = ", ".join(name for name, there in named.items() if there)
        lacks = ", ".join(f"no {name}" for name, there in named.items() if not there)
        return "; ".join(part for part in (has, lacks) if part)


@functools.cache
def processor() -> Processor:
    """This machine's."""
    return read_capabilities(torch.cpu.get_capabilities())


def read_capabilities(found: Mapping[str, object]) -> Processor:
    """From what `torch.cpu.get_capabilities` gives: name of a set of instructions -> whether it is there."""
    there = {name for name, value in found.items() if value is True}
    return Processor(
        name=str(found.get("cpu_name", "")),
        x86="x86" in str(found.get("architecture", "")),
        avx2="avx2" in there,
        avx512="avx512_f" in there,
        bf16=any("bf16" in name for name in there),
        fp16=any("fp16" in name for name in there),
        vnni=not there.isdisjoint({"avx512_vnni", "avx_vnni", "amx_int8"}),
        amx="amx_tile" in there,
    )
