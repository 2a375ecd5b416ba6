"""Threads that work around a model: results in order, bounded read-ahead, clean shutdown.

Threads read and draw (decoders and encoders release the GIL); the thread that asks for results runs the model.
An exception of a thread is raised there when its result is due.
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
    """Number of threads that read, and of those that draw: half of the processors, from 1 to 8."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, processors // 2))


def in_order(function: Callable[[T], R], items: Iterable[T], threads: int, ahead: int) -> Iterator[R]:
    """`map(function, items)` in threads, with results in the order of `items`.

    The caller's thread advances `items`, at most `ahead` items beyond the result that is due.  When the iterator is
    closed, or anything raises, calls that have not started are dropped, and running ones are waited for.
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
    """Copies images to the model's device while the model runs: from pinned memory, on a separate CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, image: Tensor) -> tuple[Tensor, Tensor, torch.cuda.Event | None]:
        """Start the copy, in any thread; give the result to `receive`, in the model's thread.

        Returns:
            The image on the host, the one on the device, and the event of the finished copy.
        """
        if self.stream is None:
            return image, image.to(self.device), None
        image = image.pin_memory()
        with torch.cuda.stream(self.stream):
            copy = image.to(self.device, non_blocking=True)
            uploaded = torch.cuda.Event()
            uploaded.record(self.stream)
        return image, copy, uploaded

    def receive(self, copy: Tensor, uploaded: torch.cuda.Event | None) -> Tensor:
        """The image on the device, for the current stream, which waits for it; the host does not."""
        if uploaded is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(uploaded)
            copy.record_stream(current)  # keeps the other stream from reusing its memory too early
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
