"""torchvision's modules with some methods replaced by this library's operators.

Each class adds behaviour but no state to its parent, so assigning `module.__class__` converts an existing module, and
converts it back.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import batch_norm
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.poolers import _setup_scales

from ...ops import clip_boxes, decode_boxes, detections, multiscale_roi_align, nms_padded
from ...ops.roi_align.arguments import rois_of_list

MIN_DETECTION_SIZE = 1e-2
"""Pixels: torchvision removes detections whose width or height is smaller."""


class AcceleratedMultiScaleRoIAlign(MultiScaleRoIAlign):
    """Pools all levels and images in one call, without a device-to-host copy."""

    keeps_format = False
    """Whether channels-last features give channels-last maps; unknown heads may rely on contiguous ones."""

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        features = [feature for name, feature in x.items() if name in self.featmap_names]
        if self.scales is None or self.map_levels is None:  # torchvision infers these in the first call and keeps them
            self.scales, self.map_levels = _setup_scales(
                features, image_shapes, self.canonical_scale, self.canonical_level
            )
        if not _successive(self.scales, len(features)):  # boxes of a missing level pool zeros
            return super().forward(x, boxes, image_shapes)
        (pooled,) = multiscale_roi_align(
            features,
            rois_of_list(features[0], [of_image.detach() for of_image in boxes]),
            self.output_size,
            spatial_scales=self.scales,
            sampling_ratio=self.sampling_ratio,
            canonical_size=self.map_levels.s0,
            canonical_level=self.map_levels.lvl0,
        )
        return pooled if self.keeps_format else pooled.contiguous()


class ChannelsLastMultiScaleRoIAlign(AcceleratedMultiScaleRoIAlign):
    """Keeps channels-last maps, for torchvision's own heads: they flatten or convolve maps in any memory format."""

    keeps_format = True


class AcceleratedRPN(RegionProposalNetwork):
    """Decodes only the best anchors of each level at inference; one NMS call serves the whole batch."""

    def forward(self, images, features: dict[str, Tensor], targets=None) -> tuple[list[Tensor], dict[str, Tensor]]:
        if self.training:  # the losses need every anchor; proposals come from filter_proposals
            return super().forward(images, features, targets)
        maps = list(features.values())
        logits, deltas = self.head(maps)
        anchors = torch.stack(self.anchor_generator(images, maps))
        moves, starts, scores, levels, first = [], [], [], [], 0
        for level, (logit, delta) in enumerate(zip(logits, deltas, strict=True)):
            logit = logit.permute(0, 2, 3, 1).flatten(1)
            delta = delta.permute(0, 2, 3, 1).reshape(*logit.shape, 4)
            best, index = self._best(logit)
            moves.append(_rows(delta, index))
            starts.append(_rows(anchors[:, first : first + logit.shape[1]], index))
            scores.append(best)
            levels.append(torch.full_like(index, level))
            first += logit.shape[1]
        moves, starts, scores, levels = (torch.cat(parts, 1) for parts in (moves, starts, scores, levels))
        candidates = decode_boxes(moves, starts, self.box_coder.weights, self.box_coder.bbox_xform_clip)
        return self._suppress(candidates, scores, levels, images.image_sizes)[0], {}

    def filter_proposals(
        self, proposals: Tensor, objectness: Tensor, image_shapes: list[tuple[int, int]], num_anchors_per_level: list
    ) -> tuple[list[Tensor], list[Tensor]]:
        candidates, scores, levels = [], [], []
        logits = objectness.detach().reshape(len(proposals), -1).split(num_anchors_per_level, 1)
        for level, (logit, boxes) in enumerate(zip(logits, proposals.split(num_anchors_per_level, 1), strict=True)):
            best, index = self._best(logit)
            candidates.append(_at_least_float32(_rows(boxes, index)))
            scores.append(best)
            levels.append(torch.full_like(index, level))
        return self._suppress(*(torch.cat(parts, 1) for parts in (candidates, scores, levels)), image_shapes)

    def _best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and indices, `Tensor[B, K]` each, of the best among one level's anchors `Tensor[B, N]`."""
        best, index = logits.topk(min(self.pre_nms_top_n(), logits.shape[1]), dim=1)
        return _at_least_float32(best).sigmoid(), index

    def _suppress(
        self, candidates: Tensor, scores: Tensor, levels: Tensor, image_shapes: list[tuple[int, int]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Boxes `Tensor[B, N, 4]` with scores and levels `[B, N]` -> each image's proposals and their scores."""
        boxes = clip_boxes(candidates, _sizes(image_shapes, candidates.device))
        sides = boxes[..., 2:] - boxes[..., :2]
        valid = (sides >= self.min_size).all(-1) & (scores >= self.score_thresh)
        groups = torch.where(valid, levels, -1)
        slots = min(self.post_nms_top_n(), groups.shape[1])
        kept, counts = nms_padded(boxes, scores, groups, self.nms_thresh, slots)
        kept = [row[:count] for row, count in zip(kept, counts.tolist(), strict=True)]  # the only host synchronisation
        return tuple([of_image[row] for of_image, row in zip(values, kept, strict=True)] for values in (boxes, scores))


class AcceleratedRoIHeads(RoIHeads):
    """Scores, decoding, thresholds and NMS of all images in one operator, which decodes only possible detections."""

    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        if torch.is_grad_enabled() and (class_logits.requires_grad or box_regression.requires_grad):
            # The caller may differentiate detections; the operator has no gradient.
            return super().postprocess_detections(class_logits, box_regression, proposals, image_shapes)
        rois = [len(of_image) for of_image in proposals]
        deltas = box_regression.unflatten(1, (class_logits.shape[1], 4))
        boxes, scores, labels, counts = detections(
            [_pad(class_logits.split(rois))],
            _pad(deltas.split(rois)),
            _pad(proposals),
            _pad([torch.ones(count, dtype=torch.bool, device=class_logits.device) for count in rois]),
            _sizes(image_shapes, class_logits.device),
            score_threshold=self.score_thresh,
            nms_iou=self.nms_thresh,
            max_detections=self.detections_per_img,
            min_size=MIN_DETECTION_SIZE,
            box_weights=self.box_coder.weights,
        )
        counts = counts.tolist()  # the only host synchronisation
        return tuple([row[:count] for row, count in zip(of, counts, strict=True)] for of in (boxes, scores, labels))


class AcceleratedTransform(GeneralizedRCNNTransform):
    """Makes the batch channels-last on a CPU: convolutions and pooling are faster, with the same results."""

    def forward(self, images, targets=None):
        images, targets = super().forward(images, targets)
        if images.tensors.device.type == "cpu":
            images.tensors = images.tensors.contiguous(memory_format=torch.channels_last)
        return images, targets


class AcceleratedFrozenBatchNorm2d(FrozenBatchNorm2d):
    """Normalises in one pass instead of two."""

    folds_as = FrozenBatchNorm2d

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:  # under autocast torchvision's promotes the map, which affects later layers
            return super().forward(x)
        return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def _successive(scales: list[float], levels: int) -> bool:
    """Whether each level is half the size of the one before."""
    return len(scales) == levels and all(scale * 2**level == scales[0] for level, scale in enumerate(scales))


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Select boxes of each image by index: `[B, N, 4]`, `[B, K]` -> `[B, K, 4]`."""
    return values.gather(1, index[..., None].expand(-1, -1, 4))


def _pad(values: list[Tensor]) -> Tensor:
    """Each image's `Tensor[R, ...]` -> `Tensor[B, max R, ...]`, padded with zeros."""
    return values[0][None] if len(values) == 1 else pad_sequence(list(values), batch_first=True)


def _sizes(image_shapes: list[tuple[int, int]], device: torch.device) -> Tensor:
    """`Tensor[B, 2]` on the device, without a host synchronisation."""
    sizes = torch.tensor([(int(height), int(width)) for height, width in image_shapes], dtype=torch.float32)
    return sizes.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else sizes.to(device)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
