"""mmcv's RoIAlign and NMS, with mmcv's signatures, on this library's operators.

Each `make_*` function takes mmcv's function and returns its replacement, which passes calls that it does not support on
to mmcv's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ... import ops


def make_roi_align(original: Callable) -> Callable:
    def roi_align(
        input: Tensor,
        rois: Tensor,
        output_size: int | Sequence[int],
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        pool_mode: str = "avg",
        aligned: bool = True,
    ) -> Tensor:
        if pool_mode != "avg":
            return original(input, rois, output_size, spatial_scale, sampling_ratio, pool_mode, aligned)
        return ops.roi_align(input, rois.detach(), output_size, spatial_scale, sampling_ratio, aligned).contiguous()

    return roi_align


def make_layer_forward(original: Callable) -> Callable:
    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        if self.pool_mode != "avg":
            return original(self, input, rois)
        return ops.roi_align(
            input, rois.detach(), self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned
        ).contiguous()

    return forward


def make_extractor_forward(extractor: type, layer: type) -> Callable:
    """The `forward` of `SingleRoIExtractor`, with all levels in one call."""
    original, level_rule = vars(extractor)["forward"], extractor.map_roi_levels

    def forward(self, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None) -> Tensor:
        layers = list(self.roi_layers)[: len(feats)]
        if not _served(layers, layer) or type(self).map_roi_levels is not level_rule:
            return original(self, feats, rois, roi_scale_factor)
        first = layers[0]
        scales = [each.spatial_scale for each in layers]
        expand = 1.0 if roi_scale_factor is None or len(feats) == 1 else roi_scale_factor  # as mmdet does
        (pooled,) = ops.multiscale_roi_align(
            feats,
            rois.detach(),
            first.output_size,
            spatial_scales=scales,
            sampling_ratio=first.sampling_ratio,
            aligned=first.aligned,
            box_scales=(expand,),
            canonical_size=self.finest_scale,
            canonical_level=round(-np.log2(scales[0])),
            level_rule="mmdet",
        )
        return pooled.contiguous()  # as mmdet's is, whatever the features' memory format

    return forward


def _served(layers: Sequence[nn.Module], kind: type) -> bool:
    """Whether the layers are average RoIAligns with equal settings, each level half as large as the one before."""
    first = layers[0]
    return all(
        type(layer) is kind
        and layer.pool_mode == "avg"
        and (layer.output_size, layer.sampling_ratio, layer.aligned)
        == (first.output_size, first.sampling_ratio, first.aligned)
        and layer.spatial_scale * 2**level == first.spatial_scale
        for level, layer in enumerate(layers)
    )


def make_nms(original: Callable) -> Callable:
    def nms(
        boxes: Tensor | np.ndarray,
        scores: Tensor | np.ndarray,
        iou_threshold: float | None = None,
        offset: int = 0,
        score_threshold: float = 0,
        max_num: int = -1,
        *,
        iou_thr: float | None = None,
    ) -> tuple[Tensor, Tensor] | tuple[np.ndarray, np.ndarray]:
        iou_threshold = iou_thr if iou_threshold is None else iou_threshold  # the former is mmcv's old name
        if offset != 0 or iou_threshold is None:
            return original(boxes, scores, iou_threshold, offset, score_threshold, max_num)
        arrays = isinstance(boxes, np.ndarray)
        boxes, scores = (torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in (boxes, scores))
        kept = _suppress(boxes, scores, None, iou_threshold, score_threshold, max_num)
        found = torch.cat((boxes[kept], scores[kept][:, None]), dim=1)
        return (found.numpy(), kept.numpy()) if arrays else (found, kept)

    return nms


def make_batched_nms(original: Callable) -> Callable:
    def batched_nms(
        boxes: Tensor, scores: Tensor, idxs: Tensor, nms_cfg: dict | None, class_agnostic: bool = False
    ) -> tuple[Tensor, Tensor]:
        options = dict(nms_cfg or {})
        agnostic = options.pop("class_agnostic", class_agnostic)
        kind, offset = options.pop("type", "nms"), options.pop("offset", 0)
        iou_threshold = options.pop("iou_threshold", options.pop("iou_thr", None))
        score_threshold, max_num = options.pop("score_threshold", 0), options.pop("max_num", -1)
        many = len(boxes) >= options.pop("split_thr", 10000)
        if kind != "nms" or offset != 0 or iou_threshold is None or options or boxes.shape[-1] != 4:
            return original(boxes, scores, idxs, nms_cfg, class_agnostic)
        groups = None if agnostic and not many else idxs  # mmcv ignores class_agnostic for many boxes
        kept = _suppress(boxes, scores, groups, iou_threshold, score_threshold, max_num)
        return torch.cat((boxes[kept], scores[kept][:, None]), dim=1), kept

    return batched_nms


def _suppress(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor | None,
    iou_threshold: float,
    score_threshold: float,
    max_num: int,
) -> Tensor:
    """Indices `Tensor[K]` int64 of the boxes that are kept, best first."""
    if score_threshold > 0:
        passing = (scores > score_threshold).nonzero()[:, 0]
        groups = None if groups is None else groups[passing]
        return passing[_suppress(boxes[passing], scores[passing], groups, iou_threshold, 0, max_num)]
    boxes, scores = boxes.detach(), scores.detach()
    if groups is None:
        kept = ops.nms(boxes, scores, iou_threshold)
    else:
        kept = ops.batched_nms(boxes, scores, groups, iou_threshold)
    return kept[:max_num] if max_num > 0 else kept
