"""Why the reference serves a call in place of a kernel; each reason is warned of once for each operator.

What holds for the whole machine or for a GPU is known before the first launch (`refusal`).  A launch function raises
`Fallback` for a call that its kernel does not serve.  A kernel that does not build or fit says so by its error
(`reason_of`).  An error that leaves the GPU unusable, such as an illegal access, is raised.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator

import torch

OLDEST_CAPABILITY = (8, 0)
"""The oldest GPU that runs the Triton kernels: older ones lack bfloat16 and asynchronous copies, and the tiles do not
fit them."""

NO_TRITON = "Triton is not installed; `pip install triton` brings what the kernel needs"

NO_COMPILER = (
    "Triton finds no C compiler, which it needs once on each machine; install gcc or clang, or name one in the "
    "environment variable CC"
)

_LAUNCH_ERRORS = (  # errors of loading and launching that leave the GPU usable
    "no kernel image",
    "device kernel image is invalid",
    "unsupported toolchain",
    "too many resources requested for launch",
    "PassManager::run failed",
)


class Fallback(Exception):  # noqa: N818  (an answer to the caller, not an error)
    """Raised by a launch function for a call that its kernel does not serve; the reference serves it.

    Args:
        reason: the reason, and what to do about it.  A constant text, without this call's numbers: each text is warned
            of once, and no call formats one.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


_WARNED: set[tuple[str, str]] = set()
_LISTENERS: list[list[tuple[str, str]]] = []


def warn_fallback(name: str, reason: str, device: str = "cuda") -> None:
    """Warns that the operator runs in plain PyTorch on `device`, once for each operator and reason."""
    for heard in _LISTENERS:
        heard.append((name, reason))
    if (name, reason) in _WARNED:
        return
    _WARNED.add((name, reason))
    warnings.warn(f"doublehead: {name} on {device} runs in plain PyTorch: {reason}", RuntimeWarning, stacklevel=3)


@contextlib.contextmanager
def fallbacks() -> Iterator[list[tuple[str, str]]]:
    """Lists the (operator, reason) of each call inside that the reference serves, whether warned of before or not."""
    heard: list[tuple[str, str]] = []
    _LISTENERS.append(heard)
    try:
        yield heard
    finally:
        _LISTENERS[:] = [other for other in _LISTENERS if other is not heard]


class Refusals:
    """Why no Triton kernel can run on a GPU; looked up once, as it does not change."""

    def __init__(self) -> None:
        self._reasons: dict[int | None, str | None] = {}

    def __call__(self, index: int | None = None) -> str | None:
        """The reason for GPU `index`, or None; without an index that for the whole machine, without touching a GPU."""
        try:
            return self._reasons[index]
        except KeyError:
            reason = no_triton() if index is None else self() or too_old(index) or no_start()
            self._reasons[index] = reason
            return reason


refusal = Refusals()


def no_triton() -> str | None:
    """The reason if Triton is missing, else None."""
    return None if importlib.util.find_spec("triton") is not None else NO_TRITON


def too_old(index: int) -> str | None:
    """The reason if GPU `index` is too old for the kernels, else None; AMD's GPUs have no such limit."""
    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) >= OLDEST_CAPABILITY:
        return None
    oldest = "".join(map(str, OLDEST_CAPABILITY))
    return f"GPU {index} is sm_{major}{minor}, and the kernels need sm_{oldest} or newer"


def no_start() -> str | None:
    """The reason if Triton cannot build its driver, else None; a driver in Triton's cache needs no compiler."""
    try:
        _start_triton()
    except Exception as error:
        return _no_build(error) or f"Triton does not start: {_summary(error)}"
    return None


def _start_triton() -> None:
    from triton.runtime import driver

    driver.active.utils  # noqa: B018  (compiles and loads it)


def c_compiler() -> str | None:
    """The C compiler that Triton would use, or None."""
    named = os.environ.get("CC")
    if named is not None:
        return shutil.which(named)
    return shutil.which("gcc") or shutil.which("clang")


def reason_of(error: BaseException) -> str | None:
    """Why a kernel cannot be built or launched, from its error; None for any other error, which must be raised."""
    built = _no_build(error)
    if built is not None:
        return built
    if isinstance(error, ImportError):
        return f"the kernel does not load: {_summary(error)}"
    named = type(error).__name__ in ("CompilationError", "OutOfResources", "PTXASError") and _is_tritons(error)
    launch = isinstance(error, RuntimeError) and any(text in str(error) for text in _LAUNCH_ERRORS)
    return f"the kernel does not build for this GPU: {_summary(error)}" if named or launch else None


def _no_build(error: BaseException) -> str | None:
    """The reason if Triton could not compile C: no compiler, no headers, or no folder to write in; else None."""
    no_compiler = isinstance(error, RuntimeError) and "Failed to find C compiler" in str(error)
    if no_compiler or (isinstance(error, (OSError, subprocess.CalledProcessError)) and c_compiler() is None):
        return NO_COMPILER
    if isinstance(error, subprocess.CalledProcessError):
        return "Triton's C compiler fails, often for want of Python's headers (python3-dev); its messages are above"
    if isinstance(error, OSError):
        return f"Triton cannot build it ({_summary(error)}); TRITON_CACHE_DIR names a folder to write in"
    return None


def _is_tritons(error: BaseException) -> bool:
    return any(base.__module__.partition(".")[0] == "triton" for base in type(error).__mro__)


def _summary(error: BaseException) -> str:
    """The error's type and last line, where Triton says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:200]}" if lines else type(error).__name__
