"""Checks of a training state: `STATE` for any one, `trainer_state` for one that a given trainer can continue from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from doublehead.engine.schema import (
    Check,
    anything,
    each,
    either,
    entries,
    exactly,
    items,
    like,
    nothing,
    number,
    plain,
    tensor,
    text,
    whole,
)

FORMAT = "doublehead.state/1"

_TENSORS = each(plain)
_SCALER = entries(
    {
        "scale": number(1e-30),
        "growth_factor": number(1),
        "backoff_factor": number(1e-30),
        "growth_interval": whole(1),
        "_growth_tracker": whole(0),
    }
)
_LOSSES = entries({"sums": each(tensor((), torch.float64)), "steps": whole(0)})
_RUN = entries({"recipe": each(anything), "classes": items(text)}, {"images": whole(0), "files": text})

STATE = entries(
    {
        "format": exactly(FORMAT),
        "step": whole(0),
        "evaluated_step": whole(-1),
        "seconds": number(0),
        "model": _TENSORS,
        "optimizer": entries({"state": each(each(anything), names=whole(0)), "param_groups": items(each(anything))}),
        "scaler": either(exactly({}), _SCALER),
        "average": either(nothing, entries({"updates": whole(0), "model": _TENSORS})),
        "losses": _LOSSES,
        "machine": entries({"processes": whole(1), "threads": whole(1), "device": text}),
    },
    optional={"run": _RUN},  # of the data and recipe; the first versions had none
)
"""Any state in a file, whatever was trained."""


def trainer_state(trainer: Any) -> Check:
    """A state that `trainer` can continue from: its model's tensors, its optimiser's parameters."""
    model = entries({name: like(tensor) for name, tensor in trainer.model.state_dict().items()}, others=False)
    wanted = entries(
        {
            "step": whole(0),
            "evaluated_step": whole(-1),
            "seconds": number(0),
            "model": model,
            "optimizer": entries({"state": anything, "param_groups": _param_groups(trainer.optimizer)}),
            "scaler": either(exactly({}), _SCALER),  # empty unless amp was fp16
            "average": either(nothing, entries({"updates": whole(0), "model": model})),
            "losses": _LOSSES,
        }
    )
    memory = _optimizer_memory(trainer.optimizer)

    def check(state: Any, path: str = "") -> None:
        wanted(state, path)
        whole(0)(state["step"] - state["evaluated_step"], "the number of steps since the last evaluation")
        # Empty before the first step, and while fp16 has overflowed at every step so far.
        begun = state["step"] > 0 and not (state["scaler"] and state["optimizer"]["state"] == {})
        (memory if begun else exactly({}))(state["optimizer"]["state"], "optimizer.state")

    return check


def _optimizer_memory(optimizer: torch.optim.Optimizer) -> Check:
    """What the optimiser holds for each of its parameters after a step."""
    memory_of = _adamw_memory
    if isinstance(optimizer, torch.optim.SGD):
        if not any(group["momentum"] for group in optimizer.param_groups):
            return anything  # without momentum its state changes nothing
        memory_of = _sgd_memory
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return entries({index: memory_of(parameter) for index, parameter in enumerate(parameters)}, others=False)


def _sgd_memory(parameter: nn.Parameter) -> Check:
    return entries({"momentum_buffer": like(parameter)}, others=False)


def _adamw_memory(parameter: nn.Parameter) -> Check:
    moment = like(parameter)
    return entries({"step": tensor(()), "exp_avg": moment, "exp_avg_sq": moment}, others=False)


def _param_groups(optimizer: torch.optim.Optimizer) -> Check:
    checks = [_param_group(group) for group in optimizer.state_dict()["param_groups"]]

    def check(value: Any, path: str) -> None:
        items(anything, len(checks))(value, path)
        for row, (group, check_group) in enumerate(zip(value, checks, strict=True)):
            check_group(group, f"{path}[{row}]")

    return check


def _param_group(group: Mapping[str, Any]) -> Check:
    """Settings like those of `group`; switches that another version of PyTorch does not know may be missing."""
    switches = {name: _switch for name, value in group.items() if value is None or isinstance(value, bool)}
    wanted = {name: _setting(value) for name, value in group.items() if name not in switches}
    return entries(wanted | {"params": _numbers(group["params"])}, switches)


def _numbers(expected: list[int]) -> Check:
    def check(value: Any, path: str) -> None:
        items(whole(0), len(expected))(value, path)
        exactly(expected)(list(value), path)

    return check


def _setting(value: Any) -> Check:
    return items(number(0), len(value)) if isinstance(value, (list, tuple)) else number(0)


_switch = either(nothing, either(exactly(True), exactly(False)))
