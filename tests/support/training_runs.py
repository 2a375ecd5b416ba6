"""Trainings in processes of their own, and how two runs are compared."""

from __future__ import annotations

import json

import safetensors.torch
import torch

from doublehead.engine.checkpoint import load_state
from doublehead.engine.logs import read_log
from tests.support.engine_standin import TINY, launch


def train(folder, *more, log=None, **more_of_launch):
    """A started training; its output goes to `log`."""
    where = [] if "--resume" in more else ["--out", folder]
    options = [] if "--resume" in more else TINY
    log = log or folder.with_suffix(".txt")
    return launch("train", [*where, *options, *more], log, **more_of_launch)


def contents(folder):
    """Everything of a run that must not depend on how often it was interrupted."""
    state = load_state(folder / "state.pt")
    flat = {}

    def flatten(name, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                flatten(f"{name}.{key}", inner)
        elif isinstance(value, (list, tuple)):
            for key, inner in enumerate(value):
                flatten(f"{name}.{key}", inner)
        else:
            flat[name] = value

    flatten("state", state)
    flat.pop("state.seconds")
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        flat["header"] = file.metadata()
        flat |= {f"model.{name}": file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if (folder / "best.safetensors").exists():
        with safetensors.safe_open(folder / "best.safetensors", "pt") as file:
            flat["best step"] = (file.metadata()["step"], file.metadata()["validation_ap"])
            flat |= {f"best.{name}": file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    times = ("time", "images_per_second")
    flat["log"] = [{k: v for k, v in r.items() if k not in times} for r in read_log(folder / "log.jsonl")]
    flat["metrics"] = {k: v for k, v in json.loads((folder / "metrics.json").read_text()).items() if k != "seconds"}
    return flat


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        assert same, name


OPTIONS = "--train.ema-decay 0.9 --train.accumulate 2 --train.eval-every 5".split()
