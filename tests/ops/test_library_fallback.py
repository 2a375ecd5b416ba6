"""When the reference takes a kernel's place, and what is said: all reasons, simulated without a GPU."""

import contextlib
import os
import subprocess
import sys
import warnings

import pytest
import torch

import doublehead.ops
from doublehead.ops import _fallback, _library

HOPPER, TURING = (9, 0), (7, 5)
X = torch.linspace(-1, 1, 32).view(4, 8)
WEIGHT = torch.linspace(-1, 1, 64).view(8, 8)
ARGUMENTS = (X, WEIGHT, None, None, None, None, [2, 2], True, False)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing has been warned of, nothing is known of the GPUs."""
    monkeypatch.setattr(_fallback, "_WARNED", set())
    monkeypatch.setattr(_fallback, "refusal", _fallback.Refusals())


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs of which Triton serves the first; tensors of the CPU pass for the first's."""
    capabilities = [HOPPER, TURING]
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(_fallback, "_start_triton", lambda: None)
    monkeypatch.setattr(_library, "_device_of", lambda arguments: torch.device("cuda", 0))
    return capabilities


@pytest.fixture
def kernel(monkeypatch):
    """`kernel(error)`: fused_conv's launcher, for a kernel that raises the error; `kernel.calls` counts launches."""
    pytest.importorskip("triton")
    launchers = dict(_library.TRITON_KERNELS)

    def make(error, **more):
        def launch(*arguments):
            make.calls += 1
            if error is not None:
                raise error
            return "from the kernel"

        module = type(sys)("doublehead_test_kernel")
        module.launch = launch
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(_library, "LIBRARY", Deaf())
        _library.define_triton_kernel("fused_conv", module.__name__, "launch", **more)
        made, _library.TRITON_KERNELS["fused_conv"] = _library.TRITON_KERNELS["fused_conv"], launchers["fused_conv"]
        return made

    make.calls = 0
    return make


class Deaf:
    """A library that registers nothing."""

    def impl(self, *_):
        pass


def served(launch, *arguments):
    """The result, and the texts of the warnings."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        return launch(*arguments), [str(warning.message) for warning in heard]


def expect_reference(launch, *words, device="cuda"):
    expected = _library.REFERENCES["fused_conv"](*ARGUMENTS)
    for warned in (1, 0):
        found, texts = served(launch, *ARGUMENTS)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert len(texts) == warned
        assert all(text.startswith(f"doublehead: fused_conv on {device} runs in plain PyTorch: ") for text in texts)
        assert all(word in text for text in texts for word in words), texts


def test_a_kernel_that_works_is_used(gpus, kernel):
    assert served(kernel(None), *ARGUMENTS) == ("from the kernel", [])


def test_a_compiled_kernel_is_asked_first_and_needs_no_triton(gpus, kernel, monkeypatch):
    answer, built = ["compiled"], [True]
    monkeypatch.setattr(_library, "COMPILED", {})
    monkeypatch.setattr(_library, "_registered", lambda name, key: built[0])
    monkeypatch.setattr(_fallback.importlib.util, "find_spec", lambda name: None)
    launch = kernel(
        None, compiled="compiled", first=lambda args: answer[0] if len(args) == len(ARGUMENTS) else "packed"
    )
    assert served(launch, *ARGUMENTS) == ("compiled", [])
    assert _library.native("fused_conv", "cuda") and _library.language("fused_conv", "cuda") == "CUDA"
    answer[0] = None
    expect_reference(launch, "pip install triton")
    answer[0], built[0] = "compiled", False
    assert not _library.native("fused_conv", "cuda") and _library.language("fused_conv", "cuda") == "Triton"
    assert kernel.calls == 0


def test_triton_takes_what_a_compiled_kernel_does_not(gpus, kernel, monkeypatch):
    monkeypatch.setattr(_library, "COMPILED", {})
    for built, answer in ((True, None), (False, "compiled")):
        monkeypatch.setattr(_library, "_registered", lambda name, key, built=built: built)
        launch = kernel(None, compiled="compiled", first=lambda args, answer=answer: answer)
        assert served(launch, *ARGUMENTS) == ("from the kernel", [])


def test_no_triton(gpus, kernel, monkeypatch):
    launch = kernel(None)
    monkeypatch.setattr(_fallback.importlib.util, "find_spec", lambda name: None)
    expect_reference(launch, "pip install triton")
    assert kernel.calls == 0
    assert not _library.native("fused_conv", "cuda") and _library.why_reference("fused_conv") == _fallback.NO_TRITON


def test_each_gpu_is_asked_for_its_age(gpus, kernel, monkeypatch):
    launch = kernel(None)
    assert launch(*ARGUMENTS) == "from the kernel"
    monkeypatch.setattr(_library, "_device_of", lambda arguments: torch.device("cuda", 1))
    expect_reference(launch, "GPU 1 is sm_75", "sm_80")
    assert _library.why_reference("fused_conv", 0) is None and "sm_75" in _library.why_reference("fused_conv", 1)
    assert _library.native("fused_conv", "cuda")


def test_the_machine_is_asked_once(gpus, kernel, monkeypatch):
    asked = []
    monkeypatch.setattr(_fallback, "_start_triton", lambda: asked.append(1))
    launch = kernel(None)
    for _ in range(3):
        launch(*ARGUMENTS)
    assert asked == [1]


START = """
import torch, triton.backends.nvidia.driver as driver
from doublehead.ops import _fallback
_fallback._start_triton = driver.CudaUtils
print(_fallback.no_start())
"""


def no_start(tmp_path, **environment):
    """What Triton's own start says where there is no GPU, with these variables."""
    (tmp_path / "libcuda.so.1").touch()
    settings = {
        **{name: value for name, value in os.environ.items() if name not in ("CC", "TRITON_INTERPRET")},
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "TRITON_LIBCUDA_PATH": str(tmp_path),
        **environment,
    }
    command = [sys.executable, "-c", START]
    return subprocess.run(command, env=settings, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("environment", [{"PATH": ""}, {"CC": "no-such-compiler"}], ids=["no gcc", "CC is missing"])
def test_no_c_compiler(tmp_path, environment):
    pytest.importorskip("triton")
    assert no_start(tmp_path, **environment) == _fallback.NO_COMPILER


def test_a_c_compiler_that_fails(tmp_path):
    pytest.importorskip("triton")
    assert "Python's headers" in no_start(tmp_path, CC="false")


def test_without_a_start_every_operator_takes_the_reference(gpus, kernel, monkeypatch):
    def fail():
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    launch = kernel(None)
    monkeypatch.setattr(_fallback, "_start_triton", fail)
    expect_reference(launch, "no C compiler", "gcc")
    assert kernel.calls == 0


def unbuilt(kind):
    """Errors of a kernel that does not build or fit, as Triton raises them."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return {
        "compilation": lambda: CompilationError("def kernel():", None, "no such type"),
        "resources": lambda: OutOfResources(300_000, 232_448, "shared memory"),
        "ptxas": lambda: PTXASError("ptxas fatal: unknown option"),
        "passes": lambda: RuntimeError("PassManager::run failed"),
        "registers": lambda: RuntimeError("Triton Error [CUDA]: too many resources requested for launch"),
        "image": lambda: RuntimeError("Triton Error [CUDA]: no kernel image is available for execution"),
        "launcher": lambda: RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
        "cache": lambda: PermissionError(13, "Permission denied", "/.triton"),
        "import": lambda: ImportError("cannot import name 'gather'"),
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("compilation", "no such type"),
        ("resources", "shared memory"),
        ("ptxas", "unknown option"),
        ("passes", "PassManager"),
        ("registers", "too many resources"),
        ("image", "no kernel image"),
        ("launcher", "no C compiler"),
        ("cache", "TRITON_CACHE_DIR"),
        ("import", "gather"),
    ],
)
def test_a_kernel_that_does_not_build(gpus, kernel, kind, words):
    launch = kernel(unbuilt(kind))
    expect_reference(launch, words)
    assert kernel.calls == 1  # building takes seconds: it is not tried again for such a call
    served(launch, X.double(), WEIGHT.double(), *ARGUMENTS[2:])
    assert kernel.calls == 2


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory"),
        AssertionError("wrong"),
        ValueError("wrong"),
    ],
    ids=str,
)
def test_other_errors_are_raised(gpus, kernel, error):
    with pytest.raises(type(error), match=str(error).replace("[", r"\[")):
        kernel(error)(*ARGUMENTS)


def test_a_launch_function_says_not_this_call(kernel):
    launch = kernel(_library.Fallback("odd widths; pad them"))
    expect_reference(launch, "odd widths; pad them", device="cpu")
    assert kernel.calls == 2


def test_in_the_interpreter_errors_are_raised(kernel):
    with pytest.raises(RuntimeError, match="PassManager"):
        kernel(unbuilt("passes"))(*ARGUMENTS)


def test_each_reason_and_operator_is_warned_of():
    calls = [("a", "x"), ("b", "x"), ("a", "y"), ("a", "x")]
    with _fallback.fallbacks() as heard:
        texts = [served(_library.warn_fallback, *call)[1] for call in calls]
    assert [len(text) for text in texts] == [1, 1, 1, 0]
    assert heard == calls
    served(_library.warn_fallback, "a", "x")
    assert heard == calls


def test_the_cuda_part_is_missing(monkeypatch):
    registered = {}

    class Noting:
        def impl(self, name, function, key):
            assert key == "CUDA"
            registered[name] = function

    monkeypatch.setattr(_library, "LIBRARY", Noting())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_library, "UNLOADED", {"_C_cuda": "it is not built"})
    _library.define_missing_kernels()
    # `detections_by_class` is not among them: where it is missing, the Triton kernels of `detections` serve.
    assert {"nms", "nms_padded", "pyramid_roi_align", "pyramid_roi_align_backward"} == set(registered)
    boxes, scores = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2]]), torch.tensor([0.5, 0.9])
    arguments = (boxes, scores, None, 0.5)
    found, texts = served(registered["nms"], *arguments)
    assert torch.equal(found, _library.REFERENCES["nms"](*arguments))
    assert len(texts) == 1 and "nms on cuda" in texts[0] and "_C_cuda is not loaded: it is not built" in texts[0]
    assert not _library.native("nms", "cuda") and _library.why_reference("nms") in texts[0]


def test_compiled_code_knows_nothing_of_it(triton_kernels):
    def convolve(x):
        return torch.ops.doublehead.fused_conv(x, *(WEIGHT.to(x), *ARGUMENTS[2:]))

    compiled = torch.compile(convolve, backend="aot_eager", fullgraph=True)
    x = X.to(triton_kernels)
    torch.testing.assert_close(compiled(x), convolve(x))


def fake_cuda(*shape):
    """A tensor without data on a GPU that need not exist."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(*shape, device="cuda")


def test_fake_tensors_on_a_gpu_ask_nothing(monkeypatch):
    monkeypatch.setattr(_fallback, "refusal", lambda index=None: pytest.fail("asked"))
    with fake_cuda(1).fake_mode:
        x, weight = (torch.empty(tensor.shape, device="cuda") for tensor in (X, WEIGHT))
        found, texts = served(torch.ops.doublehead.fused_conv, x, weight, *ARGUMENTS[2:])
    assert found.shape == (4, 8) and found.device.type == "cuda" and texts == []


def test_scores_are_fused_without_the_operator_and_it_is_said(monkeypatch):
    monkeypatch.setattr(_fallback, "no_triton", lambda: _fallback.NO_TRITON)
    with fake_cuda(1).fake_mode:
        logits = torch.empty(4, 3, device="cuda")
        for warned in (1, 0):
            found, texts = served(doublehead.ops.fuse_scores, logits, logits)
            assert found.shape == (4, 3) and len(texts) == warned
            assert all(text.startswith("doublehead: fuse_scores on cuda") and "Triton" in text for text in texts)


@pytest.mark.parametrize("part, key", [("_C", "CPU"), ("_C_cuda", "CUDA")])
def test_a_part_built_from_older_sources_is_warned_of(monkeypatch, part, key):
    monkeypatch.setattr(_library, "UNLOADED", {})
    monkeypatch.setattr(_library, "_registered", lambda name, k: (name, k) != ("pyramid_roi_align", key))
    with pytest.warns(RuntimeWarning, match=rf"{part} was built from older sources: it lacks pyramid_roi_align, "):
        _library.check_compiled_parts()
    monkeypatch.setattr(_library, "UNLOADED", {part: "it is not built"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _library.check_compiled_parts()  # the part's absence has been warned of


def test_parts_of_these_sources_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _library.check_compiled_parts()
