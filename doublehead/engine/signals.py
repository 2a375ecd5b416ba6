"""Stop on request: after SIGTERM or a first Ctrl-C the running step ends and its state is saved."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from doublehead.errors import Abandoned


class Stopped(SystemExit):
    """A stop was asked for; the process exits with 128 + the signal's number (143, or 130 for Ctrl-C).

    Not 0, so that scripts do not take a stopped training for a finished one.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + (signal_number or signal.SIGTERM))  # 0: another process got the signal


class StopSignals:
    """While entered, SIGTERM and SIGINT set `received` instead of ending the process at once.

    A second Ctrl-C raises `Abandoned`.  Outside the main thread, where Python allows no handlers, this does nothing.

    Args:
        on_first: called in the handler of the first signal, unless that ends the process at once.
    """

    def __init__(self, on_first: Callable[[], None] = lambda: None) -> None:
        self.on_first = on_first
        self.received = 0
        self._at_once = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def ending_at_once(self) -> Iterator[None]:
        """Inside, there is nothing to save: a signal raises `Stopped` at once."""
        self._at_once = True
        try:
            if self.received:
                raise Stopped(self.received)
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._at_once:
            # Only once: a second signal must not interrupt the clean-up.
            self._at_once = False
            self.received = self.received or number
            raise Stopped(number)
        if self.received and number == signal.SIGINT:
            raise Abandoned
        if not self.received:
            self.received = number
            self.on_first()


def say_saving() -> None:
    """Answer a request to stop at once: the running step may take a while.

    Past Python's own buffers, which must not be used in a signal's handler: it may have interrupted a write to them.
    """
    with contextlib.suppress(OSError):
        below_the_bar = "\n" if os.isatty(2) else ""
        os.write(2, f"{below_the_bar}saving: the running step ends first; Ctrl-C again ends without it\n".encode())
