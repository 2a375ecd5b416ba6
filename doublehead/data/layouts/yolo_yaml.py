"""Reads YOLO's `data.yaml`: the names of the classes, and where the images of each split are.

Its paths were often right elsewhere: `../train/images` (Roboflow), `path: ../datasets/cells` (Ultralytics), absolute on
another machine.  So a path is taken as it is said if it leads into the data set's folder, and otherwise by its longest
last part that exists there.  Outside the folder only `outside_root` reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import DataError
from ..coco_json import shown
from ..paths import check_inside, check_regular
from ..yolo import check_names
from .folders import files_in, is_file

SPLIT_KEYS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


@dataclass(frozen=True)
class Description:
    """What a `data.yaml` says.

    `splits` are folders of images, or text files that list them; `notes` say what is not where it is said to be.
    """

    path: Path
    names: dict[int, str]
    splits: dict[str, list[Path]]
    notes: list[str]
    key_points: bool


def find_description(root: Path) -> Description | None:
    """The description in a folder; None: no YAML file there has `names`.

    Raises:
        DataError: several have, or it is invalid; its splits' images are not in the folder.
    """
    files = [root / name for name in files_in(root, (".yaml", ".yml"))]
    loaded = {path: content for path in files if isinstance(content := _load(path), dict) and "names" in content}
    if len(loaded) > 1 and root / "data.yaml" in loaded:
        loaded = {root / "data.yaml": loaded[root / "data.yaml"]}
    if len(loaded) > 1:
        raise DataError(f"{root}: several descriptions of a YOLO set, {', '.join(path.name for path in loaded)}; keep "
                        "one, or call it data.yaml", "ambiguous layout")  # fmt: skip
    for path, content in loaded.items():
        names = check_names(_names(content, path), str(path))
        splits, notes = _splits(root, path, content)
        return Description(path, names, splits, notes, content.get("kpt_shape") is not None)
    return None


def _load(path: Path) -> Any:
    import yaml  # only here: other layouts do without

    check_regular(path, "annotation")
    text = ""
    try:
        text = path.read_text("utf-8-sig")
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if "names" not in text and path.name != "data.yaml":
            return None  # another tool's file
        raise DataError(f"{path}: invalid YAML: {' '.join(str(error).split())[:300]}", "invalid YAML") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", "missing file") from error


def _names(content: dict[Any, Any], path: Path) -> dict[int, str]:
    said = content["names"]
    if isinstance(said, list):
        said = dict(enumerate(said))
    if not isinstance(said, dict) or not all(
        isinstance(key, int) and not isinstance(key, bool) and key >= 0 and isinstance(name, (str, int, float, bool))
        for key, name in said.items()
    ):
        raise DataError(f"{path}: names is {shown(content['names'])}; a list of names, or 'number: name' is accepted",
                        "malformed record")  # fmt: skip
    count = content.get("nc", len(said))
    if count != len(said):
        raise DataError(f"{path}: nc is {shown(count)}, but there are {len(said)} names", "malformed record")
    return {key: str(name) for key, name in said.items()}


def _splits(root: Path, path: Path, content: dict[Any, Any]) -> tuple[dict[str, list[Path]], list[str]]:
    """The places of each split's images; and notes on those that are not where they are said to be."""
    splits: dict[str, list[Path]] = {}
    said_of: dict[str, list[str]] = {}
    notes: list[str] = []
    missing: dict[str, str] = {}
    for split, keys in SPLIT_KEYS.items():
        said = next((content[key] for key in keys if content.get(key)), None)
        places = said if isinstance(said, list) else [said] if said is not None else []
        if not all(isinstance(place, str) for place in places):
            raise DataError(f"{path}: {split} is {shown(said)}; a path or a list of paths is accepted",
                            "malformed record")  # fmt: skip
        found = [_inside(root, place, str(content.get("path") or ""), split) for place in places]
        twice = any(places_of == found and said_of[other] != places for other, places_of in splits.items())
        if places and (None in found or twice):
            missing[split] = places[0 if twice else found.index(None)]
        elif places:
            splits[split], said_of[split] = [place for place in found if place], places
            notes += [f"{path.name}: {split} {place} is read from {there.relative_to(root)}" for place, there in
                      zip(places, splits[split], strict=True) if not _as_said(root, there, place)]  # fmt: skip
    if "train" in missing or not splits:
        said = ", ".join(f"{split}: {place}" for split, place in missing.items()) or "it names neither train nor val"
        raise DataError(f"{path}: the images are not in {root} ({said}); correct the path, relative to this file's "
                        "folder", "missing folder")  # fmt: skip
    return splits, notes + [f"{path.name}: {split} {place} is not there" for split, place in missing.items()]


def _inside(root: Path, place: str, base: str, split: str) -> Path | None:
    """The folder or list in `root` that a path means; None: there is none."""
    parts, start = _parts(place), _parts(base)
    whole = [*start, *parts]
    said = [Path(*whole[cut:]) for cut in range(len(whole))]
    words = (split, *SPLIT_KEYS[split])
    usual = [path for word in words for path in (Path(word, "images"), Path("images", word))]
    for path in [*said[:1], *said[1:-1], *usual, *said[-1:]]:
        if (root / path).is_dir() or (path.suffix == ".txt" and is_file(root / path)):
            return root / path
    return root if not parts else None


def _as_said(root: Path, found: Path, place: str) -> bool:
    """Whether a place is where it is said to be, but for the folders above it."""
    there, said = list(found.relative_to(root).parts), _parts(place)
    shared = min(len(there), len(said))
    return there == said or (shared > 0 and there[-shared:] == said[-shared:] and (shared > 1 or len(said) == 1))


def _parts(path: str) -> list[str]:
    """A path's parts, without those that lead upwards."""
    return [part for part in PurePosixPath(path.replace("\\", "/")).parts if part not in ("..", ".", "/")]


def images_listed(root: Path, listing: Path, outside_root: bool) -> Iterator[Path]:
    """The images that a text file names, one a line; relative to it, to the root, or the end of a path elsewhere.

    Raises:
        DataError: it is not text; a name leads out of the root.
    """
    try:
        lines = listing.read_text("utf-8-sig").splitlines()
    except ValueError as error:
        raise DataError(f"{listing}: not a text file in UTF-8: {error}", "malformed record") from error
    for number, line in enumerate(lines, 1):
        name = line.strip().replace("\\", "/")
        if not name:
            continue
        parts = _parts(name)
        inside = [folder / Path(*parts[cut:]) for cut in range(len(parts)) for folder in (listing.parent, root)]
        found = next((path for path in inside if is_file(path)), None)
        if found is None:
            check_inside(name, f"{listing}, line {number}", outside_root)
        yield found or listing.parent / name
