"""A small Ext detector learns the same with the fused conv-head as module by module."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.support.paths import ROOT

STEPS = 3


def smaller(recipe):
    """A recipe with small pictures and few boxes; the head, which is compared, is left whole."""
    roi = dataclasses.replace(recipe.model.roi, samples=32)
    image = dataclasses.replace(recipe.model.image, min_size=(64,), max_size=64)
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, roi=roi, image=image),
        data=dataclasses.replace(recipe.data, image_size=64),
    )


@pytest.fixture
def double():
    """In float64: in float32 AdamW makes rounding visible within some steps, as another seed would."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_loss_curve_is_the_same(double, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from fused_training import FUSED, PLAIN, RECOMPUTE, RUNS, losses, small_recipe

    for drawn in ("pictures.draw_curves", "run.draw_results", "run.draw_first_batches"):  # a third of the time
        monkeypatch.setattr(f"doublehead.engine.{drawn}", lambda *args: [])
    plain, *others = (losses(smaller(small_recipe(STEPS, *RUNS[name]))) for name in (PLAIN, FUSED, RECOMPUTE))
    assert len(set(plain)) == STEPS
    for curve in others:
        assert curve == pytest.approx(plain, rel=1e-5)
