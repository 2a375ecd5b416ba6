"""`doublehead export RUN model.xml --precision bf16|int8`: the written file in another precision."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from doublehead.config import DataConfig
from doublehead.data import build_dataset
from doublehead.engine.data_options import EvaluationData, data_config
from doublehead.engine.distributed import World
from doublehead.engine.evaluator import evaluate
from doublehead.engine.logs import say
from doublehead.errors import UserError, config_errors
from doublehead.exporting import ExportedDetector, load, openvino_file, openvino_runtime
from doublehead.exporting.as_model import ExportedModel

NOTABLE = 0.003
"""A loss of AP above this is called one."""


class PrecisionChange:
    """Replaces an OpenVINO file in fp32 by one in bf16 or int8.

    Args:
        precision: "bf16" or "int8".
        trained: the data of training.
        data: the images that int8's ranges are taken from, and on which it is measured.
        classes: the detector's.
        number: of images for the ranges.
        measure: whether to measure int8.

    Raises:
        UserError, DataError: int8's images cannot be used, or there are none.
    """

    def __init__(
        self,
        precision: str,
        trained: DataConfig,
        data: EvaluationData,
        classes: Sequence[str],
        number: int,
        measure: bool,
    ) -> None:
        self.precision, self.number, self.measure = precision, number, measure
        if precision == "int8":
            with config_errors():
                self.images = build_dataset(data_config(trained, data), "val", classes=classes)

    def __call__(self, path: Path) -> None:
        """Replace the file `path` and its weights.

        Raises:
            UserError: an image is larger than the program's input.
        """
        before = load(path)
        note = before.description | {"precision": self.precision}
        graph, _ = openvino_runtime.read(path)
        if self.precision == "int8":
            graph, note["int8"] = self._quantised(graph, before)
        elif not openvino_runtime.computes_in("bf16"):
            say("bf16: OpenVINO finds none in this processor; here the file is computed in fp32")
        changed = path.with_name("changed.xml")
        openvino_file.save(graph, note, changed)
        for file in (openvino_runtime.weights_of(changed), changed):
            file.replace(path.with_suffix(file.suffix))
        if self.precision == "int8" and self.measure:
            say(self._loss(before, load(path)))

    def _quantised(self, graph: Any, detector: ExportedDetector) -> tuple[Any, dict[str, Any]]:
        """The quantised graph, and what the description says about it."""
        from doublehead.exporting.openvino_int8 import quantised

        number = min(self.number, len(self.images))
        chosen = [round(i * (len(self.images) - 1) / max(number - 1, 1)) for i in range(number)]
        say(f"calibrating int8 on {number} of {len(self.images)} images of {self.images.name}: this takes minutes")
        began = time.monotonic()
        graph = quantised(graph, list(self._prepared(detector, chosen)))
        say(f"done in {time.monotonic() - began:.0f} s")
        return graph, {"images": number, "data": self.images.name}

    def _prepared(self, detector: ExportedDetector, chosen: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """The program's inputs for these images; each one is repeated if it takes several at a time."""
        model = ExportedModel(detector)
        for index in chosen:
            image = self.images[index][0]
            if (problem := model.too_large(*image.shape[-2:])) is not None:
                raise UserError(f"image {self.images.image_ids[index]} {problem}")
            yield detector.prepare([image] * detector.shape[0])

    def _loss(self, before: ExportedDetector, after: ExportedDetector) -> str:
        """What int8 costs, in words."""
        say(f"measuring fp32 and int8 on {len(self.images)} images")
        world, models = World(device=torch.device("cpu")), (ExportedModel(before), ExportedModel(after))
        fp32, int8 = (evaluate(model, self.images, world, progress=True)[0].get("AP") for model in models)
        if fp32 is None or int8 is None:
            return "int8 is not measured: these images have no objects to find"
        text = f"AP {100 * fp32:.1f} in fp32, {100 * int8:.1f} in int8 ({100 * (int8 - fp32):+.2f})"
        return text + (": more than 0.3 are lost; bf16 may serve better" if fp32 - int8 > NOTABLE else "")
