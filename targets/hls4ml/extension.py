# SPDX-License-Identifier: Apache-2.0
"""The layer that isthmus adds to hls4ml, by hls4ml's extension API: one class for every function of `hls_code`. Needs hls4ml."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from hls4ml.backends import get_backend
from hls4ml.backends.template import FunctionCallTemplate, LayerConfigTemplate
from hls4ml.converters.onnx_to_hls import get_onnx_attribute, register_onnx_layer_handler
from hls4ml.model.attributes import Attribute
from hls4ml.model.layers import Layer, register_layer

from isthmus.targets.hls4ml.simulation import EXTENSION_HEADER
from isthmus.targets.hls4ml.writer import GLOBAL_MEAN, KERNEL


class IsthmusKernel(Layer):
    """`kernel`: the function's name; `body`: what stands in its config struct; `shape`: the result's, without the batch."""

    _expected_attributes: ClassVar[list[Any]] = [Attribute("kernel", value_type=str), Attribute("body", value_type=str), Attribute("shape", value_type=list)]

    def initialize(self) -> None:
        self.add_output_variable(self.get_attr("shape"))


class _Config(LayerConfigTemplate):
    def __init__(self) -> None:
        super().__init__(IsthmusKernel)

    def format(self, node: Any) -> str:
        return f"struct config{node.index} {{\n{node.get_attr('body')}    static const unsigned reuse_factor = {node.get_attr('reuse_factor')};\n}};\n"


class _Call(FunctionCallTemplate):
    def __init__(self) -> None:
        super().__init__(IsthmusKernel, include_header=[f"nnet_utils/{EXTENSION_HEADER}"])

    def format(self, node: Any) -> str:
        given = [node.get_input_variable(name) for name in node.inputs]
        result = node.get_output_variable()
        types = ", ".join([*(variable.type.name for variable in given), result.type.name, f"config{node.index}"])
        return f"nnet::{node.get_attr('kernel')}<{types}>({', '.join(variable.name for variable in (*given, result))});"


def _parsed(node: Any, input_names: list[str], input_shapes: list[list[int]], graph: Any) -> dict[str, Any]:
    return {
        "class_name": KERNEL,
        "name": node.name,
        "inputs": input_names,
        "outputs": list(node.output),
        "kernel": get_onnx_attribute(node, "kernel"),
        "body": get_onnx_attribute(node, "body"),
        "shape": list(get_onnx_attribute(node, "shape")),
    }


def _global_mean(node: Any, input_names: list[str], input_shapes: list[list[int]], graph: Any) -> dict[str, Any]:
    _, rows, columns, channels = input_shapes[0]
    own = {"class_name": "GlobalAveragePooling2D", "name": node.name, "inputs": input_names, "outputs": list(node.output)}
    window = {"pool_height": rows, "pool_width": columns, "stride_height": rows, "stride_width": columns}
    return {**own, **window, "data_format": "channels_last", "n_filt": channels, "in_height": rows, "in_width": columns}


def register(backend: str, header: Path) -> None:
    """Makes the layer known to hls4ml; `header` is the file with its HLS code."""
    register_onnx_layer_handler(KERNEL, _parsed)
    register_onnx_layer_handler(GLOBAL_MEAN, _global_mean)
    register_layer(KERNEL, IsthmusKernel)
    get_backend(backend).register_template(_Config)
    get_backend(backend).register_template(_Call)
    get_backend(backend).register_source(header.resolve())
