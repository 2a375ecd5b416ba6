"""The build's decisions (setup.py, without building), and the state of what was built."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import doublehead.ops  # noqa: F401  (defines the operators)
from doublehead.ops import _library
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def build():
    """setup.py as a module; it builds nothing when imported."""
    spec = importlib.util.spec_from_file_location("doublehead_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", ["65.5.0", "76.1"])
def test_an_old_setuptools_is_named(build, version):
    with pytest.raises(SystemExit, match=f"setuptools {version} is too old .* pip install 'setuptools>=77'"):
        build.check_setuptools(version)


def test_the_oldest_setuptools_is_that_of_pyproject(build):
    build.check_setuptools(f"{build.OLDEST_SETUPTOOLS}.0.1")
    assert f'"setuptools>={build.OLDEST_SETUPTOOLS}"' in (ROOT / "pyproject.toml").read_text()


# ---------------------------------------------------------------------------------------------
# Which torch


def make_torch(folder: Path, version: str, cuda: bool) -> Path:
    (folder / "lib").mkdir(parents=True)
    (folder / "version.py").write_text(f"__version__ = '{version}'\ncuda: str | None = None\n")
    if cuda:
        (folder / "lib" / "libtorch_cuda.so").touch()
    return folder


def test_find_torch_is_the_running_one(build):
    found = build.find_torch()
    assert found.folder == Path(torch.__file__).parent
    assert found.version == torch.__version__
    assert found.cuda == (torch.version.cuda is not None)


def test_find_torch_looks_past_an_isolated_build(build, monkeypatch):
    """In an isolated build this interpreter sees no torch, but one started without PYTHONPATH does."""
    seen_here = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else seen_here(name))
    assert build.find_torch().folder == Path(torch.__file__).parent


def test_find_torch_where_there_is_none(build, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    nothing = subprocess.CompletedProcess([], 0, stdout="\n", stderr="")
    monkeypatch.setattr(build.subprocess, "run", lambda *args, **kwargs: nothing)
    assert build.find_torch() is None


@pytest.mark.parametrize("version, cuda", [("2.13.0+cpu", False), ("2.15.0+cu130", True)])
def test_read_torch(build, tmp_path, version, cuda):
    torch_found = build.read_torch(make_torch(tmp_path / "torch", version, cuda))
    assert (torch_found.version, torch_found.cuda) == (version, cuda)


def test_read_torch_of_a_broken_installation(build, tmp_path):
    (tmp_path / "torch").mkdir()
    assert build.read_torch(tmp_path / "torch") is None


@pytest.mark.parametrize(
    "version, wanted",
    [
        (None, ["torch>=2.11"]),
        ("2.9.1", ["torch>=2.11"]),
        ("2.10.0+cu128", ["torch>=2.11"]),
        ("2.11.0", []),
        ("2.13.0+cpu", []),
        ("2.15.0a0+git123", []),
        ("3.0.0", []),
    ],
)
def test_torch_is_fetched_only_where_none_will_do(build, version, wanted):
    found = version and build.Torch(Path("anywhere"), version, False)
    assert build.build_requirements(found) == wanted


# ---------------------------------------------------------------------------------------------
# CUDA or not, for which architectures


@pytest.mark.parametrize(
    "torch_cuda, nvcc, wanted, built, reason",
    [
        (True, "/c/nvcc", "", True, "torch 2.15.0 has CUDA and nvcc is /c/nvcc"),
        (True, "/c/nvcc", "1", True, "torch 2.15.0 has CUDA"),
        (True, "/c/nvcc", "0", False, "DOUBLEHEAD_CUDA=0"),
        (True, None, "", False, "no nvcc was found"),
        (False, "/c/nvcc", "", False, "torch 2.15.0 was built without CUDA"),
        (False, None, "", False, "without CUDA and no nvcc"),
        (False, None, "0", False, "DOUBLEHEAD_CUDA=0"),
    ],
)
def test_decide_cuda(build, torch_cuda, nvcc, wanted, built, reason):
    decision, why = build.decide_cuda(build.Torch(Path("t"), "2.15.0", torch_cuda), nvcc, wanted)
    assert decision is built
    assert reason in why


@pytest.mark.parametrize("torch_cuda, nvcc, missing", [(True, None, "no nvcc"), (False, "/c/nvcc", "without CUDA")])
def test_cuda_demanded_but_impossible(build, torch_cuda, nvcc, missing):
    with pytest.raises(SystemExit, match=f"DOUBLEHEAD_CUDA=1 demands .*{missing}"):
        build.decide_cuda(build.Torch(Path("t"), "2.15.0", torch_cuda), nvcc, "1")


@pytest.mark.parametrize(
    "arch_list, gpus, reason",
    [
        ("7.5", ["9.0"], "8.0 or newer and TORCH_CUDA_ARCH_LIST names 7.5 alone"),
        ("6.1;7.5+PTX", [], "TORCH_CUDA_ARCH_LIST names 6.1, 7.5+PTX alone"),
        ("", ["7.5", "7.5"], "the visible GPUs have 7.5 alone"),
        ("7.5;8.0", [], ""),
        ("", ["7.5", "9.0"], ""),
        ("9.0", ["7.5"], ""),
        ("", [], ""),
        (" ; ", [], ""),
        ("10.0", [], ""),
    ],
)
def test_gpus_that_are_too_old(build, arch_list, gpus, reason):
    torch_found = build.Torch(Path("t"), "2.15.0", True)
    decision, why = build.decide_cuda(torch_found, "/c/nvcc", "", arch_list, gpus)
    assert decision is (not reason)
    assert reason in why
    if not reason:
        assert build.decide_cuda(torch_found, "/c/nvcc", "1", arch_list, gpus)[0]
        return
    with pytest.raises(SystemExit, match="DOUBLEHEAD_CUDA=1 demands the CUDA part, but the kernels need compute capab"):
        build.decide_cuda(torch_found, "/c/nvcc", "1", arch_list, gpus)
    assert build.decide_cuda(torch_found, "/c/nvcc", "0", arch_list, gpus) == (False, "DOUBLEHEAD_CUDA=0")


def test_cuda_switch_is_checked(build):
    with pytest.raises(SystemExit, match="DOUBLEHEAD_CUDA: got 'yes'; accepted are 0"):
        build.decide_cuda(build.Torch(Path("t"), "2.15.0", True), "/c/nvcc", "yes")


def make_nvcc(folder: Path) -> str:
    folder.mkdir(parents=True)
    (folder / "nvcc").write_text("#!/bin/sh\n")
    (folder / "nvcc").chmod(0o755)
    return str(folder / "nvcc")


def test_find_nvcc_prefers_cuda_home_then_path(build, tmp_path):
    home, path = make_nvcc(tmp_path / "home" / "bin"), make_nvcc(tmp_path / "path")
    environ = {"CUDA_HOME": str(tmp_path / "home"), "PATH": str(tmp_path / "path")}
    assert build.find_nvcc(environ) == home
    assert build.find_nvcc({"CUDA_PATH": environ["CUDA_HOME"], "PATH": environ["PATH"]}) == home
    assert build.find_nvcc({"PATH": environ["PATH"]}) == path


KNOWN = ["75", "80", "86", "89", "90", "100", "103", "120"]


@pytest.mark.parametrize(
    "known, arch_list, gpus, archs",
    [
        (KNOWN, "", [], "80-real;86-real;89-real;90-real;100-real;120"),
        (["75", "80", "86", "89", "90"], "", [], "80-real;86-real;89-real;90"),
        (KNOWN, "", ["9.0"], "90"),
        (KNOWN, "", ["8.6", "8.0", "8.6"], "80-real;86"),
        (["80", "90"], "", ["10.0"], "90-virtual"),  # newer than nvcc: PTX
        (KNOWN, "8.0;9.0+PTX", ["12.0"], "80-real;90"),
        (KNOWN, "8.0 9.0a, 10.0f", [], "80-real;90a-real;100f-real"),
        (KNOWN, "7.5;8.0;9.0+PTX;", [], "80-real;90"),  # what is too old is left out
        (KNOWN, "", ["7.5", "8.6"], "86"),
        (["75", "80"], "", ["12.0"], "80-virtual"),
    ],
)
def test_choose_archs(build, known, arch_list, gpus, archs):
    assert build.choose_archs(known, arch_list, gpus) == archs


def test_arch_list_is_checked(build):
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: got 'Hopper'; accepted are entries like 8.0"):
        build.choose_archs(KNOWN, "8.0;Hopper")


def test_max_jobs(build):
    assert build.parallel("") == []
    assert build.parallel("3") == ["--parallel", "3"]
    for wrong in ("0", "-1", "many"):
        with pytest.raises(SystemExit, match="MAX_JOBS: got"):
            build.parallel(wrong)


# ---------------------------------------------------------------------------------------------
# What was built and registered


def test_every_kernel_folder_has_its_python_folder():
    kernels = {path.parent.parent.name for path in (ROOT / "csrc").glob("*/c*/*.c*")}
    assert kernels
    assert kernels <= {path.parent.name for path in (ROOT / "doublehead" / "ops").glob("*/op.py")}


def test_every_kernel_has_a_schema():
    """A kernel registered under a misspelt name would never run: torch lists it as dangling."""
    dangling = torch._C._dispatch_find_dangling_impls()
    assert not [line for line in dangling if "doublehead::" in line]


def test_schemas_are_those_torch_knows():
    known = {schema.name: schema for schema in torch._C._jit_get_all_schemas()}
    assert _library.SCHEMAS
    for name, text in _library.SCHEMAS.items():
        schema = known[f"doublehead::{name}"]
        assert not schema.is_mutable, name
        assert [argument.name for argument in schema.arguments] == [
            argument.name for argument in torch._C.parse_schema(f"doublehead::{text}").arguments
        ]


def test_every_operator_has_reference_and_fake():
    for name in _library.SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"doublehead::{name}", "CompositeExplicitAutograd"), name
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"doublehead::{name}", "Meta"), name


@pytest.mark.skipif("_C" in _library.UNLOADED, reason=f"the CPU part is not loaded: {_library.UNLOADED.get('_C')}")
def test_every_operator_with_a_cpu_kernel_uses_it():
    sources = "".join(path.read_text() for path in (ROOT / "csrc").glob("*/cpu/*.cpp"))
    implemented = set(re.findall(r'\bimpl\("(\w+)"', sources))
    assert implemented == {name for name in _library.SCHEMAS if _library.native(name, "cpu")} - _library.CPU_KERNELS
    assert implemented, "no CPU kernel at all"


# ---------------------------------------------------------------------------------------------
# Other installations, each in a Python of its own

USE_AN_OPERATOR = """
import torch, doublehead.ops
boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
kept = doublehead.ops.nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5)
print("kept", kept.tolist())
"""


# An editable installation would find the compiled parts of this checkout for any package of the name.
WITHOUT_EDITABLE_FINDER = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if finder.__module__.startswith("_frozen_importlib")]
"""


def run_python(code: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, **kwargs)


def test_operators_need_torch_alone():
    blocked = ("torchvision", "PIL", "matplotlib", "pycocotools", "tyro", "tqdm", "tensorboard", "safetensors", "scipy")
    code = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n" + USE_AN_OPERATOR
    done = run_python(code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "kept [1, 2]" in done.stdout


def test_importing_doublehead_is_cheap():
    done = run_python("import sys, doublehead; print(doublehead.__version__, 'torch' in sys.modules)", cwd=ROOT)
    assert done.stdout.split() == [doublehead.__version__, "False"], done.stderr


@pytest.fixture
def uncompiled(tmp_path):
    """A copy of the operators alone, without the compiled parts; returns (folder, environment to run in)."""
    package = tmp_path / "doublehead"
    package.mkdir()
    for name in ("__init__.py", "version.py"):
        shutil.copy(ROOT / "doublehead" / name, package)
    shutil.copytree(ROOT / "doublehead" / "ops", package / "ops", ignore=shutil.ignore_patterns("__pycache__"))
    return package, dict(os.environ, PYTHONPATH=str(tmp_path))


def test_without_compiled_part_the_reference_serves_and_says_so_once(uncompiled, tmp_path):
    package, environ = uncompiled
    again = "doublehead.ops.nms(boxes, torch.rand(3), 0.5); print(doublehead.__file__)\n"
    done = run_python(WITHOUT_EDITABLE_FINDER + USE_AN_OPERATOR + again, cwd=tmp_path, env=environ)
    assert done.returncode == 0, done.stderr
    assert "kept [1, 2]" in done.stdout and str(package) in done.stdout
    assert done.stderr.count("RuntimeWarning") == 1
    assert "runs without its compiled part doublehead._C: it is not built" in done.stderr
    assert "`pip install -e .` builds the part" in done.stderr


def test_a_broken_compiled_part_is_named_and_the_reference_serves(uncompiled, tmp_path):
    package, environ = uncompiled
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (package / f"_C{suffix}").write_bytes(b"this is no library")
    done = run_python(WITHOUT_EDITABLE_FINDER + USE_AN_OPERATOR, cwd=tmp_path, env=environ)
    assert done.returncode == 0, done.stderr
    assert "kept [1, 2]" in done.stdout
    assert done.stderr.count("RuntimeWarning") == 1
    assert re.search(r"doublehead\._C: it does not load: .*_C", done.stderr)
