"""The rule of accuracy: a kernel may be off by twice what plain PyTorch in the same dtype is off."""

from __future__ import annotations

import torch
from torch import Tensor

TF32_EPS = 2.0**-10
"""The relative error of one rounding to TF32."""


def convolution_eps(device: str, dtype: torch.dtype) -> float | None:
    """`eps` of what replaces a convolution: TF32's where PyTorch allows it, as by default to float32 on a GPU.

    The library may still compute exactly where a problem is small, so the error of `plain` alone does not bound ours.
    """
    tf32 = device == "cuda" and dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"
    return TF32_EPS if tf32 else None


def error_and_bound(
    actual: Tensor, plain: Tensor, exact: Tensor, what: str = "result", roundings: int = 2, eps: float | None = None
) -> tuple[float, float]:
    """Largest error of `actual`, and what it may be: 2 x largest error of `plain`, both against `exact` (float64).

    So many `roundings` of the largest value are allowed in any case: `plain` may be right by luck.  `eps` is that of
    one rounding: the dtype's own if it is not given.  An AssertionError says what is not comparable at all.
    """
    assert actual.dtype == plain.dtype and actual.shape == exact.shape, f"{what}: {actual.dtype}, {actual.shape}"
    assert actual.isfinite().cpu().equal(exact.isfinite().cpu()), f"{what}: not finite where it should be, or reverse"
    exact = exact.double().cpu()
    if not exact.numel():
        return 0.0, 0.0
    error, allowed = ((value.double().cpu() - exact).abs().max().item() for value in (actual, plain))
    eps = torch.finfo(plain.dtype).eps if eps is None else eps
    return error, 2 * allowed + roundings * eps * exact.abs().max().item()


def assert_as_exact(
    actual: Tensor, plain: Tensor, exact: Tensor, what: str = "result", roundings: int = 2, eps: float | None = None
) -> None:
    """Asserts that the error of `error_and_bound` is within the bound."""
    error, bound = error_and_bound(actual, plain, exact, what, roundings, eps)
    assert error <= bound, f"{what}: error {error:.3g}, allowed {bound:.3g}"
