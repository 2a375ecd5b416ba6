"""`doublehead analyze FIGURE ...`: the paper's Figures 2-4 and 6-10 for any detectors and data."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Annotated

import tyro

from doublehead.analysis import options
from doublehead.errors import shown_to_user

PROGRAM = "doublehead analyze"
MODULES = {
    options.SlidingWindows: "sliding_windows",
    options.Pearson: "pearson",
    options.FCWeights: "fc_weights",
    options.FeatureCorrelation: "feature_correlation",
    options.BalanceWeights: "balance_weights",
    options.Qualitative: "qualitative",
    options.Heads: "heads.command",
}
Figure = (
    Annotated[options.SlidingWindows, tyro.conf.subcommand("sliding-windows")]
    | Annotated[options.Pearson, tyro.conf.subcommand("pearson")]
    | Annotated[options.FCWeights, tyro.conf.subcommand("fc-weights")]
    | Annotated[options.FeatureCorrelation, tyro.conf.subcommand("feature-correlation")]
    | Annotated[options.BalanceWeights, tyro.conf.subcommand("balance-weights")]
    | Annotated[options.Qualitative, tyro.conf.subcommand("qualitative")]
    | Annotated[options.Heads, tyro.conf.subcommand("heads")]
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exits with 2 on a user's error."""
    with shown_to_user():
        description = (
            "Analyse trained detectors as the paper does; each figure becomes PNG and CSV files.\n"
            "On several processes: torchrun --nproc-per-node N -m doublehead analyze ..."
        )
        run(tyro.cli(Figure, prog=PROGRAM, description=description, args=arguments))


def run(chosen: options.Output) -> None:
    """Draw one figure on this process and those beside it."""
    from doublehead.engine.distributed import join_world  # only now: these import PyTorch
    from doublehead.engine.logs import counted_warnings

    module = importlib.import_module(f"doublehead.analysis.{MODULES[type(chosen)]}")
    with join_world(chosen.device) as world, counted_warnings(shown=world.is_main):
        module.run(chosen, world)
