"""The operator library `torch.ops.doublehead`: definitions, and the loader of the compiled parts.

Python owns the schemas. Each operator's op.py calls `define` with its schema, its reference (plain PyTorch, which
serves every device that has no kernel of its own) and its fake (shapes alone). The compiled parts, `doublehead._C` for
the CPU and `doublehead._C_cuda` for CUDA, only add kernels for their device. Without them everything works, on the
reference.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch

from . import _fallback
from ._fallback import Fallback, warn_fallback

__all__ = ["Fallback", "warn_fallback"]  # for the rooms, beside what is defined here

NAMESPACE = "doublehead"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

#: name -> schema of every operator defined so far.
SCHEMAS: dict[str, str] = {}

#: operator -> its definition in plain PyTorch.
REFERENCES: dict[str, Callable] = {}

#: operator -> the launcher of its Triton kernel, which takes the reference where the kernel cannot be used.
TRITON_KERNELS: dict[str, Callable] = {}

#: operators with a path of their own for the CPU in plain PyTorch.
CPU_KERNELS: set[str] = set()

#: "_C" or "_C_cuda" -> why it is not loaded; a part that is loaded is not listed.
UNLOADED: dict[str, str] = {}


def define(schema: str, *, reference: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Defines an operator and returns it, bound: `torch.ops.doublehead.<name>.default`.

    Args:
        schema: "name(Tensor input, ...) -> Tensor", functional: no argument is written to.
        reference: its definition in plain PyTorch, for any device; takes the schema's arguments by position.
        fake: the same arguments -> empty results of the right shape, dtype and memory format.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    SCHEMAS[name], REFERENCES[name] = schema, reference
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def define_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Gives the operator its gradient, in the words of `torch.library.register_autograd`."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def define_autocast(name: str, kernel: Callable) -> None:
    """Says what the operator does under `torch.autocast`, on CPU and CUDA.

    `kernel` takes the operator's arguments and calls the operator itself with arguments cast as it sees fit; autocast
    is off while it runs. Without this call autocast leaves the operator's arguments as they are.
    """
    off = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.AutocastCUDA
    )

    def without_autocast(*arguments):
        with torch._C._ExcludeDispatchKeyGuard(off):
            return kernel(*arguments)

    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, without_autocast, f"Autocast{device}")


def define_cpu_kernel(name: str, kernel: Callable) -> None:
    """Serves CPU tensors by `kernel`, plain PyTorch that is faster there than the reference.

    It may read values back, and work on as much as they ask for: on the CPU that costs nothing.
    """

    @functools.wraps(kernel)
    def answer(*arguments):
        with one_thread_if_forked():
            return kernel(*arguments)

    CPU_KERNELS.add(name)
    LIBRARY.impl(name, answer, "CPU")


class _Process:
    """Whether this process is a forked child.  Its parent's threads are not in it, but OpenMP waits for them."""

    forked = False


def _note_fork() -> None:
    _Process.forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_NOTHING = contextlib.nullcontext()


def one_thread_if_forked() -> contextlib.AbstractContextManager:
    """In a forked child, torch's operators run in this thread alone inside: else they may wait for ever.

    PyTorch's own DataLoader does the same for its workers.  The compiled kernels look after themselves.
    """
    if torch.compiler.is_compiling() or not _Process.forked:
        return _NOTHING
    return _one_thread()


def define_triton_kernel(name: str, module: str, function: str) -> None:
    """Serves CUDA tensors by a Triton kernel, and where it cannot be used by the reference, with a warning.

    Args:
        name: of the operator.
        module: that launches the kernel; it is imported at the first call, as it imports Triton.
        function: of that module; takes the operator's arguments by position.  It raises `Fallback` for a call that
            its kernel does not serve.
    """
    unbuilt: dict[tuple, str] = {}  # calls whose kernel does not build -> why; building takes seconds

    def launch(*arguments):
        device = _device_of(arguments)
        cuda = device is not None and device.type == "cuda"
        reason = _fallback.refusal(device.index) if cuda else None
        if reason is None and unbuilt:
            reason = unbuilt.get(_signature(arguments))
        if reason is None:
            try:
                with torch.cuda.device(device) if cuda else _NOTHING:
                    return getattr(importlib.import_module(module), function)(*arguments)
            except Fallback as answer:
                reason = answer.reason
            except Exception as error:
                reason = _fallback.reason_of(error) if cuda else None
                if reason is None:
                    raise
                unbuilt[_signature(arguments)] = reason
        warn_fallback(name, reason, "cuda" if device is None else device.type)
        return REFERENCES[name](*arguments)

    TRITON_KERNELS[name] = launch
    LIBRARY.impl(name, launch, "CUDA")


def define_missing_kernels() -> None:
    """Lets the reference serve, with a warning, what `_C_cuda` would if it were loaded.  Call it when all is defined.

    Where torch has no CUDA there is nothing to warn of.
    """
    if "_C_cuda" not in UNLOADED or torch.version.cuda is None:
        return
    for name, reference in REFERENCES.items():
        if name not in TRITON_KERNELS:
            LIBRARY.impl(name, _with_warning(name, reference), "CUDA")


def _with_warning(name: str, reference: Callable) -> Callable:
    reason = no_cuda_part()

    def serve(*arguments):
        warn_fallback(name, reason)
        return reference(*arguments)

    return serve


def no_cuda_part() -> str:
    """Why `_C_cuda` serves nothing, as a reason to warn of."""
    return f"_C_cuda is not loaded: {UNLOADED['_C_cuda']}; `python -m doublehead.info` says how it can be built"


def _tensors(arguments: Iterable) -> Iterator[torch.Tensor]:
    for argument in arguments:
        for value in argument if isinstance(argument, (list, tuple)) else (argument,):
            if isinstance(value, torch.Tensor):
                yield value


def _device_of(arguments: Iterable) -> torch.device | None:
    """The first tensor's device; its GPU is made the current one, as Triton launches there, whatever the tensors'."""
    first = next(_tensors(arguments), None)
    return None if first is None else first.device


def _signature(arguments: Iterable) -> tuple:
    """What calls have in common that the same kernel serves: where, dtypes, and shapes but for the number of rows."""
    return tuple((tensor.device, tensor.dtype, *tensor.shape[1:]) for tensor in _tensors(arguments))


@contextlib.contextmanager
def enable_autograd():
    """Records gradients even inside a kernel, where torch has switched autograd off.

    For a reference that is itself the gradient of another reference, taken by `torch.autograd.grad`. Inputs that may
    have been made in inference mode must be cloned inside.
    """
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.inference_mode(False), torch.enable_grad():
        yield


def native(name: str, device: str) -> bool:
    """Whether operator `name` has a kernel of its own for the kind of device; else the reference serves it.

    A single GPU can still be too old for it, or a single call: `why_reference` says so of a GPU.
    """
    if device == "cuda":
        return why_reference(name) is None
    key = "Meta" if device == "meta" else device.upper()
    return _registered(name, key)


def why_reference(name: str, index: int | None = None) -> str | None:
    """Why the reference serves CUDA tensors for operator `name`, on GPU `index` or everywhere; None: a kernel does."""
    if name in TRITON_KERNELS:
        return _fallback.refusal(index)
    if "_C_cuda" in UNLOADED:
        return no_cuda_part()
    return None if _registered(name, "CUDA") else "no CUDA kernel in this version"


def _registered(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)


def language(name: str, device: str) -> str:
    """What the kernel is written in: "C++", "CUDA", "Triton" or "PyTorch"."""
    if device == "cuda":
        return "Triton" if name in TRITON_KERNELS else "CUDA"
    return "PyTorch" if name in CPU_KERNELS else "C++"


def load_compiled_parts() -> None:
    """Imports `_C`, and `_C_cuda` where torch has CUDA; warns if the CPU part is missing, or either is broken."""
    _load("_C")
    if torch.version.cuda is None:
        UNLOADED["_C_cuda"] = "this torch was built without CUDA"
    else:
        _load("_C_cuda")


def _load(part: str) -> None:
    module = f"{NAMESPACE}.{part}"
    if importlib.util.find_spec(module) is None:
        UNLOADED[part] = "it is not built"
        if part == "_C_cuda":
            return  # no accident: most machines have no CUDA compiler, and `python -m doublehead.info` says why
    else:
        try:
            importlib.import_module(module)
            return
        except ImportError as error:
            UNLOADED[part] = f"it does not load: {error}"
    warnings.warn(
        f"doublehead runs without its compiled part {module}: {UNLOADED[part]}. Its operators work, on the slower "
        "reference in plain PyTorch; `pip install -e .` builds the part.",
        RuntimeWarning,
        stacklevel=2,
    )


load_compiled_parts()
