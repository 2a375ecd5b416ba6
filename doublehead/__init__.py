"""Double-Head R-CNN for PyTorch.

For torchvision's detectors: `accelerate`, `restore`.  For own data: `train`, `load`.  Nothing is imported before it is
used: `import doublehead` does not wait for PyTorch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any, TypeVar

from .version import __version__ as __version__

if TYPE_CHECKING:
    from doublehead.config import Precision

    from .api.detections import Detection, Detections
    from .api.predictor import Predictor
    from .api.training import TrainResult, train

__all__ = [
    "Detection", "Detections", "Predictor", "TrainResult", "__version__", "accelerate", "load", "restore", "train",
]  # fmt: skip
_HOME = {
    "Detection": "doublehead.api.detections",
    "Detections": "doublehead.api.detections",
    "Predictor": "doublehead.api.predictor",
    "TrainResult": "doublehead.api.training",
}
Model = TypeVar("Model")


def __getattr__(name: str) -> Any:
    if name == "train":  # the command's module, which can be called: see there
        return importlib.import_module("doublehead.train")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load(
    path: str | os.PathLike, device: Any = "auto", *, precision: Precision = "fp32", ext_gate: Any = None
) -> Predictor:
    """Open a detector: a run, a checkpoint, a converted or an exported one.

    Args:
        path: a run's folder or one that `doublehead convert` wrote, a `model.safetensors` or `best.safetensors`, or
            what `doublehead export` wrote, `.pt2`, `.onnx` or `.xml`.  A `.pt2` holds compiled code: open only files
            that you trust.
        device: "auto" (CUDA where there is one, else the CPU), "cpu", "cuda", "cuda:1", or a `torch.device`.  An
            exported program runs on the kind of device it was made for.
        precision: "fp32"; "bf16" or "fp16", which are faster where the processor has them; or "int8" on a CPU, with
            what `doublehead quantize` wrote beside the checkpoint.  A warning of one line says what the processor
            lacks.  An exported program computes as it was exported; OpenVINO's take bf16 too.
        ext_gate: for a Double-Head-Ext read out as `fused`: RoIs whose best fc-score is not above this do not reach the
            conv-head, which is faster and approximate; "calibrated": the gate that `doublehead calibrate` stored beside
            the weights.  None: as configured, as a rule no gate.

    Returns:
        A `Predictor`: `.predict(image)`, `.draw(image, detections)`, `.classes`, `.model`.

    Raises:
        UserError: there is no such file, it holds no detector, is damaged, is made for another device, or cannot
            compute in this precision; a gate does nothing for it, or there is no calibrated one for its weights.  For
            another project's checkpoint, the message is the `doublehead convert` line that makes one of ours.

    Example:
        >>> predictor = doublehead.load("runs/cells-1")
        >>> detections = predictor.predict("photo.jpg")
        >>> predictor.draw("photo.jpg", detections).save("found.jpg")
    """
    from .api.loading import load

    return load(path, device, precision=precision, ext_gate=ext_gate)


def accelerate(model: Model, fold: bool = True) -> Model:
    """Make one torchvision Faster, Mask or Keypoint R-CNN faster, in place, with the same results.

    This library's operators replace RoI pooling (boxes, masks, keypoints), the RPN's selection of proposals and the
    post-processing of detections, at inference and in training.  If all layers of the backbone and of the RPN's head
    are PyTorch's and torchvision's own, frozen batch norms take one pass instead of two, and images on a CPU become
    channels-last.  At inference without gradients on a CPU, a ResNet's batch norms are folded into its convolutions,
    together with ReLU and sums, and in float32 the box head's fully connected layers run as blocks of products.  The
    result is remembered, as much memory again as the backbone's weights and twice the box head's take, and computed
    anew when a weight changes (writing through `.data` is not seen: call `model.eval()` after it).  Where inner layers
    have hooks or are of other classes, the backbone or the head runs as it is.  Only the classes of these modules
    change, to subclasses; weights, hooks and all other attributes stay.  So `state_dict`, training, `copy.deepcopy` and
    pickling work as before.

    Differences: because of rounding, NMS may decide differently about two boxes whose overlap nearly equals the
    threshold; 16-bit boxes and scores are computed and returned in float32; detections whose boxes are not finite are
    removed.  In eval mode with gradients enabled, detections keep their gradient and post-processing stays
    torchvision's: use `torch.inference_mode()`.  Call `restore` before `torch.jit.script`, tracing and ONNX export.

    To speed up MMDetection or Detectron2, which replaces functions in the whole process, see `patch` in
    `doublehead.interop.mmdet` and `doublehead.interop.detectron2`.

    Args:
        model: a model of these families, from any builder in `torchvision.models.detection` or built by hand.
            Accelerating it again changes only parts that were exchanged since.
        fold: False: leaves the layers of backbone, RPN and box head as they are, and takes folding back.

    Returns:
        `model` itself.

    Raises:
        TypeError: another kind of model, or a part that is not torchvision's own class (a subclass, a foreign box
            coder, ...), by name; the model is unchanged.
        ValueError: a part has settings or replaced methods that the operators do not support, by name; the model is
            unchanged.
    """
    from .interop.torchvision.accelerate import accelerate

    return accelerate(model, fold)


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
