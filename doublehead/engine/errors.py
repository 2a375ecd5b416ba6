"""Errors a user can act on, and how the command lines show them.

A `UserError` is a mistake in the input or a fact about the machine (a missing folder, a full
disk): the command lines print its message alone and exit with its `exit_code`.  Everything else
is a bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator

from doublehead.engine.signals import Abandoned

_DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ESTALE,
    errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENFILE,
}  # fmt: skip


class UserError(ValueError):
    """Something the user can put right; the message says what and how."""

    exit_code = 2


class CheckpointError(UserError):
    """A checkpoint cannot be read or written; the message names the file."""


class NonFiniteLossError(UserError):
    """A loss became NaN or infinite; the message names the step, the losses and the images."""

    exit_code = 1


class PeerLostError(UserError):
    """The connection to another process of this job broke, and no process says why."""

    exit_code = 1


class PeerFailed(SystemExit):
    """Another process of this job failed and says why; this one ends with its exit code and says nothing."""


class PeerStopped(PeerFailed):
    """Another process of this job was asked to stop, and this one stops with it."""


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
    """Wraps a command line: prints a user's error, or that Ctrl-C stopped it, as one line, and exits with its code."""
    try:
        yield
    except ValueError as error:
        from doublehead.data import DataError  # only now: it brings PyTorch

        if not isinstance(error, (UserError, DataError)):
            raise
        _exit(str(error), getattr(error, "exit_code", 2))
    except BrokenPipeError:
        # What is still to be written goes nowhere when Python ends; what took the place of stdout may be no file.
        with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        _exit("the program that reads the output has ended (broken pipe)", 128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        _exit(f"{error.filename or 'the output folder'}: {error.strerror}", 2)
    except Abandoned:  # the training has said what there is to say
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        if _rank() == "0":
            print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        raise SystemExit(128 + signal.SIGINT) from None


def _exit(message: str, code: int) -> None:
    where = "" if _rank() == "0" else f" (rank {_rank()})"
    message = " ".join(line.strip() for line in message.splitlines())
    print(f"error{where}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def _rank() -> str:
    return os.environ.get("RANK", "0")
