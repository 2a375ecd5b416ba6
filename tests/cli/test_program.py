"""The program `doublehead`: its list of commands, unknown ones, help without slow imports, the former module names."""

import importlib
import json
import os
import runpy
import subprocess
import sys
import warnings

import pytest

import doublehead
import doublehead.cli as cli
from tests.support.paths import ROOT

NEW_MODULES = {name: f"doublehead.cli.{name}" for name in cli.COMMANDS} | {"info": "doublehead.cli.installation"}
FORMER = [name for name in cli.COMMANDS if name not in ("data", "train", "calibrate", "quantize")]
"""Commands that were modules `doublehead.NAME`; `train` still is one, `doublehead.data` is the data sets."""
SLOW = ("torch", "torchvision", "numpy", "matplotlib", "PIL", "pycocotools", "tensorboard", "triton", "safetensors")

CALL_EACH = """
import contextlib, io, json, runpy, sys

results = {}
for module, *arguments in json.loads(sys.argv[1]):
    sys.argv = ["program", *arguments]
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code or 0
    loaded = sorted({name.partition(".")[0] for name in sys.modules})
    results[" ".join([module, *arguments])] = [code, output.getvalue(), errors.getvalue(), loaded]
print(json.dumps(results))
"""


def call_each(*calls: list[str]) -> dict[str, list]:
    """Run modules as `python -m` does, one after the other in one new process.

    Args:
        calls: each a module's name and arguments.

    Returns:
        By call: exit code, stdout, stderr, and the packages loaded until then.
    """
    command = [sys.executable, "-c", CALL_EACH, json.dumps(calls)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_the_commands_are_listed(capsys, arguments):
    cli.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("  ")] == [f"  {n:9}  {what}" for n, what in cli.COMMANDS.items()]
    assert max(map(len, lines)) < 100


@pytest.mark.parametrize(
    "name, hint",
    [
        ("trian", "did you mean 'train'?"),
        ("analyse", "did you mean 'analyze'?"),
        ("--resume", f"the commands are: {', '.join(cli.COMMANDS)}"),
        ("cli", f"the commands are: {', '.join(cli.COMMANDS)}"),
    ],
)
def test_an_unknown_command_is_one_line(capsys, name, hint):
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 2
    assert capsys.readouterr() == ("", f"error: there is no command {name!r}; {hint}\n")


def test_the_version_is_one_line(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"doublehead {doublehead.__version__}\n"


def test_a_command_gets_the_rest_of_the_line(monkeypatch):
    calls = []
    monkeypatch.setattr("doublehead.cli.tables.main", calls.append)
    cli.main(["tables", "1", "--format", "csv"])
    monkeypatch.setattr(sys, "argv", ["doublehead", "tables"])
    cli.main()
    assert calls == [["1", "--format", "csv"], []]


def test_the_installed_program_is_this_one():
    assert '[project.scripts]\ndoublehead = "doublehead.cli:main"\n' in (ROOT / "pyproject.toml").read_text()


def test_help_comes_without_slow_imports():
    """No command's --help imports them; where nothing is to be parsed, tyro is not imported either."""
    alone = ["--help", "--version", "nonsense"]
    bare = [["doublehead"], *(["doublehead", word] for word in alone), ["doublehead", "info", "--help"]]
    helps = [["doublehead", name, "--help"] for name in cli.COMMANDS if name != "info"]
    results = call_each(*bare, *helps, ["doublehead.train", "--help"])
    for call, (code, output, errors, loaded) in results.items():
        assert not set(loaded) & set(SLOW), call
        if call.split() in bare:
            assert "tyro" not in loaded, call
        if call == "doublehead nonsense":
            assert (code, output) == (2, "")
        else:
            assert (code, errors) == (0, ""), call  # `doublehead.train`, too, says nothing new
    for name in cli.COMMANDS:
        assert results[f"doublehead {name} --help"][1].startswith(f"usage: doublehead {name} ")
    assert results["doublehead.train --help"][1] == results["doublehead train --help"][1]


def test_a_former_module_runs_the_command_and_says_the_new_name_once():
    results = call_each(*([f"doublehead.{name}", "--help"] for name in FORMER if name != "info"))
    assert len(results) == 6
    for name in FORMER[:-1]:
        code, output, errors, _ = results[f"doublehead.{name} --help"]
        assert code == 0 and output.startswith(f"usage: doublehead {name} ")
        assert errors == note(name)


def note(name: str) -> str:
    return f"note: python -m doublehead.{name} is now doublehead {name}; the next release removes the old name\n"


@pytest.mark.parametrize("rank, said", [("0", note("info")), ("1", "")])
def test_one_of_several_processes_says_the_new_name(monkeypatch, capsys, rank, said):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "argv", ["info"])
    runpy.run_module("doublehead.info", run_name="__main__", alter_sys=True)
    output, errors = capsys.readouterr()
    assert output.startswith("doublehead ") and errors == said


@pytest.mark.parametrize("name", ["train", *FORMER])
def test_a_former_module_is_the_new_one(monkeypatch, name):
    monkeypatch.delitem(sys.modules, f"doublehead.{name}", raising=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        former = importlib.import_module(f"doublehead.{name}")
        importlib.import_module(f"doublehead.{name}")
    new = importlib.import_module(NEW_MODULES[name])
    assert former.main is importlib.import_module(f"doublehead.cli.{name}").main
    if name == "info":
        assert former.report is new.report and former.served_by is new.served_by
        assert former.compiled_part is new.compiled_part
    else:
        assert former is new  # also what a test replaces in it
    said = [str(warning.message) for warning in caught if warning.category is DeprecationWarning]
    text = f"doublehead.{name} is now {NEW_MODULES[name]}; the next release removes the old name"
    assert said == ([] if name == "train" else [text])


def test_the_warning_names_the_line_that_imports(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "doublehead.tables", raising=False)
    monkeypatch.delitem(sys.modules, "doublehead.info", raising=False)
    script = tmp_path / "script.py"
    script.write_text("import doublehead.tables\n\nfrom doublehead.info import report\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runpy.run_path(str(script))
    assert [(warning.filename, warning.lineno) for warning in caught] == [(str(script), 1), (str(script), 3)]


def test_worker_processes_do_not_repeat_it(monkeypatch, capsys):
    """A process that Python starts afresh imports the former module as `__mp_main__`."""
    monkeypatch.delitem(sys.modules, "doublehead.tables", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        runpy.run_module("doublehead.tables", run_name="__mp_main__", alter_sys=True)
    assert capsys.readouterr() == ("", "")
