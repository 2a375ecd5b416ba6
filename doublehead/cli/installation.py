"""A report of the installation: versions, compiled parts, and what runs each operator on each device."""

import importlib
import platform
import warnings
from importlib import metadata
from types import ModuleType

import torch

from doublehead.version import __version__

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a missing compiled part is what this report is about
    from doublehead.engine.precision import on_this_cpu
    from doublehead.ops import _fallback, _library  # `doublehead.ops` defines the operators
    from doublehead.ops.processor import processor

DEVICES = ("cpu", "cuda")
PACKAGES = ("torchvision", "triton", "numpy", "pycocotools")


def report() -> str:
    """The whole report, as text."""
    return "\n".join([*_versions(), *_precision(), *_processor(), "", *_parts(), "", *_operators(), *_refused_gpus()])


def served_by(name: str, device: str) -> tuple[str, str]:
    """What runs operator `name` on `device` ("cpu" or "cuda"), and why.

    Returns:
        (what its kernel is written in, "") or ("reference", the reason why there is no kernel).
    """
    if _library.native(name, device):
        return _library.language(name, device), ""
    if device == "cuda":
        return "reference", _library.why_reference(name)
    if "_C" in _library.UNLOADED:
        return "reference", "_C is not loaded"
    return "reference", "no CPU kernel in this version"


def compiled_part(name: str) -> ModuleType | None:
    """The loaded module `doublehead.<name>` ("_C" or "_C_cuda"), None if it is not loaded."""
    return None if name in _library.UNLOADED else importlib.import_module(f"doublehead.{name}")


def _versions() -> list[str]:
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    facts = {
        "doublehead": __version__,
        "Python": f"{platform.python_version()} ({platform.machine()})",
        "torch": f"{torch.__version__}, {cuda}",
        **{package: _version(package) for package in PACKAGES},
        "threads": torch.get_num_threads(),
    }
    return [f"{name:12} {fact}" for name, fact in facts.items()] + _gpus()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return ["GPU          none that torch can use"]
    lines = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        lines.append(f"GPU {index}        {torch.cuda.get_device_name(index)}, sm_{major}{minor}")
    return lines


def _precision() -> list[str]:
    """PyTorch's switches that choose how float32 is multiplied on a GPU."""
    switches = {
        "torch.backends.cudnn.conv.fp32_precision": torch.backends.cudnn.conv,
        "torch.backends.cuda.matmul.fp32_precision": torch.backends.cuda.matmul,
    }
    lines = [f"{name} = {_switch(owner)}" for name, owner in switches.items()]
    return [f"float32      {lines[0]}", *(f"             {line}" for line in lines[1:])]


def _processor() -> list[str]:
    """What the CPU has, and what that means for each precision of the commands."""
    found = processor()
    lines = [f"CPU          {found.name or platform.machine()}: {found.listed()}"]
    return lines + [f"  {name:10} {means}" for name, means in on_this_cpu().items()]


def _switch(owner: object) -> str:
    try:
        return f'"{owner.fp32_precision}"'
    except RuntimeError as error:  # the older switches and these were both set, and disagree
        return f"unknown: {str(error).splitlines()[0]}"


def _refused_gpus() -> list[str]:
    """The GPUs on which no Triton kernel runs, and why; empty where the table says so for the whole machine."""
    if not torch.cuda.is_available() or _fallback.refusal() is not None:
        return []
    names = ", ".join(sorted(_library.TRITON_KERNELS))
    found = {index: _fallback.refusal(index) for index in range(torch.cuda.device_count())}
    return [f"reference on cuda:{index}: {why} ({names})" for index, why in found.items() if why is not None]


def _parts() -> list[str]:
    """The state of `_C` and `_C_cuda`."""
    cpu, cuda = compiled_part("_C"), compiled_part("_C_cuda")
    lines = [f"CPU part     not loaded: {_library.UNLOADED.get('_C')}"]
    if cpu is not None:
        build = cpu.build_info()
        lines = [
            f"CPU part     built by {build['compiler']} ({build['flags']}) against torch {build['torch']}",
            f"             runs here as {build['instruction_set']}",
        ]
    if cuda is not None:
        build = cuda.build_info()
        runtime = f"{build['cuda_runtime'] // 1000}.{build['cuda_runtime'] % 1000 // 10}"
        lines.append(f"CUDA part    built by {build['compiler']} against torch {build['torch']}")
        lines.append(f"             for sm_{build['archs'].replace(',', ', sm_')}, CUDA runtime {runtime}")
        return lines
    why = _library.UNLOADED["_C_cuda"]
    if cpu is not None and why == "it is not built":
        why += f", as {cpu.build_info()['cuda_reason']}"
    return [*lines, f"CUDA part    not loaded: {why}"]


def _operators() -> list[str]:
    """A line for each operator: what runs it on each device."""
    width = max(len(name) for name in _library.SCHEMAS)
    lines = [f"{'operator':{width}}  " + "  ".join(f"{device:9}" for device in DEVICES).rstrip()]
    reasons = {}
    for name in sorted(_library.SCHEMAS):
        served = {device: served_by(name, device) for device in DEVICES}
        lines.append(f"{name:{width}}  " + "  ".join(f"{by:9}" for by, _ in served.values()).rstrip())
        for device, (by, why) in served.items():
            if by == "reference":
                reasons.setdefault((device, why), []).append(name)
    for (device, why), names in reasons.items():
        which = "all" if len(names) == len(_library.SCHEMAS) else ", ".join(names)
        lines.append(f"reference on {device}: {why} ({which})")
    return lines
