# SPDX-License-Identifier: Apache-2.0
"""The C simulation: what is compiled of hls4ml's project and how, and where its files lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

from isthmus.targets.hls4ml.board_design import BEATS, KERNEL_FILE

if TYPE_CHECKING:
    from isthmus.targets.hls4ml.backends import Backend

QONNX_FILE = "qonnx.onnx"
CONFIG_FILE = "hls_config.json"
SOURCE_FILE = "csim/library.cpp"
HEADER_FILE = "csim/isthmus.h"
EXTENSION_FILE = "csim/nnet_isthmus.h"
LIBRARY_FILE = "csim/libmodel.so"
STAND_INS_FOLDER = "csim/stand_ins"
WEIGHTS_FILE = "csim/weights.h"
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
_HEADER = """// SPDX-License-Identifier: Apache-2.0
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

"""


def header(backend: Backend) -> str:
    """What is parsed once for all projects of a backend: its fixed-point types and, with AMD's, hls4ml's own headers."""
    names = [f"{backend.types}_fixed.h", f"{backend.types}_int.h", *(f"nnet_utils/nnet_{part}.h" for part in backend.parts)]
    if backend.parts:
        names.append(f"nnet_utils/{EXTENSION_HEADER}")
    return _HEADER + "".join(f'#include "{name}"\n' for name in names) + "#endif\n"


# One translation unit instead of hls4ml's two: its headers are parsed once.
_SOURCE = """// SPDX-License-Identifier: Apache-2.0
// The C simulation of the HLS project as one shared library, which finds its weights wherever the folder stands.
#include "isthmus.h"

"""

# The generated line buffers are thousands of plain assignments that run once a pixel: to optimise them is a third of the compile time
# and saves nothing.
_LINE_BUFFERS = """#include "../{firmware}/defines.h"
#pragma GCC push_options
#pragma GCC optimize("O0")
#include "../{firmware}/nnet_utils/nnet_code_gen.h"
#pragma GCC pop_options

"""
# oneAPI's weights are constants of the code; g++ has no constant expressions of ac_fixed, which icpx' own version has.
_WEIGHTS = """#include "../{firmware}/defines.h"
#define constexpr const
#include "weights.h"
#undef constexpr

"""


def source(backend: Backend, board: bool) -> str:
    """`board`: with the wrapper for the board's bus, and a function that runs the network through it."""
    extra = _LINE_BUFFERS if backend.parts else _WEIGHTS if backend.name == "oneAPI" else ""
    files = [backend.written, *([f"{backend.firmware}/model_axi.cpp"] if backend.name == "VivadoAccelerator" else []), backend.bridge]
    wrapped = board and backend.name != "VivadoAccelerator"  # whose bridge calls its own wrapper
    files += [KERNEL_FILE] if wrapped else []
    return _SOURCE + extra.format(firmware=backend.firmware) + "".join(f'#include "../{file}"\n' for file in files) + (BEATS if wrapped else "")


# -O1: -O3 takes g++ a third longer for a simulation that is a quarter faster, -O0 throughout simulates forty times slower.
# -fno-gnu-unique: without it two of these libraries in one process share their template statics, and none can be unloaded.
# -DNDEBUG: an assertion would end the process that holds the session; a wrong value fails the comparison with the reference instead.
_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fno-gnu-unique", "-DNDEBUG", "-w")


def flags(backend: Backend) -> tuple[str, ...]:
    folders = dict.fromkeys((PROJECT_FOLDER, backend.firmware, *backend.includes, STAND_INS_FOLDER))
    return (*_FLAGS, *(word for folder in folders for word in ("-I", folder)))


# C synthesis alone: the other steps are the build's own. Vitis' script reads them from a file, Vivado's from its arguments.
OPTIONS = {"reset": 1, "csim": 0, "synth": 1, "cosim": 0, "validation": 0, "export": 0, "vsynth": 0, "fifo_opt": 0}
BUILD_OPTIONS = "array set opt {\n" + "".join(f"    {name} {value}\n" for name, value in OPTIONS.items()) + "}\n"
