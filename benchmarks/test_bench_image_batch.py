"""Pictures to a padded batch: doublehead against torchvision's `GeneralizedRCNNTransform`, side by side."""

from __future__ import annotations

import pytest
import torch
from floors import resize_bytes
from inputs import DEVICE, generator

from doublehead.config import ImageConfig
from doublehead.models.images import ImageTransform

#: (height, width) of the pictures: COCO's, a video's, a camera's.
CASES = {
    "480 x 640": [(480, 640)],
    "1080 x 1920": [(1080, 1920)],
    "3000 x 4000": [(3000, 4000)],
    "4 of COCO's sizes": [(480, 640), (427, 640), (640, 480), (375, 500)],
}


def pictures(sizes: list[tuple[int, int]], layout: str) -> list[torch.Tensor]:
    """uint8, in memory as decoders give them or plane by plane."""
    options = {"generator": generator(0), "device": DEVICE, "dtype": torch.uint8}
    images = [torch.randint(0, 256, (*size, 3), **options).permute(2, 0, 1) for size in sizes]
    return images if layout == "decoded" else [image.contiguous() for image in images]


@pytest.mark.parametrize("layout", ["decoded", "planes"])
@pytest.mark.parametrize("case", CASES)
def test_image_batch(compare, case, layout):
    images = pictures(CASES[case], layout)
    config = ImageConfig()
    ours = ImageTransform(config).to(DEVICE).eval()
    batch, sizes = ours(images)
    out = batch.pixels
    read = sum(resize_bytes(image.shape[1:], size, 3) for image, size in zip(images, sizes, strict=True))
    compare(
        op="image_batch",
        case=f"{case}, uint8 {layout}",
        details={"images": len(images), "batch": list(out.shape), "layout": layout},
        providers={"torchvision": torchvisions(images, config), "doublehead": lambda: ours(images)[0].pixels},
        check=close,
        bytes_moved=read + out.numel() * out.element_size(),
        budget=6.0 if DEVICE == "cpu" else 1.0,
    )


def torchvisions(images: list[torch.Tensor], config: ImageConfig):
    """Its models take floats: making them of uint8 pictures is part of the work."""
    try:
        from torchvision.models.detection.transform import GeneralizedRCNNTransform
    except ImportError:
        return "torchvision is not installed"
    theirs = GeneralizedRCNNTransform(config.min_size[0], config.max_size, list(config.mean), list(config.std)).eval()
    return lambda: theirs([image / 255 for image in images])[0].tensors


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Positions in float32: beside an edge of a large picture a value moves by a few thousandths."""
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)
