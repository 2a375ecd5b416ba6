"""Where a result was made: the command without the program's path, and the commit of this checkout alone."""

import json
import re
import subprocess

import pytest
import torch

from doublehead.analysis import provenance as module
from doublehead.analysis.provenance import PACKAGE, command_line, commit, provenance
from doublehead.version import __version__


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_what_it_says(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/doublehead", "analyze", "pearson", "a b=runs/a"])
    found = json.loads(json.dumps(provenance()))
    assert list(found) == ["command", "version", "commit", "date", "machine"]
    assert found["command"] == "doublehead analyze pearson 'a b=runs/a'" and found["version"] == __version__
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", found["date"])
    machine = found["machine"]
    assert list(machine) == ["processor", "cores", "threads", "torch"] and machine["processor"]
    assert machine["cores"] >= 1 and machine["threads"] == torch.get_num_threads()
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    assert provenance()["machine"] == machine | {"gpu": "a GPU"}
    assert "/" not in json.dumps(found["machine"]) and machine["torch"] == torch.__version__


@pytest.mark.parametrize(
    "program, shown",
    [
        ("/venv/bin/doublehead", "doublehead"),
        (str(PACKAGE / "__main__.py"), "doublehead"),
        (str(PACKAGE / "analyze.py"), "doublehead analyze"),
        ("/home/me/study.py", "study.py"),
        ("-c", "-c"),
    ],
)
def test_the_program_has_no_path(program, shown):
    assert command_line([program, "--out", "x y"]) == f"{shown} --out 'x y'"


def test_the_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    package = tmp_path / "project" / "doublehead"
    package.mkdir(parents=True)
    assert commit(package) is None
    git(package.parent, "init", "-q")
    assert commit(package) is None  # nothing is committed
    (package / "file").write_text("one")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-q", "-m", "first")
    assert commit(package) == git(package.parent, "rev-parse", "--short", "HEAD").strip()
    (package / "file").write_text("two")
    assert commit(package) == git(package.parent, "rev-parse", "--short", "HEAD").strip() + "-dirty"
    installed = package.parent / "venv" / "site-packages" / "doublehead"
    installed.mkdir(parents=True)
    assert commit(installed) is None  # the checkout around it is another project's
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(package) is None  # no git


def test_the_processor_has_a_name_everywhere(monkeypatch):
    monkeypatch.setattr(module.Path, "read_text", lambda *_, **__: "model name\t: A 9000\nmodel name\t: A 9000\n")
    assert module.processor_name() == "A 9000"

    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(module.Path, "read_text", missing)
    assert module.processor_name()
