"""The heads in 8 bits on a CPU: which layers can, the scales of their inputs, and switching a model over.

Weights have one scale for each output channel and are symmetric; they are quantised from the model's own, whenever
these change.  A layer's input has one scale, measured on images (`observe`): a step of 8 bits.  An input that follows a
ReLU has the values 0 .. 255 steps, any other -128 .. 127 steps; what lies outside is clipped.  Sums are exact, in
32 bits.  What lies between the products (attention, residual sums, the average over cells, classifiers and regressors)
stays in float.

A model in 8 bits is the same module with the same `state_dict`: it can be copied, pickled, trained and exported.  Only
inference without gradients on a CPU, in float32 or under autocast to bfloat16, runs in 8 bits; in training, with
gradients, on another device, in other dtypes, under torch.compile and export the model computes in float as before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Literal, NamedTuple

from torch import nn


class Support(NamedTuple):
    """What this processor and this build of PyTorch do for products of 8-bit integers."""

    level: Literal["vnni", "seven_bits", "none"]
    """`vnni`: native, inputs have 8 bits.  `seven_bits`: x86 without VNNI, whose instruction saturates at 16 bits;
    inputs have 7 bits, so that no sum does, with the same scales (steps are twice as large).  `none`: the operators are
    missing."""
    reason: str
    """One line on why, such as "the processor has no AVX512-VNNI"; empty for `vnni`."""


class Observation:
    """The inputs of each layer that `observe` has seen."""

    def scales(self) -> dict[str, float]:
        """Layer name -> scale, for `use_int8`; of the layers that ran, in the order of `int8_layers`.

        Raises:
            ValueError: nothing ran, or a layer's inputs were all zero or not finite; the message names it.
        """
        raise NotImplementedError


def int8_support() -> Support:
    """What this machine can do; cheap, and the same for the whole process."""
    raise NotImplementedError


def int8_layers(model: nn.Module) -> list[str]:
    """The layers of `model` that can run in 8 bits, in the order in which they run: the products of conv- and fc-heads.

    A name is that of the module, as in `model.named_modules()`; the three products of a non-local block that have one
    input are one layer, called `<block>.qkv`.

    Args:
        model: a `DoubleHeadRCNN`, a `Detector`, or a tower; names are relative to it.

    Returns:
        for instance `["detector.heads.fc.tower.1", "detector.heads.fc.tower.3",
        "detector.heads.conv.tower.0.residual.0", ...]`; empty if there is none (C4 models).
    """
    raise NotImplementedError


@contextlib.contextmanager
def observe(model: nn.Module) -> Iterator[Observation]:
    """While in the block, `model` runs in float and the inputs of its layers are recorded, on eval-mode calls.

    ```
    with observe(model) as observation, torch.inference_mode():
        for images in batches:
            model(images)
    use_int8(model, observation.scales())
    ```

    A model in 8 bits is in 8 bits again afterwards.  The memory it takes does not grow with the number of images.

    Raises:
        ValueError: the model has no layer that can run in 8 bits, is in training mode, or is not on a CPU.
    """
    raise NotImplementedError
    yield


def use_int8(
    model: nn.Module, scales: Mapping[str, float], leave_out: Collection[str] = (), *, bits: Literal[7, 8] | None = None
) -> None:
    """Let layers of `model` run in 8 bits from the next call on; see the module for when they do.

    Args:
        model: as in `int8_layers`.
        scales: layer name -> scale of its input, as `Observation.scales` gives them.  Layers without one run in float.
        leave_out: layers that run in float all the same.
        bits: of the inputs.  None: what `int8_support` says.  8 where it says `seven_bits` is emulated, exactly and
            slowly: it shows what a machine with VNNI would compute.

    Raises:
        ValueError: a name in `scales` or `leave_out` is no layer of the model, a scale is not finite and positive, or
            no layer is left.
        RuntimeError: `int8_support` says `none`.
    """
    raise NotImplementedError


def use_float(model: nn.Module) -> None:
    """Let all layers run in float again; changes nothing in a model that does already."""
    raise NotImplementedError


def layers_in_int8(model: nn.Module) -> list[str]:
    """The layers that `use_int8` has switched over, in the order of `int8_layers`; empty: the model runs in float."""
    raise NotImplementedError
