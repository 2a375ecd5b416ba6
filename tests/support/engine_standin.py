"""What the engine's tests share: a tiny detector, a data set in memory, and processes that can be killed.

`TinyDetector` has the models' interface, not their maths.  `launch` starts a command of the library in
another process, with that detector in place of the real one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import multiprocessing
import os
import socket
import sys
import types
from collections import Counter
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from doublehead.data import DetectionDataset


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors are slower on several threads, and beside other work much slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TinyDetector(nn.Module):
    """Finds at most one box per class; in training it draws random numbers, as the real one does."""

    drop = 0.1

    def __init__(self, num_classes: int, width: int = 4) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, 4, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU()
        )
        self.classify = nn.Linear(width * 4, num_classes)
        self.locate = nn.Linear(width * 4, 4 * num_classes)

    def forward(self, images, targets=None):
        if targets is None:
            return [self.detect(image) for image in images]
        losses = [self.losses(image, target) for image, target in zip(images, targets, strict=True)]
        return {name: torch.stack([loss[name] for loss in losses]).mean() for name in losses[0]}

    def set_readout(self, readout, fusion=None, ext_gate=None):
        self.readout = (readout, fusion, ext_gate)

    def outputs(self, image):
        x = self.features(F.interpolate(image[None].float() / 255, (32, 32), mode="bilinear"))
        x = F.adaptive_avg_pool2d(x, 2).flatten(1)
        if self.training and self.drop:
            x = x * (torch.rand(x.shape, device=x.device) > self.drop)
        return self.classify(x)[0], self.locate(x)[0].view(self.num_classes, 4)

    def losses(self, image, target):
        logits, boxes = self.outputs(image)
        label = target["labels"][:1]
        scaled = target["boxes"][:1] / image.shape[-1]
        return {
            "loss_cls": F.cross_entropy(logits[None].float(), label),
            "loss_box": F.smooth_l1_loss(boxes[label].float(), scaled),
        }

    def detect(self, image):
        logits, boxes = self.outputs(image)
        height, width = image.shape[-2:]
        scale = torch.tensor([width, height, width, height], device=image.device)
        corners = boxes[1:].sigmoid().view(-1, 2, 2).sort(dim=1).values.reshape(-1, 4) * scale
        return {"boxes": corners, "labels": torch.arange(1, self.num_classes), "scores": logits.softmax(0)[1:]}


def tiny_models(seen: list | None = None) -> types.ModuleType:
    """Stands in for the module `doublehead.models`; the configurations it builds from are added to `seen`."""

    def build_detector(config, num_classes):
        if seen is not None:
            seen.append(config)
        return TinyDetector(num_classes)

    models = types.ModuleType("doublehead.models")
    models.build_detector = build_detector
    return models


def tiny_program(monkeypatch):
    """A function that runs a command in this process, with the tiny detector and without charts: its exit code."""
    monkeypatch.setitem(sys.modules, "doublehead.models", tiny_models())
    monkeypatch.setattr("doublehead.engine.pictures.draw_curves", lambda *args: None)
    monkeypatch.setattr("doublehead.engine.charts.draw_charts", lambda *args: [])

    def run(*arguments, command="train"):
        try:
            importlib.import_module(f"doublehead.cli.{command}").main([str(argument) for argument in arguments])
        except SystemExit as stop:
            return stop.code
        return 0

    return run


def checksums(folder: Path) -> dict[Path, str]:
    """The digest of each file in `folder`, at any depth, and the folders in it."""
    paths = sorted(folder.rglob("*"))
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder" for path in paths}


class MemoryDataset(DetectionDataset):
    """Images and COCO annotations given as they are; classes a, b, ... with sparse category ids."""

    def __init__(self, images: list[torch.Tensor], annotations: list[dict], classes: int = 2) -> None:
        self.name = "memory"
        self.classes = [chr(ord("a") + i) for i in range(classes)]
        self.category_ids = [3 * i + 2 for i in range(classes)]
        self.image_ids = [10 * i + 7 for i in range(len(images))]
        self.image_sizes = [tuple(image.shape[-2:]) for image in images]
        self.file_names = [f"{i}.png" for i in self.image_ids]
        self.horizontal_flip = 0.0
        self.skipped = Counter()
        self.images = images
        self._annotations = [{"id": i, "iscrowd": 0} | a for i, a in enumerate(annotations, start=1)]
        for annotation in self._annotations:
            annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])

    def load(self, index):
        image_id = self.image_ids[index]
        mine = [a for a in self._annotations if a["image_id"] == image_id and not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in mine], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([self.category_ids.index(a["category_id"]) + 1 for a in mine], dtype=torch.int64)
        return self.images[index], {"boxes": boxes, "labels": labels, "image_id": image_id}

    def annotations(self):
        return [dict(a) for a in self._annotations]


# ---------------------------------------------------------------------- processes

_processes = multiprocessing.get_context("forkserver")


@functools.cache
def _start_server() -> None:
    """A server that has imported everything once: the processes it forks begin within milliseconds."""
    _processes.set_forkserver_preload([__name__, "doublehead.cli.train", "doublehead.cli.evaluate", *_SLOW_IMPORTS])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)  # it does not inherit the path otherwise
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


_SLOW_IMPORTS = (
    "doublehead.engine.run", "torch.utils.tensorboard", "matplotlib.figure", "matplotlib.backends.backend_agg",
    "pycocotools.cocoeval", "torch._dynamo",
)  # fmt: skip


def launch(
    command: str,
    arguments: list[str],
    output: Path,
    rank: int = 0,
    size: int = 1,
    port: int = 0,
    before=None,
    draw=False,
):
    """Start `doublehead COMMAND arguments` with `TinyDetector`; one process of `size`.

    Its output goes to `output`.  `before` is called in the new process first.  Without `draw` the curves and charts,
    which take longer than all the rest, are not drawn.  Returns the started process.
    """
    _start_server()
    arguments = [str(a) for a in arguments]
    process = _processes.Process(target=_run, args=(command, arguments, str(output), rank, size, port, before, draw))
    process.start()
    return process


def finish(process, seconds: float = 120) -> int:
    """Wait for a process; its exit code, or -signal."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        raise AssertionError("the process hangs")
    return process.exitcode


def free_port() -> int:
    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _run(command, arguments, output, rank, size, port, before, draw):
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as in a process that a user starts
    if size > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    sys.modules["doublehead.models"] = tiny_models()
    if before:
        before()
    if not draw:
        importlib.import_module("doublehead.engine.pictures").draw_curves = lambda *args: None
        importlib.import_module("doublehead.engine.charts").draw_charts = lambda *args: []
    importlib.import_module(f"doublehead.cli.{command}").main(arguments)


TINY = (
    "--data.train-images 9 --data.val-images 3 --data.image-size 64 --data.workers 0 --train.batch-size 4 "
    "--train.steps 12 --train.checkpoint-every 3 --train.log-every 2 --train.warmup-steps 4 --train.milestones 8 "
    "--train.device cpu"
).split()
"""Options of a training that takes a second."""
