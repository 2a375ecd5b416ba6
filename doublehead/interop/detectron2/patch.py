"""Patches Detectron2 to use our RoI pooling and NMS."""

from __future__ import annotations

from torch import Tensor

from ...ops import batched_nms, multiscale_roi_align, nms, roi_align
from ...ops.roi_align.arguments import rois_of_list
from ..patching import Patch, import_or_explain

_patch: Patch | None = None


def patch() -> None:
    """Make Detectron2 use this library's RoI pooling and NMS in the whole process, until `unpatch`.

    This affects every model, including those already built: the `forward` methods of
    `detectron2.modeling.poolers.ROIPooler` and `detectron2.layers.ROIAlign` are replaced, and so are `nms` and
    `batched_nms` of `detectron2.layers` in all modules of Detectron2.  Your own modules get the fast functions if they
    look them up in `detectron2.layers` at the call, or import them from there after `patch`.  A second call changes
    nothing.

    The results are Detectron2's: its level rule, `ROIAlign` (aligned=False) and `ROIAlignV2` (aligned=True), adaptive
    sampling, lists of `Boxes`.  Boxes are not rounded to the features' 16-bit dtype first.  `ROIPool` and
    `ROIAlignRotated` stay Detectron2's.  Call `unpatch` before tracing, scripting or export.

    Raises:
        ImportError: Detectron2 cannot be imported.
    """
    global _patch
    if _patch is None:
        _patch = _make()
    _patch.apply()


def unpatch() -> None:
    """Undo `patch`, if it was called."""
    global _patch
    if _patch is not None:
        _patch.undo()
    _patch = None


def _make() -> Patch:
    caller = "doublehead.interop.detectron2.patch"
    advice = ("install Detectron2 for this Python and torch (https://github.com/facebookresearch/detectron2); "
              "where it does not install, `doublehead convert` brings its weights here")  # fmt: skip
    layers = import_or_explain("detectron2.layers", caller, advice)
    poolers = import_or_explain("detectron2.modeling.poolers", caller, advice)
    single, pooler = layers.ROIAlign, poolers.ROIPooler
    original = vars(pooler)["forward"]

    def pool(self, x: list[Tensor], box_lists: list) -> Tensor:
        first = self.level_poolers[0]
        served = all(
            type(level) is single and (level.sampling_ratio, level.aligned) == (first.sampling_ratio, first.aligned)
            for level in self.level_poolers
        )
        if not served or any(boxes.tensor.shape[-1] != 4 for boxes in box_lists):
            return original(self, x, box_lists)
        if len(x) != len(self.level_poolers) or len(box_lists) != len(x[0]):
            raise ValueError(
                f"ROIPooler needs {len(self.level_poolers)} maps and boxes for each of the images in them, "
                f"got {len(x)} maps of {len(x[0])} images and boxes of {len(box_lists)}"
            )
        (pooled,) = multiscale_roi_align(
            x,
            rois_of_list(x[0], [boxes.tensor.detach() for boxes in box_lists]),
            self.output_size,
            spatial_scales=[level.spatial_scale for level in self.level_poolers],
            sampling_ratio=first.sampling_ratio,
            aligned=first.aligned,
            canonical_size=self.canonical_box_size,
            canonical_level=self.canonical_level,
            level_rule="detectron2",
        )
        return pooled.contiguous()  # as Detectron2's is, whatever the features' memory format

    return Patch(
        ("detectron2",),
        {layers.nms: _nms, layers.batched_nms: _batched_nms},
        {(pooler, "forward"): pool, (single, "forward"): _align},
    )


def _align(self, input: Tensor, rois: Tensor) -> Tensor:
    return roi_align(
        input, rois.detach(), self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned
    ).contiguous()


# Not `ops.nms` itself: `unpatch` finds functions by identity, and others may hold `ops.nms` on purpose.


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return nms(boxes, scores, iou_threshold)


def _batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    return batched_nms(boxes, scores, idxs, iou_threshold)
