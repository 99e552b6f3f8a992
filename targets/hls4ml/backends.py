# SPDX-License-Identifier: Apache-2.0
"""hls4ml's backends: for each what of it is written, how g++ compiles its C simulation, and what it cannot carry.

AMD's three share their code but for a few headers. Catapult's and oneAPI's compute in `ac_fixed`, Libero's in `ap_fixpt`. The C simulation of
oneAPI and Libero is compiled with stand-ins for the headers of icpx and SmartHLS (`stand_ins`), and the artifact says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from isthmus.errors import IsthmusError, Problem
from isthmus.profile import Profile
from isthmus.targets.hls4ml import stand_ins
from isthmus.targets.hls4ml.fixed import activation_type
from isthmus.targets.hls4ml.tail import fpga_outputs
from isthmus.targets.hls4ml.writer import GLOBAL_MEAN

if TYPE_CHECKING:
    from isthmus.graph import QuantGraph

BOTH = ("io_parallel", "io_stream")
# hls4ml's headers that every project of AMD's backends shares, parsed once.
_AMD_PARTS = (
    "types", "helpers", "common", "mult", "function_stubs", "stream", "activation", "activation_stream", "conv1d_latency", "conv2d", "conv2d_stream",
    "dense", "dense_stream", "merge", "merge_stream", "padding", "padding_stream", "pooling", "pooling_stream", "sepconv2d", "sepconv2d_stream",
    "transpose", "transpose_stream",
)  # fmt: skip


@dataclass(frozen=True)
class Backend:
    """`name`: hls4ml's. `firmware`, `bridge`: where it puts the generated code. `includes`: folders for g++, behind the firmware's own.

    `types`: "ap" or "ac", the family of fixed-point types. `parts`: headers precompiled with them. `copied`: folder of hls4ml's package -> folder of
    the artifact, for types that the project itself does not carry. `operators`: the QONNX operators it has code for; empty: all that are lowered to.
    `inexact`: those whose code rounds otherwise than the form, each with how. `stand_ins`: headers (name -> text) in the place of a vendor's.
    `said`: what the artifact says of its C simulation.
    """

    name: str
    title: str
    tools: tuple[str, ...]
    firmware: str = "project/firmware"
    bridge: str = "project/model_bridge.cpp"
    includes: tuple[str, ...] = ()
    types: str = "ap"
    parts: tuple[str, ...] = ()
    copied: tuple[str, str] | None = None
    io_types: tuple[str, ...] = BOTH
    operators: frozenset[str] = frozenset()
    inexact: Mapping[str, str] = field(default_factory=dict)
    stand_ins: Mapping[str, str] = field(default_factory=dict)
    said: str = ""

    @property
    def written(self) -> str:
        """The file that the conversion ends with."""
        return f"{self.firmware}/model.cpp"


_AMD_INCLUDES = ("project/firmware/ap_types",)
_AC_INCLUDES = ("project/firmware/nnet_utils", "project/firmware/ac_types/include", "project/firmware/ac_math/include", "project/firmware/ac_simutils/include")
_CUT_OFF = "an average that hls4ml's Catapult backend cuts off at the bits of its input, where the form rounds"
DEPTHWISE = "depthwise Conv"  # a Conv of the QONNX graph with groups
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("Vitis", "Vitis HLS", ("vitis-run", "vitis_hls"), includes=_AMD_INCLUDES, parts=_AMD_PARTS),
        Backend("Vivado", "Vivado HLS", ("vivado_hls",), includes=_AMD_INCLUDES, parts=_AMD_PARTS),
        Backend("VivadoAccelerator", "Vivado HLS accelerator", ("vivado_hls",), includes=_AMD_INCLUDES, parts=_AMD_PARTS),
        Backend("Catapult", "Catapult", ("catapult",), includes=_AC_INCLUDES, types="ac", inexact=dict.fromkeys(("AveragePool", GLOBAL_MEAN), _CUT_OFF)),
        Backend(
            "oneAPI",
            "oneAPI",
            ("icpx",),
            firmware="project/src/firmware",
            bridge="project/src/model_bridge.cpp",
            includes=("project/src", "csim/stand_ins", "csim/ac_types"),
            types="ac",
            copied=("templates/quartus/ac_types", "csim/ac_types"),
            io_types=("io_parallel",),
            inexact={DEPTHWISE: "a depthwise convolution, for which hls4ml's oneAPI code computed other values than the form"},
            stand_ins=stand_ins.ONEAPI,
            said="its C simulation is hls4ml's code compiled by g++ with a stand-in for SYCL's pipes; icpx has not compiled it",
        ),
        Backend(
            "Libero",
            "SmartHLS",
            ("shls",),
            includes=("csim/stand_ins", "csim/ap_types"),
            copied=("templates/vivado/ap_types", "csim/ap_types"),
            io_types=("io_parallel",),
            operators=frozenset({"Quant", "MatMul", "Relu", "Reshape"}),
            stand_ins=stand_ins.LIBERO,
            said="its C simulation is hls4ml's code compiled by g++ with AMD's ap_fixed in the place of SmartHLS' ap_fixpt; SmartHLS has not compiled it",
        ),
    )
}
ACCELERATED = ("pynq-z2", "zcu102")  # boards of hls4ml's block designs


def chosen_backend(profile: Profile, wanted: str = "auto") -> Backend:
    """The backend that `--set backend=` names, the profile's own where it is "auto". Raises `IsthmusError` for a name hls4ml has not."""
    name = str(profile.toolchain.get("backend", "Vitis")) if wanted == "auto" else wanted
    if name not in BACKENDS:
        raise IsthmusError(f"option backend of target hls4ml: {name!r} is not one of auto, {', '.join(BACKENDS)}")
    return BACKENDS[name]


def part_problems(backend: Backend, profile: Profile) -> list[Problem]:
    """A backend writes for one maker's parts; hls4ml's script for Catapult loads AMD's libraries."""
    maker = str(profile.toolchain.get("maker", "AMD"))
    own_maker = {"oneAPI": "Intel", "Libero": "Microchip"}.get(backend.name, "AMD")
    if maker == own_maker:
        return []
    own = str(profile.toolchain.get("backend", "Vitis"))
    found = f"{backend.name} writes for parts of {own_maker}, and {profile.board} is {maker}'s"
    return [Problem(profile.name, "backend", found, f"use --set backend={own}, or choose another board ('isthmus targets' lists them)")]


def backend_problems(backend: Backend, graph: QuantGraph, profile: Profile, io_type: str) -> list[Problem]:
    """What this backend has no code for. `graph` has passed every other rule."""
    problems = []
    if backend.name == "VivadoAccelerator":
        if profile.name not in ACCELERATED:
            fix = "use --set backend=Vitis, or one of these boards"
            problems.append(Problem(profile.name, "backend", f"VivadoAccelerator knows the boards {', '.join(ACCELERATED)}", fix))
        for side, specs in (("input", graph.inputs), ("output", graph.outputs)):
            if len(specs) != 1:
                found = f"{len(specs)} {side}s, and VivadoAccelerator moves one"
                problems.append(Problem("model", "backend", found, "use --set backend=Vitis, or cut the network (--split) so that one tensor crosses"))
    if (backend.operators or backend.inexact) and not problems:
        problems += _layer_problems(backend, graph, io_type)
    return problems


def _layer_problems(backend: Backend, graph: QuantGraph, io_type: str) -> list[Problem]:
    """hls4ml leaves a layer for which its backend has no code out of the project, without a word; of others its code is inexact."""
    import onnx  # the steps of the plan, which import this module, lower nothing

    from isthmus.targets.hls4ml.lower import lower

    lowered = lower(graph, io_type)
    biases = {f"{product.layer}_add" for product in lowered.products}  # become part of the dense layer
    problems: dict[str, Problem] = {}
    for node in onnx.load_from_string(lowered.model).graph.node:
        grouped = any(attribute.name == "group" and attribute.i > 1 for attribute in node.attribute)
        operator = DEPTHWISE if node.op_type == "Conv" and grouped else node.op_type
        missing = bool(backend.operators) and operator not in backend.operators and node.name not in biases
        if not missing and operator not in backend.inexact:
            continue
        layer = max((known for known in lowered.nodes if node.name.startswith(known)), key=len, default="")
        name = lowered.nodes.get(layer, node.name)
        found = f"becomes {operator}, which hls4ml's {backend.name} backend has no code for" if missing else f"becomes {backend.inexact[operator]}"
        fix = "keep to dense layers and Relu, or choose a board with an AMD part" if missing else "use --set backend=Vitis on an AMD part, or another layer"
        problems.setdefault(name, Problem(name, "backend-layer", found, fix))
    return list(problems.values())


def settings(backend: Backend, graph: QuantGraph, profile: Profile) -> dict[str, Any]:
    """What hls4ml's converter is told beside part, clock and types."""
    if backend.name == "VivadoAccelerator":
        ends = [activation_type(scale) for scale in (graph.tensors[graph.raw_input(0)].scale, graph.tensors[fpga_outputs(graph)[0]].scale) if scale is not None]
        types = {"input_type": f"ap_fixed<8,{ends[0].integer}>", "output_type": f"ap_fixed<8,{ends[1].integer}>"}
        return {"board": profile.name, "interface": "axi_stream", **types}
    if backend.name == "Libero":
        # The folder is not looked into here: hls4ml writes it into a Makefile that is not used.
        return {"part": str(profile.toolchain["device"]), "smarthls_path": "SmartHLS"}
    return {}
