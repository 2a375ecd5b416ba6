"""From logits to detections against torchvision's post-processing, on the same outputs of a detector's heads."""

from __future__ import annotations

import pytest

pytest.importorskip("torchvision")

from post_processing import OPTIONS, batched, check, class_by_class, head_outputs, image_by_image  # noqa: E402

from doublehead.ops import detections  # noqa: E402
from doublehead.ops.detections import reference  # noqa: E402
from doublehead.ops.detections.arguments import DetectionArguments  # noqa: E402


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("classes", [81, 366])
def test_detections(compare, batch, classes):
    inputs = head_outputs(batch, 1000, classes)
    arguments = DetectionArguments(*inputs, **OPTIONS)
    scores = reference.class_scores(inputs[0], OPTIONS["fusion"])[..., 1:]
    compare(
        op="detections",
        case=f"detections: {batch} x 1000 RoIs x {classes} classes, two heads",
        details={
            "images": batch,
            "rois": 1000,
            "classes": classes,
            "above_threshold": int((scores > OPTIONS["score_threshold"]).sum()),
            "detections": int(detections(*inputs, **OPTIONS)[3].sum()),
        },
        providers={
            "torchvision, batched_nms": lambda: image_by_image(inputs, batched),
            "torchvision, nms per class": lambda: image_by_image(inputs, class_by_class),
            "reference": lambda: reference.detections(arguments),
            "doublehead": lambda: detections(*inputs, **OPTIONS),
        },
        check=check,
    )
