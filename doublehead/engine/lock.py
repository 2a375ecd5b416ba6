"""One training per run folder: a lock that names its holder and ends with its process, however that ends.

The lock is a POSIX record lock on `<folder>/.lock`.  The kernel drops it when the process ends, by SIGKILL too, so
there is no stale lock to clear; loader processes forked from the trainer do not inherit it and cannot hold it longer;
and NFS passes it on to other machines.  The file's content tells people who holds the lock.  A file without a
lock on it means nothing and is taken over.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from doublehead.errors import UserError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

LOCK_FILE = ".lock"
_HELD: dict[Path, FolderLock] = {}  # POSIX locks do not hold off the process that has them
_TAKEN = {errno.EACCES, errno.EAGAIN}
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


class FolderLock:
    """The right to write into a run's folder.

    Args:
        folder: created if missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._path = self.folder / LOCK_FILE
        self._file: int | None = None
        self._pid = os.getpid()

    def acquire(self) -> str | None:
        """Take the lock.

        Returns:
            None, or why the file system has no locks: then nothing prevents a second training.

        Raises:
            UserError: another process holds it (the message names host, process and time), or the folder cannot be
                written.
        """
        key = Path(os.path.realpath(self.folder))
        before = _HELD.setdefault(key, self)
        if before is not self and before._pid == os.getpid():
            raise UserError(f"{self.folder} is in use by another training of this process: one folder, one training")
        _HELD[key] = self  # an entry inherited by a forked process means nothing
        try:
            missing = self._take()
        except BaseException as error:
            self._close()
            if isinstance(error, OSError):
                raise UserError(f"the run folder {self.folder} cannot be written: {error.strerror}") from error
            raise
        if missing:
            self._close()
        return missing

    def release(self) -> None:
        """Give the lock back, and remove its file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                if self._is_current():
                    self._path.unlink()  # while it is held: whoever waits on the old file sees that it is gone
        self._close()

    def _take(self) -> str | None:
        """Lock the folder's lock file and write this process's name into it; returns why, where there are no locks."""
        if fcntl is None:
            return "this system has no POSIX locks"
        for _ in range(100):
            self.folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # an aborted start removed the folder in between
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                try:
                    fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno in _UNSUPPORTED:
                        self._path.unlink(missing_ok=True)
                        return error.strerror
                    if error.errno in _TAKEN:
                        raise UserError(_refusal(self.folder, _holder(self._file))) from error
                    raise
                if self._is_current():
                    break
                os.close(self._file)
        with contextlib.suppress(OSError):  # on a full disk the lock holds without a name
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, json.dumps(_myself()).encode(), 0)
        return None

    def _is_current(self) -> bool:
        """Whether the locked file is still the one in the folder: its previous holder may have removed it."""
        try:
            there, mine = os.stat(self._path), os.fstat(self._file)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if _HELD.get(key := Path(os.path.realpath(self.folder))) is self:
            del _HELD[key]


def _myself() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}


def _holder(file: int) -> dict[str, Any]:
    """The holder named in the lock file; empty if unknown."""
    for _ in range(20):  # its holder writes just after locking
        with contextlib.suppress(OSError, ValueError):
            holder = json.loads(os.pread(file, 4096, 0))
            if isinstance(holder, dict) and holder.keys() >= {"host", "pid", "since"}:
                return holder
        time.sleep(0.01)
    return {}


def _refusal(folder: Path, holder: dict[str, Any]) -> str:
    who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}" if holder else "which left no name"
    return (
        f"{folder} is in use by another training ({who}): wait until it ends or stop it, or train into another folder"
    )
