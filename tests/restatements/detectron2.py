"""Faster R-CNN with a pyramid as Detectron2 has it: its names, and what it makes of pictures.

From detectron2's modeling/{anchor_generator, proposal_generator/rpn, proposal_generator/proposal_utils, poolers,
roi_heads/fast_rcnn, box_regression, postprocessing}.py and data/transforms.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import softmax
from torchvision.ops import nms, roi_align

from .layers import Weights, pad_images, pillow_like, pyramid, resnet50, rows

STRIDES = (4, 8, 16, 32, 64)
MOST = math.log(1000 / 16)
STYLES = {
    "caffe": ([103.530, 116.280, 123.675], [1.0, 1.0, 1.0]),
    "pytorch": ([123.675, 116.280, 103.530], [58.395, 57.120, 57.375]),
}


def names(stage: int, block: int) -> dict:
    at = f"backbone.bottom_up.res{stage + 1}.{block}"
    return {layer: (f"{at}.{layer}", f"{at}.{layer}.norm") for layer in ("conv1", "conv2", "conv3", "shortcut")}


class FasterRCNN:
    def __init__(self, w: Weights, classes: int, side: int, longest: int, style: str = "caffe", topk=(1000, 1000)):
        self.w, self.classes, self.side, self.longest, self.style, self.topk = w, classes, side, longest, style, topk
        self.channels, self.fc = 32, 64

    def resize(self, picture):
        """uint8 `[3, H, W]` RGB -> levels as float64, the network's channels first to last."""
        height, width = picture.shape[1:]
        scale = self.side / min(height, width)
        new_h, new_w = (self.side, scale * width) if height < width else (scale * height, self.side)
        if max(new_h, new_w) > self.longest:
            scale = self.longest / max(new_h, new_w)
            new_h, new_w = new_h * scale, new_w * scale
        image = pillow_like(picture, (int(new_h + 0.5), int(new_w + 0.5)))
        return image[[2, 1, 0]] if self.style == "caffe" else image

    def __call__(self, pictures):
        mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in STYLES[self.style])
        images = [self.resize(picture) for picture in pictures]
        batch = pad_images([(image - mean) / std for image in images])
        stem = "backbone.bottom_up.stem.conv1"
        maps = resnet50(self.w, batch, (stem, f"{stem}.norm"), names, 1e-5, stride_in_1x1=self.style == "caffe")
        features = pyramid(
            self.w, maps, lambda level: f"backbone.fpn_lateral{level + 2}",
            lambda level: f"backbone.fpn_output{level + 2}", self.channels,
        )  # fmt: skip
        results = []
        for row, (image, picture) in enumerate(zip(images, pictures, strict=True)):
            mine = [feature[row : row + 1] for feature in features]
            size = image.shape[1:]
            found = self.detect(mine, self.propose(mine, size), size)
            results.append(self.rescale(*found, size, picture.shape[1:]))
        return results

    def propose(self, features, size):
        boxes, logits, levels = [], [], []
        for level, feature in enumerate(features):
            hidden = self.w.conv(feature, "proposal_generator.rpn_head.conv", self.channels, 3, bias=True).relu()
            logit = rows(
                self.w.conv(hidden, "proposal_generator.rpn_head.objectness_logits", 3, bias=True, gain=3), 1
            )[:, 0]  # fmt: skip
            delta = rows(self.w.conv(hidden, "proposal_generator.rpn_head.anchor_deltas", 12, bias=True, gain=0.3), 4)
            anchors = self.anchors(level, feature.shape[2:])
            best = logit.topk(min(self.topk[0], len(logit)))
            boxes.append(decode(anchors[best.indices], delta[best.indices], (1, 1, 1, 1)))
            logits.append(best.values)
            levels.append(torch.full((len(best.values),), level))
        boxes, logits, levels = clip(torch.cat(boxes), size), torch.cat(logits), torch.cat(levels)
        keep = ((boxes[:, 2] - boxes[:, 0]) > 0) & ((boxes[:, 3] - boxes[:, 1]) > 0)
        boxes, logits, levels = boxes[keep], logits[keep], levels[keep]
        kept = nms_of_groups(boxes, logits, levels, 0.7)[: self.topk[1]]
        return boxes[kept]

    def anchors(self, level, cells):
        size, found = 32 * 2**level, []
        for y in range(cells[0]):
            for x in range(cells[1]):
                for ratio in (0.5, 1.0, 2.0):
                    width = math.sqrt(size * size / ratio)
                    height = ratio * width
                    cx, cy = x * STRIDES[level], y * STRIDES[level]
                    found.append([cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2])
        return torch.tensor(found, dtype=torch.float64)

    def detect(self, features, boxes, size):
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        level = torch.floor(4 + torch.log2(area.sqrt() / 224 + 1e-8)).clamp(2, 5) - 2
        pooled = torch.zeros(len(boxes), self.channels, 7, 7, dtype=torch.float64)
        for number in range(4):
            on = level == number
            pooled[on] = roi_align(features[number], [boxes[on]], 7, 1 / STRIDES[number], 0, aligned=True)
        x = self.w.linear(pooled.flatten(1), "roi_heads.box_head.fc1", self.fc).relu()
        x = self.w.linear(x, "roi_heads.box_head.fc2", self.fc).relu()
        logits = self.w.linear(x, "roi_heads.box_predictor.cls_score", self.classes + 1)
        deltas = self.w.linear(x, "roi_heads.box_predictor.bbox_pred", 4 * self.classes, gain=0.5)
        scores = softmax(logits, 1)[:, :-1]
        found = torch.stack(
            [decode(boxes, deltas[:, 4 * k : 4 * k + 4], (10, 10, 5, 5)) for k in range(self.classes)], dim=1
        )
        found = clip(found, size)
        rows_, labels = (scores > 0.05).nonzero().unbind(1)
        found, scores = found[rows_, labels], scores[rows_, labels]
        kept = nms_of_groups(found, scores, labels, 0.5)[:100]
        return found[kept], scores[kept], labels[kept]

    def rescale(self, boxes, scores, labels, size, original):
        x, y = original[1] / size[1], original[0] / size[0]
        boxes = clip(boxes * torch.tensor([x, y, x, y], dtype=torch.float64), original)
        keep = ((boxes[:, 2] - boxes[:, 0]) > 0) & ((boxes[:, 3] - boxes[:, 1]) > 0)
        return boxes[keep], scores[keep], labels[keep]


def decode(boxes, deltas, weights):
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    dx, dy, dw, dh = (deltas / torch.tensor(weights, dtype=deltas.dtype)).unbind(1)
    cx, cy = boxes[:, 0] + 0.5 * width + dx * width, boxes[:, 1] + 0.5 * height + dy * height
    w, h = width * dw.clamp(max=MOST).exp(), height * dh.clamp(max=MOST).exp()
    return torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], 1)


def clip(boxes, size):
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([x1.clamp(0, size[1]), y1.clamp(0, size[0]), x2.clamp(0, size[1]), y2.clamp(0, size[0])], dim=-1)


def nms_of_groups(boxes, scores, groups, threshold):
    """Indices kept, best first."""
    kept = []
    for group in groups.unique():
        mine = (groups == group).nonzero()[:, 0]
        kept.append(mine[nms(boxes[mine], scores[mine], threshold)])
    kept = torch.cat(kept) if kept else torch.zeros(0, dtype=torch.long)
    return kept[scores[kept].argsort(descending=True)]
