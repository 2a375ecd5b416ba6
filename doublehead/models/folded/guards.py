"""When folded networks may stand in for modules: where nobody can tell but by the time it takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ...ops._folded import has_global_hooks
from ...ops._library import in_dispatch_mode, is_functorch_tensor

DEVICES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Attributes of a module: what is called when it is."""


def may_fold(maps: Sequence[Tensor], tensors: Sequence[Tensor]) -> bool:
    """Whether nothing but the result of a network with these weights, called on these maps, is wanted."""
    return all(x.dim() == 4 for x in maps) and may_stand_in(maps, tensors)


def may_stand_in(inputs: Sequence[Tensor], tensors: Sequence[Tensor]) -> bool:
    """As `may_fold`, for inputs of any shape."""
    if in_dispatch_mode() or forward_ad._current_level >= 0 or has_global_hooks():
        return False
    if not all(_is_plain(tensor, inputs[0].device) for tensor in (*inputs, *tensors)) or not all(
        x.numel() for x in inputs
    ):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, *tensors)):
        return False
    # Weights of inference mode have no version counter: a change could not be seen.
    return not any(tensor.is_inference() for tensor in tensors) and _dtypes_fit(inputs, tensors)


def _is_plain(tensor: Tensor, device: torch.device) -> bool:
    """On this device, and no tensor that does something else, or more, when an operator is called on it."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device == device
        and device.type in DEVICES
        and tensor.layout == torch.strided
        and not is_functorch_tensor(tensor)
    )


def _dtypes_fit(inputs: Sequence[Tensor], tensors: Sequence[Tensor]) -> bool:
    """Whether the modules would run in one dtype that is known; autocast leaves float64 alone."""
    (dtype, *others), own = {x.dtype for x in inputs}, {tensor.dtype for tensor in tensors}
    device = inputs[0].device.type
    if torch.is_autocast_enabled(device):
        allowed = {torch.float32, torch.bfloat16, torch.float16}
        return torch.get_autocast_dtype(device) in DTYPES and own <= allowed and {dtype, *others} <= allowed
    return not others and own == {dtype} and dtype in DTYPES


def is_bare(module: nn.Module) -> bool:
    """Whether calling the module runs its class's `forward` at inference, and nothing else."""
    attributes = vars(module)
    return (
        not attributes["training"]
        and "forward" not in attributes
        and "_conv_forward" not in attributes
        and attributes.get("_compiled_call_impl") is None
        and not any(attributes.get(name) for name in HOOKS)
    )
