"""Faster R-CNN and Double-Head R-CNN as MMDetection 3.3 has them: their names, and what they make of pictures.

From mmdet's models/{roi_heads/double_roi_head, roi_heads/bbox_heads/double_bbox_head, roi_heads/roi_extractors,
task_modules/coders/delta_xywh_bbox_coder, task_modules/prior_generators, dense_heads/rpn_head, layers/bbox_nms}.py,
datasets/transforms/transforms.py and mmcv.imrescale.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import interpolate, softmax
from torchvision.ops import nms, roi_align

from .layers import Weights, pad_images, pyramid, resnet50, rows

STRIDES = (4, 8, 16, 32, 64)
MOST = abs(math.log(16 / 1000))
STYLES = {
    "caffe": ([103.530, 116.280, 123.675], [1.0, 1.0, 1.0]),
    "pytorch": ([123.675, 116.280, 103.530], [58.395, 57.120, 57.375]),
}
HEAD = "roi_head.bbox_head"


def names(stage: int, block: int) -> dict:
    at = f"backbone.layer{stage}.{block}"
    layers = {f"conv{k}": (f"{at}.conv{k}", f"{at}.bn{k}") for k in (1, 2, 3)}
    return layers | {"shortcut": (f"{at}.downsample.0", f"{at}.downsample.1")}


class TwoStage:
    def __init__(self, w: Weights, classes: int, scale: tuple[int, int], double: bool, style="pytorch", nms_pre=1000,
                 max_per_img=1000):  # fmt: skip
        self.w, self.classes, self.scale, self.double, self.style = w, classes, scale, double, style
        self.nms_pre, self.max_per_img = nms_pre, max_per_img
        self.channels, self.fc, self.conv_dim = 32, 64, 64

    def resize(self, picture):
        height, width = picture.shape[1:]
        factor = min(max(self.scale) / max(height, width), min(self.scale) / min(height, width))
        size = int(height * factor + 0.5), int(width * factor + 0.5)
        image = interpolate(picture[None].double(), size, mode="bilinear", align_corners=False)[0]
        image = (image + 0.5).floor()
        return image.flip(0) if self.style == "caffe" else image

    def __call__(self, pictures):
        mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in STYLES[self.style])
        images = [self.resize(picture) for picture in pictures]
        batch = pad_images([(image - mean) / std for image in images])
        caffe = self.style == "caffe"
        maps = resnet50(self.w, batch, ("backbone.conv1", "backbone.bn1"), names, 1e-5, stride_in_1x1=caffe)
        features = pyramid(
            self.w, maps, lambda level: f"neck.lateral_convs.{level}.conv",
            lambda level: f"neck.fpn_convs.{level}.conv", self.channels,
        )  # fmt: skip
        results = []
        for row, (image, picture) in enumerate(zip(images, pictures, strict=True)):
            mine = [feature[row : row + 1] for feature in features]
            size, original = image.shape[1:], picture.shape[1:]
            boxes, scores, labels = self.detect(mine, self.propose(mine, size), size)
            x, y = size[1] / original[1], size[0] / original[0]
            results.append((boxes / torch.tensor([x, y, x, y], dtype=torch.float64), scores, labels))
        return results

    def propose(self, features, size):
        anchors, scores, deltas, levels = [], [], [], []
        for level, feature in enumerate(features):
            hidden = self.w.conv(feature, "rpn_head.rpn_conv", self.channels, 3, bias=True).relu()
            score = rows(self.w.conv(hidden, "rpn_head.rpn_cls", 3, bias=True, gain=1), 1)[:, 0].sigmoid()
            delta = rows(self.w.conv(hidden, "rpn_head.rpn_reg", 12, bias=True, gain=0.2), 4)
            order = score.sort(descending=True).indices[: self.nms_pre]
            anchors.append(self.anchors(level, feature.shape[2:])[order])
            scores.append(score[order])
            deltas.append(delta[order])
            levels.append(torch.full((len(order),), level))
        boxes = decode(torch.cat(anchors), torch.cat(deltas), (1, 1, 1, 1), size)
        scores, levels = torch.cat(scores), torch.cat(levels)
        width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        keep = (width > 0) & (height > 0)
        boxes, scores, levels = boxes[keep], scores[keep], levels[keep]
        return boxes[nms_of_groups(boxes, scores, levels, 0.7)[: self.max_per_img]]

    def anchors(self, level, cells):
        """Base size: the stride, eight times enlarged; first the cells of a row, then the next row."""
        ratios = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
        side = 8 * STRIDES[level]
        width, height = side / ratios.sqrt(), side * ratios.sqrt()
        base = torch.stack([-width / 2, -height / 2, width / 2, height / 2], 1)
        y, x = torch.meshgrid(*(torch.arange(n) * STRIDES[level] for n in cells), indexing="ij")
        shift = torch.stack([x, y, x, y], -1).reshape(-1, 1, 4)
        return (shift + base).reshape(-1, 4)

    def pool(self, features, boxes, factor=None):
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        level = torch.floor(torch.log2(side / 56 + 1e-6)).clamp(0, 3)
        if factor is not None:
            centre, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) * factor
            boxes = torch.cat([centre - sides / 2, centre + sides / 2], 1)
        pooled = torch.zeros(len(boxes), self.channels, 7, 7, dtype=torch.float64)
        for number in range(4):
            on = level == number
            pooled[on] = roi_align(features[number], [boxes[on]], 7, 1 / STRIDES[number], 0, aligned=True)
        return pooled

    def fc_branch(self, x, prefix):
        for number in (0, 1):
            x = self.w.linear(x.flatten(1), f"{HEAD}.{prefix}.{number}", self.fc).relu()
        return x

    def conv_branch(self, x):
        def layer(x, name, channels, kernel=1):
            return self.w.norm(self.w.conv(x, f"{name}.conv", channels, kernel), f"{name}.bn", 1e-5)

        block = f"{HEAD}.res_block"
        y = layer(layer(x, f"{block}.conv1", self.channels, 3).relu(), f"{block}.conv2", self.conv_dim)
        x = (y + layer(x, f"{block}.conv_identity", self.conv_dim)).relu()
        for number in range(4):
            at, inner = f"{HEAD}.conv_branch.{number}", self.conv_dim // 4
            y = self.w.norm(self.w.conv(x, f"{at}.conv1", inner), f"{at}.bn1", 1e-5).relu()
            y = self.w.norm(self.w.conv(y, f"{at}.conv2", inner, 3), f"{at}.bn2", 1e-5).relu()
            x = (x + self.w.norm(self.w.conv(y, f"{at}.conv3", self.conv_dim), f"{at}.bn3", 1e-5)).relu()
        return x.mean((2, 3))

    def detect(self, features, boxes, size):
        of_classes = self.fc_branch(self.pool(features, boxes), "fc_branch" if self.double else "shared_fcs")
        of_boxes = self.conv_branch(self.pool(features, boxes, 1.3)) if self.double else of_classes
        scores = softmax(self.w.linear(of_classes, f"{HEAD}.fc_cls", self.classes + 1), 1)[:, :-1]
        deltas = self.w.linear(of_boxes, f"{HEAD}.fc_reg", 4 * self.classes, gain=0.5)
        found = torch.stack(
            [decode(boxes, deltas[:, 4 * k : 4 * k + 4], (0.1, 0.1, 0.2, 0.2), size) for k in range(self.classes)], 1
        )
        row, labels = (scores > 0.05).nonzero().unbind(1)
        found, scores = found[row, labels], scores[row, labels]
        kept = nms_of_groups(found, scores, labels, 0.5)[:100]
        return found[kept], scores[kept], labels[kept]


def decode(boxes, deltas, stds, size):
    deltas = deltas * torch.tensor(stds, dtype=deltas.dtype)
    centre, sides = (boxes[:, :2] + boxes[:, 2:]) * 0.5, boxes[:, 2:] - boxes[:, :2]
    centre = centre + sides * deltas[:, :2]
    sides = sides * deltas[:, 2:].clamp(-MOST, MOST).exp()
    x1, y1, x2, y2 = torch.cat([centre - sides / 2, centre + sides / 2], 1).unbind(1)
    return torch.stack([x1.clamp(0, size[1]), y1.clamp(0, size[0]), x2.clamp(0, size[1]), y2.clamp(0, size[0])], 1)


def nms_of_groups(boxes, scores, groups, threshold):
    """Indices kept, best first: groups are moved apart, as mmcv's batched_nms does it."""
    moved = boxes + (groups * (boxes.max() + 1))[:, None] if len(boxes) else boxes
    return nms(moved, scores, threshold)
