"""The authors' Double-Head R-CNN, a fork of maskrcnn-benchmark, and its plain Faster R-CNN: names and results.

From the release's modeling/poolers.py and roi_heads/box_head/{roi_box_feature_extractors, attention, inference,
roi_box_predictors}.py, and maskrcnn-benchmark's rpn/{anchor_generator, inference, loss}.py, matcher.py, box_coder.py,
structures/bounding_box.py, csrc/cpu/nms_cpu.cpp, layers/batch_norm.py and data/transforms/transforms.py.

Boxes are first and last pixel: a box is x2 - x1 + 1 wide.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn.functional import softmax
from torchvision.ops import roi_align

from .layers import Weights, pad_images, pillow_like, pyramid, resnet50, rows

STRIDES = (4, 8, 16, 32, 64)
MEAN = [102.9801, 115.9465, 122.7717]
MOST = math.log(1000 / 16)
EXTRACTOR, PREDICTOR = "roi_heads.box.feature_extractor", "roi_heads.box.predictor"


def names(stage: int, block: int) -> dict:
    at = f"backbone.body.layer{stage}.{block}"
    layers = {f"conv{k}": (f"{at}.conv{k}", f"{at}.bn{k}") for k in (1, 2, 3)}
    return layers | {"shortcut": (f"{at}.downsample.0", f"{at}.downsample.1")}


class GeneralizedRCNN:
    def __init__(self, w: Weights, classes: int, side: int, longest: int, double: bool, stacks=2, mode=3,
                 pre_nms=1000, post_nms=1000, inner=None):  # fmt: skip
        """`classes`: with background.  `mode`: how the four outputs are read, 0 conv, 1 fc, 2 fc + conv, 3 fused.
        `inner`: NONLOCAL_INTER_CHANNELS."""
        self.w, self.classes, self.side, self.longest, self.double = w, classes, side, longest, double
        self.stacks, self.mode, self.pre_nms, self.post_nms = stacks, mode, pre_nms, post_nms
        self.channels, self.fc, self.conv_dim, self.groups = 32, 64, 64, 4
        self.inner = inner or self.conv_dim // 2

    def resize(self, picture):
        """uint8 `[3, H, W]` RGB -> levels as float64, BGR."""
        height, width = picture.shape[1:]
        side, short, long = self.side, float(min(height, width)), float(max(height, width))
        if long / short * side > self.longest:
            side = int(round(self.longest * short / long))
        if (width <= height and width == side) or (height <= width and height == side):
            size = height, width
        elif width < height:
            size = int(side * height / width), side
        else:
            size = side, int(side * width / height)
        return pillow_like(picture, size)[[2, 1, 0]]

    def __call__(self, pictures):
        """Boxes as COCO has them: x, y, width, height."""
        mean = torch.tensor(MEAN, dtype=torch.float64)[:, None, None]
        images = [self.resize(picture) for picture in pictures]
        batch = pad_images([image - mean for image in images])
        stem = "backbone.body.stem.conv1", "backbone.body.stem.bn1"
        maps = resnet50(self.w, batch, stem, names, 0.0, stride_in_1x1=True)
        features = pyramid(
            self.w, maps, lambda level: f"backbone.fpn.fpn_inner{level + 1}",
            lambda level: f"backbone.fpn.fpn_layer{level + 1}", self.channels,
        )  # fmt: skip
        results = []
        for row, (image, picture) in enumerate(zip(images, pictures, strict=True)):
            mine = [feature[row : row + 1] for feature in features]
            size, original = image.shape[1:], picture.shape[1:]
            boxes, scores, labels = self.detect(mine, self.propose(mine, size), size)
            x, y = original[1] / size[1], original[0] / size[0]
            x1, y1, x2, y2 = (boxes * torch.tensor([x, y, x, y], dtype=torch.float64)).unbind(1)
            order = scores.argsort(descending=True)
            boxes = torch.stack([x1, y1, x2 - x1 + 1, y2 - y1 + 1], 1)
            results.append((boxes[order], scores[order], labels[order]))
        return results

    def anchors(self, level, cells):
        base = cell_anchors(32 * 2**level, STRIDES[level])
        self.w.tensors[f"rpn.anchor_generator.cell_anchors.{level}"] = torch.tensor(base, dtype=torch.float32)
        return grid_anchors(base, STRIDES[level], cells)

    def propose(self, features, size):
        boxes, scores = [], []
        for level, feature in enumerate(features):
            hidden = self.w.conv(feature, "rpn.head.conv", self.channels, 3, bias=True).relu()
            score = rows(self.w.conv(hidden, "rpn.head.cls_logits", 3, bias=True, gain=1), 1)[:, 0].sigmoid()
            delta = rows(self.w.conv(hidden, "rpn.head.bbox_pred", 12, bias=True, gain=0.2), 4)
            best = score.topk(min(self.pre_nms, len(score)))
            found = decode(self.anchors(level, feature.shape[2:])[best.indices], delta[best.indices], (1, 1, 1, 1))
            found = clip(found, size)
            kept = nms(found, best.values, 0.7)[: self.post_nms]
            boxes.append(found[kept])
            scores.append(best.values[kept])
        boxes, scores = torch.cat(boxes), torch.cat(scores)
        return boxes[scores.topk(min(self.post_nms, len(scores))).indices]

    def pool(self, features, boxes, expand=None):
        width, height = boxes[:, 2] - boxes[:, 0] + 1, boxes[:, 3] - boxes[:, 1] + 1
        level = torch.floor(4 + torch.log2((width * height).sqrt() / 224 + 1e-6)).clamp(2, 5) - 2
        if expand is not None:
            cx, cy = boxes[:, 0] + 0.5 * width, boxes[:, 1] + 0.5 * height
            half_w, half_h = 0.5 * width * expand, 0.5 * height * expand
            boxes = torch.stack([cx - half_w, cy - half_h, cx + half_w - 1, cy + half_h - 1], 1)
        pooled = torch.zeros(len(boxes), self.channels, 7, 7, dtype=torch.float64)
        for number in range(4):
            on = level == number
            pooled[on] = roi_align(features[number], [boxes[on]], 7, 1 / STRIDES[number], 2, aligned=False)
        return pooled

    def mlp(self, x):
        return self.w.linear(
            self.w.linear(x.flatten(1), f"{EXTRACTOR}.fc6", self.fc).relu(), f"{EXTRACTOR}.fc7", self.fc
        ).relu()

    def conv_vector(self, x):
        def sequence(x, name, *layers):
            """(number, channels, kernel) of convolutions; norms follow them, ReLUs all norms but the last."""
            for position, (number, channels, kernel) in enumerate(layers):
                x = self.w.norm(self.w.conv(x, f"{name}.{number}", channels, kernel), f"{name}.{number + 1}", 1e-5)
                x = x.relu() if position < len(layers) - 1 else x
            return x

        up, dim = f"{EXTRACTOR}.nonlocal_conv", self.conv_dim
        x = (
            sequence(x, f"{up}.top", (0, dim, 1)) + sequence(x, f"{up}.bottom", (0, self.channels, 3), (3, dim, 1))
        ).relu()
        for stack in range(self.stacks):
            at = f"{EXTRACTOR}.shared_nonlocal.{stack}"
            x = self.non_local(x, at)
            inner = dim // 4
            x = (x + sequence(x, f"{at}.ffconv.bottleneck", (0, inner, 1), (3, inner, 3), (6, dim, 1))).relu()
        return x.mean((2, 3))

    def non_local(self, x, at):
        inner = self.inner
        g, theta, phi = (
            self.w.conv(x, f"{at}.{part}", inner, bias=True, gain=0.5).flatten(2) for part in ("g", "theta", "phi")
        )
        parts = []
        for value, query, key in zip(*(part.chunk(self.groups, 1) for part in (g, theta, phi)), strict=True):
            weights = query.transpose(1, 2) @ key / key.shape[2]
            parts.append((weights @ value.transpose(1, 2)).transpose(1, 2))
        mixed = torch.cat(parts, 1).view(len(x), inner, *x.shape[2:])
        z = self.w.norm(self.w.conv(mixed, f"{at}.W.0", self.conv_dim, bias=True), f"{at}.W.bn", 1e-5)
        return (z + x).relu()

    def detect(self, features, boxes, size):
        if self.double:
            conv, fc = self.conv_vector(self.pool(features, boxes, 1.3)), self.mlp(self.pool(features, boxes, 1.0))
            scores_conv = softmax(self.w.linear(conv, f"{PREDICTOR}.cls_score", self.classes), 1)
            deltas_conv = self.w.linear(conv, f"{PREDICTOR}.bbox_pred", 4 * self.classes, gain=0.5)
            scores_fc = softmax(self.w.linear(fc, f"{PREDICTOR}.cls_score_fc", self.classes), 1)
            deltas_fc = self.w.linear(fc, f"{PREDICTOR}.bbox_pred_fc", 4 * self.classes, gain=0.5)
            scores = [scores_conv, scores_fc, scores_fc, 1 - (1 - scores_conv) * (1 - scores_fc)][self.mode]
            deltas = deltas_fc if self.mode == 1 else deltas_conv
        else:
            x = self.mlp(self.pool(features, boxes))
            scores = softmax(self.w.linear(x, f"{PREDICTOR}.cls_score", self.classes), 1)
            deltas = self.w.linear(x, f"{PREDICTOR}.bbox_pred", 4 * self.classes, gain=0.5)
        results = []
        for label in range(1, self.classes):
            found = clip(decode(boxes, deltas[:, 4 * label : 4 * label + 4], (10, 10, 5, 5)), size)
            passes = scores[:, label] > 0.05
            mine, score = found[passes], scores[passes, label]
            kept = nms(mine, score, 0.5)
            results.append((mine[kept], score[kept], torch.full((len(kept),), label)))
        boxes, scores, labels = (torch.cat(parts) for parts in zip(*results, strict=True))
        if len(scores) > 100:
            keep = scores >= scores.sort(descending=True).values[99]
            boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
        return boxes, scores, labels


def cell_anchors(size, stride):
    """Rounded on a cell of the stride's size, then enlarged about the cell's middle pixel."""
    centre, base = (stride - 1) / 2, []
    for ratio in (0.5, 1.0, 2.0):
        width = np.round(np.sqrt(stride * stride / ratio))
        height = np.round(width * ratio)
        width, height = width * size / stride, height * size / stride
        half_w, half_h = (width - 1) / 2, (height - 1) / 2
        base.append([centre - half_w, centre - half_h, centre + half_w, centre + half_h])
    return base


def grid_anchors(base, stride, cells):
    found = []
    for y in range(cells[0]):
        for x in range(cells[1]):
            found += [[a + x * stride, b + y * stride, c + x * stride, d + y * stride] for a, b, c, d in base]
    return torch.tensor(found, dtype=torch.float64)


def rpn_labels(anchors, truth, size, straddle):
    """Labels of one image's anchors: 1 object, 0 background, -1 left out of the loss; and each one's ground-truth box.

    `size`: (height, width); `straddle`: RPN.STRADDLE_THRESH, negative: off.
    """
    overlap = iou(truth, anchors)
    best, matched = overlap.max(0)
    labels = torch.ones(len(anchors))
    labels[best < 0.7] = -2
    labels[best < 0.3] = 0
    for row in overlap:  # low-quality matches: of each box its best anchors, ties included
        labels[row == row.max()] = 1
    if straddle >= 0:
        for i, (x1, y1, x2, y2) in enumerate(anchors.tolist()):
            if not (x1 >= -straddle and y1 >= -straddle and x2 < size[1] + straddle and y2 < size[0] + straddle):
                labels[i] = -1
    labels[labels == -2] = -1
    return labels, matched


def rpn_losses(logits, deltas, anchors, truths, sizes, straddle):
    """Objectness and box loss of a batch, where the sampler takes every labelled anchor."""
    cross_entropy, smooth, total = 0.0, 0.0, 0
    for logit, delta, truth, size in zip(logits, deltas, truths, sizes, strict=True):
        labels, matched = rpn_labels(anchors, truth, size, straddle)
        sampled, positive = labels >= 0, labels == 1
        probability = logit.sigmoid()
        right = torch.where(positive, probability, 1 - probability)
        cross_entropy = cross_entropy - right[sampled].log().sum()
        away = (delta - encode(truth[matched], anchors))[positive].abs()
        smooth = smooth + torch.where(away < 1 / 9, 0.5 * away**2 * 9, away - 0.5 / 9).sum()
        total += int(sampled.sum())
    return cross_entropy / total, smooth / total


def sides(boxes):
    return boxes[..., 2] - boxes[..., 0] + 1, boxes[..., 3] - boxes[..., 1] + 1


def iou(a, b):
    (aw, ah), (bw, bh) = sides(a[:, None]), sides(b[None])
    first = torch.maximum(a[:, None, :2], b[None, :, :2])
    last = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    both = (last - first + 1).clamp(min=0).prod(2)
    return both / (aw * ah + bw * bh - both)


def encode(truth, boxes):
    (tw, th), (w, h) = sides(truth), sides(boxes)
    x, y = truth[:, 0] + 0.5 * tw - boxes[:, 0] - 0.5 * w, truth[:, 1] + 0.5 * th - boxes[:, 1] - 0.5 * h
    return torch.stack([x / w, y / h, (tw / w).log(), (th / h).log()], 1)


def decode(boxes, deltas, weights):
    width, height = boxes[:, 2] - boxes[:, 0] + 1, boxes[:, 3] - boxes[:, 1] + 1
    dx, dy, dw, dh = (deltas / torch.tensor(weights, dtype=deltas.dtype)).unbind(1)
    cx, cy = boxes[:, 0] + 0.5 * width + dx * width, boxes[:, 1] + 0.5 * height + dy * height
    w, h = width * dw.clamp(max=MOST).exp(), height * dh.clamp(max=MOST).exp()
    return torch.stack([cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w - 1, cy + 0.5 * h - 1], 1)


def clip(boxes, size):
    x1, y1, x2, y2 = boxes.unbind(1)
    right, bottom = size[1] - 1, size[0] - 1
    return torch.stack([x1.clamp(0, right), y1.clamp(0, bottom), x2.clamp(0, right), y2.clamp(0, bottom)], 1)


def nms(boxes, scores, threshold):
    """Indices kept, best first; areas and overlaps count pixels."""
    order = scores.argsort(descending=True).tolist()
    areas = (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)
    kept = []
    gone = torch.zeros(len(boxes), dtype=torch.bool)
    for i in order:
        if gone[i]:
            continue
        kept.append(i)
        width = (torch.minimum(boxes[i, 2], boxes[:, 2]) - torch.maximum(boxes[i, 0], boxes[:, 0]) + 1).clamp(min=0)
        height = (torch.minimum(boxes[i, 3], boxes[:, 3]) - torch.maximum(boxes[i, 1], boxes[:, 1]) + 1).clamp(min=0)
        overlap = width * height
        gone |= overlap / (areas[i] + areas - overlap) > threshold
    return torch.tensor(kept, dtype=torch.long)
