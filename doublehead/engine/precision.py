"""The precision in which a trained detector computes: asked for by name, with one line where the processor lacks it.

float32 computes as the model is.  The 16-bit ones are autocast's: weights stay as they are, and boxes and scores are
float32 in any case.  int8 switches layers of the heads over, as `doublehead quantize` found best; the rest computes in
bfloat16 where the processor has it, else in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

import torch

from doublehead.config import Precision
from doublehead.errors import UserError
from doublehead.ops.processor import processor

if TYPE_CHECKING:
    from torch import nn

    from doublehead.engine.int8_file import Int8Plan

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What autocast computes in; None: it is off."""


class Mode(NamedTuple):
    """How a model computes on a device."""

    asked: Precision
    used: Precision
    """Another one than asked for only where int8 has no operators."""
    dtype: torch.dtype | None
    """What autocast computes in; None: it is off."""
    note: str = ""
    """One line on what the processor lacks; empty: nothing."""
    plan: Int8Plan | None = None
    """What the checkpoint's int8.json says; None where int8 was not asked for."""

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The context in which the model runs; with `dtype` None nothing changes, not even an autocast outside."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, self.dtype)


FP32 = Mode("fp32", "fp32", None)


def resolve_precision(precision: Precision, device: torch.device) -> Mode:
    """How `precision` is computed on `device`.

    Raises:
        UserError: there is no such precision, or it is not for this device.
    """
    if precision not in get_args(Precision):
        raise UserError(f"precision is {precision!r}: expected one of {', '.join(get_args(Precision))}")
    if precision == "int8":
        if device.type != "cpu":
            raise UserError(f"precision int8 is for CPUs, this is {device}: take the device cpu, or precision bf16")
        return _int8()
    return Mode(precision, precision, DTYPES[precision], emulated(precision) if device.type == "cpu" else "")


def set_precision(model: nn.Module, precision: Precision, device: torch.device, checkpoint: str | Path) -> Mode:
    """Let `model`, read from `checkpoint`, compute in `precision` on `device`: int8 layers are switched over.

    The 16-bit precisions need `Mode.autocast` around every call; so does int8, for what is not in 8 bits.

    Raises:
        UserError: see `resolve_precision`; for int8 also: the model has no layers for it, or there is no usable
            int8.json beside the checkpoint.
    """
    mode = resolve_precision(precision, device)
    if precision == "int8":
        from doublehead.engine.int8_file import read_int8
        from doublehead.models import quantized

        mode = mode._replace(plan=read_int8(checkpoint, model))
        if mode.used == "int8":
            quantized.use_int8(model, mode.plan.scales, mode.plan.left_out)
        else:
            quantized.use_float(model)
    return mode


@contextlib.contextmanager
def in_float32(model: nn.Module, device: torch.device, mode: Mode) -> Iterator[None]:
    """Inside, `model` computes as in precision fp32; afterwards in `mode` again."""
    from doublehead.models import quantized

    quantized.use_float(model)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if mode.used == "int8":
            quantized.use_int8(model, mode.plan.scales, mode.plan.left_out)


def rest_dtype() -> torch.dtype | None:
    """What autocast computes in beside int8 layers: bfloat16 where this processor has it; None: float32."""
    return torch.bfloat16 if processor().bf16 else None


def emulated(precision: Precision) -> str:
    """One line, if a 16-bit precision is not native to this processor; else empty."""
    lacks = {
        "bf16": (processor().bf16, "AVX512-BF16 and AMX" if processor().x86 else "bfloat16"),
        "fp16": (processor().fp16, "AVX512-FP16 and AMX" if processor().x86 else "float16"),
    }
    native, missing = lacks.get(precision, (True, ""))
    return "" if native else f"{precision} is emulated, slower than fp32: this processor lacks {missing}"


def _int8() -> Mode:
    from doublehead.ops import int8

    support, rest = int8.int8_support(), rest_dtype()
    if support.level == "none":
        used = "fp32" if rest is None else "bf16"
        return Mode("int8", used, rest, f"int8 cannot run here, {used} runs in its place: {support.reason}")
    note = f"int8 inputs have 7 bits: {support.reason}" if support.level == "seven_bits" else ""
    return Mode("int8", "int8", rest, note)


def on_this_cpu() -> dict[str, str]:
    """Precision -> what it means on this machine's CPU, in a line."""
    from doublehead.ops import int8  # without the models: `info` works where there is no torchvision

    support = int8.int8_support()
    means = {"vnni": "native", "seven_bits": f"inputs have 7 bits: {support.reason}"}
    lines = {"fp32": "native"}
    for name in ("bf16", "fp16"):
        lines[name] = emulated(name).removeprefix(f"{name} is ") or "native"
    lines["int8"] = means.get(support.level, f"cannot run: {support.reason}")
    if support.level != "none":
        lines["int8"] += f"; the other layers compute in {'bf16' if rest_dtype() is not None else 'fp32'}"
    return lines
