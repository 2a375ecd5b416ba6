"""The rule of accuracy: a kernel may be off by twice what plain PyTorch in the same dtype is off."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_exact(actual: Tensor, plain: Tensor, exact: Tensor, what: str = "result", roundings: int = 2) -> None:
    """Largest error of `actual` <= 2 x largest error of `plain`, both against `exact` (float64).

    So many `roundings` of the largest value are allowed in any case: `plain` may be right by luck.
    """
    assert actual.dtype == plain.dtype and actual.shape == exact.shape, f"{what}: {actual.dtype}, {actual.shape}"
    assert actual.isfinite().equal(exact.isfinite()), f"{what}: not finite where it should be, or the other way round"
    exact = exact.double().cpu()
    if not exact.numel():
        return
    error, allowed = ((value.double().cpu() - exact).abs().max().item() for value in (actual, plain))
    floor = torch.finfo(plain.dtype).eps * exact.abs().max().item()
    assert error <= 2 * allowed + roundings * floor, f"{what}: error {error:.3g}, plain PyTorch's {allowed:.3g}"
