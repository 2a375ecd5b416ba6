"""One small data set, written out in every layout that `--data.root` alone reads: `write_layout(name, folder)`.

Eight pictures of 64 x 48 and 48 x 64 pixels with filled rectangles in the colours of three classes; the last picture
has none.  Corners are whole pixels, so that every layout can state them exactly, or to six decimals (YOLO).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("apple", "banana", "cherry")
COLOURS = {"apple": (60, 200, 60), "banana": (240, 220, 40), "cherry": (200, 30, 60)}


@dataclass(frozen=True)
class Sample:
    """One picture: name without suffix, width, height, objects as (class, (x1, y1, x2, y2) between pixel edges)."""

    name: str
    width: int
    height: int
    objects: tuple[tuple[str, tuple[int, int, int, int]], ...]

    @property
    def file(self) -> str:
        return f"{self.name}.jpg"


TRAIN = (
    Sample("a0", 64, 48, (("apple", (4, 6, 30, 34)), ("banana", (34, 10, 60, 40)))),
    Sample("a1", 48, 64, (("cherry", (2, 3, 26, 33)),)),
    Sample("a2", 64, 48, (("banana", (10, 8, 50, 44)),)),
    Sample("a3", 48, 64, (("apple", (0, 0, 20, 30)), ("cherry", (20, 32, 48, 64)))),
    Sample("a4", 64, 48, (("cherry", (30, 4, 62, 28)), ("apple", (3, 20, 27, 45)))),
)
VAL = (
    Sample("b0", 64, 48, (("apple", (8, 8, 36, 36)), ("cherry", (40, 12, 63, 35)))),
    Sample("b1", 48, 64, (("banana", (6, 20, 42, 50)),)),
    Sample("b2", 64, 48, ()),
)
Parts = dict[str, tuple[Sample, ...]]


def draw(path: Path, sample: Sample) -> None:
    """Write a sample's picture."""
    pixels = np.random.default_rng(ord(sample.name[1])).integers(90, 130, (sample.height, sample.width, 3), np.uint8)
    for name, (x1, y1, x2, y2) in sample.objects:
        pixels[y1:y2, x1:x2] = COLOURS.get(name, (40, 60, 220))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)


def draw_all(folder: Path, samples: Iterable[Sample]) -> None:
    for sample in samples:
        draw(folder / sample.file, sample)


def write(path: Path, content: object) -> None:
    """Write text as it is, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def coco(samples: Iterable[Sample], prefix: str = "", first_id: int = 1, placeholder: bool = False) -> dict:
    """COCO's JSON; `prefix` comes before file names; `placeholder`: Roboflow's category 0."""
    samples = tuple(samples)
    ids = {name: first_id + i for i, name in enumerate(CLASSES)}
    objects = [(i, item) for i, sample in enumerate(samples) for item in sample.objects]
    categories = [{"id": i, "name": name, "supercategory": "fruit"} for name, i in ids.items()]
    return {
        "info": {"description": ""},
        "images": [
            {"id": i, "file_name": prefix + s.file, "width": s.width, "height": s.height} for i, s in enumerate(samples)
        ],
        "annotations": [
            {"id": number, "image_id": i, "category_id": ids[name], "bbox": [x1, y1, x2 - x1, y2 - y1],
             "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            for number, (i, (name, (x1, y1, x2, y2))) in enumerate(objects)
        ],
        "categories": [{"id": 0, "name": "fruit", "supercategory": "none"}] * placeholder + categories,
    }  # fmt: skip


def xml(sample: Sample) -> str:
    """VOC's XML: pixels count from 1, and the last pixel belongs to the box."""
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax>"
        f"<ymax>{y2}</ymax></bndbox></object>"
        for name, (x1, y1, x2, y2) in sample.objects
    )
    size = f"<size><width>{sample.width}</width><height>{sample.height}</height><depth>3</depth></size>"
    return f"<annotation><filename>{sample.file}</filename>{size}{objects}</annotation>"


def yolo(sample: Sample) -> str:
    """YOLO's label file: class, centre and size as shares of the image's sides, six decimals."""
    return "".join(
        f"{CLASSES.index(name)} {(x1 + x2) / 2 / sample.width:.6f} {(y1 + y2) / 2 / sample.height:.6f} "
        f"{(x2 - x1) / sample.width:.6f} {(y2 - y1) / sample.height:.6f}\n"
        for name, (x1, y1, x2, y2) in sample.objects
    )


def labelme(sample: Sample) -> dict:
    """LabelMe's JSON: rectangles by two corners, and every second object as a polygon."""
    shapes = []
    for number, (name, (x1, y1, x2, y2)) in enumerate(sample.objects):
        kind = "polygon" if number % 2 else "rectangle"
        points = [[x1, y1], [x2, y2]] if kind == "rectangle" else [[x1, (y1 + y2) / 2], [x2, y1], [x1, y2]]
        shapes.append({"label": name, "points": points, "group_id": None, "shape_type": kind, "flags": {}})
    return {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": sample.file, "imageData": "aGVsbG8=",
            "imageHeight": sample.height, "imageWidth": sample.width}  # fmt: skip


def write_xml(folder: Path, samples: Iterable[Sample]) -> None:
    for sample in samples:
        write(folder / f"{sample.name}.xml", xml(sample))


def write_yolo(folder: Path, samples: Iterable[Sample]) -> None:
    for sample in samples:
        write(folder / f"{sample.name}.txt", yolo(sample))


def write_labelme(folder: Path, samples: Iterable[Sample]) -> None:
    for sample in samples:
        write(folder / f"{sample.name}.json", labelme(sample))


def coco_split_folders(root: Path, parts: Parts) -> None:
    for split, samples in parts.items():
        draw_all(root / split, samples)
        write(root / "annotations" / f"instances_{split}.json", coco(samples))


def coco_flat(root: Path, parts: Parts) -> None:
    for split, samples in parts.items():
        draw_all(root / "images", samples)
        write(root / "annotations" / f"instances_{split}.json", coco(samples))


def coco_annotations(root: Path, parts: Parts) -> None:
    for split, samples in parts.items():
        draw_all(root / "images" / split, samples)
        write(root / "annotations" / f"{split}.json", coco(samples))


def coco_roboflow(root: Path, parts: Parts) -> None:
    for split, samples in parts.items():
        folder = root / {"val": "valid"}.get(split, split)
        draw_all(folder, samples)
        write(folder / "_annotations.coco.json", coco(samples, placeholder=True))


def coco_cvat(root: Path, parts: Parts) -> None:
    everything = sum(parts.values(), ())
    draw_all(root / "images", everything)
    write(root / "annotations" / "instances_default.json", coco(everything))


def coco_label_studio(root: Path, parts: Parts) -> None:
    everything = sum(parts.values(), ())
    draw_all(root / "images", everything)
    write(root / "result.json", coco(everything, "images\\", first_id=0))


def voc(root: Path, parts: Parts, lists: str | None = "ImageSets/Main") -> None:
    for split, samples in parts.items():
        draw_all(root / "JPEGImages", samples)
        write_xml(root / "Annotations", samples)
        if lists is not None:
            write(root / lists / f"{split}.txt", "".join(f"{sample.name}\n" for sample in samples))


def voc_lists_at_root(root: Path, parts: Parts) -> None:
    voc(root, parts, lists="")


def voc_without_lists(root: Path, parts: Parts) -> None:
    voc(root, parts, lists=None)


def xml_beside(root: Path, parts: Parts) -> None:
    draw_all(root, sum(parts.values(), ()))
    write_xml(root, sum(parts.values(), ()))


def xml_folders(root: Path, parts: Parts) -> None:
    draw_all(root / "images", sum(parts.values(), ()))
    write_xml(root / "annotations", sum(parts.values(), ()))


def xml_roboflow(root: Path, parts: Parts) -> None:
    for split, samples in parts.items():
        xml_beside(root / {"val": "valid"}.get(split, split), {split: samples})


def yolo_ultralytics(root: Path, parts: Parts) -> None:
    for split, samples in parts.items():
        draw_all(root / "images" / split, samples)
        write_yolo(root / "labels" / split, samples)
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(CLASSES))
    write(root / "data.yaml", f"path: ../datasets/fruit\ntrain: images/train\nval: images/val\nnames:\n{names}")


def yolo_roboflow(root: Path, parts: Parts) -> None:
    for split, samples in parts.items():
        folder = root / {"val": "valid"}.get(split, split)
        draw_all(folder / "images", samples)
        write_yolo(folder / "labels", samples)
    names = ", ".join(f"'{name}'" for name in CLASSES)
    write(root / "data.yaml", f"train: ../train/images\nval: ../valid/images\n\nnc: {len(CLASSES)}\nnames: [{names}]\n")


def yolo_classes(root: Path, parts: Parts) -> None:
    draw_all(root / "images", sum(parts.values(), ()))
    write_yolo(root / "labels", sum(parts.values(), ()))
    write(root / "classes.txt", "".join(f"{name}\n" for name in CLASSES))


def labelme_beside(root: Path, parts: Parts) -> None:
    draw_all(root, sum(parts.values(), ()))
    write_labelme(root, sum(parts.values(), ()))


def labelme_splits(root: Path, parts: Parts) -> None:
    for split, samples in parts.items():
        draw_all(root / split, samples)
        write_labelme(root / split, samples)


LAYOUTS: dict[str, Callable[[Path, Parts], None]] = {
    "coco": coco_split_folders,
    "coco-flat": coco_flat,
    "coco-annotations": coco_annotations,
    "coco-roboflow": coco_roboflow,
    "coco-cvat": coco_cvat,
    "coco-label-studio": coco_label_studio,
    "voc": voc,
    "voc-lists-at-root": voc_lists_at_root,
    "voc-without-lists": voc_without_lists,
    "xml-beside": xml_beside,
    "xml-folders": xml_folders,
    "xml-roboflow": xml_roboflow,
    "yolo": yolo_ultralytics,
    "yolo-roboflow": yolo_roboflow,
    "yolo-classes": yolo_classes,
    "labelme": labelme_beside,
    "labelme-splits": labelme_splits,
}
SINGLE = frozenset(("coco-cvat", "coco-label-studio", "voc-without-lists", "xml-beside", "xml-folders", "yolo-classes",
                    "labelme"))  # fmt: skip
"""Layouts with one split alone, which is divided."""


def write_layout(name: str, folder: Path, train: Iterable[Sample] = TRAIN, val: Iterable[Sample] = VAL) -> Path:
    """Write the samples in a layout of `LAYOUTS` into a folder, which is made; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    LAYOUTS[name](folder, {"train": tuple(train), "val": tuple(val)})
    return folder
