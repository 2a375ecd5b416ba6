"""What has to hold of whole detectors before they are timed."""

from __future__ import annotations

import copy

import torch
from detectors import pictures
from post_processing import agreement
from torch import Tensor, nn

from doublehead.config import ImageConfig


def same_in_float64(found: dict[str, nn.Module]) -> None:
    """torchvision's model, the accelerated one and its conversion find the same in the same order, on a small picture.

    In float64 rounding decides nothing.
    """
    side = 128
    image = [pictures(1, side)[0].double()]
    results = {}
    for name in ("torchvision", "doublehead", "fc kind"):
        model = copy.deepcopy(found[name]).double()
        if name == "fc kind":
            model.transform.config = ImageConfig(min_size=(side,), max_size=2 * side)
        else:
            model.transform.min_size, model.transform.max_size = (side,), 2 * side
            normal = found["fc kind"].config.image
            mean, std = (torch.tensor(values).tolist() for values in (normal.mean, normal.std))  # as float32 has them
            model.transform.image_mean, model.transform.image_std = mean, std
        with torch.inference_mode():
            results[name] = model(image)[0]
    expected = results.pop("torchvision")
    assert len(expected["boxes"]) > 5
    for result in results.values():
        assert result["labels"].tolist() == expected["labels"].tolist()
        torch.testing.assert_close(result["boxes"], expected["boxes"], atol=1e-2, rtol=0)
        torch.testing.assert_close(result["scores"], expected["scores"], atol=1e-4, rtol=0)


def inside(model: nn.Module) -> list[Tensor]:
    """Of a small picture: feature maps, and what the heads say of given boxes. All before anything is chosen."""
    pixels = nn.functional.interpolate(pictures(1, 128)[0][None], (128, 160))
    pixels = ((pixels - 0.45) / 0.225).contiguous(memory_format=torch.channels_last)
    corners = torch.rand(40, 2, 2, generator=torch.Generator().manual_seed(0)).sort(1).values
    boxes = (corners * torch.tensor([160.0, 128.0])).flatten(1)
    if hasattr(model, "roi_heads"):
        heads, features = model.roi_heads, model.backbone(pixels)
        pooled = heads.box_roi_pool(features, [boxes], [(128, 160)])
        return [*features.values(), *heads.box_predictor(heads.box_head(pooled))]
    features = model.detector.backbone(pixels)
    outputs = model.detector.heads(model.detector.roi_pooling(features, boxes[None]))
    said = [value for name in sorted(outputs) for value in outputs[name] if value is not None]
    return [*features, *said]


def off_by_most(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of two `inside`, relative to how much each varies over cells or boxes."""
    most = 0.0
    for a, e in zip(actual, expected, strict=True):
        others = [dim for dim in range(e.dim()) if dim != 1]
        spread = (e.double() - e.double().mean(others, keepdim=True)).norm()
        most = max(most, ((a.double() - e.double()).norm() / spread).item())
    return most


def shared(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> float:
    """The share of detections with a counterpart: the same class, an IoU above 0.9; of both ways the smaller."""
    both = [(agreement(f, e), agreement(e, f)) for f, e in zip(found, expected, strict=True)]
    return min(sum(shares) / len(both) for shares in zip(*both, strict=True))


def plain(model: nn.Module) -> nn.Module:
    """A copy of our detector that runs module by module, all RoIs through all heads; a gate drops RoIs afterwards."""
    model = copy.deepcopy(model)
    model.detector.readout = model.detector.readout.replace(skip=False)
    for head in model.detector.heads.values():
        head.tower.plain()
    return model
