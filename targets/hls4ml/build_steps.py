# SPDX-License-Identifier: Apache-2.0
"""The steps from a project to what the tool of its backend makes of it, in order, each with the command that the tool is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from isthmus.targets.hls4ml import simulation
from isthmus.targets.hls4ml.board_design import BITSTREAM_FOLDER, DESIGN_FILE, KERNEL, KERNEL_SCRIPT

NAME, PROJECT, BUILD = simulation.PROJECT_NAME, simulation.PROJECT_FOLDER, simulation.BUILD_FOLDER
SOLUTION = f"{PROJECT}/{NAME}_prj/solution1"
VITIS = ("vitis-run", "vitis_hls")  # the first is the name from 2024.2 on, where the second still starts but is on its way out


@dataclass(frozen=True)
class BuildStep:
    """`argv` runs in `folder` of the artifact; where it is empty the tool is given build/<name>.tcl with `tcl`, as that tool takes it.

    `makes` must be there afterwards; `reports` are read into the record.
    """

    name: str
    tools: tuple[str, ...]
    tcl: str = ""
    argv: tuple[str, ...] = ()
    folder: str = ""
    makes: tuple[str, ...] = ()
    reports: tuple[str, ...] = ()

    @property
    def script(self) -> str:
        """Relative to the artifact; "" where the step has none."""
        return f"{BUILD}/{self.name}.tcl" if self.tcl else ""

    def command(self, tool: str) -> list[str]:
        if self.argv:
            return [tool, *self.argv]
        if Path(tool).name == "vitis-run":
            return [tool, "--mode", "hls", "--tcl", self.script]
        return [tool, "-mode", "batch", "-nojournal", "-nolog", "-source", self.script] if Path(tool).name == "vivado" else [tool, "-f", self.script]


def steps_of(backend: str, board: bool) -> tuple[BuildStep, ...]:
    """`board`: the artifact has a design of the board around the kernel, which becomes a bitstream."""
    if backend == "Catapult":
        return _catapult()
    if backend == "oneAPI":
        return _oneapi()
    if backend == "Libero":
        return _libero()
    return _amd(backend, board)


def step_names() -> list[str]:
    """Of every backend, in order."""
    return ["synthesis", "cosimulation", "export", "implementation", "kernel", "bitstream"]


# ---- AMD
def _hls(*commands: str, reset: bool = False) -> str:
    """hls4ml's project, opened as its own script does, and the commands."""
    options = " ".join(f"{name}={value}" for name, value in simulation.OPTIONS.items())
    project = [f"set ::argv {{{options}}}", "source build_prj.tcl"] if reset else [f"open_project {NAME}_prj", "open_solution solution1"]
    return "\n".join([f"cd {PROJECT}", *project, *commands, "exit", ""])


def _implement(top: str) -> str:
    """Out of context: what the IP takes and how fast it is, placed and routed. Vivado refuses to write a bitstream of it, for want of pins."""
    return f"""read_verilog [glob {SOLUTION}/syn/verilog/*.v]
foreach script [glob -nocomplain {SOLUTION}/syn/verilog/*.tcl] {{ source $script }}
source {PROJECT}/project.tcl
synth_design -top {top} -part $part -mode out_of_context
create_clock -period $clock_period [get_ports ap_clk]
opt_design
place_design
route_design
write_checkpoint -force {BUILD}/routed.dcp
report_utilization -file {BUILD}/utilisation.rpt
report_timing_summary -file {BUILD}/timing.rpt
exit
"""


def _amd(backend: str, board: bool) -> tuple[BuildStep, ...]:
    hls = VITIS if backend == "Vitis" else ("vivado_hls",)
    wrapped = backend == "VivadoAccelerator"  # its project is the kernel with its bus, and needs no second one
    top = KERNEL if wrapped else NAME
    steps = [
        BuildStep("synthesis", hls, _hls(reset=True), makes=(f"{SOLUTION}/syn/verilog",), reports=(f"{SOLUTION}/syn/report/{top}_csynth.rpt",)),
        BuildStep("cosimulation", hls, _hls("cosim_design -rtl verilog"), reports=(f"{SOLUTION}/sim/report/{top}_cosim.rpt",)),
        BuildStep("export", hls, _hls("export_design -format ip_catalog"), makes=(f"{SOLUTION}/impl/ip",)),
        BuildStep("implementation", ("vivado",), _implement(top), makes=(f"{BUILD}/routed.dcp",), reports=(f"{BUILD}/utilisation.rpt", f"{BUILD}/timing.rpt")),
    ]
    if board and not wrapped:
        steps.append(BuildStep("kernel", hls, f"source {KERNEL_SCRIPT}\n", makes=(f"{BUILD}/{KERNEL}/solution1/impl/ip",)))
    if board:
        made = tuple(f"{BITSTREAM_FOLDER}/{NAME}{ending}" for ending in (".bit", ".hwh"))
        reports = (f"{BITSTREAM_FOLDER}/utilisation.rpt", f"{BITSTREAM_FOLDER}/timing.rpt")
        steps.append(BuildStep("bitstream", ("vivado",), f"source {DESIGN_FILE}\n", makes=made, reports=reports))
    return tuple(steps)


# ---- the others: as hls4ml's own build() calls them
def _catapult() -> tuple[BuildStep, ...]:
    """hls4ml's script runs what its options ask for, in one go. Its reports are kept, not read."""

    def run(**options: int) -> tuple[str, ...]:
        asked = " ".join(f"{name}={value}" for name, value in options.items())
        return ("-product", "ultra", "-shell", "-f", "build_prj.tcl", "-eval", f'set ::argv "{asked}"')

    common = {"csim": 0, "vhdl": 0, "verilog": 1}
    return (
        BuildStep("synthesis", ("catapult",), argv=run(synth=1, cosim=0, **common), folder=PROJECT, makes=(f"{PROJECT}/{NAME}_prj.ccs",)),
        BuildStep("cosimulation", ("catapult",), argv=run(reset=1, synth=1, cosim=1, **common), folder=PROJECT, makes=(f"{PROJECT}/{NAME}_prj.ccs",)),
        BuildStep(
            "implementation", ("catapult",), argv=run(reset=1, synth=1, cosim=0, vsynth=1, **common), folder=PROJECT, makes=(f"{PROJECT}/{NAME}_prj.ccs",)
        ),
    )


def _oneapi() -> tuple[BuildStep, ...]:
    """icpx by hls4ml's CMake file: `report` compiles to RTL and estimates, `fpga_sim` is what co-simulation runs, `fpga` ends in Quartus."""
    folder = f"{BUILD}/oneapi"

    def target(name: str) -> tuple[str, ...]:
        return ("--build", folder, "--target", name)

    return (
        BuildStep("configure", ("cmake",), argv=("-S", PROJECT, "-B", folder), makes=(f"{folder}/Makefile",)),
        BuildStep("synthesis", ("cmake",), argv=target("report"), makes=(f"{folder}/{NAME}.report.prj",)),
        BuildStep("cosimulation", ("cmake",), argv=target("fpga_sim"), makes=(f"{folder}/{NAME}.fpga_sim",)),
        BuildStep("export", ("cmake",), argv=target("fpga_ip_export")),
        BuildStep("implementation", ("cmake",), argv=target("fpga"), makes=(f"{folder}/{NAME}.fpga",)),
    )


def _libero() -> tuple[BuildStep, ...]:
    """SmartHLS in hls4ml's folder; "-a" runs what a step rests on as well, and is not needed as the steps stand in order."""
    results = f"{PROJECT}/hls_output/reports/summary.results.rpt"

    def run(name: str) -> tuple[str, ...]:
        return ("-s", name)

    return (
        BuildStep("synthesis", ("shls",), argv=run("hw"), folder=PROJECT, makes=(f"{PROJECT}/hls_output/rtl",)),
        BuildStep("cosimulation", ("shls",), argv=run("cosim"), folder=PROJECT, reports=(results,)),
        BuildStep("implementation", ("shls",), argv=run("fpga"), folder=PROJECT, reports=(results,)),
    )
