"""`python -m doublehead.evaluate CHECKPOINT [options]`: measure a trained detector on a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from doublehead.config import Fusion, ReadOut, to_dict
from doublehead.engine.data_options import EvaluationData, check_output, data_config
from doublehead.engine.errors import shown_to_user

PROGRAM = "python -m doublehead.evaluate"


@dataclass(frozen=True)
class Options:
    """What the command line takes."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A model.safetensors, or the folder of a run."""
    data: EvaluationData = field(default_factory=EvaluationData)
    readout: ReadOut | None = None
    """Of an Ext model: which head classifies and which gives the boxes."""
    fusion: Fusion | None = None
    """Of an Ext model: how `fused` joins the two classifiers."""
    ext_gate: float | None = None
    """Of an Ext model read out as `fused`: leave out RoIs whose best fc-score is not above this; approximate."""
    out: str | None = None
    """Write the detections to this file, in COCO's submission format."""
    metrics: str | None = None
    """Write the metrics to this file; RUN/metrics-NAME.json counts in `python -m doublehead.tables`."""
    device: str = "auto"
    """`auto`: CUDA where there is one, else CPU."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exits with 2 on a user's error."""
    with shown_to_user():
        description = "Measure a detector: COCO's twelve numbers, AP per class, and VOC's AP for voc data."
        run(tyro.cli(Options, prog=PROGRAM, description=description, args=arguments))


def run(options: Options) -> None:
    """Evaluate on this process and those beside it."""
    from doublehead.data import build_dataset  # these bring PyTorch: --help need not wait for it
    from doublehead.engine.checkpoint import load_model
    from doublehead.engine.distributed import join_world
    from doublehead.engine.errors import config_errors
    from doublehead.engine.evaluator import evaluate, format_metrics
    from doublehead.engine.files import write_json
    from doublehead.engine.logs import counted_warnings, say

    check_output(options.out)
    check_output(options.metrics, "--metrics")
    with join_world(options.device) as world, counted_warnings(shown=world.is_main):
        model, recipe, classes, _ = load_model(options.checkpoint)
        with config_errors():
            set_readout(model, options, recipe.model.detection)
            data = data_config(recipe.data, options.data)
            dataset = build_dataset(data, "val", classes=classes)
        if world.is_main:
            say(f"{options.checkpoint}: {recipe.name}, on {len(dataset)} images of {dataset.name}")
        metrics, results = evaluate(
            model.to(world.device),
            dataset,
            world,
            voc=data.format == "voc",
            workers=data.workers,
            progress=world.is_main,
        )
        if options.out:
            world.on_main(lambda: write_json(options.out, results, indent=None))
        if options.metrics:
            how = {"detection": readout_used(model), "data": to_dict(data)}
            world.on_main(lambda: write_json(options.metrics, how | metrics))
        if world.is_main:
            say(format_metrics(metrics))
            if options.out:
                say(f"\n{len(results)} detections written to {options.out}")


def set_readout(model, options: Options, trained) -> None:
    """Change an Ext model's read-out where the command line asks for it."""
    if options.readout or options.fusion or options.ext_gate is not None:
        readout = options.readout or ("fused" if options.fusion else trained.readout)
        model.set_readout(readout, options.fusion or trained.fusion, options.ext_gate)


def readout_used(model) -> dict[str, str | float]:
    """The part of `DetectionConfig` that the command line may change."""
    used = model.detector.detection
    return {"readout": used.readout, "fusion": used.fusion, "ext_gate": used.ext_gate}


if __name__ == "__main__":
    main()
