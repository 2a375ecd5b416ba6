"""Imports run downwards only: from each layer of the package to lower ones, and never in a circle.

Every import counts: also one inside a function or under `TYPE_CHECKING`, and a module named in a string, as for
`importlib.import_module`.
"""

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.paths import ROOT

COMMANDS = "analyze convert detect evaluate export info tables train"
LAYERS: tuple[dict[str, str], ...] = (
    {"errors": "", "version": ""},
    {"config": "", "ops": "torch triton", "weights": "torch numpy safetensors", "paper": ""},
    {
        "models": "torch torchvision safetensors",
        "data": "torch torchvision numpy PIL simplejpeg tqdm yaml",
        "recipes": "",
    },
    {"engine": "torch numpy PIL matplotlib pycocotools safetensors tensorboard tqdm tyro"},
    {
        "analysis": "torch numpy matplotlib tqdm tyro",
        "exporting": "torch onnxruntime onnxscript openvino nncf",
        "interop": "torch numpy torchvision",
    },
    {"cli": "torch tqdm tyro"},
    {"api": "torch numpy PIL"},
    dict.fromkeys(COMMANDS.split(), ""),
    {"__init__": "", "__main__": ""},
)
"""From the bottom: each layer's packages and modules of `doublehead`, and what each imports from other projects.

A package may import from every lower layer, and from itself; never from its neighbours in the same layer.  The top
layers are what users name: `import doublehead`, `python -m doublehead`, `python -m doublehead.train`, ...
"""
HEIGHT = {room: height for height, layer in enumerate(LAYERS) for room in layer}
OTHER_PROJECTS = {room: set(names.split()) for layer in LAYERS for room, names in layer.items()}


class Import(NamedTuple):
    """One import, with the place where it stands."""

    importer: str
    """The importing module, such as "doublehead.engine.trainer"."""
    imported: str
    """A module of this package; of another project the top-level name alone."""
    line: int

    def __str__(self) -> str:
        return f"{self.importer} (line {self.line}) imports {self.imported}"


def find_modules(root: Path) -> dict[str, Path]:
    """Name -> file of every module of `doublehead` in the folder `root`."""
    files = sorted((root / "doublehead").rglob("*.py"))
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def find_imports(modules: dict[str, Path]) -> list[Import]:
    """Every import in these modules, but not those of the standard library."""
    found = set()
    for name, file in modules.items():
        is_package = file.stem == "__init__"
        for node in ast.walk(ast.parse(file.read_text())):
            for target in imported_names(node, name, is_package, modules):
                top = target.partition(".")[0]
                if top == "doublehead":
                    target = target if target in modules else target.rpartition(".")[0]
                    assert target in modules, f"{file}:{node.lineno}: {target} is no module"
                    found.add(Import(name, target, node.lineno))
                elif top not in sys.stdlib_module_names:
                    found.add(Import(name, top, node.lineno))
    return sorted(entry for entry in found if entry.importer != entry.imported)


def imported_names(node: ast.AST, module: str, is_package: bool, modules: dict[str, Path]) -> Iterator[str]:
    """Absolute names of what a node of `module` imports: modules, or attributes of modules."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parts = module.split(".") if node.level else []
        parts = parts[: len(parts) + is_package - node.level]
        origin = ".".join(parts + ([node.module] if node.module else []))
        yield from (f"{origin}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Constant) and node.value in modules and "." in node.value:
        yield node.value


def room_of(module: str) -> str:
    """The package or module directly in `doublehead` to which a module belongs."""
    return (module.split(".") + ["__init__"])[1]


def upward(imports: list[Import]) -> list[str]:
    """The imports that lead to a higher layer, or to a neighbour in the same layer."""
    inside = [entry for entry in imports if entry.imported.partition(".")[0] == "doublehead"]
    rooms = [(entry, room_of(entry.importer), room_of(entry.imported)) for entry in inside]
    return [str(entry) for entry, here, there in rooms if here != there and HEIGHT[here] <= HEIGHT[there]]


def circle(imports: list[Import]) -> list[str]:
    """The modules of one circle of imports, the first one also at the end; empty: there is none."""
    graph: dict[str, set[str]] = {}
    for entry in imports:
        graph.setdefault(entry.importer, set()).add(entry.imported)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1][::-1]
    return []


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return find_imports(find_modules(ROOT))


def test_every_package_has_a_layer():
    assert {room_of(module) for module in find_modules(ROOT)} == HEIGHT.keys()


def test_imports_run_downwards(imports):
    assert upward(imports) == []


def test_imports_make_no_circle(imports):
    assert circle(imports) == []


def test_other_projects_stay_in_the_layers_that_need_them(imports):
    """Above all: operators work with torch alone, and configurations load without it."""
    others = [entry for entry in imports if entry.imported.partition(".")[0] != "doublehead"]
    used = {(room_of(entry.importer), entry.imported) for entry in others}
    assert used == {(room, name) for room, names in OTHER_PROJECTS.items() for name in names}


@pytest.mark.parametrize("text", [
    "from doublehead.engine import run",
    "def late():\n    from ..engine.run import start",
    "if TYPE_CHECKING:\n    import doublehead.engine.run",
    "importlib.import_module('doublehead.engine.run')",
    "from doublehead import __version__",
    "from ..models import heads",
    "from .. import models",
])  # fmt: skip
def test_an_upward_import_is_found(tmp_path, text):
    write(tmp_path, {"data/__init__": "", "data/coco": text, "models/__init__": "", "models/heads": "",
                     "engine/__init__": "", "engine/run": "from doublehead.data import coco\nimport os"})  # fmt: skip
    found = upward(find_imports(find_modules(tmp_path)))
    assert len(found) == 1 and found[0].startswith("doublehead.data.coco (line ")


@pytest.mark.parametrize("modules", [
    {"a": "from . import b", "b": "def late():\n    from .c import name", "c": "import doublehead.data.a"},
    {"__init__": "from .a import name", "a": "if TYPE_CHECKING:\n    from doublehead.data import name"},
])  # fmt: skip
def test_a_circle_is_found(tmp_path, modules):
    write(tmp_path, {"data/__init__": ""} | {f"data/{name}": text for name, text in modules.items()})
    found = circle(find_imports(find_modules(tmp_path)))
    assert found[0] == found[-1] and len(found) == 1 + sum(map(bool, modules.values()))


def write(root: Path, modules: dict[str, str]) -> None:
    """Write modules of a package `doublehead`: path without ending -> text."""
    for name, text in ({"__init__": ""} | modules).items():
        file = root / "doublehead" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
