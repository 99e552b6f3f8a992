# SPDX-License-Identifier: Apache-2.0
"""`QonnxWriter`: QONNX in the channels-last dialect that hls4ml reads, and beside it the precision of each HLS layer.

The dialect is written at once instead of being derived by qonnx's ConvertToChannelsLastAndClean: that one leaves global pools in NCHW,
which hls4ml then reads as NHWC, and it renames the nodes that the layer configuration refers to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from isthmus.targets.hls4ml.fixed import Fixed
from isthmus.targets.hls4ml.kernels import Kernel

CHANNELS_LAST = "qonnx.custom_op.channels_last"
QUANT = "qonnx.custom_op.general"
# Of our own: a layer whose HLS code is in `hls_code`, made known to hls4ml by `extension`.
KERNEL_DOMAIN = "isthmus"
KERNEL = "IsthmusKernel"
GLOBAL_MEAN = "IsthmusGlobalMean"  # hls4ml's own layer, whose ONNX handler (1.3.0) takes rows for channels in every layout


class QonnxWriter:
    """Collects nodes and layer types. Shapes are written, not inferred: hls4ml does not infer them and onnx does not know the dialect."""

    def __init__(self) -> None:
        self.layers: dict[str, dict[str, Any]] = {}  # hls4ml's LayerName section
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._shapes: list[onnx.ValueInfoProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    # ---- border
    def input(self, name: str, shape: Sequence[int], of: Fixed) -> str:
        """A graph input that already holds values of type `of`: the border is raw int8."""
        self._inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))
        self.layer(name, result=of)
        return self.quant(name, f"{name}_quant", of, shape)

    def output(self, value: str, name: str, shape: Sequence[int], of: Fixed) -> None:
        """hls4ml orders outputs by node, so each gets a node of its own, written last and in order; it costs nothing in hardware."""
        result = self.quant(value, name, of, shape, inform=False)
        self._outputs.append(helper.make_tensor_value_info(result, TensorProto.FLOAT, list(shape)))

    # ---- nodes
    def node(self, op: str, inputs: Sequence[str], name: str, result_shape: Sequence[int], *, domain: str = "", **attributes: Any) -> str:
        """A node and the shape of its one result, whose name is returned."""
        result = f"{name}_out"
        self._nodes.append(helper.make_node(op, list(inputs), [result], name=name, domain=domain, **attributes))
        self._inform(result, result_shape)
        return result

    def kernel(self, kernel: Kernel, inputs: Sequence[str], name: str, shape: Sequence[int], result: Fixed) -> str:
        """A layer of our own: `shape` has the batch, as everywhere."""
        self.layer(name, result=result)
        return self.node(KERNEL, inputs, name, shape, domain=KERNEL_DOMAIN, kernel=kernel.function, body=kernel.body, shape=list(shape[1:]))

    def quant(self, value: str, name: str, of: Fixed, shape: Sequence[int], inform: bool = True) -> str:
        """A `Quant` node: `of` as QONNX says it. hls4ml turns it into a cast, or drops it where the value has that type already."""
        parameters = [self.constant(f"{name}_{part}", number) for part, number in (("scale", 2.0**-of.fraction), ("zero", 0.0), ("bits", float(of.bits)))]
        result = f"{name}_out"
        self._nodes.append(helper.make_node("Quant", [value, *parameters], [result], name=name, domain=QUANT, signed=1, narrow=0, rounding_mode="ROUND"))
        if inform:
            self._inform(result, shape)
        self.layer(name, result=of)
        return result

    def constant(self, name: str, values: np.ndarray | float | Sequence[int], dtype: type[np.generic] = np.float32) -> str:
        array = np.asarray(values, dtype)
        self._constants.append(numpy_helper.from_array(array, name))
        self._inform(name, array.shape, TensorProto.INT64 if dtype is np.int64 else TensorProto.FLOAT)
        return name

    def weights(self, name: str, integers: np.ndarray, of: Fixed) -> str:
        """Integer weights as QONNX has them: real numbers behind a `Quant`."""
        self.constant(name, np.ldexp(integers.astype(np.float64), -of.fraction))
        return self.quant(name, f"{name}_quant", of, integers.shape)

    def layer(self, name: str, **precision: Fixed | str) -> None:
        """The types of layer `name`: each is given, none is left to a default."""
        self.layers[name] = {"Precision": {key: str(value) for key, value in precision.items()}, "Trace": False}

    def model(self, name: str) -> bytes:
        from isthmus.graph import IR_VERSION, OPSET  # the steps of the plan, which import this module, need no onnx_ir: a third of a second

        graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs, self._constants, value_info=self._shapes)
        opsets = [helper.make_opsetid(domain, version) for domain, version in (("", OPSET), (CHANNELS_LAST, 1), (QUANT, 1), (KERNEL_DOMAIN, 1))]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="isthmus", ir_version=IR_VERSION)
        return model.SerializeToString(deterministic=True)

    def _inform(self, name: str, shape: Sequence[int], kind: int = TensorProto.FLOAT) -> None:
        self._shapes.append(helper.make_tensor_value_info(name, kind, list(shape)))
