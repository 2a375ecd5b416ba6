"""Opens what `doublehead export` wrote: by torch and `doublehead.ops`, onnxruntime or OpenVINO, without model code."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import ImageConfig
from ..errors import UserError
from .calls import Call, PackageCall, RequestCall, SessionCall
from .description import FORMAT, NAME, flaw_of, image_config, machine
from .package import read_description


class ExportedDetections(NamedTuple):
    """Detections of a batch, best score first, with zeros in empty slots."""

    boxes: Tensor
    """`Tensor[B, D, 4]`, float32: (x1, y1, x2, y2) in pixels of the input."""
    scores: Tensor
    """`Tensor[B, D]`, float32."""
    labels: Tensor
    """`Tensor[B, D]`, int64: label i is `classes[i - 1]`; 0 in empty slots."""
    count: Tensor
    """`Tensor[B]`, int64: the number of detections in each image."""


class ExportedDetector:
    """An opened detector.

    Several threads may call it; a package runs one call at a time.  In a process forked after opening, an ONNX file
    works; a package and an OpenVINO file raise an error.

    Attributes:
        description: the exporter's description: "classes", "preprocessing", "inputs", "outputs", "device", ...
        classes: label i is `classes[i - 1]`.
        shape: (B, H, W) of the pixels it takes, exactly; with `dynamic_batch`, B is the maximum.
        dynamic_batch: whether fewer than B images are accepted.
        device: the device on which it runs.
        precision: "fp32", "bf16" or "int8": what its layers compute in.
    """

    def __init__(
        self, call: Call, description: dict[str, Any], device: torch.device, precision: str | None = None
    ) -> None:
        self._call, self.description, self.device = call, description, device
        self.precision: str = precision or description.get("precision", "fp32")
        self.classes: list[str] = description["classes"]
        batch, _, height, width = description["inputs"]["pixels"]["shape"]
        self.shape = (batch, height, width)
        self.dynamic_batch: bool = description["dynamic_batch"]
        self._transform = None

    def __call__(self, pixels: Tensor, sizes: Tensor) -> ExportedDetections:
        """Detect objects in a prepared batch.

        Args:
            pixels: `Tensor[B, 3, H, W]`, float32 on `device`: resized and normalised as `description["preprocessing"]`
                says, at the top left, zeros beyond each image.
            sizes: `Tensor[B, 2]`, float32: (height, width) of each image; zeros for missing images.

        Raises:
            ValueError: another shape, dtype or device.
            RuntimeError: a package, in a process that was forked since it was opened.
        """
        batch, height, width = self.shape
        if self.dynamic_batch and pixels.dim():
            batch = min(max(pixels.shape[0], 1), batch)
        for name, tensor, shape in (("pixels", pixels, (batch, 3, height, width)), ("sizes", sizes, (batch, 2))):
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or tensor.device.type != self.device.type:
                raise ValueError(
                    f"{name}: expected float32 {list(shape)} on {self.device.type}, got {tensor.dtype} "
                    f"{list(tensor.shape)} on {tensor.device}"
                )
        return ExportedDetections(*self._call(pixels.contiguous(), sizes.contiguous()))

    def detect(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Detect objects in images of any size, with the model's own preprocessing; this needs torchvision.

        Args:
            images: up to B, each `Tensor[3, H, W]`, RGB, float in 0..1 or uint8.

        Returns:
            per image "boxes" `Tensor[n, 4]` in its pixels, "labels" `Tensor[n]`, "scores" `Tensor[n]`, best first.

        Raises:
            ValueError: too many images, malformed ones, or one that after resizing is larger than (H, W).
        """
        from ..models import Detections  # imported here because it needs torchvision

        pixels, sizes, after = self._prepare(images)
        found = self(pixels, sizes)
        before = [(image.shape[-2], image.shape[-1]) for image in images]
        return self._transform.detections(Detections(*(v[: len(images)] for v in found)), before, after)

    def prepare(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The program's inputs for images, which `detect` runs it on; this needs torchvision.

        Args:
            images: as for `detect`.

        Returns:
            (pixels, sizes), as `__call__` takes them.

        Raises:
            ValueError: see `detect`.
        """
        return self._prepare(images)[:2]

    def _prepare(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
        """The program's inputs, and each image's (height, width) in them."""
        from ..models.images import ImageTransform

        batch, *canvas = self.shape
        if len(images) > batch:
            raise ValueError(f"images: this program takes up to {batch} at a time, got {len(images)}")
        if self._transform is None:
            config, legacy = image_config(self.description), self.description["legacy_boxes"]
            self._transform = ImageTransform(config, legacy).eval().to(self.device)
        images_in_batch, after = self._transform(images, canvas=tuple(canvas))
        batch = len(images) if self.dynamic_batch else batch
        pixels = images_in_batch.pixels.new_zeros(batch, 3, *canvas)
        sizes = images_in_batch.sizes.new_zeros(batch, 2)
        pixels[: len(images)], sizes[: len(images)] = images_in_batch
        return pixels, sizes, after

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of an image of this size after the model's own resizing; this needs torchvision.

        The program takes it if neither is above those of `shape`.
        """
        return resized(image_config(self.description), height, width)

    def __repr__(self) -> str:
        batch, height, width = self.shape
        return (
            f"ExportedDetector({self.description['recipe']}, {len(self.classes)} classes, {batch} x 3 x {height} x "
            f"{width}, {self.description['kind']} on {self.device})"
        )


def resized(config: ImageConfig, height: int, width: int) -> tuple[int, int]:
    """(height, width) of an image of this size after the resizing that `config` says; this needs torchvision."""
    from ..models.images import RESIZE_RULES

    size = RESIZE_RULES[config.resize].size((height, width), config.min_size[-1], config.max_size)
    return max(1, size[0]), max(1, size[1])


def load(path: str | Path, device_index: int = 0, precision: str | None = None) -> ExportedDetector:
    """Open an exported detector.

    A package holds compiled code, which runs when it is opened: open only files that you trust.

    Args:
        path: a package (.pt2), an ONNX file, or an OpenVINO file (.xml, with the .bin beside it), which `doublehead
            export` wrote.
        device_index: the GPU's index, for a package made for CUDA.  ONNX and OpenVINO files run on the CPU; for other
            execution providers create an `onnxruntime.InferenceSession` yourself.
        precision: "fp32" or "bf16", for an OpenVINO file whose weights are floats; None: the file's own.  A processor
            without bf16 computes in fp32, and a warning says so.

    An OpenVINO file runs on as many threads as PyTorch has when it is opened (`torch.set_num_threads`).

    Raises:
        UserError: the file does not exist, is not from this library, is damaged, or was made for another device or
            kind of machine; or the package that runs it is missing; or it cannot compute in this precision.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix.lower() == ".xml":
        return _load_openvino(path, precision)
    detector = _load_package(path, device_index) if zipfile.is_zipfile(path) else _load_onnx(path)
    if precision not in (None, detector.precision):
        raise UserError(f"{path}: computes in {detector.precision}; another precision needs another export")
    return detector


def _load_package(path: Path, device_index: int) -> ExportedDetector:
    import doublehead.ops  # noqa: F401  (the package calls torch.ops.doublehead)

    description = _checked(path, read_description(path))
    wanted, made_for = description["device"], description["machine"]
    if wanted == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"{path}: made for CUDA ({made_for}), and torch sees no CUDA device here")
        if machine("cuda") != made_for:
            raise UserError(
                f"{path}: made for {made_for}, and this GPU is {machine('cuda')}: export again on this machine"
            )
    try:
        compiled = torch._inductor.aoti_load_package(str(path), device_index=device_index if wanted == "cuda" else -1)
    except RuntimeError as error:
        raise UserError(
            f"{path}: cannot be opened ({str(error).strip().splitlines()[0]}); it was made with torch "
            f"{description['torch']} for {made_for}, and here are torch {torch.__version__} and {machine(wanted)}"
        ) from error
    device = torch.device(wanted, device_index) if wanted == "cuda" else torch.device("cpu")
    return ExportedDetector(PackageCall(compiled), description, device)


def _load_onnx(path: Path) -> ExportedDetector:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{path}: not a package; to open an ONNX file: pip install onnxruntime") from error

    def open_session() -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    try:
        session = open_session()
    except Exception as error:  # onnxruntime has its own exception class for each kind of failure
        raise UserError(f"{path}: neither a package nor an ONNX file ({str(error).splitlines()[0]})") from error
    note = session.get_modelmeta().custom_metadata_map.get(NAME)
    description = _checked(path, _parsed(note))
    return ExportedDetector(SessionCall(open_session, session), description, torch.device("cpu"))


def _load_openvino(path: Path, precision: str | None) -> ExportedDetector:
    from . import openvino_runtime

    graph, note = openvino_runtime.read(path)
    description = _checked(path, _parsed(note))
    openvino_runtime.check_weights(path, description)
    own = description.get("precision", "fp32")
    if precision not in (None, own) and not {precision, own} <= {"fp32", "bf16"}:
        known = precision in ("fp32", "bf16", "int8")
        hint = f"export it with --precision {precision}" if known else "OpenVINO files are in fp32, bf16 or int8"
        raise UserError(f"{path}: computes in {own}, not in {precision}: {hint}")
    return in_openvino(graph, description, precision or own)


def in_openvino(graph: Any, description: dict[str, Any], precision: str) -> ExportedDetector:
    """An `openvino.Model` of a detector, ready to run.

    Raises:
        UserError: OpenVINO does not compile it.
    """
    call, precision = openvino_call(graph, precision)
    return ExportedDetector(call, description, torch.device("cpu"), precision)


def openvino_call(graph: Any, precision: str) -> tuple[RequestCall, str]:
    """Compile an `openvino.Model` for a precision, and the precision in which it computes.

    Raises:
        UserError: OpenVINO does not compile it.
    """
    from . import openvino_runtime

    if precision == "bf16" and not openvino_runtime.computes_in("bf16"):
        warnings.warn("bf16: OpenVINO finds none in this processor, and computes in fp32", stacklevel=4)
        precision = "fp32"

    try:
        return RequestCall(openvino_runtime.compiled(graph, "bf16" if precision == "bf16" else "fp32")), precision
    except RuntimeError as error:
        raise UserError(f"OpenVINO cannot compile this program: {openvino_runtime.reason(error)}") from error


def _checked(path: Path, description: dict[str, Any] | None) -> dict[str, Any]:
    if description is None:
        raise UserError(f"{path}: not a detector that `doublehead export` wrote, or damaged")
    if description.get("format") != FORMAT:
        raise UserError(f"{path}: written in {description.get('format')}, this version reads {FORMAT}")
    if (flaw := flaw_of(description)) is not None:
        raise UserError(f"{path}: its description cannot be used: {flaw}")
    return description


def _parsed(note: str | None) -> dict[str, Any] | None:
    try:
        found = json.loads(note) if note else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
