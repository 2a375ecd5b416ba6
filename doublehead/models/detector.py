"""The detector: image -> backbone -> proposals -> RoIAlign -> heads -> fusion -> NMS -> detections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config import DetectionConfig, Fusion, ModelConfig, ReadOutName
from .backbone import build_backbone
from .detections import detect
from .graph import DetectorGraphs, make_bucket
from .heads import Heads
from .images import ImageTransform
from .inference import HeadsResult, judge_gates, run_heads, run_heads_for_each
from .losses import head_losses, sample_rois
from .readout import ReadOut, Sources, resolve_readout, resolve_sources
from .roi_pooling import RoIPooling
from .rounds import Decoding
from .rpn import RPN
from .structures import Detections, ImageBatch, Proposals, Targets
from .targets import check_targets


class Detector(nn.Module):
    """The static core: padded batch in, losses or padded detections out, no shape made from data.

    `torch.compile(detector, fullgraph=True)` and `torch.export.export` take it as it is.

    Args:
        config: the whole model.
        num_classes: classes with background.

    Raises:
        ValueError: the configuration contradicts itself; the message names the field.
    """

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes: expected at least 2 (background and one class), got {num_classes}")
        if config.legacy_boxes != (config.roi.level_rule == "maskrcnn_benchmark"):
            raise ValueError(
                f"legacy_boxes and roi.level_rule 'maskrcnn_benchmark' need each other, got {config.legacy_boxes} and "
                f"{config.roi.level_rule!r}"
            )
        self.config = config
        self.num_classes = num_classes
        backbone = build_backbone(config.backbone)
        self.backbone = backbone.body
        self.min_side = 1.0 if config.legacy_boxes else 0.0
        self.rpn = RPN(config.rpn, backbone.channels, backbone.map_strides, self.min_side)
        self.heads = Heads(config.head, config.roi, backbone.channels, num_classes, backbone.conv5)
        self.roi_pooling = RoIPooling(config.roi, self.heads.box_scales.values(), backbone.strides)
        self.readout = resolve_readout(config)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle; models that version 0.1.0 pickled whole hold the read-out in two parts."""
        if "sources" in state:
            state = dict(state)
            state["_readout"] = ReadOut(state.pop("sources"), state.pop("detection"))
            state["min_side"] = state.pop("least_side")
        super().__setstate__(state)

    def forward(self, images: ImageBatch, targets: Targets | None = None) -> Detections | dict[str, Tensor]:
        """Detect, or with `targets` compute the weighted losses (their sum is the objective)."""
        features = self.backbone(images.pixels)
        proposals, losses = self.rpn(images, features, targets)
        if targets is None:
            return self._detect(features, proposals, images.sizes)
        rois = sample_rois(proposals, targets, self.config.roi)
        outputs = self.heads(self.roi_pooling(features, rois.boxes))
        return losses | head_losses(outputs, rois, self.config)

    def _detect(self, features: Sequence[Tensor], proposals: Proposals, sizes: Tensor) -> Detections:
        decoding = Decoding(sizes, self.config.roi.box_weights, self.min_side)
        heads = run_heads(self.heads, self.roi_pooling, features, proposals, self.readout, decoding)
        return self._read_out(heads, proposals, sizes, self.readout)

    def detect_each(self, images: ImageBatch, readouts: Sequence[ReadOut]) -> list[Detections]:
        """Detections of several read-outs (see `resolve_readout`); backbone and proposals are computed once for all."""
        features = self.backbone(images.pixels)
        proposals, _ = self.rpn(images, features)
        decoding = Decoding(images.sizes, self.config.roi.box_weights, self.min_side)
        results = run_heads_for_each(self.heads, self.roi_pooling, features, proposals, readouts, decoding)
        return [
            self._read_out(heads, proposals, images.sizes, readout)
            for heads, readout in zip(results, readouts, strict=True)
        ]

    def detect_gates(self, images: ImageBatch, readout: ReadOut, gates: Sequence[float]) -> list[Detections]:
        """Detections of a fused read-out with each of these values of `ext_gate`; the heads run once, on all RoIs.

        Up to rounding of the conv-head those of a run with that gate (see `judge_gates`).
        """
        features = self.backbone(images.pixels)
        proposals, _ = self.rpn(images, features)
        ran = run_heads(self.heads, self.roi_pooling, features, proposals, readout.replace(ext_gate=0.0))
        gated = [readout.replace(ext_gate=gate) for gate in gates]
        results = judge_gates(ran, proposals, gated)
        return [self._read_out(heads, proposals, images.sizes, one) for heads, one in zip(results, gated, strict=True)]

    def _read_out(self, heads: HeadsResult, proposals: Proposals, sizes: Tensor, readout: ReadOut) -> Detections:
        detections = detect(heads.outputs, readout, heads.proposals, sizes, self.config.roi.box_weights, self.min_side)
        # Not `_replace`: torch 2.11's compiler cannot trace it.
        return Detections(*detections[:4], rois=proposals.valid.sum(1), box_rois=heads.box_rois)

    @property
    def readout(self) -> ReadOut:
        """How the heads are read out; to change it, assign another `ReadOut`.

        Raises:
            TypeError: something else is assigned.
            ValueError: the heads were not trained for it (see `resolve_sources`), or its sources are another model's.
        """
        return self._readout

    @readout.setter
    def readout(self, readout: ReadOut) -> None:
        if not isinstance(readout, ReadOut):
            raise TypeError(f"readout: expected a ReadOut, as resolve_readout returns, got {type(readout).__name__}")
        name, fusion = readout.detection.readout, readout.detection.fusion
        sources = resolve_sources(self.config.head.kind, name, fusion, self.config.loss)
        if readout.sources != sources:
            raise ValueError(f"readout: expected {sources} for {name!r} with fusion {fusion!r}, got {readout.sources}")
        self._readout = readout

    @property
    def sources(self) -> Sources:
        """Which heads give the classes and the boxes; read-only, see `readout`."""
        return self._readout.sources

    @property
    def detection(self) -> DetectionConfig:
        """The thresholds and options of the read-out; read-only, see `readout`."""
        return self._readout.detection

    def set_readout(self, readout: ReadOutName, fusion: Fusion | None = None, ext_gate: float | None = None) -> None:
        """Choose how an Ext model is read out; see `DetectionConfig`.  None: as configured.

        Raises:
            ValueError: the heads were not trained for it (see `resolve_sources`), or a gate outside of 0 .. 1.
        """
        self.readout = self.resolve_readout(readout, fusion, ext_gate)

    def resolve_readout(
        self, readout: ReadOutName, fusion: Fusion | None = None, ext_gate: float | None = None
    ) -> ReadOut:
        """What `set_readout` would set, without setting it; raises as it does."""
        return resolve_readout(self.config, readout, fusion, ext_gate)


class DoubleHeadRCNN(nn.Module):
    """The detector with torchvision's interface: lists of images in, lists of dicts out.

    Args:
        config: the whole model.
        num_classes: classes with background; background is class 0.
    """

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.transform = ImageTransform(config.image, config.legacy_boxes)
        self.detector = Detector(config, num_classes)
        self._graphs = DetectorGraphs()

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training mode, detections in eval mode.

        Args:
            images: each `Tensor[3, H, W]`, RGB, float in 0..1 or uint8, of any size and on any device; or a
                `Tensor[B, 3, H, W]`.
            targets: in training, per image "boxes" `Tensor[n, 4]` (x1, y1, x2, y2) in the image's pixels, x1 < x2 and
                y1 < y2, floats or integers, and "labels" `Tensor[n]`, integers from 1 on.  Boxes may reach over the
                border.  Keep them on the CPU: what is on a GPU already is used unchecked, as reading it would make
                the host wait.

        Returns:
            training: loss name -> weighted scalar; the objective is their sum.
            eval: per image "boxes" `Tensor[n, 4]` in the image's pixels, "labels" `Tensor[n]`,
            "scores" `Tensor[n]`, best first.

        Raises:
            TypeError: images or targets that are not tensors, such as arrays, lists and PIL images.
            ValueError: targets missing in training, or malformed images or targets.
        """
        batch, after = self.transform(images)
        before = [(image.shape[-2], image.shape[-1]) for image in images]
        if self.training:
            check_targets(images, targets, self.num_classes)
            self._check_statistics(batch)
            return self.detector(batch, self.transform.targets(targets, before, after))
        return self.transform.detections(self._graphs(self.detector, batch), before, after)

    def _check_statistics(self, batch: ImageBatch) -> None:
        """Batch norm needs more than one value of a channel to train on; the backbone's last map has the fewest."""
        images, _, height, width = batch.pixels.shape
        stride = self.detector.backbone.strides[-1]
        if images > 1 or height > stride or width > stride:
            return
        if any(isinstance(module, _BatchNorm) and module.training for module in self.detector.backbone.modules()):
            raise ValueError(
                f"images: of one image of {height} x {width} pixels (height x width, resized and padded) the "
                "backbone's last map has a single cell, of which batch norm has no statistics: train on several images "
                "at a time or with a larger image.min_size and max_size, or set backbone.norm to frozen_batch_norm or "
                "group_norm"
            )

    def set_readout(self, readout: ReadOutName, fusion: Fusion | None = None, ext_gate: float | None = None) -> None:
        """Choose how an Ext model is read out: see `Detector.set_readout`."""
        self.detector.set_readout(readout, fusion, ext_gate)

    def detect_each(self, images: Sequence[Tensor], readouts: Sequence[ReadOut]) -> list[list[dict[str, Tensor]]]:
        """Detections of `images`, in eval mode, in several read-outs of an Ext model at the price of about one.

        Args:
            images: as in `forward`.
            readouts: results of `Detector.resolve_readout`.

        Returns:
            For each read-out what `forward` gives for the images after its `set_readout`, with "rois" and "box_rois",
            `Tensor[]` int64, of each image (see `Detections`).
        """
        return self._each(images, lambda batch: self.detector.detect_each(batch, readouts))

    def detect_gates(
        self, images: Sequence[Tensor], readout: ReadOut, gates: Sequence[float]
    ) -> list[list[dict[str, Tensor]]]:
        """`detect_each` for several gates of one fused read-out: see `Detector.detect_gates`.

        Args:
            images: as in `forward`.
            readout: result of `Detector.resolve_readout`.
            gates: values of `ext_gate`; 0: none.
        """
        return self._each(images, lambda batch: self.detector.detect_gates(batch, readout, gates))

    def _each(
        self, images: Sequence[Tensor], detect: Callable[[ImageBatch], list[Detections]]
    ) -> list[list[dict[str, Tensor]]]:
        """What `forward` gives for each of the results of `detect`, with "rois" and "box_rois"."""
        before = [(image.shape[-2], image.shape[-1]) for image in images]
        batch, after = self.transform(images)
        each = detect(batch)
        return [
            [
                output | {"rois": rois, "box_rois": box_rois}
                for output, rois, box_rois in zip(
                    self.transform.detections(result, before, after), result.rois, result.box_rois, strict=True
                )
            ]
            for result in each
        ]

    def compile_graph(self, batch: int, height: int, width: int, dtype: torch.dtype | None = None) -> None:
        """Record pixels -> detections as one CUDA graph, for batches of up to this shape.

        From then on, in eval mode and under `torch.no_grad()` or `torch.inference_mode()`, `model(images)` pads the
        batch to the smallest recorded shape that holds it and replays that graph; a batch that fits none runs eagerly,
        in the precision of the call.  Call it once for each shape: landscape, portrait, several batch sizes.  Their
        graphs share memory.

        Results are those of `model.detector` on the padded batch.  More padding than eager's changes them slightly:
        at the border convolutions see zeros further out, and `rpn.anchors` "rounded" derives strides from the padded
        size (equal where that is a multiple of 64).

        When weights, buffers, submodules or the read-out have changed since, or the model has moved, the graph is
        recorded anew at the next call.  Changes through `.data` are not seen: call `release_graphs`.  `train()` gives
        the graphs' memory back.  Copies and pickles of the model have no graphs; `state_dict` knows nothing of them.
        While the model is not on a CUDA device it runs eagerly.  Not for several threads or streams at once.

        Args:
            batch: the most images.
            height, width: the largest padded batch, in pixels; multiples of `image.size_divisible`.  An image is
                resized first, as `image.min_size` and `max_size` say.
            dtype: float16 or bfloat16: recorded under autocast, and replayed so whatever the autocast of the call;
                None: the autocast that is on now, if any.  float32: none.

        Raises:
            ValueError: a number or the dtype is not accepted, or the weights were made in inference mode.
            RuntimeError: the model is in training mode.
        """
        if self.training:
            raise RuntimeError("compile_graph: the model is in training mode; call model.eval() first")
        device = next(self.detector.parameters()).device.type
        self._graphs.add(
            self.detector, make_bucket(batch, height, width, dtype, self.config.image.size_divisible, device)
        )

    def release_graphs(self) -> None:
        """Forget the shapes of `compile_graph`; from now on everything runs eagerly."""
        self._graphs.clear()

    def train(self, mode: bool = True) -> DoubleHeadRCNN:
        """Set the mode; training frees the graphs' memory, and inference records them anew when it needs them."""
        if mode:
            self._graphs.release()
        return super().train(mode)


def build_detector(config: ModelConfig, num_classes: int) -> DoubleHeadRCNN:
    """The detector a configuration describes, with fresh weights (backbone: as configured)."""
    return DoubleHeadRCNN(config, num_classes)
