"""What `analyze heads` keeps: the state of a training, and its results as JSON, CSV and detectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from doublehead.analysis.heads.curves import learning_curves
from doublehead.analysis.heads.reading import NUMBERS, Readable, readables
from doublehead.analysis.heads.setup import Setup
from doublehead.analysis.heads.specs import BASE, HeadSpec, Member, parse_variant
from doublehead.analysis.heads.training import SideBySide, sampling_of
from doublehead.analysis.output import save_figure, write_csv
from doublehead.analysis.provenance import provenance
from doublehead.engine.checkpoint import MODEL_FILE, save_model
from doublehead.engine.files import replacing, write_json
from doublehead.engine.logs import say
from doublehead.engine.run import METRICS_FILE
from doublehead.errors import UserError
from doublehead.models import DoubleHeadRCNN

FORMAT = "doublehead heads 1"
STATE_FORMAT = "doublehead.heads-state/1"
RECORD_FILE = "heads.json"


@dataclass
class SeedLog:
    """What was measured of one seed so far, as plain values."""

    seed: int
    results: list[dict[str, Any]] = field(default_factory=list)
    """One entry for each detector, read-out and evaluated step."""
    heads: list[dict[str, Any]] = field(default_factory=list)
    """One entry for each head and evaluated step."""

    def add(
        self,
        training: SideBySide,
        wanted: Sequence[Readable],
        metrics: Sequence[Mapping[str, Any]],
        windows: Mapping[HeadSpec, Mapping[str, Any]],
        members: Sequence[Member],
    ) -> None:
        """Note an evaluation (see `Reader.read`) after the present step of `training`."""
        rois = {spec: training.rois[sampling_of(spec.roi)] for spec in training.learners}
        where = {"seed": self.seed, "step": training.step}
        for (member, readout), one in zip(wanted, metrics, strict=True):
            detection = readout.detection
            self.results.append(
                {"variant": member.variant, "kind": member.kind, "readout": detection.readout,
                 "fusion": detection.fusion, **where, "rois": max(rois[spec] for spec in member.heads.values())}
                | {name: one.get(name) for name in NUMBERS}
            )  # fmt: skip
        users = first_users(members)
        for spec, learner in training.learners.items():
            member, branch = users[spec]
            label = f"{member.kind} {branch}" if member.kind == "double_head_ext" else spec.label
            self.heads.append(
                {"variant": member.variant, "head": label, **where, "rois": rois[spec]}
                | learner.take_losses()
                | windows[spec]
            )

    def check(self, path: Path, setup: Setup, step: int) -> None:
        """Hold what was measured up to a step against what is to be measured.

        Raises:
            UserError: other kinds or variants were evaluated, although their heads are the same; `path` is named.
        """
        wanted = {
            (pause, one.member.variant, one.member.kind, one.readout.detection.readout, one.readout.detection.fusion)
            for pause in setup.pauses
            if pause <= step
            for one in readables(setup.members, every=pause == setup.options.steps)
        }
        names = ("step", "variant", "kind", "readout", "fusion")
        if {tuple(one[name] for name in names) for one in self.results} != wanted:
            raise UserError(
                f"{path}: other kinds or variants of these heads were evaluated: give another --out, or the --kinds, "
                "--vary and --varied-kinds it had"
            )

    def summary(self, step: int) -> str:
        """The base detectors' AP at a step, in one line."""
        found = [one for one in self.results if one["step"] == step and one["variant"] == BASE]
        own = {one["kind"]: one["AP"] for one in reversed(found)}  # the first is a kind's own read-out
        return "AP " + ", ".join(
            f"{kind} {100 * ap:.1f}" if ap is not None else f"{kind} -" for kind, ap in reversed(own.items())
        )


def first_users(members: Sequence[Member]) -> dict[HeadSpec, tuple[Member, str]]:
    """Head -> the first detector that it is part of, and its branch there."""
    users: dict[HeadSpec, tuple[Member, str]] = {}
    for member in members:
        for branch, spec in member.heads.items():
            users.setdefault(spec, (member, branch))
    return users


def save_state(path: Path, digest: str, training: dict[str, Any], log: SeedLog) -> None:
    """Write all that a stopped training needs, and where it was trained last, atomically."""
    state = {"format": STATE_FORMAT, "digest": digest, "training": training, "results": log.results, "heads": log.heads}
    state |= {"provenance": provenance()}
    try:
        with replacing(path) as temporary:
            torch.save(state, temporary)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def load_state(path: Path, digest: str) -> dict[str, Any] | None:
    """What `save_state` wrote; None: nothing yet.

    Raises:
        UserError: it is damaged, or of other heads, data or options.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["digest"] if state["format"] == STATE_FORMAT else None
    except Exception as error:  # whatever a damaged file makes PyTorch raise
        raise UserError(f"{path}: cannot be read: remove it, and this seed is trained again") from error
    if found != digest:
        raise UserError(f"{path}: is of other heads, data or options: give another --out, or the options it had")
    return state


def save_models(
    setup: Setup, heads: Mapping[HeadSpec, nn.Module], wanted: Sequence[Readable], metrics: Sequence[Mapping[str, Any]],
    seed: int,
) -> None:  # fmt: skip
    """Write the base's detectors of a seed, each as a run's folder that every other command reads."""
    saved = set()
    for (member, _), one in zip(wanted, metrics, strict=True):
        if member.variant != BASE or member.kind not in setup.options.save_models or member.kind in saved:
            continue
        saved.add(member.kind)  # the first is in the kind's own read-out
        folder = _model_folder(setup, member, seed)
        folder.mkdir(parents=True, exist_ok=True)
        recipe = replace(
            setup.recipe,
            name=f"{member.kind}, heads alone",
            about=f"heads trained on the frozen {setup.recipe.name}",
            model=member.model,
            train=replace(setup.recipe.train, seed=seed, batch_size=setup.options.images),
        )
        start = setup.start
        save_model(
            folder / MODEL_FILE, _put_together(setup, member, heads), recipe, start.classes, start.category_ids,
            setup.options.steps,
        )  # fmt: skip
        write_json(folder / METRICS_FILE, dict(one))


def is_saved(setup: Setup, member: Member, seed: int) -> bool:
    """Whether `save_models` has written this detector, or would not."""
    if member.variant != BASE or member.kind not in setup.options.save_models:
        return True
    return all((_model_folder(setup, member, seed) / name).exists() for name in (MODEL_FILE, METRICS_FILE))


def _model_folder(setup: Setup, member: Member, seed: int) -> Path:
    return setup.folder / "models" / f"{member.kind}-seed{seed}"


def _put_together(setup: Setup, member: Member, heads: Mapping[HeadSpec, nn.Module]) -> DoubleHeadRCNN:
    """The whole detector: the frozen parts with these heads."""
    backbone = replace(member.model.backbone, weights=None)
    model = DoubleHeadRCNN(replace(member.model, backbone=backbone), setup.model.num_classes)
    model.detector.backbone.load_state_dict(setup.model.detector.backbone.state_dict())
    model.detector.rpn.load_state_dict(setup.model.detector.rpn.state_dict())
    for branch, spec in member.heads.items():
        model.detector.heads[branch].load_state_dict(heads[spec].state_dict())
    return model


def write_results(setup: Setup, folder: Path) -> None:
    """Write `heads.json` and `heads.csv` of all seeds, and say what came out."""
    options = setup.options
    states = {seed: load_state(folder / f"seed-{seed}.pt", setup.digest) for seed in options.seeds}
    results = [one for state in states.values() for one in state["results"]]
    files = [setup.features(train) for train in (True, False)]
    objects = sum(item["objects"] for item in files[1].index["items"])
    content = {
        "format": FORMAT,
        **provenance(),
        "digest": setup.digest,  # equal in files that differ in nothing but seeds
        "start": {"checkpoint": options.checkpoint},
        "data": {
            "name": setup.train_set.name,
            "train_images": len(setup.train_set),
            "val_images": len(setup.val_set),
            "val_objects": objects,
        },
        "steps": options.steps,
        "images_per_step": options.images,
        "seeds": list(options.seeds),
        "features": {
            "bytes": sum(file.index["bytes"] for file in files),
            "seconds": sum(file.index["seconds"] for file in files),
        },
        "trainings": [
            {"seed": seed, "seconds": round(state["training"]["seconds"], 1)} | state["provenance"]
            for seed, state in states.items()
        ],
        "variants": {BASE: {}} | {text: parse_variant(text) for text in options.vary},
        "results": results,
        "heads": [one for state in states.values() for one in state["heads"]],
    }
    write_json(folder / RECORD_FILE, content, indent=None)
    columns = ("variant", "kind", "readout", "fusion", "seed", "step", "rois", *NUMBERS)
    write_csv(folder / "heads.csv", columns, ([one[name] for name in columns] for one in results))
    save_figure(folder / "learning-curves.png", learning_curves(content))
    models = ", models/" if options.save_models else ""
    say(f"{folder}: {RECORD_FILE}, heads.csv, learning-curves.png{models}")
