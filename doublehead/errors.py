"""Errors a user can act on, and how the command lines show them.

A `UserError` is a mistake in the input or a fact about the machine (a missing folder, a full disk): the command lines
print its message alone and exit with its `exit_code`.  Everything else is a bug and keeps its traceback.

A leaf: it imports nothing of the library and no PyTorch, so that every package can raise these.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import unicodedata
from collections.abc import Iterator

UNPRINTABLE = {"Cc": "a control character", "Cs": "half a surrogate pair", "Zl": "a line break", "Zp": "a line break"}
"""By Unicode category: characters that would break a one-line message, a table or a list read line by line."""
_DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ESTALE,
    errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENFILE,
}  # fmt: skip


class UserError(ValueError):
    """Something the user can put right; the message says what and how."""

    exit_code = 2


class DataError(UserError):
    """The data cannot be used as they are: the message, one line, names the file, the record and what is accepted.

    `reason` is the kind of trouble in few words, by which `DetectionDataset.skipped` counts.
    """

    def __init__(self, message: str, reason: str = "bad data"):
        super().__init__(one_line(message))
        self.reason = reason


class CheckpointError(UserError):
    """A checkpoint cannot be read or written; the message names the file."""


class Abandoned(KeyboardInterrupt):
    """A second Ctrl-C: the process ends in the middle of a step, by the signal itself."""


@contextlib.contextmanager
def config_errors() -> Iterator[None]:
    """Inside, a `ValueError` or a missing file is a mistake in the configuration: a `UserError`."""
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
    except UserError as error:
        _exit(str(error), error.exit_code)
    except BrokenPipeError:
        # Python flushes stdout when it ends; what is left must not raise again. What replaced stdout may be no file.
        with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        _exit("the program that reads the output has ended (broken pipe)", 128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        _exit(f"{error.filename or 'the output folder'}: {error.strerror}", 2)
    except Abandoned:  # the training has printed its message already
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        if _rank() == "0":
            print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        raise SystemExit(128 + signal.SIGINT) from None


def one_line(text: str) -> str:
    """The text with control characters as their escapes: file names may hold any, and terminals obey some."""
    return "".join(ascii(letter)[1:-1] if unicodedata.category(letter) in UNPRINTABLE else letter for letter in text)


def _exit(message: str, code: int) -> None:
    where = "" if _rank() == "0" else f" (rank {_rank()})"
    message = " ".join(line.strip() for line in message.splitlines())
    print(f"error{where}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def _rank() -> str:
    return os.environ.get("RANK", "0")
