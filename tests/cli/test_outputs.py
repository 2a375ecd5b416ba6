"""No command replaces a file that exists without --overwrite, and it says so before the work."""

import importlib
import os

import pytest

from doublehead.cli.outputs import check_output
from doublehead.errors import UserError

CASES = {
    "evaluate --out": ["nowhere", "--out", "old.json"],
    "evaluate --metrics": ["nowhere", "--metrics", "old.json"],
    "tables --out": ["6", "--out", "old.json"],
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_exists_is_refused(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.json").write_text("mine")
    command, option = case.split()
    main = importlib.import_module(f"doublehead.cli.{command}").main
    with pytest.raises(SystemExit) as stop:
        main(CASES[case])
    said = f"error: {option} old.json: exists: give another file, or --overwrite to replace it\n"
    assert (stop.value.code, capsys.readouterr().err) == (2, said)
    assert (tmp_path / "old.json").read_text() == "mine"
    with pytest.raises(SystemExit) if command == "evaluate" else open(os.devnull):
        main([*CASES[case], "--overwrite"])
    assert "exists" not in capsys.readouterr().err  # evaluate now says that there is no checkpoint


def test_devices_and_new_files_are_accepted(tmp_path):
    check_output("/dev/null", "--out", False)
    check_output(str(tmp_path / "new"), "--out", False)
    (tmp_path / "old").touch()
    check_output(str(tmp_path / "old"), "--out", True)
    os.symlink(tmp_path / "old", tmp_path / "link")
    with pytest.raises(UserError, match="--metrics .*link: exists"):
        check_output(str(tmp_path / "link"), "--metrics", False)
