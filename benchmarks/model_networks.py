"""Heads and whole detectors in the cost model: operations, bytes and launches."""

from __future__ import annotations

from typing import NamedTuple

from model_machine import Machine, Step

CELLS, BF16 = 49, 2
IN, INNER, WIDE, ATTENDED = 256, 256, 1024, 512
"""Channels: of the pooled map, inside a residual block, between blocks, inside a non-local block."""


class Engine(NamedTuple):
    """A product takes `operations / speed + unhidden * bytes / the memory's speed`. Operations a microsecond."""

    speed: float
    unhidden: float


# cuBLAS is published at 650 to 760 on large products. What torch.compile's form of the conv-head took on that day, less
# its passes, leaves 530 to 560 on the average of cuBLAS's and cuDNN's products of these shapes, bytes included.
VENDOR, VENDOR_SPATIAL = Engine(680e6, 0.5), Engine(500e6, 0.5)
VENDOR_FP32, VENDOR_SPATIAL_FP32 = Engine(340e6, 0.5), Engine(250e6, 0.5)
# Fitted to the rows of 2026-11-26, two constants to two of them: the non-local block alone, where only the last product
# is Triton's (1x1), and the conv-head, where all are (3x3). With all bytes unhidden 488 serves both kinds; which of the
# two is right, the times of single products must tell.
TRITON, TRITON_SPATIAL = Engine(378e6, 0.5), Engine(603e6, 0.5)
# TF32 has half of bf16's speed; 0.39 fits the one row that there is.
TRITON_FP32, TRITON_SPATIAL_FP32 = Engine(0.39 * 378e6, 0.5), Engine(0.39 * 603e6, 0.5)


class Product(NamedTuple):
    """A product of the conv-head for one RoI: channels in and out, taps, bytes that it reads beside its input."""

    name: str
    channels: int
    out: int
    taps: int = 1
    residual: bool = False
    mean: bool = False


WIDENING = [Product("3x3", IN, INNER, 9), Product("joined", IN + INNER, WIDE)]
BOTTLENECK = [
    Product("1x1", WIDE, INNER),
    Product("3x3", INNER, INNER, 9),
    Product("added", INNER, WIDE, residual=True),
]
NON_LOCAL = [Product("qkv", WIDE, 3 * ATTENDED), Product("added", ATTENDED, WIDE, residual=True)]


def product(machine: Machine, one: Product, rois: int, engine: Engine, size: int = BF16) -> Step:
    rows = rois * CELLS
    operations = 2.0 * rows * one.channels * one.taps * one.out * (64 / CELLS if one.mean else 1)  # 64 rows a tile
    moved = rows * (one.channels + one.out * ((not one.mean) + one.residual)) * size
    return Step(one.name, operations / engine.speed + engine.unhidden * moved / machine.dram)


def attention(machine: Machine, rois: int, size: int = BF16) -> Step:
    """Reads queries, keys and values, writes as many as the values are: bound by the memory."""
    return Step("attention", rois * CELLS * 4 * ATTENDED * size / machine.dram)


def non_local(machine: Machine, rois: int, size: int = BF16) -> list[Step]:
    """The block alone: queries, keys and values by cuBLAS, the projection with its residual by Triton."""
    engines = VENDOR, TRITON
    first, last = (product(machine, one, rois, engine, size) for one, engine in zip(NON_LOCAL, engines, strict=True))
    return [first, attention(machine, rois, size), last]


def conv_head(machine: Machine, rois: int, engines: dict[str, Engine], size: int = BF16) -> list[Step]:
    """K = 5: three residual and two non-local blocks. The last product averages the cells, in Triton."""
    steps = []
    blocks = [WIDENING, NON_LOCAL, BOTTLENECK, NON_LOCAL, BOTTLENECK]
    for number, block in enumerate(blocks):
        for place, one in enumerate(block):
            if number + 1 == len(blocks) and place + 1 == len(block):
                steps.append(product(machine, one._replace(mean=True), rois, engines["mean"], size))
                continue
            if one.name == "joined" and engines["joined"] is not engines["mean"]:  # the copy that joins two inputs
                steps.append(Step("join", 2 * rois * CELLS * one.channels * size / machine.dram))
            steps.append(product(machine, one, rois, engines[one.name], size))
            if one.name == "qkv":
                steps.append(attention(machine, rois, size))
    return steps


KINDS = ("3x3", "joined", "1x1", "added", "qkv", "mean")
ALL_TRITON = {**dict.fromkeys(KINDS, TRITON), "3x3": TRITON_SPATIAL}
ALL_TRITON_FP32 = {**dict.fromkeys(KINDS, TRITON_FP32), "3x3": TRITON_SPATIAL_FP32}
ENGINES = {**dict.fromkeys(KINDS, VENDOR), "3x3": VENDOR_SPATIAL, "mean": TRITON}
ENGINES_FP32 = {**dict.fromkeys(KINDS, VENDOR_FP32), "3x3": VENDOR_SPATIAL_FP32, "mean": TRITON_FP32}
"""Which engine runs which product. The last two: the table of ops/fused_conv/engines.py for 1000 RoIs on sm_90."""


# ---------------------------------------------------------------------------------------------
# Whole detectors


class Network(NamedTuple):
    """A detector with a ResNet-50 and an FPN: what an image of 800 pixels costs beside launches and heads, in us."""

    launches: int
    """Of the device's kernels, for one batch: counted in a trace."""
    convolutions: float
    passes: float
    """Norms, activations and sums that are passes over maps of their own, and copies into another layout or dtype."""


# Launches and passes are counted: in a trace of Ext, and by the bytes of norms in fp32. Convolutions: 355 GFLOP, fitted
# to batch 16; TF32 has half of bf16's speed.
BEFORE = Network(926, 1600, 1500)
BEFORE_FC = BEFORE._replace(launches=893)
BEFORE_FP32 = BEFORE._replace(convolutions=3200)
# models/folded on CUDA: tests/models/test_folded_cuda.py counts operators, of which ours have about 35 launches of
# their own; passes are the pyramid's sums and the check for what is not finite. Convolutions as fitted before, although
# they read channels-last maps now, which the tensor cores want.
AFTER = Network(175 + 35, 1600, 120)
AFTER_FC = AFTER._replace(launches=165 + 12)
AFTER_FP32 = AFTER._replace(convolutions=3200, passes=240)


def detector(machine: Machine, network: Network, images: int, heads: float, pooling: float, boxes: float) -> float:
    """Microseconds of a batch. heads and pooling: for an image; boxes: NMS and detections of a batch."""
    each = network.convolutions + network.passes + heads + pooling
    return network.launches * machine.launch + images * each + boxes


# ---------------------------------------------------------------------------------------------
# The conv-head's training step: whichever is slower, the host that launches or the device


class Host(NamedTuple):
    """What a step does on the host: counted by tests/models/test_conv_training.py, the time of a launch fitted."""

    launches: int
    launch: float
    operators: int
    calls: int
    """Of functions in Python."""


OPERATOR, CALL = 10.0, 2.4
"""Microseconds. One profile fits both: 17.3 ms for a step, of which launches through Triton's Python a fifth."""
HOST_BEFORE = Host(75, 46.0, 477, 3767)
HOST = Host(75, 11.5, 320, 1600)  # ops/_triton.py's Launcher: a quarter of the time
DEVICE_STEP = 8400.0  # measured: the sum of the kernels' times. What was saved on the device since is not counted.


def training_step(machine: Machine, host: Host) -> list[Step]:
    del machine  # both are measured, or fitted
    of_host = host.launches * host.launch + host.operators * OPERATOR + host.calls * CALL
    return [Step("step", max(of_host, DEVICE_STEP))]
