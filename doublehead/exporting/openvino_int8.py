"""Quantises an OpenVINO graph to int8 by NNCF: layers with weights alone, nothing that computes boxes."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .description import INPUTS
from .openvino_runtime import import_nncf, without_reports


def quantised(graph: Any, calibration: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """A copy of an `openvino.Model` whose convolutions and fully connected layers compute in int8.

    Weights have a scale for each channel, activations one for each tensor, from the values seen.  The attention's
    products of activations, RoIAlign, box arithmetic, suppression and scores stay in float32.

    Args:
        graph: of `openvino_file.graph_of`.
        calibration: prepared batches, (pixels, sizes).
    """
    nncf = import_nncf()
    with without_reports():
        from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

    inputs = [dict(zip(INPUTS, (tensor.numpy() for tensor in batch), strict=True)) for batch in calibration]
    nncf.set_log_level(logging.ERROR)  # else it names every node that stays as it is
    # NNCF draws progress bars, and warns of overflows in the statistics of empty slots' scores, the lowest float32.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return nncf.quantize(
            graph,
            nncf.Dataset(inputs),
            subset_size=len(inputs),
            preset=nncf.QuantizationPreset.MIXED,
            ignored_scope=nncf.IgnoredScope(names=kept_float(graph)),
            # Processors without VNNI sum two products in 16 bits, which weights of 7 bits cannot overflow.
            advanced_parameters=AdvancedQuantizationParameters(overflow_fix=OverflowFix.ENABLE),
        )


def kept_float(graph: Any) -> list[str]:
    """The names of the nodes that are neither layers with weights nor sums of feature maps."""
    leave_out = ("Constant", "Parameter", "Result")
    nodes = [node for node in graph.get_ops() if node.get_type_name() not in leave_out]
    return [node.get_friendly_name() for node in nodes if not _is_layer(node)]


def _is_layer(node: Any) -> bool:
    kind = node.get_type_name()
    if kind in ("Convolution", "MatMul"):
        return node.input_value(1).get_node().get_type_name() == "Constant"
    return kind == "Add" and len(node.get_output_partial_shape(0)) == 4
