"""Packages load whatever the compiler does with the C++ standard library."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._inductor import config

from doublehead.errors import UserError
from doublehead.exporting import package
from doublehead.exporting.compiler import check_compiler, inductor_settings
from tests.support.export_samples import QUICK

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the link options are those of Linux")

COMPILER = """#!/bin/sh
case " $* " in *" -shared "*) exec {compiler} "$@" {options} ;; esac
exec {compiler} "$@"
"""
OPEN = """
import sys, torch
x = torch.linspace(-1, 1, 8).view(2, 4)
print(torch._inductor.aoti_load_package(sys.argv[1])(x).tolist())
"""


@pytest.fixture
def gxx() -> str:
    found = shutil.which("g++")
    if found is None:
        pytest.skip("needs g++")
    return found


@pytest.fixture
def static(gxx, tmp_path) -> Iterator[None]:
    """A compiler that links libstdc++ into what it builds, as PyTorch's compiler."""
    archive = subprocess.run([gxx, "-print-file-name=libstdc++.a"], capture_output=True, text=True).stdout.strip()
    if not Path(archive).is_file():
        pytest.skip("there is no libstdc++.a")
    (tmp_path / "static").mkdir()
    made = tmp_path / "static" / "g++"
    made.write_text(COMPILER.format(compiler=gxx, options="-static-libstdc++"))
    made.chmod(0o755)
    with config.patch({"cpp.cxx": (None, str(made))}):
        yield


@pytest.mark.parametrize("name", ["g++", "no-such-compiler", "false"])  # the last builds nothing
def test_an_ordinary_compiler_stays_as_it_is(tmp_path, name):
    with config.patch({"cpp.cxx": (None, name)}):
        assert inductor_settings(tmp_path) == {}


BUILDS = """#!/bin/sh
echo "$#: $*" > "{folder}/arguments"
while [ "$1" != -o ]; do shift; done
echo "{needed}" > "$2"
"""


@pytest.fixture
def compiler_that_needs(tmp_path):
    """(the library that its output needs) -> a compiler, in a folder whose name has a space."""

    def make(needed: str) -> Path:
        made = tmp_path / "some compilers" / "g++"
        made.parent.mkdir()
        made.write_text(BUILDS.format(folder=tmp_path, needed=needed))
        made.chmod(0o755)
        return made

    return make


@pytest.mark.parametrize("library", ["libstdc++.so.6", "libc++.so.1"])
def test_a_compiler_that_shares_its_library_stays_as_it_is(tmp_path, compiler_that_needs, library):
    with config.patch({"cpp.cxx": (None, shlex.quote(str(compiler_that_needs(library))))}):
        assert inductor_settings(tmp_path) == {}


@pytest.mark.parametrize("given", ["", " -pipe"])
def test_a_compiler_that_links_its_own_library_hides_it(tmp_path, compiler_that_needs, given):
    with config.patch({"cpp.cxx": (None, shlex.quote(str(compiler_that_needs("libc.so.6"))) + given)}):
        settings = inductor_settings(tmp_path)
    _, script = settings.pop("cpp.cxx")
    assert settings == {"aot_inductor.precompile_headers": False}
    assert Path(script) == tmp_path / "g++"  # by the name older versions of PyTorch tell the kind of compiler
    for mode, added in (("-c", ""), ("-shared", " -Wl,--exclude-libs,ALL")):
        subprocess.run([script, mode, "two words", "-o", tmp_path / "a"], check=True)
        number = 4 + bool(given) + bool(added)
        arguments = f"{number}:{given} {mode} two words -o {tmp_path / 'a'}{added}"
        assert (tmp_path / "arguments").read_text().strip() == arguments


def test_a_compiler_may_have_arguments(monkeypatch, gxx):
    monkeypatch.setenv("CXX", f"{shlex.quote(gxx)} -pipe")
    check_compiler()
    for missing in ("no-such-compiler -pipe", "g++ '", ""):
        monkeypatch.setenv("CXX", missing)
        with pytest.raises(UserError, match="no compiler is found"):
            check_compiler()


@pytest.mark.usefixtures("static")
def test_a_package_keeps_a_standard_library_of_its_own_to_itself(tmp_path, monkeypatch):
    """In a process of its own, which otherwise would crash, or raise `std::bad_cast`."""
    monkeypatch.setattr(package, "INDUCTOR_OPTIONS", QUICK)
    with torch.no_grad():
        model, path = nn.Linear(4, 3).eval(), tmp_path / "a.pt2"
        package.write_package(model, (torch.randn(2, 4),), {}, path)
        expected = model(torch.linspace(-1, 1, 8).view(2, 4))
    done = subprocess.run([sys.executable, "-c", OPEN, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout.splitlines()[-1])), expected)
    with zipfile.ZipFile(path) as archive:
        (library,) = [archive.read(name) for name in archive.namelist() if name.endswith(".so")]
    assert b"libstdc++.so" not in library  # so the compiler did link its own
