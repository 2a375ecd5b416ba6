"""What values a layer's input has, and the scale with which 8 bits serve it best."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 2048
CANDIDATES = 128
"""How many ranges are compared for the best one."""


class Histogram:
    """Counts of the magnitudes of all values seen but 0, which every grid has, in `BINS` bins of 0 .. top.

    `top` doubles when a value lies above it, so that memory does not grow.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.top = 0.0
        self.finite = True
        self.seen = False

    def add(self, x: Tensor) -> None:
        """Count the values of `x`."""
        self.seen = self.seen or x.numel() > 0
        magnitudes = x.detach().float().abs()
        largest = float(magnitudes.max()) if x.numel() else 0.0
        if not largest < float("inf"):
            self.finite = False
            return
        if largest == 0:
            return
        self.top = self.top or largest
        while largest > self.top:
            self._double()
        self.counts += torch.histc(magnitudes, BINS, 0.0, self.top).double()
        self.counts[0] -= int((magnitudes == 0).sum())

    def scale(self, signed: bool) -> float:
        """The step of 8 bits with the least mean square error of rounding and clipping; 0 if all values were 0."""
        if self.top == 0:
            return 0.0
        centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (self.top / BINS)
        ranges = self.top * torch.arange(1, CANDIDATES + 1, dtype=torch.float64)[:, None] / CANDIDATES
        steps = ranges / (127.5 if signed else 255.0)
        inside = centres <= ranges
        errors = torch.where(inside, steps**2 / 12, (centres - ranges) ** 2)
        best = int((errors * self.counts).sum(1).argmin())
        return float(steps[best])

    def _double(self) -> None:
        self.counts = torch.cat((self.counts.view(-1, 2).sum(1), self.counts.new_zeros(BINS // 2)))
        self.top *= 2
