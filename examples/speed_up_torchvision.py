"""Make a torchvision detector faster, with the same detections.

python examples/speed_up_torchvision.py                    # an untrained Faster R-CNN on a random picture
python examples/speed_up_torchvision.py --weights DEFAULT  # torchvision's trained one, which it downloads
"""

import argparse
import time

import torch
from torchvision.models import detection

import doublehead

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="fasterrcnn_resnet50_fpn")
parser.add_argument("--weights")
parser.add_argument("--side", type=int, default=800, help="of the picture, in pixels")
options = parser.parse_args()

model = getattr(detection, options.model)(weights=options.weights, weights_backbone=None, box_score_thresh=0.0).eval()
images = [torch.rand(3, options.side, options.side)]


def detect() -> tuple[dict[str, torch.Tensor], float]:
    """The detections of the second of two calls, and its seconds."""
    with torch.inference_mode():
        model(images)
        start = time.perf_counter()
        (found,) = model(images)
    return found, time.perf_counter() - start


before, slow = detect()
doublehead.accelerate(model)
after, fast = detect()
torch.testing.assert_close(after["boxes"], before["boxes"], atol=0.01, rtol=1e-3)
print(f"{len(after['boxes'])} boxes, the same: {1000 * slow:.0f} ms before, {1000 * fast:.0f} ms with doublehead")
