"""What makes one wheel serve every torch from 2.11 and every Python from 3.10 on; .ci/wheel builds and installs one."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
import setuptools

from tests.support.paths import ROOT

PARTS = ["_C", "_C_cuda"]
SUFFIX = ".abi3.so"
OWN_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
STABLE_PYTHON = {"PyModuleDef_Init", "Py_BuildValue", "PyBool_FromLong"}  # all in Python's stable ABI since 3.5

needs_stable_abi = pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="a free-threaded Python has no stable ABI"
)


@pytest.fixture(scope="module")
def build():
    """setup.py as a module; it builds nothing when imported."""
    spec = importlib.util.spec_from_file_location("doublehead_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_stable_abi
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the format of the symbols is that of Linux")
@pytest.mark.parametrize("part", PARTS)
def test_a_built_part_uses_the_stable_interfaces_alone(part):
    """Anything else of torch (C++ names above all) may be gone, or mean something else, in the next version."""
    built = ROOT / "doublehead" / f"{part}{SUFFIX}"
    if not built.exists():
        pytest.skip(f"{part} is not built")
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    lines = subprocess.run(["nm", "-D", "--undefined-only", built], capture_output=True, text=True, check=True).stdout
    wanted = [line.split()[-1] for line in lines.splitlines() if " U " in line]
    # Those of the system's libraries carry a version, but for what libtorch_cpu.so has of libstdc++, too.
    of_others = {name for name in wanted if "@" not in name and not re.match(r"_ZN?K?St", name)}
    of_python = {name for name in of_others if re.match(r"_?Py", name)}
    of_torch = {name for name in of_others - of_python if re.fullmatch(r"(aoti_)?torch_\w+", name)}
    assert of_torch and "PyModuleDef_Init" in of_python
    assert of_python <= STABLE_PYTHON, "is it in Python's stable ABI of 3.10? Then enter it above"
    assert of_others - of_python - of_torch == set()


@needs_stable_abi
def test_the_wheel_is_for_every_python(build):
    assert build.STABLE_ABI
    target = re.search(r"Py_LIMITED_API=(\w+)", (ROOT / "CMakeLists.txt").read_text())[1]
    oldest = re.search(r'"py_limited_api": "cp(\d)(\d+)"', (ROOT / "setup.py").read_text())
    assert int(target, 16) == int(oldest[1]) << 24 | int(oldest[2]) << 16
    assert f'requires-python = ">={oldest[1]}.{oldest[2]}"' in (ROOT / "pyproject.toml").read_text()


def test_parts_of_earlier_builds_are_found(build, tmp_path):
    """Python would import `_C.cpython-311-x86_64-linux-gnu.so` in place of the `_C.abi3.so` that was just built."""
    old = [tmp_path / f"_C{OWN_SUFFIX}", tmp_path / f"_C_cuda{SUFFIX}"]
    built, others = tmp_path / f"_C{SUFFIX}", tmp_path / "_C.cpython-27-x86_64-linux-gnu.so"
    for path in [*old, built, others]:
        path.touch()
    assert sorted(build.stale_parts(tmp_path, [str(built)])) == sorted(old)


def test_a_wheel_holds_nothing_of_an_earlier_build(build, tmp_path, monkeypatch):
    monkeypatch.setattr(setuptools.command.build.build, "run", lambda self: None)
    for name in ("doublehead/deleted.py", "another/kept.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    command = build.FreshBuild(setuptools.Distribution())
    command.build_lib = str(tmp_path)
    command.run()
    assert [path.name for path in tmp_path.rglob("*.py")] == ["kept.py"]


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "doublehead" / "py.typed").is_file()
    assert 'doublehead = ["py.typed"]' in (ROOT / "pyproject.toml").read_text()
