"""What the other examples use when they are given nothing: generated shapes in COCO's layout, and a detector of them.

python examples/sample_data.py      # makes data/shapes
"""

import json
from pathlib import Path

from PIL import Image

import doublehead
from doublehead.config import DataConfig
from doublehead.data import build_dataset


def make_data(folder: str = "data/shapes", train: int = 120, val: int = 30) -> Path:
    """A data set: annotations/instances_{train,val}.json, and pictures in train/ and val/; kept if it is there."""
    root = Path(folder)
    if root.exists():
        return root
    for split, count in (("train", train), ("val", val)):
        shapes = build_dataset(DataConfig("shapes", train_images=count, val_images=count), split)
        (root / split).mkdir(parents=True)
        for name, (image, _) in zip(shapes.file_names, shapes, strict=True):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / split / name)
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(shapes.coco_ground_truth()))
    return root


def make_detector(folder: str = "runs/example", steps: int = 200) -> Path:
    """A run of some minutes on that data; kept if it is there."""
    if Path(folder).exists():
        return Path(folder)
    return doublehead.train(data=make_data(), train={"steps": steps}, out=folder).folder


if __name__ == "__main__":
    print(make_data())
