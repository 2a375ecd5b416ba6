"""Starting a training from a trained detector (`--from`): its model's configuration, and every tensor that fits."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from doublehead.config import ModelConfig, Recipe
from doublehead.engine.checkpoint import LoadedModel, load_model
from doublehead.errors import CheckpointError, UserError

_OF_CLASSES = re.compile(r"detector\.heads\.\w+\.(classifier|regressor)\.(weight|bias)")
_COUNTER = "num_batches_tracked"  # a batch norm's, which a frozen one lacks
_BACKBONE = "detector.backbone."
_ABOUT = "; from "
_SHOWN = 8  # names in a message


@dataclass(frozen=True)
class Source:
    """A trained detector to start from."""

    path: Path
    loaded: LoadedModel
    options: tuple[str, ...] = ()
    """The user's own fields of the model, by their full names."""

    def recipe(self, recipe: Recipe) -> Recipe:
        """`recipe` with this detector's model, changed by the user's own fields alone.

        All weights are this detector's, so none of a backbone are fetched; `about` says where they come from.
        """
        model = _merged(recipe.model, self.loaded.recipe.model, self.options, "model")
        model = replace(model, backbone=replace(model.backbone, weights=None))
        about = f"{recipe.about.partition(_ABOUT)[0]}{_ABOUT}{self.path}"
        return replace(recipe, about=about, model=model)

    def copy_to(self, model: nn.Module, config: ModelConfig, classes: Sequence[str]) -> str:
        """Copy the weights that fit into `model`, which was built of `config` for `classes`.

        Classifiers and box regressors are copied whole if the classes are the same in the same order; else the rows
        of the classes that both know, by name, and of the background.  If there is no such class they stay new.

        Returns:
            One line: what is copied, what is new and why, and what of the detector is not used.

        Raises:
            UserError: the user asks for another backbone, which has no weights here.
        """
        mine, target = self.loaded.model.state_dict(), model.state_dict()
        rows = _rows(self.loaded.classes, classes)
        whole: dict[str, Tensor] = {}
        by_name: dict[str, Tensor] = {}
        for name, tensor in target.items():
            source, per_class = mine.get(name), _rows_per_class(name, config)
            if source is None or per_class != _rows_per_class(name, self.loaded.recipe.model):
                continue
            if rows is None or per_class is None:
                if source.shape == tensor.shape:
                    whole[name] = source
            elif rows and source.shape[1:] == tensor.shape[1:]:
                by_name[name] = _with_rows(tensor, source, rows, per_class)
        new = [name for name in target if name not in whole and name not in by_name and not name.endswith(_COUNTER)]
        if any(name.startswith(_BACKBONE) for name in new):
            raise self._other_backbone()
        model.load_state_dict(target | whole | by_name)
        other_classes = [name for name in new if rows == {} and _rows_per_class(name, config)]
        unused = [name for name in mine if name not in target and not name.endswith(_COUNTER)]
        said = self._said(classes, list(whole), list(by_name), new, other_classes, unused)
        return f"{self.path}: {'; '.join(said)}"

    def _said(
        self,
        classes: Sequence[str],
        whole: Sequence[str],
        by_name: Sequence[str],
        new: Sequence[str],
        other_classes: Sequence[str],
        unused: Sequence[str],
    ) -> Iterator[str]:
        before = self.loaded.classes
        total = len(whole) + len(by_name) + len(new)
        yield "all weights" if len(whole) == total else f"{len(whole)} of {total} tensors"
        if by_name:
            both, others = ([n for n in classes if (n in before) == known] for known in (True, False))
            new_rows = f", those of {_listed(others)} new" if others else ""
            yield f"{_layers(by_name)}: the rows of background, {_listed(both)} by name{new_rows}"
        if other_classes:
            yield f"{_layers(other_classes)} new: its {len(before)} classes are none of the {len(classes)} here"
        if others := [name for name in new if name not in other_classes]:
            yield f"{_layers(others)} new: it has none of this shape"
        if unused:
            yield f"not used of it: {_layers(unused)}"

    def _other_backbone(self) -> UserError:
        backbone = self.loaded.recipe.model.backbone
        options = [_option(name) for name in self.options if name.startswith("model.backbone.")]
        return UserError(
            f"--from {self.path}: its backbone ({backbone.name}, neck {backbone.neck}, {backbone.fpn_channels} "
            f"channels) does not fit {', '.join(options) or 'the model'}: leave that out, or --from"
        )


def without_start(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """A recipe of a run that started from a detector, for one that does not; and a note that says so."""
    about, separator, path = recipe.about.partition(_ABOUT)
    if not separator or recipe.model.backbone.weights is not None:
        return recipe, []
    note = f"the recipe is of a run that started from {path}: without --from {path} all weights begin at random"
    return replace(recipe, about=about), [note]


def read_source(path: str | Path, recipe: Recipe, given: Collection[str]) -> Source:
    """Open the detector to start from: a run's or a converted model's folder, or a model.safetensors.

    Raises:
        UserError: there is none, it is another project's (the message has the command to convert it), damaged, or
            the user asks for other weights as well.
    """
    if "model.backbone.weights" in given and recipe.model.backbone.weights is not None:
        raise UserError(
            f"--from {path} and --model.backbone.weights exclude each other: --from brings the backbone's weights too"
        )
    try:
        loaded = load_model(path)
    except CheckpointError as error:
        then = ", then give --from FOLDER" if str(error).endswith(" FOLDER") else ""
        raise CheckpointError(f"--from {error}{then}") from error
    return Source(Path(path), loaded, tuple(name for name in sorted(given) if name.startswith("model.")))


def _merged(mine: Any, theirs: Any, names: Collection[str], prefix: str) -> Any:
    """`theirs` with the fields `names` of `mine`."""
    changes = {}
    for field in theirs.__dataclass_fields__:
        name, value = f"{prefix}.{field}", getattr(mine, field)
        if is_dataclass(value):
            changes[field] = _merged(value, getattr(theirs, field), names, name)
        elif name in names:
            changes[field] = value
    return replace(theirs, **changes)


def _rows(before: Sequence[str], now: Sequence[str]) -> dict[int, int] | None:
    """Row now -> row before, of the background and of each class that both know.

    None: the classes are the same, in the same order.  Empty: no class is.
    """
    if list(before) == list(now):
        return None
    old = {name: row for row, name in enumerate(before, start=1)}
    rows = {row: old[name] for row, name in enumerate(now, start=1) if name in old}
    return {0: 0} | rows if rows else {}


def _rows_per_class(name: str, config: ModelConfig) -> int | None:
    """How many rows of a tensor belong to each class; None: it knows no classes."""
    layer = _OF_CLASSES.fullmatch(name)
    if layer is None or (layer[1] == "regressor" and config.head.class_agnostic_boxes):
        return None
    return 1 if layer[1] == "classifier" else 4


def _with_rows(tensor: Tensor, source: Tensor, rows: Mapping[int, int], per_class: int) -> Tensor:
    result = tensor.clone()
    into, out_of = (whole.unflatten(0, (-1, per_class)) for whole in (result, source))
    for row, before in rows.items():
        into[row] = out_of[before].to(into)
    return result


def _layers(tensors: Sequence[str]) -> str:
    """The layers of these tensors, towers as a whole: `heads.fc.classifier, heads.conv.tower`."""
    names = (name.removeprefix("detector.").rpartition(".")[0] for name in tensors)
    return _listed(list(dict.fromkeys(re.sub(r"(\.tower)\..*", r"\1", name) for name in names)))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
