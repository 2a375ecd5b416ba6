"""The machine of the cost model: what a GPU takes for launches, chains of dependent work and traffic."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import NamedTuple


class Machine(NamedTuple):
    """One GPU; times in microseconds, traffic in bytes a microsecond (MB/s)."""

    name: str
    multiprocessors: int
    mhz: float
    """The most it runs at."""
    dram: float
    l2: float
    l2_bytes: float
    l2_latency: float
    dram_latency: float
    instruction: float
    """Cycles from one instruction of a warp to the next that needs it, on the average of a kernel."""
    issue: float
    """Warp instructions that a multiprocessor issues in a cycle when many warps are ready."""
    barrier: float
    """A barrier of a block, and what its last warp is behind."""
    launch: float
    """What a launch costs beside its kernel: from the end of the one before it to its first instruction, and
    from its last one until the next may begin. Clearing memory is a launch too."""

    def cycles(self, count: float) -> float:
        return count / self.mhz

    def chain(self, instructions: float) -> float:
        """So many instructions of one warp, each of which waits for the one before."""
        return self.cycles(instructions * self.instruction)

    def issued(self, instructions: float) -> float:
        """So many warp instructions on all multiprocessors together."""
        return self.cycles(instructions / self.issue / self.multiprocessors)


H200 = Machine(
    name="NVIDIA H200",
    multiprocessors=132,  # measured: what PyTorch says
    mhz=1980,  # measured: nvidia-smi's clocks.max.sm
    dram=4.10e6,  # measured: a copy of 1 GiB (results/first-design-nvidia-h200.json)
    l2=5.6e6,  # published microbenchmarks of the H100: 5.5 to 5.7 TB/s read
    l2_bytes=60 << 20,  # what PyTorch says
    l2_latency=0.20,  # fitted; published for the H100: 262 to 273 cycles (0.14 us) from the near half of the L2
    dram_latency=0.60,  # fitted; published: 480 cycles (0.25 us) with warm page tables, which a flush leaves cold
    instruction=5.0,  # fitted; dependent arithmetic takes 4, conversions, shared memory and branches more
    issue=2.4,  # of 4: what mixtures of integers, branches and shared memory reach; not fitted
    barrier=0.03,  # about 30 cycles, and as many until all warps have come; not fitted
    launch=3.2,  # fitted: RoIAlign's one or two launches, and the 8 to 66 of NMS, agree on it
)


class Step(NamedTuple):
    """One launch, and how long it works once it runs."""

    name: str
    work: float
    counts: str = ""
    """What was counted for it, in words."""


def makespan(durations: Iterable[float], slots: int) -> float:
    """When the last block ends, if blocks begin in order as soon as one of the slots is free."""
    free = [0.0] * slots
    for duration in durations:
        heapq.heapreplace(free, free[0] + duration)
    return max(free)
