"""Networks written down a second time, in plain PyTorch, for comparison: what the restated projects have in common.

A `Weights` makes up each tensor when it is first asked for, under the project's own name, so that after one pass over
any images it holds the state_dict of a model with lively outputs.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F


class Weights:
    """Tensors by name, in float32, computed with in the dtype of the input.

    Args:
        seed: of the random values.
        counters: batch norms have `num_batches_tracked`.
    """

    def __init__(self, seed: int, counters: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.counters = counters
        self.tensors: dict[str, torch.Tensor] = {}

    def random(self, name, shape, std):
        if name not in self.tensors:
            self.tensors[name] = torch.randn(shape, generator=self.generator) * std
        return self.tensors[name].double()

    def conv(self, x, name, channels, kernel=1, stride=1, bias=False, gain=1.0):
        inputs = x.shape[1]
        std = gain * math.sqrt(2 / (inputs * kernel * kernel))
        weight = self.random(f"{name}.weight", (channels, inputs, kernel, kernel), std)
        offset = self.random(f"{name}.bias", (channels,), 0.1 * gain) if bias else None
        return F.conv2d(x, weight, offset, stride=stride, padding=kernel // 2)

    def linear(self, x, name, rows, gain=1.0):
        weight = self.random(f"{name}.weight", (rows, x.shape[1]), gain * math.sqrt(2 / x.shape[1]))
        return F.linear(x, weight, self.random(f"{name}.bias", (rows,), 0.1 * gain))

    def norm(self, x, name, eps):
        """With the statistics of the first input, but for some noise."""
        if f"{name}.weight" not in self.tensors:
            noise = torch.randn(4, x.shape[1], generator=self.generator) * 0.1
            variance, mean = torch.var_mean(x.detach(), dim=(0, 2, 3))
            self.tensors |= {
                f"{name}.weight": 1 + noise[0],
                f"{name}.bias": noise[1],
                f"{name}.running_mean": mean.float() + noise[2] * variance.float().sqrt(),
                f"{name}.running_var": variance.float() * (1 + noise[3]).abs() + 1e-3,
            }
            if self.counters:
                self.tensors[f"{name}.num_batches_tracked"] = torch.tensor(7)
        parts = ("weight", "bias", "running_mean", "running_var")
        weight, bias, mean, variance = (self.tensors[f"{name}.{p}"].double()[:, None, None] for p in parts)
        return (x - mean) / (variance + eps).sqrt() * weight + bias


def resnet50(w: Weights, x, stem, stage, eps: float, stride_in_1x1: bool):
    """C2 .. C5.

    Args:
        stem: (name of the convolution, of its norm).
        stage: stage 1 .. 4, block -> {"conv1": (name, norm's name), ..., "shortcut": ...}.
    """
    x = w.norm(w.conv(x, stem[0], 64, kernel=7, stride=2), stem[1], eps).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    maps = []
    for number, blocks in enumerate((3, 4, 6, 3), start=1):
        inner = 32 * 2**number
        for block in range(blocks):
            names = stage(number, block)
            stride = 2 if number > 1 and block == 0 else 1
            stride1, stride3 = (stride, 1) if stride_in_1x1 else (1, stride)
            y = w.norm(w.conv(x, names["conv1"][0], inner, 1, stride1), names["conv1"][1], eps).relu()
            y = w.norm(w.conv(y, names["conv2"][0], inner, 3, stride3), names["conv2"][1], eps).relu()
            y = w.norm(w.conv(y, names["conv3"][0], 4 * inner), names["conv3"][1], eps)
            if block == 0:
                x = w.norm(w.conv(x, names["shortcut"][0], 4 * inner, 1, stride), names["shortcut"][1], eps)
            x = (x + y).relu()
        maps.append(x)
    return maps


def pyramid(w: Weights, maps, lateral, output, channels: int):
    """P2 .. P6; `lateral` and `output`: level 0 .. 3 -> name of the convolution."""
    above, results = None, []
    for level in (3, 2, 1, 0):
        x = w.conv(maps[level], lateral(level), channels, bias=True, gain=0.5)
        if above is not None:
            x = x + F.interpolate(above, scale_factor=2, mode="nearest")
        above = x
        results.insert(0, w.conv(x, output(level), channels, 3, bias=True, gain=0.5))
    return [*results, results[3][:, :, ::2, ::2]]


def pillow_like(picture, size):
    """uint8 `[3, H, W]` -> levels as float64, by PyTorch's form of Pillow's bilinear filter.

    It is within one level of Pillow's own, which is not exact enough to compare detections.
    """
    return F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0].double()


def pad_images(images):
    """Images `[3, H, W]` one behind the other, zeros to the right and below, sides multiples of 32."""
    height, width = (math.ceil(max(image.shape[side] for image in images) / 32) * 32 for side in (1, 2))
    batch = torch.zeros(len(images), 3, height, width, dtype=torch.float64)
    for row, image in enumerate(images):
        batch[row, :, : image.shape[1], : image.shape[2]] = image
    return batch


def rows(predicted, width: int):
    """A map `[1, A * width, H, W]` of one image as `[H * W * A, width]`."""
    return predicted[0].permute(1, 2, 0).reshape(-1, width)
