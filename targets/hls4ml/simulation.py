# SPDX-License-Identifier: Apache-2.0
"""The C simulation: what is compiled of hls4ml's project and how, and the script for C synthesis where AMD's tool is."""

from __future__ import annotations

QONNX_FILE = "qonnx.onnx"
CONFIG_FILE = "hls_config.json"
SOURCE_FILE = "csim/library.cpp"
HEADER_FILE = "csim/isthmus.h"
EXTENSION_FILE = "csim/nnet_isthmus.h"
LIBRARY_FILE = "csim/libmodel.so"
SYNTHESIS_FILE = "synthesis.tcl"
ESTIMATE_FILE = "estimate.json"
BUILD_FOLDER = "build"
BUILD_RECORD = f"{BUILD_FOLDER}/build.json"
PROJECT_FOLDER = "project"
PROJECT_NAME = "model"
WEIGHTS_FOLDER = f"{PROJECT_FOLDER}/firmware/weights"

GENERATED_HEADER = "nnet_code_gen.h"  # of hls4ml's headers the only one that differs from project to project
EXTENSION_HEADER = EXTENSION_FILE.rpartition("/")[2]

# What every project shares, precompiled once. Weights are read when the library first runs, from the folder beside it: compiled in, they
# double g++'s time, and hls4ml's own script compiles in the absolute path of the build folder.
HEADER = """// SPDX-License-Identifier: Apache-2.0
#ifndef ISTHMUS_H_
#define ISTHMUS_H_
#include <dlfcn.h>
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdio>
#include <iostream>
#include <map>
#include <string>
#include <tuple>

static std::string isthmus_weights_folder() {
    Dl_info where;
    dladdr(reinterpret_cast<void *>(&isthmus_weights_folder), &where);
    const std::string file(where.dli_fname);
    const std::size_t slash = file.rfind('/');
    return (slash == std::string::npos ? std::string(".") : file.substr(0, slash)) + "/../project/firmware/weights";
}
#define WEIGHTS_DIR isthmus_weights_folder()

#include "ap_fixed.h"
#include "ap_int.h"
""" + "".join(
    f'#include "nnet_utils/nnet_{part}.h"\n'
    for part in (
        "types", "helpers", "common", "mult", "function_stubs", "stream", "activation", "activation_stream", "conv1d_latency", "conv2d", "conv2d_stream",
        "dense", "dense_stream", "merge", "merge_stream", "padding", "padding_stream", "pooling", "pooling_stream", "sepconv2d", "sepconv2d_stream",
        "transpose", "transpose_stream",
    )
) + f"""#include "nnet_utils/{EXTENSION_HEADER}"
#endif
"""  # fmt: skip

# One translation unit instead of hls4ml's two: its headers are parsed once.
SOURCE = """// SPDX-License-Identifier: Apache-2.0
// The C simulation of the HLS project as one shared library, which finds its weights wherever the folder stands.
#include "isthmus.h"

// The generated line buffers are thousands of plain assignments that run once a pixel: to optimise them is a third of the compile time
// and saves nothing.
#include "../project/firmware/defines.h"
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
FLAGS = (
    "-std=c++17", "-O1", "-fPIC", "-fno-gnu-unique", "-DNDEBUG", "-w",
    "-I", PROJECT_FOLDER, "-I", f"{PROJECT_FOLDER}/firmware", "-I", f"{PROJECT_FOLDER}/firmware/ap_types",
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
