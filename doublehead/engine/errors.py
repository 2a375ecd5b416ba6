"""Errors a user can act on, and how the command lines show them.

A `UserError` is a mistake in the input or a fact about the machine (a missing folder, a full
disk): the command lines print its message alone and exit with its `exit_code`.  Everything else
is a bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}


class UserError(ValueError):
    """Something the user can put right; the message says what and how."""

    exit_code = 2


class CheckpointError(UserError):
    """A checkpoint cannot be read or written; the message names the file."""


class NonFiniteLossError(UserError):
    """A loss became NaN or infinite; the message names the step, the losses and the images."""

    exit_code = 1


@contextlib.contextmanager
def config_errors() -> Iterator[None]:
    """Inside, a `ValueError` or a file that is not there is a mistake in the configuration: a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error


@contextlib.contextmanager
def shown_to_user() -> Iterator[None]:
    """Wraps a command line: prints user errors as one message and exits with their code."""
    try:
        yield
    except ValueError as error:
        from doublehead.data import DataError  # only now: it brings PyTorch

        if not isinstance(error, (UserError, DataError)):
            raise
        _exit(str(error), getattr(error, "exit_code", 2))
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        _exit(f"{error.filename or 'the output folder'}: {error.strerror}", 2)


def _exit(message: str, code: int) -> None:
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (rank {rank})"
    print(f"error{where}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)
