"""Which cases `pytest benchmarks --benchmark-only` times without --full: 8 minutes, and 8 for whole detectors on a CPU.

Seconds a case counted on two CPU cores: preparation, checks and warm-up, two more calls of each provider, then 3 s of
sampling or five rounds, whichever is more, then memory. On a GPU a case takes 3 to 10 s, most of it Triton's and the
profiler's first use. --full on one H100, for each stage of gpu.sh: nms 9 cases, roi_align 11, roi_batches 15 at about
6 s; non_local 4, conv_head 4 at 40 to 80 s (torch.compile with max-autotune); fused_conv 5, detections 9, detector 13.
"""

from __future__ import annotations

from typing import Any

HEADLINE: dict[str, list[dict[str, Any]]] = {
    "test_nms": [{"count": 4_000, "threshold": 0.5}, {"count": 12_000, "threshold": 0.5}],
    "test_batched_nms": [{"threshold": 0.5}],
    "test_hundred_detections": [{}],
    "test_forward": [{"output_size": 7}],
    "test_backward": [{"output_size": 7, "layout": "channels_last"}],
    "test_forward_bfloat16": [{"layout": "channels_last"}],
    "test_detections": [{"batch": 1, "classes": 81}],
    "test_inference": [{"form": "dot_product, 4 groups"}, {"form": None}],
    "test_training": [{"form": "dot_product, 4 groups"}],
    "test_training_step": [{"recompute": False}],
    "test_double_head_with_the_exact_skip": [{}],
    "test_detector": [{"batch": 1}],
    "test_cpu_detectors": [{}],
    "test_image_batch": [{"case": "480 x 640", "layout": "decoded"}],
}
"""Test -> parameters of the cases that are headlines; None: the parameter is absent."""


def headline_only(test: str, parameters: dict[str, Any]) -> bool:
    """Whether a case is timed without --full."""
    wanted = HEADLINE.get(test, [])
    return any(all(parameters.get(name) == value for name, value in case.items()) for case in wanted)
