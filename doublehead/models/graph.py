"""The detector as CUDA graphs: everything from pixels to detections is launched at once, one graph per shape.

A graph repeats what was recorded, in the same memory and shapes.  So each recorded shape, a *bucket*, has buffers of
its own for what goes in and what comes out; a batch that is smaller is padded into them.  Graphs of one model share a
memory pool: they never run at the same time.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops._fallback import fallbacks
from ..ops._library import why_reference
from . import folded
from .structures import Detections, ImageBatch

CAPTURING_DEVICES = ("cuda",)
"""Types of device that can record graphs."""

WARM_UP_RUNS = 3
"""Before recording: kernels are compiled and chosen, and weights folded, which must not become part of a graph."""

Run = Callable[[], Detections]


class Bucket(NamedTuple):
    """A shape to record, and the precision."""

    batch: int
    height: int
    width: int
    dtype: torch.dtype | None
    """Autocast's dtype; None: that of the weights."""

    def holds(self, pixels: Tensor) -> bool:
        """Whether a batch `Tensor[B, 3, H, W]` fits in."""
        batch, _, height, width = pixels.shape
        return batch <= self.batch and height <= self.height and width <= self.width

    @property
    def volume(self) -> int:
        return self.batch * self.height * self.width


class Recording:
    """What a graph leaves behind: `replay` runs it, which overwrites `outputs`."""

    def __init__(self, outputs: Detections, replay: Callable[[], None], pool: Any = None) -> None:
        self.outputs, self.replay, self.pool = outputs, replay, pool


def record(run: Run, device: torch.device, pool: Any = None) -> Recording:
    """Record `run` as a CUDA graph.

    Args:
        run: works in fixed memory, without waiting for the device; is called some times before.
        device: a CUDA device.
        pool: memory pool of a living graph, to share; None: a new one.

    Raises:
        RuntimeError: an operator runs in plain PyTorch that cannot be recorded; says which ones do, and why.
    """
    why = why_reference("pyramid_roi_align")
    if why is not None:
        raise RuntimeError(_unrecordable([("pyramid_roi_align", why)]))
    with torch.cuda.device(device), fallbacks() as fallen:
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_RUNS):
                run()
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as a loader that pins memory, go on as they like.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                outputs = run()
        except RuntimeError as error:
            if fallen and not isinstance(error, torch.OutOfMemoryError):
                raise RuntimeError(_unrecordable(fallen)) from error
            raise
    return Recording(outputs, graph.replay, graph.pool())


def _unrecordable(fallen: list[tuple[str, str]]) -> str:
    """The message about operators that run in plain PyTorch, and why."""
    lines = "".join(f"\n{name}: {reason}" for name, reason in dict.fromkeys(fallen))
    return (
        "compile_graph cannot record a graph: operators run in plain PyTorch, which may wait for the device "
        f"(`doublehead info` says more):{lines}"
    )


class Snapshot:
    """Everything a recording depends on, to find out cheaply whether it still holds.

    A change is another module, another tensor, other memory, or an operation in place, which raises PyTorch's version
    counter.  Writing through `.data` does not.

    Raises:
        ValueError: a tensor was made in inference mode, and has no version counter.
    """

    def __init__(self, detector: nn.Module) -> None:
        modules = dict(detector.named_modules())
        self._modules = list(modules.values())
        self._children = [(m._modules, name, child) for m in self._modules for name, child in m._modules.items()]
        self._tensors = []
        for path, module in modules.items():
            for owner in (module._parameters, module._buffers):
                for name, tensor in owner.items():
                    if tensor is None:
                        continue
                    if tensor.is_inference():
                        raise ValueError(
                            f"{path}.{name} was made in inference mode: changes to it could not be seen; build or load "
                            f"the model outside of torch.inference_mode()"
                        )
                    self._tensors.append((owner, name, tensor, tensor._version, tensor.data_ptr()))
        self._readout = detector.readout

    def unchanged(self, detector: nn.Module) -> bool:
        """Whether the detector would compute the same."""
        return (
            self._modules[0] is detector
            and self._readout == detector.readout
            and all(owner.get(name) is child for owner, name, child in self._children)
            and all(
                owner.get(name) is tensor and tensor._version == version and tensor.data_ptr() == address
                for owner, name, tensor, version, address in self._tensors
            )
        )

    def evaluating(self) -> bool:
        """Whether every module is in eval mode."""
        return not any(module.training for module in self._modules)


class CapturedBucket:
    """One bucket's buffers and recording.

    Args:
        detector: the static core, in eval mode.
        bucket: the shape.
        device: where its weights are.
        pool: memory pool of another recording on this device, or None.
    """

    def __init__(self, detector: nn.Module, bucket: Bucket, device: torch.device, pool: Any = None) -> None:
        with torch.inference_mode(False):
            self.inputs = empty_batch(bucket.batch, bucket.height, bucket.width, device)
        self.device = device

        def run() -> Detections:
            with torch.inference_mode(False), torch.no_grad(), _autocast(device, bucket.dtype):
                return detector(self.inputs)

        self.snapshot = Snapshot(detector)
        self.recording = record(run, device, pool)
        # The next call in another dtype, or `train()`, replaces the folded weights, which the graph goes on reading.
        self._kept_alive = [tensor for head in detector.heads.values() for tensor in head.tower.held_tensors()]
        self._kept_alive += folded.held_tensors(detector)

    def __call__(self, images: ImageBatch) -> Detections:
        """As `detector(images)` with `images` padded to this bucket; the results are the caller's."""
        fill(self.inputs, images)
        self.recording.replay()
        batch = images.pixels.shape[0]
        return Detections(*(None if value is None else value[:batch].clone() for value in self.recording.outputs))


class DetectorGraphs:
    """The buckets of one model.  Copies and pickles of it are empty: a graph cannot move."""

    def __init__(self) -> None:
        self._buckets: dict[Bucket, CapturedBucket | None] = {}

    @property
    def buckets(self) -> list[Bucket]:
        """Smallest first."""
        return sorted(self._buckets, key=lambda bucket: bucket.volume)

    def add(self, detector: nn.Module, bucket: Bucket) -> None:
        """Record a bucket now, or where the detector is not on CUDA, when it is and is called."""
        others = [other for other in self._buckets if other[:3] == bucket[:3]]  # the same shape in another precision
        for other in others:
            del self._buckets[other]
        self._buckets[bucket] = None
        device = next(detector.parameters()).device
        if device.type in CAPTURING_DEVICES:
            self._buckets[bucket] = self._capture(detector, bucket, device)
            return
        warnings.warn(
            f"compile_graph: the model is on {device}, and graphs need CUDA: it runs eagerly, and the graph is "
            f"recorded at the first call on a CUDA device",
            RuntimeWarning,
            stacklevel=3,
        )

    def release(self) -> None:
        """Give the recordings' memory back; buckets are recorded anew when they are needed."""
        self._buckets = dict.fromkeys(self._buckets)

    def clear(self) -> None:
        """Forget all buckets."""
        self._buckets = {}

    def __call__(self, detector: nn.Module, images: ImageBatch) -> Detections:
        """`detector(images)`: by the smallest graph the batch fits into, else eagerly."""
        bucket = self._choose(images.pixels)
        if bucket is None:
            return detector(images)
        captured = self._buckets[bucket]
        if captured is None or not captured.snapshot.unchanged(detector):
            if any(module.training for module in detector.modules()):
                return detector(images)
            captured = self._buckets[bucket] = None  # its memory is free before the new one's is taken
            captured = self._buckets[bucket] = self._capture(detector, bucket, images.pixels.device)
        elif not captured.snapshot.evaluating():
            return detector(images)
        return captured(images)

    def _choose(self, pixels: Tensor) -> Bucket | None:
        can = pixels.device.type in CAPTURING_DEVICES and pixels.dtype == torch.float32
        if not self._buckets or not can or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        return next((bucket for bucket in self.buckets if bucket.holds(pixels)), None)

    def _capture(self, detector: nn.Module, bucket: Bucket, device: torch.device) -> CapturedBucket:
        living = (other for other in self._buckets.values() if other is not None and other.device == device)
        pool = next((other.recording.pool for other in living), None)
        return CapturedBucket(detector, bucket, device, pool)

    def __deepcopy__(self, memo: dict) -> DetectorGraphs:
        return DetectorGraphs()

    def __getstate__(self) -> dict:
        return {"_buckets": {}}


def make_bucket(batch: int, height: int, width: int, dtype: torch.dtype | None, step: int, device: str) -> Bucket:
    """The bucket that `compile_graph`'s arguments describe.

    Args:
        step: what height and width must be multiples of.
        device: type of device, whose autocast counts where `dtype` is None.

    Raises:
        ValueError: a number or the dtype is not accepted.
    """
    if batch < 1:
        raise ValueError(f"batch: expected at least 1 image, got {batch}")
    for name, value in (("height", height), ("width", width)):
        if value < step or value % step:
            raise ValueError(f"{name}: expected a multiple of image.size_divisible = {step}, got {value}")
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype: expected torch.float16, torch.bfloat16, torch.float32 or None, got {dtype}")
    if dtype is None and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return Bucket(batch, height, width, None if dtype == torch.float32 else dtype)


def empty_batch(batch: int, height: int, width: int, device: torch.device | str) -> ImageBatch:
    """A batch of images without extent: zeros."""
    return ImageBatch(
        torch.zeros(batch, 3, height, width, device=device), torch.zeros(batch, 2, dtype=torch.float32, device=device)
    )


def fill(buffers: ImageBatch, images: ImageBatch) -> None:
    """Copy a batch into a larger one's memory, the rest zeros: images at the top left, the last ones without extent."""
    batch, _, height, width = images.pixels.shape
    if images.pixels.shape != buffers.pixels.shape:
        buffers.pixels.zero_()
        buffers.sizes.zero_()
    buffers.pixels[:batch, :, :height, :width].copy_(images.pixels, non_blocking=True)
    buffers.sizes[:batch].copy_(images.sizes, non_blocking=True)


def _autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    # Without the cache: an autocast around this call must not find casts there that only a replay fills.
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)
