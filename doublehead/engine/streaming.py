"""Work in threads around a model: in order, ahead of it by so much and no more, and ending cleanly.

Reading and drawing are done by threads (decoders and encoders let other Python code run meanwhile), the model by the
thread that asks for results.  Whatever a thread raises is raised there, in its turn.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")


def default_threads() -> int:
    """How many threads to read with, and how many to draw with: half of the processors, one at least, eight at most."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, processors // 2))


def in_order(function: Callable[[T], R], items: Iterable[T], threads: int, ahead: int) -> Iterator[R]:
    """`map(function, items)` in threads, with results in the order of `items`.

    `items` is advanced by the caller's thread, and by at most `ahead` beyond the result that is waited for.  When the
    iterator is closed, or anything raises, what has not begun is dropped and what has is waited for.
    """
    waiting = deque()
    executor = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(executor.submit(function, item))
            while len(waiting) > ahead or (waiting and waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


class Uploader:
    """Brings images to the model's device while the model works: from pinned memory, on a CUDA stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, image: Tensor) -> tuple[Tensor, Tensor, torch.cuda.Event | None]:
        """Start the copy, in any thread; give the result to `receive`, in the model's thread.

        Returns:
            The image on the host, the one on the device, and when the latter is there.
        """
        if self.stream is None:
            return image, image.to(self.device), None
        image = image.pin_memory()
        with torch.cuda.stream(self.stream):
            copy = image.to(self.device, non_blocking=True)
            there = torch.cuda.Event()
            there.record(self.stream)
        return image, copy, there

    def receive(self, copy: Tensor, there: torch.cuda.Event | None) -> Tensor:
        """The image on the device, for the current stream, which waits for it; the host does not."""
        if there is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(there)
            copy.record_stream(current)  # its memory belongs to the other stream, which must not reuse it too early
        return copy


class Clock:
    """Seconds spent in each stage, summed over threads."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
