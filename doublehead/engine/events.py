"""TensorBoard's event files, written synchronously.

PyTorch's `SummaryWriter` writes from a queue in a background thread: an error there (a full disk) shows up late, as a
traceback of that thread, and a killed process loses what was in the queue.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path


class EventFile:
    """A new event file in `folder`, to which scalars are appended.

    Args:
        folder: created if missing.
        first_step: events of earlier files from this step on are void: TensorBoard ignores them.

    Raises:
        OSError: the file cannot be written; so do the methods.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # slow to import
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        now = time.time()
        self.path = folder / f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter(_UnbufferedFile(self.path))
        self._add(Event(wall_time=now, step=first_step, file_version="brain.Event:2"))
        self._add(Event(wall_time=now, step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append the scalars of one step, by name."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Close the file; all events are written already."""
        self._writer.close()

    def _add(self, event) -> None:
        self._writer.write(event.SerializeToString())


class _UnbufferedFile:
    """A file whose `write` writes everything at once, or raises."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed in `close`)

    def write(self, data: bytes) -> None:
        while data:
            data = data[self._file.write(data) :]

    def close(self) -> None:
        self._file.close()
