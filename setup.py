"""Builds the compiled operators with CMake and Ninja. The metadata stands in pyproject.toml.

Environment variables: DOUBLEHEAD_CUDA=0|1 leaves the CUDA part out, or demands it; TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX"
chooses its architectures; CUDA_HOME says where the toolkit is; MAX_JOBS limits the parallel compilations.
"""

import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_SETUPTOOLS = 77  # an older one stops at pyproject.toml's licence, with a page of text that does not say so
OLDEST_TORCH = (2, 11)  # the stable-ABI target set in CMakeLists.txt
PARTS = ("_C", "_C_cuda")  # the CUDA part is dropped by CMakeBuild where it cannot be built
# One build serves every Python from 3.10 on, but for the free-threaded ones, which have no stable ABI.
STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")
DEFAULT_ARCHS = ("80", "86", "89", "90", "100", "120")
OLDEST_ARCH = (8, 0)  # the kernels use instructions that came with it


def check_setuptools(version):
    """An isolated build fetches what it needs; one without isolation uses what there is."""
    if int(version.split(".")[0]) < OLDEST_SETUPTOOLS:
        raise SystemExit(
            f"doublehead: setuptools {version} is too old to build with, {OLDEST_SETUPTOOLS} or newer is needed: "
            f"pip install 'setuptools>={OLDEST_SETUPTOOLS}'"
        )


class Torch(NamedTuple):
    """The torch that is built against: its folder, its version ("2.15.0+cu130"), whether it has CUDA."""

    folder: Path
    version: str
    cuda: bool

    @property
    def new_enough(self):
        return tuple(int(n) for n in re.findall(r"\d+", self.version)[:2]) >= OLDEST_TORCH


def find_torch():
    """The torch of this build environment, else that of the environment being installed into, else None.

    An isolated build does not see the packages of the environment it builds for; a Python started without PYTHONPATH
    (which carries the isolation) does. Nothing is imported: importing torch takes seconds and may fail.
    """
    spec = importlib.util.find_spec("torch")
    origin = spec.origin if spec else None
    if not origin:
        code = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"
        done = subprocess.run([sys.executable, "-E", "-c", code], capture_output=True, text=True, cwd=sys.prefix)
        origin = done.stdout.strip()
    return read_torch(Path(origin).parent) if origin else None


def read_torch(folder):
    """What the torch installed in `folder` is, read from its files; None if it is no complete torch."""
    try:
        version = re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text())
    except OSError:
        return None
    return version and Torch(folder, version[1], bool(list((folder / "lib").glob("*torch_cuda.*"))))


def build_requirements(torch):
    """What the build needs beyond pyproject.toml: a torch only where the environment has none that will do."""
    return [] if torch and torch.new_enough else ["torch>=" + ".".join(map(str, OLDEST_TORCH))]


def find_nvcc(environ):
    """The path of nvcc, by CUDA_HOME, CUDA_PATH, PATH, then /usr/local/cuda; None if there is none."""
    homes = [environ.get("CUDA_HOME"), environ.get("CUDA_PATH")]
    places = [os.path.join(home, "bin") for home in homes if home] + [environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(places))


def decide_cuda(torch, nvcc, wanted, arch_list="", gpus=()):
    """Whether to build the CUDA part, and the reason in words.

    `wanted` is DOUBLEHEAD_CUDA: "0", "1" or ""; arch_list and gpus are those of choose_archs.
    """
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"DOUBLEHEAD_CUDA: got {wanted!r}; accepted are 0 (leave CUDA out), 1 (demand it) or nothing.")
    if wanted == "0":
        return False, "DOUBLEHEAD_CUDA=0"
    missing = []
    if not torch.cuda:
        missing.append(f"torch {torch.version} was built without CUDA")
    if not nvcc:
        missing.append("no nvcc was found (CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda)")
    if nothing := nothing_to_compile_for(arch_list, gpus):
        missing.append(nothing)
    if missing and wanted == "1":
        raise SystemExit(f"DOUBLEHEAD_CUDA=1 demands the CUDA part, but {' and '.join(missing)}.")
    return not missing, " and ".join(missing) or f"torch {torch.version} has CUDA and nvcc is {nvcc}"


def choose_archs(known, arch_list="", gpus=()):
    """CMAKE_CUDA_ARCHITECTURES out of what nvcc knows (["80", "90", ...]).

    TORCH_CUDA_ARCH_LIST is taken as it is; else the visible GPUs; else the defaults nvcc knows; of these, those that
    the kernels can run on. Unless the list says otherwise the newest carries PTX, which newer GPUs can run.
    """
    if named := split_archs(arch_list):
        return ";".join(arch for item in named if new_enough(item) for arch in read_arch(item))
    numbers = sorted((number for number in known if new_enough(f"{number[:-1]}.{number[-1]}")), key=int)
    wanted = {gpu.replace(".", "") for gpu in gpus if new_enough(gpu)} or set(DEFAULT_ARCHS)
    archs = [number for number in numbers if number in wanted]
    if not archs:  # a GPU newer than this nvcc: PTX of the newest one that nvcc knows
        return f"{numbers[-1]}-virtual"
    return ";".join([f"{arch}-real" for arch in archs[:-1]] + [archs[-1]])


def nothing_to_compile_for(arch_list, gpus):
    """Why no architecture is left to compile for, in words; "" if one is."""
    named, where = split_archs(arch_list), "TORCH_CUDA_ARCH_LIST names"
    if not named:
        named, where = list(gpus), "the visible GPUs have"
    if not named or any(map(new_enough, named)):
        return ""
    return f"the kernels need compute capability 8.0 or newer and {where} {', '.join(dict.fromkeys(named))} alone"


def split_archs(arch_list):
    """The entries of TORCH_CUDA_ARCH_LIST."""
    return [item for item in re.split(r"[;,\s]+", arch_list) if item]


def new_enough(item):
    """Whether the kernels can run on "8.0", "9.0a+PTX", ...; an entry that cannot be read is left to read_arch."""
    match = re.match(r"(\d+)\.(\d)", item)
    return not match or (int(match[1]), int(match[2])) >= OLDEST_ARCH


def read_arch(item):
    """One entry of TORCH_CUDA_ARCH_LIST ("8.0", "9.0a", "9.0+PTX") in CMake's words."""
    match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", item)
    if not match:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST: got {item!r}; accepted are entries like 8.0, 9.0a or 9.0+PTX.")
    number = match[1] + match[2]
    return [number] if match[3] else [f"{number}-real"]


def parallel(max_jobs):
    """The build's arguments for MAX_JOBS; without it Ninja takes all processors."""
    if max_jobs and not re.fullmatch(r"[1-9]\d*", max_jobs):
        raise SystemExit(f"MAX_JOBS: got {max_jobs!r}; accepted is a number of compilations to run at once, 1 or more.")
    return ["--parallel", max_jobs] if max_jobs else []


def lines_of(*command):
    """The lines a command prints, none if it is absent or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []


def stale_parts(folder, built):
    """The compiled parts in `folder` that this Python would import in place of, or beside, the files just `built`."""
    found = [folder / f"{part}{suffix}" for part in PARTS for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    return [path for path in found if path.exists() and path.resolve() not in {Path(file).resolve() for file in built}]


class FreshBuild(build):
    """Begins with an empty package: what an earlier build left in build/lib would go into the wheel."""

    def run(self):
        shutil.rmtree(Path(self.build_lib) / "doublehead", ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Configures once, then builds one CMake target for each Extension."""

    def run(self):
        torch = find_torch()
        if not torch or not torch.new_enough:
            found = f"found torch {torch.version} in {torch.folder}" if torch else "found no torch"
            raise SystemExit(f"doublehead builds against torch >= 2.11; {found}.")
        self.configure(torch)
        super().run()
        if self.inplace:
            for stale in stale_parts(ROOT / "doublehead", [self.get_ext_fullpath(ext.name) for ext in self.extensions]):
                print(f"doublehead: removing {stale.name}, which an earlier build left.", flush=True)
                stale.unlink()

    def configure(self, torch):
        nvcc, arch_list = find_nvcc(os.environ), os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        gpus = lines_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
        cuda, reason = decide_cuda(torch, nvcc, os.environ.get("DOUBLEHEAD_CUDA", ""), arch_list, gpus)
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "TORCH_DIR": torch.folder,
            "TORCH_VERSION": torch.version,
            "PYTHON_INCLUDE": sysconfig.get_path("include"),
            "PYTHON_STABLE_ABI": "ON" if STABLE_ABI else "OFF",
            "MODULE_SUFFIX": Path(self.get_ext_filename("doublehead._C")).name.removeprefix("_C"),
            "DOUBLEHEAD_CUDA": "ON" if cuda else "OFF",
            "DOUBLEHEAD_CUDA_REASON": reason,
        }
        if cuda:
            known = [line.removeprefix("compute_") for line in lines_of(nvcc, "--list-gpu-arch")]
            settings["CMAKE_CUDA_COMPILER"] = nvcc
            settings["CMAKE_CUDA_ARCHITECTURES"] = choose_archs(known, arch_list, gpus)
            if left_out := [arch for arch in split_archs(arch_list) or gpus if not new_enough(arch)]:
                print(f"doublehead: leaving out {', '.join(left_out)}, older than compute capability 8.0.", flush=True)
        self.build_folder = Path(self.build_temp).resolve() / f"cmake-{sys.implementation.cache_tag}"
        self.cmake("-S", ROOT, "-B", self.build_folder, "-G", "Ninja", *(f"-D{k}={v}" for k, v in settings.items()))
        self.extensions = [ext for ext in self.extensions if cuda or ext.name != "doublehead._C_cuda"]
        print(f"doublehead: building the CPU part {'and the CUDA part' if cuda else 'alone'}, as {reason}.", flush=True)

    def build_extension(self, ext):
        target = ext.name.rpartition(".")[2]
        self.cmake("--build", self.build_folder, "--target", target, *parallel(os.environ.get("MAX_JOBS", "")))
        built = Path(self.get_ext_fullpath(ext.name)).resolve()
        built.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.build_folder / built.name, built)

    def cmake(self, *arguments):
        subprocess.run([find_tool("cmake"), *map(str, arguments)], check=True)


def find_tool(name):
    """The path of cmake or ninja: beside this Python, whose environment may not be activated, else on PATH."""
    path = shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))
    if not path:
        raise SystemExit(f"doublehead's build needs {name}; `pip install {name}` gives it.")
    return path


if __name__ == "__main__":
    check_setuptools(setuptools.__version__)
    setup(
        ext_modules=[Extension(f"doublehead.{part}", sources=[], py_limited_api=STABLE_ABI) for part in PARTS],
        cmdclass={"build": FreshBuild, "build_ext": CMakeBuild},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if STABLE_ABI else {},
        setup_requires=build_requirements(find_torch()),
    )
