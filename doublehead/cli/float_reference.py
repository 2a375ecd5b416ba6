"""What `evaluate --precision int8` compares with: the AP of the same model in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from doublehead.engine.evaluator import evaluate, evaluate_each
from doublehead.engine.logs import say
from doublehead.engine.precision import Mode, in_float32
from doublehead.engine.quantizing import ground_truth_digest, readout_of

if TYPE_CHECKING:
    from torch import nn

    from doublehead.models.readout import ReadOut


class FloatReference(NamedTuple):
    """An AP in fp32."""

    AP: float | None
    """0 .. 1; None: there is nothing to measure."""
    source: str
    """Where it comes from, in words."""

    def difference(self, name: str, metrics: Mapping[str, Any]) -> str:
        """A line about the AP in `metrics`, which is called `name`, beside this one."""
        found = metrics.get("AP")
        if found is None or self.AP is None:
            return f"{name}: no AP to compare with fp32"
        there, here = 100 * self.AP, 100 * found
        return f"{name} AP {here:.2f}, fp32 AP {there:.2f}: {here - there:+.2f} ({self.source})"


def float_ap(model: nn.Module, dataset: Any, world: Any, mode: Mode, settings: dict[str, Any]) -> FloatReference:
    """That of the model's present read-out: as stored if `doublehead quantize` measured on these data, else measured.

    Args:
        settings: further arguments of `evaluate`.
    """
    stored = mode.plan.measured
    same_data = stored["ground_truth"] == ground_truth_digest(dataset)
    if same_data and stored["readout"] == readout_of(model.detector.readout.detection):
        return FloatReference(stored["fp32"], "fp32 as doublehead quantize measured it on these images")
    if world.is_main:
        say("measuring fp32 too: doublehead quantize measured on other images, or in another read-out")
    with in_float32(model, world.device, mode):
        metrics, _ = evaluate(model, dataset, world, **settings)
    return FloatReference(metrics.get("AP"), "both measured now")


def float_ap_of_each(
    model: nn.Module, dataset: Any, readouts: Mapping[str, ReadOut], world: Any, mode: Mode, settings: dict[str, Any]
) -> dict[str, FloatReference]:
    """Those of several read-outs, measured."""
    if world.is_main:
        say("measuring fp32 too")
    with in_float32(model, world.device, mode):
        each = evaluate_each(model, dataset, dict(readouts), world, **settings)
    return {name: FloatReference(metrics.get("AP"), "both measured now") for name, metrics in each.items()}
