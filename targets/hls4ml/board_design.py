# SPDX-License-Identifier: Apache-2.0
"""The kernel on a Zynq board: a wrapper that takes and gives AXI-stream beats, and the Vivado block design around it (processor, DMA, kernel).

What comes out is a folder that `runtimes.pynq` opens: model.bit, model.hwh and pynq.json. Vivado has not run these scripts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from isthmus.profile import Profile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from isthmus.targets.hls4ml.backends import Backend

KERNEL = "model_axi"
KERNEL_FILE, KERNEL_SCRIPT = f"kernel/{KERNEL}.cpp", "kernel/kernel.tcl"
DESIGN_FILE = "kernel/design.tcl"
BITSTREAM_FOLDER = "bitstream"
SIDE_FILE = f"{BITSTREAM_FOLDER}/pynq.json"
BEAT_BYTES = 4
MEMORY_BITS = 32  # the narrowest that an AXI DMA reads and writes memory with

# As much of AMD's header as the wrapper names: hls4ml brings the other ones for g++, this one not.
AXI_HEADER = {
    "ap_axi_sdata.h": """// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "ap_int.h"
template <int bits, int user_bits, int id_bits, int destination_bits> struct ap_axiu {
    ap_uint<bits> data;
    ap_uint<bits / 8> keep, strb;
    ap_uint<user_bits> user;
    ap_uint<1> last;
    ap_uint<id_bits> id;
    ap_uint<destination_bits> dest;
};
"""
}

_WRAPPER = """// SPDX-License-Identifier: Apache-2.0
// The network behind an AXI DMA: {beat_bytes} int8 elements in a beat, in the order of the tensor, the last beat filled up with zeros.
#include "ap_axi_sdata.h"
#include "hls_stream.h"
#include "../project/firmware/model.h"

typedef ap_axiu<{bits}, 1, 1, 1> beat_t;  // Vivado HLS knows no side channel of no bits
static const unsigned PER_BEAT = {beat_bytes}, IN = {inputs}, OUT = {outputs};
static const unsigned IN_BEATS = (IN + PER_BEAT - 1) / PER_BEAT, OUT_BEATS = (OUT + PER_BEAT - 1) / PER_BEAT;

static beat_t made_beat(ap_uint<{bits}> data, bool last) {{
    #pragma HLS INLINE
    beat_t beat;
    beat.data = data;
    beat.keep = -1;
    beat.strb = -1;
    beat.user = 0;
    beat.id = 0;
    beat.dest = 0;
    beat.last = last;
    return beat;
}}

{body}"""

_ARRAYS = """void model_axi(hls::stream<beat_t> &given, hls::stream<beat_t> &made) {{
    #pragma HLS INTERFACE axis port=given
    #pragma HLS INTERFACE axis port=made
    #pragma HLS INTERFACE ap_ctrl_none port=return
    {input_type} in[IN];
    {output_type} out[OUT];
    #pragma HLS ARRAY_PARTITION variable=in complete
    #pragma HLS ARRAY_PARTITION variable=out complete
Given:
    for (unsigned i = 0; i < IN_BEATS; i++) {{
        #pragma HLS PIPELINE
        const ap_uint<{bits}> data = given.read().data;
        for (unsigned lane = 0; lane < PER_BEAT; lane++) {{
            #pragma HLS UNROLL
            if (i * PER_BEAT + lane < IN)
                in[i * PER_BEAT + lane].range(7, 0) = data.range(8 * lane + 7, 8 * lane);
        }}
    }}
    model(in, out);
Made:
    for (unsigned i = 0; i < OUT_BEATS; i++) {{
        #pragma HLS PIPELINE
        ap_uint<{bits}> data = 0;
        for (unsigned lane = 0; lane < PER_BEAT; lane++) {{
            #pragma HLS UNROLL
            if (i * PER_BEAT + lane < OUT)
                data.range(8 * lane + 7, 8 * lane) = out[i * PER_BEAT + lane].range(7, 0);
        }}
        made.write(made_beat(data, i == OUT_BEATS - 1));
    }}
}}
"""

_STREAMS = """static void taken(hls::stream<beat_t> &given, hls::stream<{input_type}> &in) {{
    {input_type} pack;
    ap_uint<{bits}> data = 0;
    for (unsigned i = 0; i < IN; i++) {{
        #pragma HLS PIPELINE
        if (i % PER_BEAT == 0)
            data = given.read().data;
        pack[i % {input_type}::size].range(7, 0) = data.range(7, 0);
        data >>= 8;
        if (i % {input_type}::size == {input_type}::size - 1)
            in.write(pack);
    }}
}}

static void given_back(hls::stream<{output_type}> &out, hls::stream<beat_t> &made) {{
    {output_type} pack;
    ap_uint<{bits}> data = 0;
    for (unsigned i = 0; i < OUT; i++) {{
        #pragma HLS PIPELINE
        if (i % {output_type}::size == 0)
            pack = out.read();
        const unsigned lane = i % PER_BEAT;
        if (lane == 0)
            data = 0;
        data.range(8 * lane + 7, 8 * lane) = pack[i % {output_type}::size].range(7, 0);
        if (lane == PER_BEAT - 1 || i == OUT - 1)
            made.write(made_beat(data, i == OUT - 1));
    }}
}}

void model_axi(hls::stream<beat_t> &given, hls::stream<beat_t> &made) {{
    #pragma HLS INTERFACE axis port=given
    #pragma HLS INTERFACE axis port=made
    #pragma HLS INTERFACE ap_ctrl_none port=return
    #pragma HLS DATAFLOW
    hls::stream<{input_type}> in("in");
    hls::stream<{output_type}> out("out");
    taken(given, in);
    model(in, out);
    given_back(out, made);
}}
"""

# In the C simulation alone: the wrapper between two buffers as the DMA would read and write them.
BEATS = """
extern "C" void model_beats(const unsigned char *given, unsigned char *made) {
    hls::stream<beat_t> in("in"), out("out");
    for (unsigned i = 0; i < IN_BEATS; i++) {
        beat_t beat = made_beat(0, i == IN_BEATS - 1);
        for (unsigned lane = 0; lane < PER_BEAT; lane++)
            beat.data.range(8 * lane + 7, 8 * lane) = given[i * PER_BEAT + lane];
        in.write(beat);
    }
    model_axi(in, out);
    for (unsigned i = 0; i < OUT_BEATS; i++) {
        const beat_t beat = out.read();
        for (unsigned lane = 0; lane < PER_BEAT; lane++)
            made[i * PER_BEAT + lane] = beat.data.range(8 * lane + 7, 8 * lane).to_uint();
    }
}
"""

_KERNEL_SCRIPT = f"""# SPDX-License-Identifier: Apache-2.0
# The wrapper and the network as one IP: C synthesis and export, by vitis_hls, vitis-run or vivado_hls, in the artifact's folder.
source project/project.tcl
cd build
open_project -reset {KERNEL}
set_top {KERNEL}
add_files ../{KERNEL_FILE} -cflags "-std=c++0x -I../project/firmware"
add_files ../project/firmware/model.cpp -cflags "-std=c++0x"
open_solution -reset solution1
catch {{config_array_partition -maximum_size $maximum_size}}
config_compile -name_max_length 80
set_part $part
create_clock -period $clock_period -name default
set_clock_uncertainty $clock_uncertainty default
csynth_design
export_design -format ip_catalog
exit
"""

# What differs between the two processors: cell, its automation, the ports to switch on and their names.
_PROCESSORS = {
    "zynq7": (
        "processing_system7",
        'make_external "FIXED_IO, DDR" apply_board_preset "1" Master "Disable" Slave "Disable"',
        "CONFIG.PCW_USE_S_AXI_HP0 1 CONFIG.PCW_FPGA0_PERIPHERAL_FREQMHZ $megahertz",
        "M_AXI_GP0",
        "S_AXI_HP0",
    ),
    "zynqmp": (
        "zynq_ultra_ps_e",
        'apply_board_preset "1"',
        "CONFIG.PSU__USE__S_AXI_GP2 1 CONFIG.PSU__CRL_APB__PL0_REF_CTRL__FREQMHZ $megahertz",
        "M_AXI_HPM0_FPD",
        "S_AXI_HP0_FPD",
    ),
}

_DESIGN = """# SPDX-License-Identifier: Apache-2.0
# vivado -mode batch -source {file}, in the artifact's folder: processor, DMA and kernel to {folder}/model.bit and model.hwh.
source project/project.tcl
set megahertz [expr {{1000.0 / $clock_period}}]
set board [lindex [lsort -dictionary [get_board_parts -quiet {board_part}]] end]
if {{$board eq ""}} {{ error "Vivado has no board file {board_part}: install it from the board's maker" }}
create_project design build/design -part $part -force
set_property board_part $board [current_project]
set_property ip_repo_paths [list {ip}] [current_project]
update_ip_catalog
create_bd_design design

set ps [create_bd_cell -type ip -vlnv xilinx.com:ip:{cell} ps]
apply_bd_automation -rule xilinx.com:bd_rule:{cell} -config {{{automation}}} $ps
set_property -dict [list {ports}] $ps
set dma [create_bd_cell -type ip -vlnv xilinx.com:ip:axi_dma axi_dma_0]
set_property -dict [list CONFIG.c_include_sg 0 CONFIG.c_sg_length_width 26 \\
    CONFIG.c_m_axi_mm2s_data_width {memory_bits} CONFIG.c_m_axi_s2mm_data_width {memory_bits} \\
    CONFIG.c_m_axis_mm2s_tdata_width {bits} CONFIG.c_s_axis_s2mm_tdata_width {bits}] $dma
set kernel [create_bd_cell -type ip -vlnv xilinx.com:hls:{kernel} {kernel}_0]
connect_bd_intf_net [get_bd_intf_pins axi_dma_0/M_AXIS_MM2S] [get_bd_intf_pins -of $kernel -filter {{MODE == Slave && VLNV =~ *axis_rtl*}}]
connect_bd_intf_net [get_bd_intf_pins -of $kernel -filter {{MODE == Master && VLNV =~ *axis_rtl*}}] [get_bd_intf_pins axi_dma_0/S_AXIS_S2MM]
apply_bd_automation -rule xilinx.com:bd_rule:axi4 -config {{Master /ps/{master} Slave /axi_dma_0/S_AXI_LITE Clk_xbar Auto}} \\
    [get_bd_intf_pins axi_dma_0/S_AXI_LITE]
apply_bd_automation -rule xilinx.com:bd_rule:axi4 -config {{Master /axi_dma_0/M_AXI_MM2S Slave /ps/{slave} Clk_xbar Auto}} \\
    [get_bd_intf_pins ps/{slave}]
apply_bd_automation -rule xilinx.com:bd_rule:axi4 -config {{Master /axi_dma_0/M_AXI_S2MM Slave /ps/{slave} Clk_xbar Auto}} \\
    [get_bd_intf_pins axi_dma_0/M_AXI_S2MM]
foreach pin [get_bd_pins -of $kernel -filter {{TYPE == clk}}] {{ apply_bd_automation -rule xilinx.com:bd_rule:clkrst -config {{Clk Auto}} $pin }}
validate_bd_design
save_bd_design

make_wrapper -files [get_files design.bd] -top -import
set_property top design_wrapper [current_fileset]
launch_runs impl_1 -to_step write_bitstream
wait_on_run impl_1
if {{[get_property PROGRESS [get_runs impl_1]] != "100%"}} {{ error "implementation did not end: [get_property STATUS [get_runs impl_1]]" }}
open_run impl_1
report_utilization -file {folder}/utilisation.rpt
report_timing_summary -file {folder}/timing.rpt
file copy -force build/design/design.runs/impl_1/design_wrapper.bit {folder}/model.bit
# The .hwh lies in design.gen from 2020.2 on, in design.srcs before.
file copy -force [lindex [glob build/design/design.{{gen,srcs}}/sources_1/bd/design/hw_handoff/design.hwh] 0] {folder}/model.hwh
exit
"""


@dataclass(frozen=True)
class Board:
    """A Zynq board for which a bitstream can be made: its processor, its board files, and how many int8 elements a beat of the stream has."""

    processor: str
    board_part: str
    beat_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {"processor": self.processor, "board_part": self.board_part, "beat_bytes": self.beat_bytes}


def board_of(backend: Backend, profile: Profile, inputs: int, outputs: int) -> Board | None:
    """None where the board is no Zynq, the backend not AMD's, or the network has not one input and one output: no bitstream is planned then."""
    processor, board_part = (str(profile.toolchain.get(name, "")) for name in ("processing_system", "board_part"))
    if processor not in _PROCESSORS or (inputs, outputs) != (1, 1) or backend.name not in ("Vitis", "Vivado", "VivadoAccelerator"):
        return None
    return Board(processor, board_part, 1 if backend.name == "VivadoAccelerator" else BEAT_BYTES)


def board_files(board: Board, backend: Backend) -> dict[str, bytes]:
    """What is known before hls4ml has run: the scripts, and how tensors lie on the bus."""
    cell, automation, ports, master, slave = _PROCESSORS[board.processor]
    wrapped = backend.name == "VivadoAccelerator"
    design = _DESIGN.format(
        file=DESIGN_FILE, folder=BITSTREAM_FOLDER, board_part=board.board_part, cell=cell, automation=automation, ports=ports, master=master, slave=slave,
        memory_bits=MEMORY_BITS, bits=8 * board.beat_bytes, kernel=KERNEL,
        ip="project/model_prj/solution1/impl/ip" if wrapped else f"build/{KERNEL}/solution1/impl/ip",
    )  # fmt: skip
    lanes = {"per_beat": board.beat_bytes, "beat_bytes": board.beat_bytes}
    side = {"schema": 1, "interface": "stream", "input": lanes, "output": lanes}
    files = {DESIGN_FILE: design.encode(), SIDE_FILE: (json.dumps(side, indent=1) + "\n").encode()}
    if not wrapped:
        files |= {KERNEL_SCRIPT: _KERNEL_SCRIPT.encode(), **{f"csim/stand_ins/{name}": text.encode() for name, text in AXI_HEADER.items()}}
    return files


def wrapper(board: Mapping[str, Any], io_type: str, input_type: str, output_type: str, inputs: int, outputs: int) -> str:
    """The code around hls4ml's top function, whose types only the written project names."""
    beat_bytes = int(board["beat_bytes"])
    body = (_STREAMS if io_type == "io_stream" else _ARRAYS).format(bits=8 * beat_bytes, input_type=input_type, output_type=output_type)
    return _WRAPPER.format(beat_bytes=beat_bytes, bits=8 * beat_bytes, inputs=inputs, outputs=outputs, body=body)
