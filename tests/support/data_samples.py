"""Small data sets on disk for the tests of doublehead.data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from doublehead.config import DataConfig


def picture(path: Path, width: int = 40, height: int = 30, **options) -> np.ndarray:
    """Write a noisy RGB picture; returns its pixels [H, W, 3] (JPEG changes them)."""
    pixels = np.random.default_rng(sum(path.name.encode())).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


class CocoFolder:
    """Three images (landscape, portrait, without boxes), sparse category ids, one crowd box: `train` and `val` alike.

    Change `content`, then ask for `config`.
    """

    def __init__(self, root: Path):
        self.root = root
        sizes = {"a.jpg": (40, 30), "b.jpg": (30, 40), "c.jpg": (50, 30)}
        for split in ("train", "val"):
            for name, (width, height) in sizes.items():
                picture(root / split / name, width, height)
        self.content = {
            "images": [
                {"id": 10 * i, "file_name": name, "width": width, "height": height}
                for i, (name, (width, height)) in enumerate(sizes.items(), 1)
            ],
            "annotations": [
                self.box(1, 10, 7, [1.5, 2.25, 10, 20.5], area=99.5),
                self.box(5, 10, 3, [0, 0, 40, 30], area=600.0, iscrowd=1),
                self.box(4, 20, 3, [20, 30, 10, 10], area=100.0),
            ],
            "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        }

    @staticmethod
    def box(number: int, image: int, category: int, box: list, area: float = 1.0, iscrowd: int = 0) -> dict:
        return {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": iscrowd}

    def json_file(self, split: str) -> Path:
        return self.root / "annotations" / f"instances_{split}.json"

    def config(self, **changes) -> DataConfig:
        for split in ("train", "val"):
            self.json_file(split).parent.mkdir(exist_ok=True)
            self.json_file(split).write_text(json.dumps(self.content))
        return DataConfig(format="coco", root=str(self.root), **changes)


class VocFolder:
    """Images `one` (two objects, the second difficult), `two` (one object) and `bare` (none); both splits list all."""

    def __init__(self, root: Path):
        self.root = root
        self.listed = ["one", "two", "bare"]
        self.objects = {
            "one": [("frog", (1, 1, 40, 30), 0), ("newt", (5, 6, 7, 8), 1)],
            "two": [("newt", (11, 21, 30, 25), 0)],
            "bare": [],
        }
        for name in self.listed:
            picture(root / "JPEGImages" / f"{name}.jpg")

    def xml_file(self, name: str) -> Path:
        return self.root / "Annotations" / f"{name}.xml"

    def write(self) -> None:
        lists = self.root / "ImageSets" / "Main"
        lists.mkdir(parents=True, exist_ok=True)
        for split in ("train", "val"):
            (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in self.listed))
        self.xml_file("any").parent.mkdir(exist_ok=True)
        for name, objects in self.objects.items():
            self.xml_file(name).write_text(self.xml("".join(self.entry(*item) for item in objects)))

    @staticmethod
    def xml(objects: str, size: str = "<size><width>40</width><height>30</height><depth>3</depth></size>") -> str:
        return f"<annotation>{size}{objects}</annotation>"

    @staticmethod
    def entry(name: str, box: tuple, difficult: int = 0) -> str:
        corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"  # VOC 2012 has such parts in objects
        return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox>{part}</object>"

    def config(self, **changes) -> DataConfig:
        return DataConfig(format="voc", root=str(self.root), **changes)
