"""How often an accelerated torchvision model waits for the device: twice, by its calls and on a GPU itself."""

import copy
import warnings

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import doublehead
from tests.support.torchvision_models import build, pictures

WAITING_METHODS = {"tolist", "cpu", "numpy", "__array__"}
"""Methods of a tensor that copy values back."""

WAITING_OPERATORS = {
    "item", "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "argwhere", "masked_select", "unique", "_unique",
    "_unique2", "unique_consecutive", "unique_dim", "bincount", "repeat_interleave",
}  # fmt: skip
"""Their results' sizes are values on the device, or their result is a value on the host."""


class Operators(TorchDispatchMode):
    """Lists the operators that wait on CUDA; inside an operator, such as ours, it does not look."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        masks = args[1] if name in ("index", "index_put_") else ()
        masked = any(mask is not None and mask.dtype in (torch.bool, torch.uint8) for mask in masks)
        where = name == "where" and len(args) == 1
        if name in WAITING_OPERATORS or masked or where:
            self.waits.append(name)
        return function(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Lists the calls that are no operator: values read back, and lists copied to the device, as it is not pinned."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        copied = name in ("tensor", "as_tensor") and kwargs.get("device") is not None
        copied = copied and not isinstance(args[0], torch.Tensor)
        if name in WAITING_METHODS or name == "new_tensor" or copied:
            self.waits.append(name)
        return function(*args, **kwargs)


def waits_of(run) -> list[str]:
    operators = Operators()
    with operators, Calls(operators.waits):
        run()
    return operators.waits


def detect(model, images):
    """All behind the backbone; once before, as first calls prepare what stays."""
    batch, _ = model.transform(images)
    features = model.backbone(batch.tensors)

    def run():
        proposals, _ = model.rpn(batch, features)
        model.roi_heads(features, proposals, batch.image_sizes)

    run()
    return run


@pytest.fixture(scope="module")
def pyramid():
    return doublehead.accelerate(build("fasterrcnn_resnet50_fpn"))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.tolist(),
        lambda x: x[0].item(),
        lambda x: bool(x[0] > 0),
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: x.cpu(),
    ],
)
def test_a_wait_is_seen(call):
    x = torch.arange(3.0)
    assert len(waits_of(lambda: call(x))) == 1
    with torch.inference_mode():
        assert len(waits_of(lambda: call(x))) >= 1
    assert waits_of(lambda: (x[torch.tensor([0, 2])], x.sum(), torch.where(x > 0, x, 1.0))) == []


@torch.inference_mode()
def test_only_two_calls_wait(pyramid):
    """One reads the numbers of proposals, one those of detections: the lists torchvision hands on have lengths."""
    assert waits_of(detect(pyramid, pictures())) == ["tolist", "tolist"]


@torch.inference_mode()
def test_torchvisions_pooling_waits_once_more_for_each_level():
    """Levels that do not halve, as MobileNet's, are pooled by torchvision, which looks for each level's boxes."""
    model = doublehead.accelerate(build("fasterrcnn_mobilenet_v3_large_fpn"))
    assert waits_of(detect(model, pictures())) == ["tolist", "where", "where", "tolist"]


@pytest.mark.gpu
@torch.inference_mode()
def test_waits_for_the_device_twice(pyramid):
    run = detect(copy.deepcopy(pyramid).cuda(), [image.cuda() for image in pictures()])
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Not the notice that the mode is a prototype, which speaks of "synchronizing operations" too.
    waits = [w for w in heard if "called a synchronizing" in str(w.message)]
    assert len(waits) <= 2, [f"{wait.filename}:{wait.lineno}" for wait in waits]
