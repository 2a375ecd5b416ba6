"""The operator library `torch.ops.doublehead`: definitions, and the loader of the compiled parts.

Python owns the schemas.  Each operator's op.py calls `define` with its schema, its reference (plain PyTorch, which
serves every device that has no kernel of its own) and its fake (shapes alone).  The compiled parts, `doublehead._C` for
the CPU and `doublehead._C_cuda` for CUDA, only add kernels for their device.  Without them everything works, on the
reference.

Whatever the package needs of PyTorch's dispatcher and its internals (`torch._C`) is here, and nowhere else.
"""

import contextlib
import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch

from . import _fallback
from ._fallback import Fallback, warn_fallback
from ._fork import one_thread_if_forked

__all__ = ["Fallback", "one_thread_if_forked", "warn_fallback"]  # imported from here, beside what is defined here

NAMESPACE = "doublehead"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

#: name -> schema of every operator defined so far.
SCHEMAS: dict[str, str] = {}

#: operator -> its definition in plain PyTorch.
REFERENCES: dict[str, Callable] = {}

#: operator -> the launcher of its Triton kernel, which takes the reference where the kernel cannot be used.
TRITON_KERNELS: dict[str, Callable] = {}

#: operator with a Triton kernel -> the one that takes most of its calls where `_C_cuda` has it; `define_triton_kernel`.
COMPILED: dict[str, str] = {}

#: operator -> what makes its schema's arguments into those of its Python functions; see `define`.
PACKERS: dict[str, Callable[..., tuple]] = {}

#: operators that are for the CPU alone; on other devices the reference serves them, and nothing warns of it.
CPU_ONLY: set[str] = set()

#: operators with a path of their own for the CPU in plain PyTorch.
CPU_KERNELS: set[str] = set()

#: "_C" or "_C_cuda" -> why it is not loaded; loaded parts are not listed.
UNLOADED: dict[str, str] = {}


def define(
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    pack: Callable[..., tuple] | None = None,
    cpu_only: bool = False,
) -> torch._ops.OpOverload:
    """Defines an operator and returns it, bound: `torch.ops.doublehead.<name>.default`.

    Args:
        schema: "name(Tensor input, ...) -> Tensor", functional: no argument is written to.
        reference: its definition in plain PyTorch, for any device.
        fake: the same arguments -> empty results of the right shape, dtype and memory format.
        pack: the schema's arguments, by position -> those of `reference`, `fake` and the operator's other Python
            kernels.  A schema is flat; here what belongs together becomes one tuple with names.  PyTorch leaves out
            arguments at the end that have the schema's default, so `pack` has the same defaults.  None: all functions
            take the schema's arguments by position.
        cpu_only: no other device needs a kernel.
    """
    name = schema.partition("(")[0]
    if cpu_only:
        CPU_ONLY.add(name)
    if pack is not None:
        PACKERS[name] = pack
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    reference = _taking_schema_arguments(name, reference)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", _taking_schema_arguments(name, fake), lib=LIBRARY)
    SCHEMAS[name], REFERENCES[name] = schema, reference
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def define_composite(schema: str, function: Callable) -> None:
    """Defines an operator that is nothing but calls of others, from which it has its shapes and its gradient.

    Args:
        schema: as in `define`.
        function: takes the schema's arguments by position.
    """
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(schema.partition("(")[0], function, "CompositeImplicitAutograd")


def _taking_schema_arguments(name: str, function: Callable) -> Callable:
    """`function`, which takes packed arguments, called with the schema's."""
    pack = PACKERS.get(name)
    if pack is None:
        return function

    @functools.wraps(function)
    def with_packed(*arguments):
        return function(*pack(*arguments))

    return with_packed


def define_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Gives the operator its gradient; the arguments are those of `torch.library.register_autograd`."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def define_vmap(name: str, rule: Callable) -> None:
    """Says what the operator does under `torch.vmap`; the rule is that of `torch.library.register_vmap`."""
    torch.library.register_vmap(f"{NAMESPACE}::{name}", rule, lib=LIBRARY)


def define_autocast(name: str, kernel: Callable) -> None:
    """Says what the operator does under `torch.autocast`, on CPU and CUDA.

    `kernel` takes the operator's arguments and calls the operator itself with arguments cast as it sees fit; autocast
    is off while it runs. Without this call autocast leaves the operator's arguments as they are.
    """

    def serve(*arguments):
        with without_autocast():
            return kernel(*arguments)

    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, serve, f"Autocast{device}")


_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def without_autocast() -> contextlib.AbstractContextManager:
    """Operators called inside take their arguments as they are, and calls are shorter."""
    return torch._C._ExcludeDispatchKeyGuard(_AUTOCAST)


def define_cpu_kernel(name: str, kernel: Callable) -> None:
    """Serves CPU tensors by `kernel`, plain PyTorch that is faster there than the reference.

    It may read values back, and work on as much as they ask for: on the CPU that costs nothing.
    """
    pack = PACKERS.get(name)

    @functools.wraps(kernel)
    def serve(*arguments):
        with one_thread_if_forked():
            return kernel(*arguments) if pack is None else kernel(*pack(*arguments))

    CPU_KERNELS.add(name)
    LIBRARY.impl(name, serve, "CPU")


_NOTHING = contextlib.nullcontext()


def define_triton_kernel(
    name: str, module: str, function: str, *, compiled: str | None = None, first: Callable | None = None
) -> None:
    """Serves CUDA tensors by a Triton kernel, and where it cannot be used by the reference, with a warning.

    Args:
        name: the operator's name.
        module: that launches the kernel; it is imported at the first call, as it imports Triton.
        function: of that module; takes the arguments that the reference takes.  It raises `Fallback` for a call that
            its kernel does not serve.
        compiled: an operator that `_C_cuda` has a kernel for, on which `first` relies.
        first: takes the arguments that the reference takes, and is asked before Triton is: it returns the result, or
            None for a call that the compiled kernel does not serve.
    """
    if compiled is not None:
        COMPILED[name] = compiled
    unbuilt: dict[tuple, str] = {}  # calls whose kernel does not build -> why; building takes seconds
    pack = PACKERS.get(name)
    load = functools.cache(lambda: importlib.import_module(module))

    def launch(*arguments):
        device = _device_of(arguments)
        cuda = device is not None and device.type == "cuda"
        if cuda and _compiled(name):
            result = first(*arguments) if pack is None else first(*pack(*arguments))
            if result is not None:
                return result
        reason = _fallback.refusal(device.index) if cuda else None
        if reason is None and unbuilt:
            reason = unbuilt.get(_signature(arguments))
        if reason is None:
            try:
                with torch.cuda.device(device) if cuda else _NOTHING:
                    kernel = getattr(load(), function)
                    return kernel(*arguments) if pack is None else kernel(*pack(*arguments))
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


#: type of device -> operator -> what serves it there, for `kernel`.
LAUNCHERS: dict[str, dict[str, Callable]] = {"cuda": TRITON_KERNELS}


def kernel(name: str, x: torch.Tensor) -> Callable:
    """What serves an operator on the device of x, with the schema's arguments, all of them, by position.

    For autograd functions: below autograd and autocast nothing is left to dispatch, which takes 15 us a call.  Where
    x is no plain tensor or something watches the operators that run, and on devices without Triton, it is the operator.
    """
    if type(x) in _PLAIN and not torch._C._len_torch_dispatch_stack():
        launch = LAUNCHERS.get(x.device.type, _NONE).get(name)
        if launch is not None:
            return launch
    return getattr(getattr(torch.ops, NAMESPACE), name).default


_PLAIN = torch.Tensor, torch.nn.Parameter
_NONE: dict[str, Callable] = {}


def define_missing_kernels() -> None:
    """Lets the reference serve, with a warning, what `_C_cuda` alone would serve.  To be called when all is defined.

    Where torch has no CUDA there is nothing to warn of.
    """
    if "_C_cuda" not in UNLOADED or torch.version.cuda is None:
        return
    elsewhere = {*TRITON_KERNELS, *CPU_ONLY, *COMPILED.values()}
    for name, reference in REFERENCES.items():
        if name not in elsewhere:
            LIBRARY.impl(name, _with_warning(name, reference), "CUDA")


def check_compiled_parts() -> None:
    """Warns of a compiled part from older sources, which lacks kernels.  To be called when all is defined."""
    for part, key in (("_C", "CPU"), ("_C_cuda", "CUDA")):
        elsewhere = {*TRITON_KERNELS, *(CPU_ONLY if key == "CUDA" else ())}
        lacking = [name for name in REFERENCES if name not in elsewhere and not _registered(name, key)]
        if lacking and part not in UNLOADED:
            warnings.warn(
                f"doublehead's compiled part {NAMESPACE}.{part} was built from older sources: it lacks "
                f"{', '.join(lacking)}, which run on the slower reference in plain PyTorch; `pip install -e .` builds "
                "it again.",
                RuntimeWarning,
                stacklevel=2,
            )


def _with_warning(name: str, reference: Callable) -> Callable:
    reason = no_cuda_part()

    def serve(*arguments):
        warn_fallback(name, reason)
        return reference(*arguments)

    return serve


def no_cuda_part() -> str:
    """The reason to warn of where `_C_cuda` is not loaded."""
    return f"_C_cuda is not loaded: {UNLOADED['_C_cuda']}; `doublehead info` says how it can be built"


def _tensors(arguments: Iterable) -> Iterator[torch.Tensor]:
    for argument in arguments:
        for value in argument if isinstance(argument, (list, tuple)) else (argument,):
            if isinstance(value, torch.Tensor):
                yield value


def _device_of(arguments: Iterable) -> torch.device | None:
    """The first tensor's device.  Triton launches on the current GPU, wherever the tensors are."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            return argument.device
        if isinstance(argument, (list, tuple)) and (first := next(_tensors(argument), None)) is not None:
            return first.device
    return None


def _signature(arguments: Iterable) -> tuple:
    """What calls of one compiled kernel have in common: devices, dtypes, and shapes without the number of rows."""
    return tuple((tensor.device, tensor.dtype, *tensor.shape[1:]) for tensor in _tensors(arguments))


def below_autograd() -> contextlib.AbstractContextManager:
    """Operators called inside skip autograd's layers of the dispatcher: no gradient is recorded, and calls are shorter.

    For functions that have no gradient, or record it by an autograd function of their own.  Not while tracing.
    """
    return torch._C._AutoDispatchBelowAutograd()


class without_layers:  # noqa: N801  (used as a function)
    """Inside an autograd function: operators skip autograd's and autocast's layers, and so are called faster.

    While a mode watches each operator, autograd's layers stay, which take others apart: it goes on seeing ATen's own.
    """

    def __enter__(self) -> None:
        self._outer = without_autocast()
        self._outer.__enter__()
        # Made after the outer one is entered: guards put back the state that they found.
        self._inner = _NOTHING if in_dispatch_mode() else below_autograd()
        self._inner.__enter__()

    def __exit__(self, *error) -> None:
        self._inner.__exit__(*error)
        self._outer.__exit__(*error)


def in_functorch_transform() -> bool:
    """Whether a transform of `torch.func` (vmap, grad, ...) is active."""
    return torch._C._are_functorch_transforms_active()


def in_dispatch_mode() -> bool:
    """Whether something watches each operator that runs: a `TorchDispatchMode`, such as a counter of FLOPs."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_functorch_tensor(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a transform's wrapper, which has no memory of its own."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def native(name: str, device: str) -> bool:
    """Whether operator `name` has a kernel of its own for this type of device; otherwise the reference serves it.

    A certain GPU or call may still be refused: `why_reference` says why for a GPU.
    """
    if device == "cuda":
        return why_reference(name) is None
    key = "Meta" if device == "meta" else device.upper()
    return _registered(name, key)


def why_reference(name: str, index: int | None = None) -> str | None:
    """Why the reference serves operator `name` on CUDA, on GPU `index` or on all; None: a kernel serves it."""
    if name in CPU_ONLY:
        return "for the CPU alone"
    if _compiled(name):
        return None
    if name in TRITON_KERNELS:
        return _fallback.refusal(index)
    if "_C_cuda" in UNLOADED:
        return no_cuda_part()
    return None if _registered(name, "CUDA") else "no CUDA kernel in this version"


def _registered(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)


def _compiled(name: str) -> bool:
    return name in COMPILED and _registered(COMPILED[name], "CUDA")


def language(name: str, device: str) -> str:
    """The language of the kernel: "C++", "CUDA", "Triton" or "PyTorch"."""
    if device == "cuda":
        return "Triton" if name in TRITON_KERNELS and not _compiled(name) else "CUDA"
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
            return  # no accident: most machines have no CUDA compiler, and `doublehead info` says why
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
