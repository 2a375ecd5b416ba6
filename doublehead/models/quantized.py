"""The heads in 8 bits on a CPU: which layers can, the scales of their inputs, and switching a model over.

Weights have one scale for each output channel and are symmetric; they are quantised from the model's own, whenever
these change.  A layer's input has one scale, measured on images (`observe`): a step of 8 bits.  An input that follows a
ReLU has the values 0 .. 255 steps, any other -128 .. 127 steps; what lies outside is clipped.  Only the last product of
a non-local block has a scale for each RoI, taken when it runs: what it reads differs too much between RoIs.  Sums are
exact, in 32 bits.  What lies between the products (attention, residual sums, the average over cells, classifiers and
regressors) stays in float.

A model in 8 bits is the same module with the same `state_dict`: it can be copied, pickled, trained and exported.  Only
inference without gradients on a CPU, in float32 or under autocast to bfloat16, runs in 8 bits; in training, with
gradients, on another device, in other dtypes, under torch.compile and export the model computes in float as before.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Literal

from torch import Tensor, nn

from ..ops.int8 import Support, int8_support
from .conv_tower import ConvTower
from .layered import Layered
from .observing import Histogram
from .products import Layer
from .towers import FCTower

__all__ = [
    "Observation",
    "Support",
    "int8_layers",
    "int8_support",
    "layers_in_int8",
    "observe",
    "use_float",
    "use_int8",
]

LayeredTower = ConvTower | FCTower


class Observation:
    """The inputs of each layer that `observe` has seen."""

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self._layers = layers
        self._histograms = {name: Histogram() for name in layers}

    def record(self, name: str, x: Tensor) -> None:
        """Count the values of `x`, an input of the layer."""
        self._histograms[name].add(x)

    def scales(self) -> dict[str, float]:
        """Layer name -> scale, for `use_int8`; of the layers that ran, in the order of `int8_layers`.

        The scale is the step of 8 bits with the least mean square error of rounding and clipping.

        Raises:
            ValueError: nothing ran, or a layer's inputs were all zero or not finite; the message names it.
        """
        seen = {name: histogram for name, histogram in self._histograms.items() if histogram.seen}
        if not seen:
            raise ValueError("observe: no RoI reached a layer that can run in 8 bits: run the model on images")
        for name, histogram in seen.items():
            if not histogram.finite:
                raise ValueError(f"observe: the inputs of {name} are not all finite: the model cannot run in 8 bits")
            if histogram.top == 0:
                raise ValueError(f"observe: the inputs of {name} were all zero: run the model on images of its kind")
        return {name: histogram.scale(self._layers[name].signed) for name, histogram in seen.items()}


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
    return list(_layers(_towers(model)))


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
    towers = _towers(model)
    layers = _layers(towers)
    if not layers:
        raise ValueError("observe: the model has no layer that can run in 8 bits")
    if any(tower.training for tower in towers.values()):
        raise ValueError("observe: the model is in training mode; call model.eval() first")
    if any(parameter.device.type != "cpu" for tower in towers.values() for parameter in tower.parameters()):
        raise ValueError("observe: the model is not on a CPU; call model.cpu() first")
    observation = Observation(layers)
    before = {name: tower.layered for name, tower in towers.items()}
    try:
        for prefix, tower in towers.items():
            tower.layered = Layered({}, record=_recorder(observation, prefix))
        yield observation
    finally:
        for name, tower in towers.items():
            tower.layered = before[name]


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
    support = int8_support()
    if support.level == "none":
        raise RuntimeError(f"int8: not on this machine: {support.reason}")
    towers = _towers(model)
    layers = _layers(towers)
    if isinstance(leave_out, str):
        raise TypeError(f"leave_out: expected names of layers, got the text {leave_out!r}")
    for argument, names in (("scales", scales), ("leave_out", leave_out)):
        unknown = [name for name in names if name not in layers]
        if unknown:
            raise ValueError(
                f"{argument}: the model has no layer {unknown[0]!r} that can run in 8 bits{_known(layers)}"
            )
    for name, scale in scales.items():
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scales: expected a positive number for {name}, got {scale}")
    if bits not in (None, 7, 8):
        raise ValueError(f"bits: expected 7 or 8, got {bits!r}")
    used = {name: float(scale) for name, scale in scales.items() if name not in leave_out}
    if not used:
        raise ValueError("int8: no layer is left to run in 8 bits")
    bits = bits or support.bits
    for prefix, tower in towers.items():
        own = {name.removeprefix(prefix): scale for name, scale in used.items() if name in _names(prefix, tower)}
        tower.layered = Layered(own, bits, emulated=bits > support.bits) if own else None


def use_float(model: nn.Module) -> None:
    """Let all layers run in float again; changes nothing in a model that does already."""
    for tower in _towers(model).values():
        tower.layered = None


def layers_in_int8(model: nn.Module) -> list[str]:
    """The layers that `use_int8` has switched over, in the order of `int8_layers`; empty: the model runs in float."""
    towers = _towers(model)
    own = {prefix: tower.layered.scales for prefix, tower in towers.items() if tower.layered is not None}
    return [prefix + layer.name for prefix in own for layer in towers[prefix].layers() if layer.name in own[prefix]]


def _towers(model: nn.Module) -> dict[str, LayeredTower]:
    """What stands before the names of a tower's layers -> the tower, in the order in which they run."""
    named = model.named_modules()
    return {f"{name}." if name else "": module for name, module in named if isinstance(module, ConvTower | FCTower)}


def _layers(towers: Mapping[str, LayeredTower]) -> dict[str, Layer]:
    """All layers by their names in the model."""
    return {prefix + layer.name: layer for prefix, tower in towers.items() for layer in tower.layers()}


def _names(prefix: str, tower: LayeredTower) -> set[str]:
    return {prefix + layer.name for layer in tower.layers()}


def _recorder(observation: Observation, prefix: str):
    return lambda name, x: observation.record(prefix + name, x)


def _known(layers: Iterable[str]) -> str:
    layers = list(layers)
    return f"; it has {', '.join(layers[:3])}{', ...' if len(layers) > 3 else ''}" if layers else ""
