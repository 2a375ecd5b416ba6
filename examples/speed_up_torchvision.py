"""Make a torchvision detector faster, with the same detections.

python examples/speed_up_torchvision.py --weights DEFAULT  # the trained one; without it an untrained one
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

model = getattr(detection, options.model)(weights=options.weights, weights_backbone=None).eval()
if not options.weights:  # untrained, it is sure of nothing, and would find nothing
    torch.nn.init.normal_(model.rpn.head.cls_logits.weight)
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight)
images = [torch.rand(3, options.side, options.side)]


@torch.inference_mode()
def detect():
    """The detections of the second of two calls, and its seconds."""
    for _ in range(2):
        start = time.perf_counter()
        (found,) = model(images)
    return found, time.perf_counter() - start


before, slow = detect()
doublehead.accelerate(model)
after, fast = detect()
torch.testing.assert_close(after["scores"], before["scores"], atol=1e-3, rtol=0)
print(f"{len(after['boxes'])} objects, the same: {1000 * slow:.0f} ms before, {1000 * fast:.0f} ms with doublehead")
