"""The commands of evidence/run.sh are such as doublehead takes, and what has ended is not done again."""

import importlib
import os
import shlex
import subprocess

import pytest

from doublehead.analysis.heads.specs import KINDS, parse_variant, plan
from doublehead.recipes import RECIPES
from tests.support.evidence import FOLDER

PROGRAM = """#!/usr/bin/env bash
printf '%q ' "$@" >> "$CALLS"
echo >> "$CALLS"
if [[ " $* " == *" train "* ]]; then mkdir -p "${@: -1}" && touch "${@: -1}/metrics.json"; fi
"""
PARTS = ("start", "own-data", "bccd", "heads", "heads-narrow", "heads-bccd", "factors", "balance", "figures")


@pytest.fixture(scope="module")
def called(tmp_path_factory):
    """The words of every call of a first run, and of a second, of one seed."""
    folder = tmp_path_factory.mktemp("run")
    for name in ("python", "torchrun"):
        (folder / name).write_text(PROGRAM)
        (folder / name).chmod(0o755)
    found = []
    for number in (1, 2):
        calls = folder / f"calls-{number}"
        own = {"CALLS": str(calls), "LANES": "1", "SEEDS": "0", "OUT": str(folder / "out"), "DATA": "/blood cells"}
        environment = os.environ | own | {"PATH": f"{folder}:{os.environ['PATH']}"}
        subprocess.run([FOLDER / "run.sh", *PARTS], env=environment, check=True)
        lines = [shlex.split(line) for line in calls.read_text().splitlines()]
        found.append([line[line.index("doublehead") + 1 :] for line in lines])
    return found


def test_every_command_is_parsed(called, monkeypatch):
    work = {"train": "start", "analyze": "run"}
    done = []
    for name, *rest in called[0]:
        module = importlib.import_module(f"doublehead.cli.{name}")
        monkeypatch.setattr(module, work[name], lambda *arguments, **options: done.append(arguments))
        module.main(rest)
    assert len(done) == len(called[0]) == 2 + 2 + 4 + 1 + 1 + 1 + 1 + 2 + 2


def test_every_factor_changes_a_head(called):
    for words in called[0]:
        if "--vary" in words:
            end = words.index("--out") if words.index("--out") > words.index("--vary") else len(words)
            texts = words[words.index("--vary") + 1 : end]
            recipe, variants = RECIPES["miniature-double-head-ext"], {text: parse_variant(text) for text in texts}
            members = plan(recipe, KINDS, variants, KINDS)
            base_again = {"model.loss.l_fc=0.7,model.loss.l_conv=0.8"}
            assert {member.variant for member in members} - {"base"} >= set(texts) - base_again


def test_trainings_that_have_ended_are_not_repeated(called):
    assert [words[:2] for words in called[1]] == [words[:2] for words in called[0] if words[0] != "train"]
