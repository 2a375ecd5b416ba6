"""A detector that takes images as people have them: paths, PIL images, arrays, tensors."""

from __future__ import annotations

import numbers
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from doublehead.cli import export
from doublehead.config import MAX_PIXELS, Precision, Recipe
from doublehead.data import build_dataset
from doublehead.engine import pictures
from doublehead.engine.data_options import EvaluationData, data_config
from doublehead.engine.distributed import World, find_device
from doublehead.engine.evaluator import evaluate, inference
from doublehead.engine.precision import FP32, Mode, resolve_precision
from doublehead.engine.streaming import batches
from doublehead.errors import UserError, config_errors

from .detections import Detections
from .inputs import to_tensor, to_tensors

if TYPE_CHECKING:
    from doublehead.exporting import ExportedDetector
    from doublehead.models import DoubleHeadRCNN


class Predictor:
    """A trained or an exported detector; `doublehead.load` opens it.

    `predictor(images)` is `predictor.predict(images)`.  Threads may share a predictor: calls wait for each other while
    the model runs.  Processes load their own.

    Attributes:
        path: the run's folder or the file that was loaded.
        classes: names; label i is `classes[i - 1]`, and 0 is the background.
        device: the `torch.device` on which it runs.
        model: the `DoubleHeadRCNN`, a `torch.nn.Module` in evaluation mode; None for an exported program.
        recipe: the configuration it was trained with; None for an exported program.
        exported: the exported program; None for a model.
        precision: "fp32", "bf16", "fp16" or "int8": in which the model computes; None for an exported program.
    """

    def __init__(
        self,
        path: Path,
        classes: Sequence[str],
        device: torch.device,
        *,
        model: DoubleHeadRCNN | None = None,
        recipe: Recipe | None = None,
        exported: ExportedDetector | None = None,
        mode: Mode = FP32,
    ) -> None:
        self.path, self.classes, self.device = path, list(classes), device
        self.model, self.recipe, self.exported = model, recipe, exported
        self._mode, self._lock = mode, threading.Lock()

    @property
    def precision(self) -> Precision | None:
        return self._mode.used if self.model is not None else None

    def predict(
        self, images: Any, score_threshold: float = 0.5, *, max_pixels: int = MAX_PIXELS
    ) -> Detections | list[Detections]:
        """Detect objects.

        Each image goes through the model alone, so that what is found in it does not depend on the others.  In a file
        it is, to the bit, what `doublehead detect` finds.

        Args:
            images: one image; any number of them in a list, a generator or another iterable; or a batch
                (`Tensor[B, 3, H, W]` or array [B, H, W, 3]).  An image is

                - a path, of any format that Pillow reads; the picture is turned upright as its EXIF note says;
                - a PIL image of any mode; its pixels are taken as they are, and a warning says if a note turns them;
                - an array [H, W, 3] or [H, W], or a `Tensor[3, H, W]` or `Tensor[H, W]`: RGB or grey, uint8 or floats
                  in 0..1, without normalisation, which the model does itself.  OpenCV's arrays are BGR: give
                  `image[..., ::-1]`.
            score_threshold: leave out detections that score below this, from 0 to 1.  The model itself leaves out
                those below `recipe.model.detection.score_threshold`, 0.05 as a rule.
            max_pixels: larger files are refused.

        Returns:
            `Detections` of a single image; a list of them for several images or a batch.

        Raises:
            TypeError: `images` is none of these.
            UserError: an image cannot be read, has another shape, dtype or range, or is too large for an exported
                program; the message names it.

        Example:
            >>> predictor = doublehead.load("runs/cells-1")
            >>> found = predictor.predict("photo.jpg", score_threshold=0.7)
            >>> found.boxes, found.names, found.scores
        """
        threshold = _checked_threshold(score_threshold)
        tensors, single = to_tensors(images, max_pixels)
        at_once = self.exported.shape[0] if self.exported else 1
        found = [detections for batch in batches(tensors, at_once) for detections in self._detect(batch, threshold)]
        return found[0] if single else found

    def __call__(
        self, images: Any, score_threshold: float = 0.5, *, max_pixels: int = MAX_PIXELS
    ) -> Detections | list[Detections]:
        """See `predict`."""
        return self.predict(images, score_threshold, max_pixels=max_pixels)

    def draw(
        self, image: Any, detections: Detections, score_threshold: float = 0.0, *, max_pixels: int = MAX_PIXELS
    ) -> Image.Image:
        """A copy of an image with boxes, class names and scores.

        Args:
            image: one image, as in `predict`.
            detections: what `predict` found in it.
            score_threshold: leave out detections that score below this, from 0 to 1.
            max_pixels: larger files are refused.

        Returns:
            An RGB PIL image of the image's size.  `save("found.jpg")` writes it, and notebooks show it.

        Raises:
            TypeError: `detections` are none, or a list of several images'.
            UserError: the image cannot be used, or the detections are of an image of another size.

        Example:
            >>> predictor.draw("photo.jpg", found).save("found.jpg")
        """
        threshold = _checked_threshold(score_threshold)
        if not isinstance(detections, Detections):
            several = "; draw takes one image and its own" if isinstance(detections, (list, tuple)) else ""
            raise TypeError(f"detections: expected what predict returns, got {type(detections).__name__}{several}")
        pixels = to_tensor(image, max_pixels=max_pixels)
        height, width = pixels.shape[1:]
        if (height, width) != detections.size:
            there = f"{detections.size[1]}x{detections.size[0]}"
            raise UserError(f"image is {width}x{height} (width x height), the detections are of one of {there}")
        if pixels.is_floating_point():
            pixels = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
        return pictures.draw_boxes(
            pictures.to_picture(pixels), detections.boxes, detections.labels, detections.classes, detections.scores,
            threshold,
        )  # fmt: skip

    def evaluate(
        self, data: str | Path | None = None, *, split: str | None = None, progress: bool = True
    ) -> dict[str, Any]:
        """Measure the model, as `doublehead evaluate` does.

        Args:
            data: folder of a data set; None: that of training.
            split: the split to measure on; None: that on which training validated.
            progress: show a bar.

        Returns:
            `AP`, `AP50`, ... (COCO's twelve numbers), `classes` (name -> AP, AP50), `images`, `detections`; all AP in
            0..1, None where there is nothing to measure.  For VOC data `voc` too, with VOC's AP at IoU 0.5.

        Raises:
            UserError: the data cannot be used, or this is an exported program.

        Example:
            >>> doublehead.load("runs/cells-1").evaluate("data/cells", split="test")["AP50"]
        """
        self._check_is_model("evaluate", "measure the run that it was exported from")
        given = EvaluationData(root=None if data is None else str(data), val_split=split)
        with config_errors():
            config = data_config(self.recipe.data, given)
            dataset = build_dataset(config, "val", classes=self.classes)
        with self._lock, self._mode.autocast(self.device):
            return evaluate(
                self.model, dataset, World(device=self.device), voc=dataset.is_voc, workers=config.workers,
                progress=progress,
            )[0]  # fmt: skip

    def export(self, out: str | Path, **options: Any) -> Path:
        """Write the detector as a program that runs without this library's model code, as `doublehead export` does.

        Args:
            out: the new file: `.onnx` for onnxruntime, TensorRT and others, or `.pt2`, compiled by AOTInductor for this
                kind of machine.
            options: those of the command, such as `batch=4`, `height=640, width=640` (of the resized and padded images:
                multiples of 32), `device="cuda"`, `check=False`.  A gate that the predictor was loaded with is
                exported too, unless they hold another `ext_gate`; so is its precision.

        Returns:
            The file's path, for `doublehead.load`, or `doublehead.exporting.load` where there is no torchvision.

        Raises:
            UserError: the file exists or cannot be written, an option does not fit, a package is missing, or this is an
                exported program itself.
            TypeError: an unknown option.

        Example:
            >>> doublehead.load("runs/cells-1").export("cells.onnx", height=640, width=640)
        """
        self._check_is_model("export", "give its run another file")
        gate = self.model.detector.readout.detection.ext_gate
        if gate != self.recipe.model.detection.ext_gate:
            options = {"ext_gate": gate, **options}
        options = {"precision": self._mode.asked, **options}
        export.run(export.Options(str(self.path), str(out), **options))
        return Path(out)

    def to(self, device: str | torch.device) -> Predictor:
        """Move the model, in place.

        Args:
            device: "cpu", "cuda", "cuda:1", or "auto": CUDA where there is one, else the CPU.

        Returns:
            The predictor itself.

        Raises:
            UserError: there is no such device, it has no such precision, or this is an exported program, which runs on
                the device it is made for.
        """
        self._check_is_model("to", "export it again for another device")
        with self._lock:
            wanted = find_device(str(device))
            if wanted.type != self.device.type:
                self._mode = resolve_precision(self._mode.asked, wanted)
            self.device = wanted
            self.model.to(self.device)
        return self

    def _detect(self, images: list[Tensor], threshold: float) -> list[Detections]:
        with self._lock:
            outputs = self._run_exported(images) if self.exported else self._run_model(images)
        found = []
        for image, output in zip(images, outputs, strict=True):
            # Selected outside of inference mode, these are ordinary tensors: they may be changed in place.
            keep = output["scores"].cpu() >= threshold
            kept = (output[name].cpu()[keep] for name in ("boxes", "labels", "scores"))
            found.append(Detections(*kept, self.classes, tuple(image.shape[1:])))
        return found

    def _run_model(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        with inference(self.model), self._mode.autocast(self.device):
            return self.model([image.to(self.device) for image in images])

    def _run_exported(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        for image in images:
            self._check_fits(image)
        with torch.no_grad():
            return self.exported.detect(images)

    def _check_fits(self, image: Tensor) -> None:
        """Refuse an image that is larger than the exported program's input after resizing."""
        height, width = self.exported.resized(image.shape[1], image.shape[2])
        _, most_height, most_width = self.exported.shape
        if height > most_height or width > most_width:
            raise UserError(
                f"an image of {image.shape[2]}x{image.shape[1]} (width x height) becomes {width}x{height}, and "
                f"{self.path} takes up to {most_width}x{most_height}: export it with a larger --height and --width, "
                "the longer side for both to serve landscape and portrait"
            )

    def _check_is_model(self, name: str, instead: str) -> None:
        if self.model is None:
            raise UserError(f"{self.path} is an exported program, which has no {name}: {instead}")

    def __repr__(self) -> str:
        kind = repr(self.exported) if self.exported else f"{self.recipe.name} on {self.device}"
        names = ", ".join(self.classes[:8]) + (", ..." if len(self.classes) > 8 else "")
        return f"Predictor({str(self.path)!r}: {kind}; {len(self.classes)} classes: {names})"


def _checked_threshold(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value <= 1:
        raise UserError(f"score_threshold is {value!r}, a number from 0 to 1 is accepted")
    return float(value)
