"""Tiny data, runs and files of weights under the names that README.md and docs/ use."""

from __future__ import annotations

import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torchvision.models.resnet import BasicBlock, ResNet

from doublehead.config import DataConfig, DetectionConfig, Recipe, to_dict
from doublehead.data.shapes import CLASSES as SHAPES
from doublehead.engine.checkpoint import save_model
from doublehead.engine.distributed import World
from doublehead.engine.files import write_json
from doublehead.engine.run import train
from doublehead.models import build_detector
from doublehead.recipes import RECIPES
from tests.restatements.detectron2 import FasterRCNN
from tests.restatements.layers import Weights
from tests.restatements.maskrcnn_benchmark import GeneralizedRCNN
from tests.restatements.mmdet import TwoStage
from tests.support.data_samples import CocoFolder, VocFolder, picture
from tests.support.tiny_detectors import tiny
from tests.support.torchvision_states import torchvision_state

ANIMALS = ["cat", "dog", "bird"]


class NarrowResNet(ResNet):
    """An eighth of the channels."""

    def _make_layer(self, block, planes, *options, **more):
        return super()._make_layer(block, planes // 8, *options, **more)


def narrow_resnet(weights: None, norm_layer) -> ResNet:
    """Stands in for `torchvision.models.resnet18`: files of 45 megabytes would take longer than all the rest."""
    return NarrowResNet(BasicBlock, [1, 1, 1, 1], norm_layer=norm_layer)


def blood_cells(root: Path, splits: tuple[str, ...]) -> None:
    """A few pictures in VOC's layout, with two classes of three."""
    folder = VocFolder(root)
    folder.objects["one"] = [("RBC", (1, 1, 40, 30), 0), ("WBC", (5, 6, 20, 25), 0)]
    folder.objects["two"] = [("WBC", (11, 10, 30, 25), 0), ("RBC", (3, 4, 30, 25), 0)]
    folder.objects["bare"] = [("Platelets", (3, 4, 30, 25), 0)]
    folder.write()
    for split in splits:
        shutil.copy(root / "ImageSets/Main/val.txt", root / f"ImageSets/Main/{split}.txt")


def coco(root: Path) -> None:
    """A few pictures in the layout of COCO 2017."""
    folder = CocoFolder(root)
    folder.content["categories"].append({"id": 9, "name": "bird"})
    folder.config()
    for split in ("train", "val"):
        (root / split).rename(root / f"{split}2017")
        (root / f"annotations/instances_{split}.json").rename(root / f"annotations/instances_{split}2017.json")


def recipe(kind: str, data: DataConfig) -> Recipe:
    """One step of training, of two; the detector has few channels."""
    model = tiny(kind)
    schedule = RECIPES["shapes-ext"].train
    few = {"steps": 1, "batch_size": 2, "milestones": (), "warmup_steps": 1, "checkpoint_every": 1, "device": "cpu"}
    return Recipe(name=kind, model=model, data=data, train=replace(schedule, **few))


def stopped_run(folder: Path, used: Recipe) -> None:
    """A run that was stopped after the first of two steps."""
    train(used, folder, World())
    write_json(folder / "recipe.json", to_dict(replace(used, train=replace(used.train, steps=2))))


def model(folder: Path, kind: str, classes: list[str]) -> None:
    """A model's folder, of generated shapes or of COCO."""
    torch.manual_seed(0)
    used = replace(RECIPES["shapes-ext"], model=replace(tiny(kind), detection=DetectionConfig(max_detections=5)))
    used = replace(used, data=replace(used.data, val_images=1, image_size=64, workers=0))
    folder.mkdir(parents=True)
    save_model(
        folder / "model.safetensors",
        build_detector(used.model, len(classes) + 1),
        used,
        classes,
        list(range(1, len(classes) + 1)),
    )
    write_json(folder / "recipe.json", to_dict(used))


def weights_of_others(folder: Path) -> Path:
    """Checkpoints of the other projects, under the names of published ones."""
    torch.save(torchvision_state(90), folder / "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth")
    noise = [torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8)]
    d2, mm, release = Weights(0), Weights(1, counters=True), Weights(2)
    with torch.inference_mode():  # the first pictures make the weights up
        FasterRCNN(d2, 80, 64, 80, "caffe", (50, 10))(noise)
        TwoStage(mm, 80, (80, 64), True, "pytorch", 50, 10)(noise)
        GeneralizedRCNN(release, 80, 64, 80, True)(noise)
    arrays = {name: tensor.numpy() for name, tensor in d2.tensors.items()}
    (folder / "model_final_b275ba.pkl").write_bytes(pickle.dumps({"model": arrays}, protocol=2))
    torch.save({"meta": {}, "state_dict": mm.tensors}, folder / "dh_faster_rcnn_r50_fpn_1x_coco.pth")
    torch.save({"model": release.tensors}, folder / "authors_r50.pth")
    return folder


def desk(folder: Path) -> Path:
    """`folder`, with everything else that the commands of the pages name."""
    blood_cells(folder / "data/cells", ())
    blood_cells(folder / "data/BCCD", ("test",))
    coco(folder / "data/coco")
    for name in ("street.jpg", "square.jpg", "photos/a.jpg", "more/b.jpg"):
        picture(folder / name, 80, 64)
    cells = DataConfig(format="voc", root=str(folder / "data/cells"), workers=0)
    stopped_run(folder / "runs/own-data-1", recipe("double_head_ext", cells))
    for name in ("shapes-ext-1", "bccd-small-1"):  # files are replaced, never changed: links will do
        shutil.copytree(folder / "runs/own-data-1", folder / "runs" / name, copy_function=os.link)
    for name, kind in {
        "runs/a": "fc", "runs/b": "conv", "runs/ext": "double_head_ext",
        "runs/faster-rcnn-r50-fpn": "fc", "runs/conv-head-r50-fpn": "conv",
        "runs/double-head-ext-r50-fpn": "double_head_ext",
    }.items():  # fmt: skip
        model(folder / name, kind, list(SHAPES) if name.count("-") == 0 else ANIMALS)
    found = {"classes": {name: {"AP": number / 10} for number, name in enumerate(ANIMALS)}}
    write_json(folder / "runs/faster-rcnn-r50-fpn/metrics.json", found)
    model(folder / "models/torchvision", "fc", ANIMALS)
    model(folder / "models/double-head", "double_head", ANIMALS)
    return folder
