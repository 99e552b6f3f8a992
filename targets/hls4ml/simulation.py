# SPDX-License-Identifier: Apache-2.0
"""The C simulation: what is compiled of hls4ml's project and how, and the script for C synthesis where AMD's tool is."""

from __future__ import annotations

QONNX_FILE = "qonnx.onnx"
CONFIG_FILE = "hls_config.json"
SOURCE_FILE = "csim/library.cpp"
LIBRARY_FILE = "csim/libmodel.so"
SYNTHESIS_FILE = "synthesis.tcl"
PROJECT_FOLDER = "project"
PROJECT_NAME = "model"
WEIGHTS_FOLDER = f"{PROJECT_FOLDER}/firmware/weights"

# One translation unit instead of hls4ml's two: its headers are parsed once. Weights are read when the library first runs, from the
# folder beside it: compiled in, they double g++'s time, and hls4ml's own script compiles in the absolute path of the build folder.
SOURCE = """// SPDX-License-Identifier: Apache-2.0
// The C simulation of the HLS project as one shared library, which finds its weights wherever the folder stands.
#include <dlfcn.h>
#include <string>

static std::string isthmus_weights_folder() {
    Dl_info where;
    dladdr(reinterpret_cast<void *>(&isthmus_weights_folder), &where);
    const std::string file(where.dli_fname);
    const std::size_t slash = file.rfind('/');
    return (slash == std::string::npos ? std::string(".") : file.substr(0, slash)) + "/../project/firmware/weights";
}
#define WEIGHTS_DIR isthmus_weights_folder()

// What the generated line buffers need, optimised; they themselves are thousands of plain assignments that run once a pixel: to
// optimise them is a third of the compile time and saves nothing.
#include "../project/firmware/defines.h"
#include "../project/firmware/nnet_utils/nnet_helpers.h"
#include "../project/firmware/nnet_utils/nnet_conv1d_latency.h"
#include "../project/firmware/nnet_utils/nnet_common.h"
#include "../project/firmware/nnet_utils/nnet_function_stubs.h"
#include "../project/firmware/nnet_utils/nnet_mult.h"
#pragma GCC push_options
#pragma GCC optimize("O0")
#include "../project/firmware/nnet_utils/nnet_code_gen.h"
#pragma GCC pop_options

#include "../project/firmware/model.cpp"
#include "../project/model_bridge.cpp"
"""

# -O1: -O3 takes g++ a third longer for a simulation that is a quarter faster, -O0 throughout simulates forty times slower.
# -fno-gnu-unique: without it two of these libraries in one process share their template statics, and none can be unloaded.
# -DNDEBUG: an assertion would end the process that holds the session; a wrong value fails the comparison with the reference instead.
COMPILE = (
    "g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-fno-gnu-unique", "-DNDEBUG", "-w",
    "-I", f"{PROJECT_FOLDER}", "-I", f"{PROJECT_FOLDER}/firmware", "-I", f"{PROJECT_FOLDER}/firmware/ap_types",
    SOURCE_FILE, "-o", LIBRARY_FILE, "-ldl",
)  # fmt: skip

SYNTHESIS = """# SPDX-License-Identifier: Apache-2.0
# vitis_hls -f synthesis.tcl (2024.1 and older), or: vitis-run --mode hls --tcl synthesis.tcl. Options are in project/build_opt.tcl.
cd [file join [file dirname [file normalize [info script]]] project]
source build_prj.tcl
"""

BUILD_OPTIONS = """array set opt {
    reset      1
    csim       0
    synth      1
    cosim      0
    validation 0
    export     1
    vsynth     0
    fifo_opt   0
}
"""
