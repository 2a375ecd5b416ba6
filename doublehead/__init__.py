"""Double-Head R-CNN for PyTorch."""

from __future__ import annotations

from typing import TypeVar

from .version import __version__ as __version__

Model = TypeVar("Model")


def accelerate(model: Model) -> Model:
    """Make one torchvision Faster, Mask or Keypoint R-CNN faster, in place, with the same results.

    This library's operators replace RoI pooling (boxes, masks, keypoints), the RPN's selection of proposals and the
    post-processing of detections, at inference and in training.  If all layers of the backbone and of the RPN's head
    are PyTorch's and torchvision's own, frozen batch norms take one pass instead of two, and images on a CPU become
    channels-last.  Only the classes of these modules change, to subclasses; weights, hooks and all other attributes
    stay.  So `state_dict`, training, `copy.deepcopy` and pickling work as before.

    Differences: because of rounding, NMS may decide differently about two boxes whose overlap nearly equals the
    threshold; 16-bit boxes and scores are computed and returned in float32; detections whose boxes are not finite are
    removed.  In eval mode with gradients enabled, detections keep their gradient and post-processing stays
    torchvision's: use `torch.inference_mode()`.  Call `restore` before `torch.jit.script`, tracing and ONNX export.

    To speed up MMDetection or Detectron2, which replaces functions in the whole process, see `patch` in
    `doublehead.interop.mmdet` and `doublehead.interop.detectron2`.

    Args:
        model: a model of these families, from any builder in `torchvision.models.detection` or built by hand.
            Accelerating it again changes only parts that were exchanged since.

    Returns:
        `model` itself.

    Raises:
        TypeError: another kind of model, or a part that is not torchvision's own class (a subclass, a foreign box
            coder, ...), by name; the model is unchanged.
        ValueError: a part has settings or replaced methods that the operators do not support, by name; the model is
            unchanged.
    """
    from .interop.torchvision.accelerate import accelerate

    return accelerate(model)


def restore(model: Model) -> Model:
    """Undo `accelerate`, in place: every module has its own class again.

    Args:
        model: an accelerated model; any other is left as it is.

    Returns:
        `model` itself.

    Raises:
        TypeError: the model is not a two-stage detector of torchvision.
    """
    from .interop.torchvision.accelerate import restore

    return restore(model)
