"""The objects on which the conv-head alone, the fc-head alone and Ext differ most, on one Ext model (Figures 9, 10).

Every image is evaluated with the three read-outs.  An object is a case if one head finds it and the other misses it
(Figure 9), or if one head finds it twice and the other once (Figure 10, with the proposals of its boxes in yellow).
All cases are listed in a table; the most telling ones are drawn.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from doublehead.analysis.options import Qualitative
from doublehead.analysis.output import output_folder, save_figure, write_csv
from doublehead.analysis.qualitative_cases import KINDS, READOUTS, Case, Cases, Kind, Verdict
from doublehead.analysis.qualitative_proposals import Origin, find_origins
from doublehead.analysis.readers import Reader
from doublehead.analysis.shards import fingerprint, measure_images
from doublehead.analysis.states import State
from doublehead.data import DetectionDataset, Target, build_dataset
from doublehead.engine.checkpoint import load_model
from doublehead.engine.data_options import data_config
from doublehead.engine.distributed import World
from doublehead.engine.logs import say
from doublehead.errors import UserError, config_errors
from doublehead.models.readout import resolve_readout
from doublehead.ops.boxes import box_iou

FOUND_IOU = 0.5
DUPLICATE_IOU = 0.3
"""The IoU with an object from which a second box is a duplicate; NMS keeps it, as it is far from the first."""
COLUMNS = (
    "kind", "image_id", "file", "class", "x1", "y1", "x2", "y2", "conv", "fc", "Ext", "conv_score", "fc_score",
    "Ext_score", "conv_duplicate", "fc_duplicate", "Ext_duplicate", "conv_score_at_box", "fc_score_at_box", "picture",
)  # fmt: skip


def run(options: Qualitative, world: World) -> None:
    """Write `qualitative.csv` and, for each kind that occurs, `qualitative-KIND.png`.

    Raises:
        UserError: not an Ext model, a read-out it was not trained for, or options or data that cannot be used.
        CheckpointError: the checkpoint cannot be read.
    """
    readers = open_ext(options, world.device)
    recipe, classes = readers["Ext"].recipe, readers["Ext"].classes
    with config_errors():
        data = data_config(recipe.data, options.data)
        dataset = build_dataset(data, "val", classes=classes)
    out = output_folder(options.out, world)
    if world.is_main:
        say(f"{options.checkpoint}, on {len(dataset)} images of {dataset.name}")
    numbers = {image_id: number for number, image_id in enumerate(dataset.image_ids)}

    def measure(image: Tensor, target: Target) -> tuple[Cases, int]:
        found = find_cases(
            readers, numbers[target["image_id"]], image.to(world.device), target, options.score_threshold
        )
        return Cases(found), len(target["boxes"])

    heads = list(readers.values())
    depends_on = fingerprint(heads, dataset, dataset.annotations(), score_threshold=options.score_threshold)
    folder, empty = out / "state" / "qualitative", State(depends_on, Cases())
    cases = measure_images(measure, dataset, world, folder, empty, data.workers, counted="objects").sorted()
    if any(case.image >= len(dataset) or case.label > len(classes) for case in cases):
        raise UserError(f"{folder}: holds a case that the data do not have: remove it, or give another --out")
    world.on_main(lambda: write_results(cases, readers, dataset, options, out))


def open_ext(options: Qualitative, device: torch.device) -> dict[str, Reader]:
    """A reader for each of `READOUTS`; they share one model.

    Raises:
        UserError: an option is out of range, or the model does not have these read-outs.
    """
    if not options.checkpoint:
        raise UserError("no checkpoint is named: give the one of a Double-Head-Ext")
    if options.cases < 1:
        raise UserError(f"--cases is {options.cases}, at least 1 is accepted")
    model, recipe, classes, _ = load_model(options.checkpoint)
    config = recipe.model
    least = config.detection.score_threshold
    if not least <= options.score_threshold <= 1:
        accepted = f"a number from {least:g} (below which this model detects nothing) to 1"
        raise UserError(f"--score-threshold is {options.score_threshold}, {accepted} is accepted")
    if config.head.kind != "double_head_ext":
        raise UserError(f"{options.checkpoint}: its head is {config.head.kind!r}; only 'double_head_ext' has "
                        "two heads that both classify and regress")  # fmt: skip
    readers = {}
    for name, readout in READOUTS.items():
        with config_errors():
            resolved = resolve_readout(config, readout)
        readers[name] = Reader(name, model.to(device), recipe, classes, resolved)
    return readers


def find_cases(
    readers: dict[str, Reader], number: int, image: Tensor, target: Target, threshold: float
) -> list[Case]:  # fmt: skip
    """The cases in image `number` of the data set; `image`: `Tensor[3, H, W]` uint8."""
    boxes, labels = target["boxes"], target["labels"]
    if not len(boxes):
        return []
    verdicts = {name: judge(output, boxes, labels, threshold) for name, output in detect(readers, image).items()}
    chosen = differing(verdicts)
    scores = scores_at_boxes(readers, image, boxes, labels) if chosen else {}
    found = []
    for kind, k in chosen:
        of_object = {name: values[k] for name, values in verdicts.items()}
        at_box = {name: values[k] for name, values in scores.items()}
        found.append(Case(kind, number, k, int(labels[k]), tuple(boxes[k].tolist()), of_object, at_box))
    return found


def detect(readers: dict[str, Reader], image: Tensor) -> dict[str, dict[str, Tensor]]:
    """Read-out -> detections of `image`, on the host."""
    return {name: {key: value.cpu() for key, value in reader.detect(image).items()} for name, reader in readers.items()}


def scores_at_boxes(readers: dict[str, Reader], image: Tensor, boxes: Tensor, labels: Tensor) -> dict[str, list[float]]:
    """Head -> the score of each object's class on its own box."""
    features = readers["Ext"].features(image, boxes)
    labels = labels.to(features.boxes.device)
    return {name: readers[name].read(features, features.boxes, labels).scores.tolist() for name in ("conv", "fc")}


def judge(output: dict[str, Tensor], boxes: Tensor, labels: Tensor, threshold: float) -> list[Verdict]:
    """The outcome for each object with one read-out.

    A detection is assigned to the object of its class with the highest IoU.

    Args:
        output: the detections: boxes `Tensor[D, 4]`, labels `Tensor[D]`, scores `Tensor[D]`.
        boxes: `Tensor[n, 4]`, the objects' boxes, n >= 1; labels: `Tensor[n]`.
        threshold: detections with a lower score are ignored.
    """
    iou, assigned = assign(output, boxes, labels, threshold)
    shown = output["scores"] >= threshold
    verdicts = []
    for k in range(len(boxes)):
        close, own = iou[:, k] >= FOUND_IOU, assigned[:, k]
        scores = output["scores"][own].sort(descending=True).values.tolist()
        if len(scores) > 1:
            verdicts.append(Verdict("duplicate", *scores[:2]))
        elif (own & close).any():
            verdicts.append(Verdict("found", scores[0]))
        else:
            outcome = "unclear" if (shown & close).any() else "missed"
            best = output["scores"][close].tolist()
            verdicts.append(Verdict(outcome, max(best, default=None)))
    return verdicts


def assign(output: dict[str, Tensor], boxes: Tensor, labels: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """IoUs of D detections with n objects of their class (else 0), and the assignment: both `Tensor[D, n]`.

    The arguments are those of `judge`.
    """
    same = output["labels"][:, None] == labels
    iou = torch.where(same, box_iou(output["boxes"], boxes).nan_to_num(0), 0)
    best = iou.argmax(1)[:, None] == torch.arange(len(boxes))
    return iou, best & (output["scores"] >= threshold)[:, None] & (iou >= DUPLICATE_IOU)


def origins(
    readers: dict[str, Reader], image: Tensor, target: Target, case: Case, output: dict[str, Tensor], threshold: float
) -> list[Origin]:
    """The proposals from which a duplicated object's boxes come; empty for other kinds of case.

    Args:
        image: on the model's device.
        target: the image's ground truth.
        output: the detections of the case's head.
        threshold: see `judge`.
    """
    if case.kind.outcome != "duplicate":
        return []
    _, assigned = assign(output, target["boxes"], target["labels"], threshold)
    return find_origins(readers, image, target, case, output["boxes"][assigned[:, case.object]])


def differing(verdicts: dict[str, list[Verdict]]) -> list[tuple[Kind, int]]:
    """The objects that are cases, with their kinds."""
    found = []
    for k in range(len(verdicts["conv"])):
        outcomes = {name: verdicts[name][k].outcome for name in ("conv", "fc")}
        found += [
            (kind, k)
            for kind in KINDS
            if (outcomes[kind.head], outcomes[kind.other]) == (kind.outcome, kind.other_outcome)
        ]
    return found


def most_telling(cases: list[Case], kind: Kind, count: int) -> list[Case]:
    """At most `count` cases of a kind, the most telling first, at most one per image."""
    best: dict[int, Case] = {}
    for case in sorted((case for case in cases if case.kind == kind), key=lambda case: -case.telling):
        best.setdefault(case.image, case)
    return list(best.values())[:count]


def write_results(
    cases: list[Case], readers: dict[str, Reader], dataset: DetectionDataset, options: Qualitative, out: Path
) -> None:
    """Draw the most telling cases of each kind, and write the table of all cases."""
    from doublehead.analysis.qualitative_figure import draw_cases

    device = next(readers["Ext"].model.parameters()).device
    pictures: dict[tuple[str, int, int], str] = {}
    for kind in KINDS:
        path = out / f"qualitative-{kind.name}.png"
        number = sum(case.kind == kind for case in cases)
        chosen = most_telling(cases, kind, options.cases)
        if not chosen:
            path.unlink(missing_ok=True)  # from an earlier run
            say(f"{kind.title}: no such object, no picture")
            continue
        outputs, yellow = [], []
        for case in chosen:
            image, target = dataset[case.image]
            outputs.append(detect(readers, image.to(device)))
            found = outputs[-1][kind.head]
            yellow.append(origins(readers, image.to(device), target, case, found, options.score_threshold))
        save_figure(path, draw_cases(kind, chosen, outputs, yellow, dataset, options.score_threshold))
        pictures |= {(kind.name, case.image, case.object): path.name for case in chosen}
        say(f"{kind.title}: {number} objects, {len(chosen)} in {path.name}")
    rows = [_row(case, dataset, pictures.get((case.kind.name, case.image, case.object))) for case in cases]
    write_csv(out / "qualitative.csv", COLUMNS, rows)
    say(f"{out}: qualitative.csv, {len(cases)} cases")


def _row(case: Case, dataset: DetectionDataset, picture: str | None) -> list:
    verdicts = [case.verdicts[name] for name in READOUTS]
    return [
        case.kind.name, dataset.image_ids[case.image], dataset.file_names[case.image], dataset.classes[case.label - 1],
        *case.box, *(v.outcome for v in verdicts), *(v.score for v in verdicts), *(v.duplicate for v in verdicts),
        case.at_box["conv"], case.at_box["fc"], picture,
    ]  # fmt: skip
