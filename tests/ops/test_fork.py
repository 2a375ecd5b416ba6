"""The operators in a forked process whose parent has used OpenMP's threads: they are not there, and not waited for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

CODE = """
import os, torch
from doublehead import ops

torch.set_num_threads(2)
torch.manual_seed(0)
N = 40_000  # from 32768 elements on PyTorch's own operators use several threads
corner = torch.rand(N, 2) * 2000
boxes = torch.cat((corner, corner + 1 + torch.rand(N, 2) * 40), 1)
scores, classes = torch.rand(N), torch.randint(0, 20, (N,))
rois = torch.cat((torch.randint(0, 2, (N,))[:300, None].float(), boxes[:300] / 40), 1)
maps = torch.rand(2, 16, 60, 60)
grad = torch.rand(300, 16, 7, 7)
logits, deltas = torch.randn(2, 800, 21), torch.randn(2, 800, 21, 4)
rows = logits.flatten(0, 1)
proposals, valid = boxes[:1600].view(2, 800, 4), torch.ones(2, 800, dtype=torch.bool)
sizes = torch.full((2, 2), 2000.0)
images = [torch.rand(3, 200, 240), torch.randint(0, 256, (3, 260, 200), dtype=torch.uint8)]
lists = [boxes[:N // 2] / 40, boxes[N // 2:] / 40]
halves, integers = boxes.half(), classes.int()
padded = [tensor[None].expand(3, *tensor.shape) for tensor in (boxes, scores, classes)]
layouts = maps, maps.contiguous(memory_format=torch.channels_last), maps.transpose(2, 3)
leaves = [layout.detach().requires_grad_() for layout in layouts]

def pool(leaf):
    pooled = ops.roi_align(leaf, rois, 7)
    return pooled.detach(), *torch.autograd.grad(pooled, leaf, grad)

calls = {
    "nms": lambda: ops.nms(boxes, scores, 0.5),
    "nms, 16 bit": lambda: ops.nms(halves, scores, 0.5),
    "batched_nms": lambda: ops.batched_nms(boxes, scores, classes, 0.5),
    "batched_nms, other groups": lambda: ops.batched_nms(boxes, scores, integers, 0.5),
    "nms_padded": lambda: ops.nms_padded(*padded, 0.5, 100),
    "roi_align": lambda: [part for leaf in leaves for part in pool(leaf)],
    "roi_align, lists": lambda: ops.roi_align(maps, lists, 1),
    "multiscale_roi_align": lambda: ops.multiscale_roi_align([maps, maps], rois, 7, spatial_scales=[0.5, 0.25]),
    "detections": lambda: ops.detections([logits, logits], deltas, proposals, valid, sizes),
    "fuse_scores": lambda: ops.fuse_scores(rows, rows),
    "image_batch": lambda: ops.image_batch(images, [(200, 240), (260, 200)], (260, 240), [0.5] * 3, [0.2] * 3),
}
expected = {name: call() for name, call in calls.items()}
assert torch.rand(1000, 1000).exp().isfinite().all()  # the threads are there
child = os.fork()
if child == 0:
    for name, call in calls.items():
        print(name, flush=True)
        answer = call()
        assert torch.get_num_threads() == 2, "a setting of the user's"
        torch.set_num_threads(1)  # for the comparison
        torch.testing.assert_close(answer, expected[name], rtol=0, atol=0)
        torch.set_num_threads(2)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert all(torch.equal(call(), expected[name]) for name, call in list(calls.items())[:4])  # and the parent goes on
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_answers():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    process = subprocess.Popen(
        [sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # the child too
        pytest.fail(f"it hangs in {(process.communicate()[0].splitlines() or ['nothing'])[-1]}")
    assert process.returncode == 0, f"{output}\n{errors}"
