"""Double-Head R-CNN for PyTorch."""

from __future__ import annotations

from typing import TypeVar

from .version import __version__ as __version__

Model = TypeVar("Model")


def accelerate(model: Model) -> Model:
    """Make a torchvision Faster, Mask or Keypoint R-CNN faster, in place, with the same results.

    RoI pooling (boxes, masks, keypoints), the RPN's choice of proposals and the post-processing of detections are
    replaced by this library's operators, at inference and in training.  Where all layers of the backbone and of the
    RPN's head are PyTorch's and torchvision's own, frozen batch norms take one pass in place of two, and on a CPU
    images are laid out channels-last.  Weights, hooks and every other attribute stay as they are: only the classes of
    these modules change, to subclasses, so `state_dict`, training, `copy.deepcopy` and pickling work as before.

    Differences: rounding, by which NMS decides otherwise about two boxes whose overlap is as good as the threshold;
    16-bit boxes and scores are computed and returned in float32; a detection whose box is not finite is removed.  In
    eval mode with gradients enabled, detections keep their gradient and post-processing stays torchvision's: use
    `torch.inference_mode()`.  Call `restore` before `torch.jit.script`, tracing and ONNX export.

    Args:
        model: from any builder in `torchvision.models.detection` of these families, or built by hand.  Acceleration
            of a model that is accelerated changes nothing, except for parts that were exchanged in between.

    Returns:
        `model` itself.

    Raises:
        TypeError: another model, or a part that is not torchvision's own class (a subclass, a foreign box coder, ...),
            by name.  Nothing has been changed then.
        ValueError: a part has settings or replaced methods that the operators do not know, by name; nor then.
    """
    from .interop.torchvision.accelerate import accelerate

    return accelerate(model)


def restore(model: Model) -> Model:
    """Undo `accelerate`, in place: every module has its own class again.

    Args:
        model: an accelerated model; one that is not is left as it is.

    Returns:
        `model` itself.

    Raises:
        TypeError: not a two-stage detector of torchvision.
    """
    from .interop.torchvision.accelerate import restore

    return restore(model)
