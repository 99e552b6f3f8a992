# SPDX-License-Identifier: Apache-2.0
"""The files of a conifer artifact: names, the side file that says how features become integers, and the C++ around conifer's header."""

from __future__ import annotations

import json

import numpy as np

from isthmus.tree_form import TreeForm
from isthmus.trees import LEAF

SIDE_FILE = "features.json"
CONFIG_FILE = "conifer.json"
PROJECT_FOLDER, PROJECT_NAME = "project", "trees"
SOURCE_FILE, MODEL_FILE, LIBRARY_FILE = "csim/bridge.cpp", "csim/model.json", "csim/libtrees.so"
SYNTHESIS_FILE = "synthesis.tcl"
# conifer's script looks for its files in the folder it is run in, and exports nothing unless told so.
SYNTHESIS = f"set argv {{csim=0 synth=1 export=1}}\ncd {PROJECT_FOLDER}\nsource build_hls.tcl\n"
SCHEMA = 1
# conifer's header keeps every comparison in one type, so that its order of additions is the project's.
FLAGS = ("-std=c++14", "-O1", "-fPIC", "-shared", "-w")
# The HLS project itself, for `check_project`: one function, and no optimising of code that runs a few hundred times.
PROJECT_SOURCE_FILE, PROJECT_LIBRARY_FILE = "csim/project.cpp", "csim/libproject.so"
PROJECT_FLAGS = ("-std=c++14", "-O0", "-fPIC", "-shared", "-w")
PROJECT_SOURCE = f"""// SPDX-License-Identifier: Apache-2.0
// conifer's HLS project behind a C function. Features come as integers in doubles; scores leave as integers in doubles.
#include "../{PROJECT_FOLDER}/firmware/BDT.cpp"
#include "../{PROJECT_FOLDER}/firmware/{PROJECT_NAME}.cpp"

extern "C" void project_run(const double *features, double *scores) {{
    input_arr_t x;
    score_arr_t score;
    for (int i = 0; i < n_features; i++)
        x[i] = features[i];
    {PROJECT_NAME}(x, score);
    for (int i = 0; i < BDT::fn_classes(n_classes); i++)
        scores[i] = score[i].to_double();
}}
"""

_SOURCE = """// SPDX-License-Identifier: Apache-2.0
// conifer's C++ backend behind three C functions. Features come as integers in doubles; scores leave as integers in doubles.
#include <algorithm>
#include <functional>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>
#include "ap_fixed.h"
#include "conifer.h"

struct Configuration : conifer::ConiferConfiguration {{
    typedef ap_fixed<{feature_bits}, {feature_bits}> threshold_t;
    typedef threshold_t input_t;
    typedef ap_ufixed<1, 1> weight_t;  // 0 or 1: the threshold type could not hold 1 where it has no integer bits
    typedef ap_fixed<{score_bits}, {score_bits}> score_t;
    static constexpr bool useAddTree = false;
}};
typedef conifer::BDT<Configuration> Model;

extern "C" {{
void *trees_open(const char *file) {{
    try {{ return new Model(std::string(file)); }} catch (const std::exception &) {{ return nullptr; }}
}}
int trees_run(const void *model, const double *features, int feature_count, double *scores, int score_count) {{
    try {{
        const std::vector<double> made = static_cast<const Model *>(model)->_decision_function_double(std::vector<double>(features, features + feature_count));
        if (static_cast<int>(made.size()) != score_count) return 1;
        std::copy(made.begin(), made.end(), scores);
        return 0;
    }} catch (const std::exception &) {{ return 2; }}
}}
void trees_close(void *model) {{ delete static_cast<Model *>(model); }}
}}
"""


def source(feature_bits: int, score_bits: int) -> str:
    return _SOURCE.format(feature_bits=feature_bits, score_bits=score_bits)


def side_file(form: TreeForm) -> bytes:
    """What the host needs at run time, and what `convert` makes conifer's model of. Features that no tree reads are left out."""
    used = sorted({int(index) for tree in form.trees for index in tree.feature[tree.inner]}) or [0]
    place = {feature: position for position, feature in enumerate(used)}
    trees = [
        {
            "feature": [-1 if feature == LEAF else place[int(feature)] for feature in tree.feature],
            **{name: getattr(tree, name).tolist() for name in ("threshold", "left", "right", "value")},
        }
        for tree in form.trees
    ]
    return json.dumps(
        {
            "schema": SCHEMA,
            "used": used,
            **{name: getattr(form, name)[np.array(used)].tolist() for name in ("exponents", "lowest", "highest")},
            "task": form.task,
            "sums": len(form.base),
            "base": form.base.tolist(),
            "feature_bits": form.feature_bits,
            "score_bits": form.score_bits,
            "trees": trees,
        }
    ).encode()


def config_file(part: str, clock_ns: float) -> bytes:
    return json.dumps({"schema": SCHEMA, "part": part, "clock_ns": clock_ns}).encode()
