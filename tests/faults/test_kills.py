"""Trainings killed at random and resumed until they end: the bits of one that was never stopped."""

import os
import random
import signal
import time

import pytest

from tests.support.engine_standin import finish, one_thread  # noqa: F401 (a fixture)
from tests.support.training_runs import assert_same, contents, train

VARIANTS = {
    "average-accumulate-evaluate": "--train.ema-decay 0.9 --train.accumulate 2 --train.eval-every 5",
    "loader-processes": "--data.workers 2 --train.checkpoint-every 1",
    "bf16": "--train.amp bf16 --train.checkpoint-every 2",
    "sgd-multiscale": "--train.optimizer sgd --train.lr 0.01 --model.image.min-size 48 64 80",
}
KILLS = 5  # of one training, which then is left alone


def live(folder, options, log, rng, seconds) -> int:
    """One life of a training: until it ends, or a random moment; half of the deaths wait for a file to be written."""
    begun = (folder / "recipe.json").exists()
    process = train(folder, *(["--resume", folder] if begun else options), log=log)
    if seconds is None:
        return finish(process)
    end = time.monotonic() + rng.uniform(0.1, 1.0) * seconds
    in_wait = rng.random() < 0.5
    while process.is_alive() and time.monotonic() < end + seconds * in_wait:
        if in_wait and time.monotonic() > end and any(name.startswith(".") for name in names(folder)):
            break
        time.sleep(0.0005)
    process.kill()
    return finish(process)


def names(folder) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_at_random_and_resumed_it_ends_with_the_same_bits(variant, tmp_path, seeded, rounds):
    whole, log = tmp_path / "whole", tmp_path / "log.txt"
    options = VARIANTS[variant].split()
    begun = time.monotonic()
    assert finish(train(whole, *options)) == 0
    seconds = time.monotonic() - begun
    for number in range(rounds(1)):
        folder = tmp_path / f"run-{number}"
        for _ in range(KILLS):
            assert live(folder, options, log, seeded, seconds) in (0, -signal.SIGKILL), log.read_text()
        assert live(folder, options, log, random.Random(), None) == 0, log.read_text()
        assert_same(contents(folder), contents(whole))
        # What a kill left behind is hidden and harmless, and gone with the next checkpoint of the same file.
        assert set(names(folder)) - {name for name in names(folder) if name.startswith(".")} == set(names(whole))
