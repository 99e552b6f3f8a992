# SPDX-License-Identifier: Apache-2.0
"""Headers of two vendors' compilers, as far as hls4ml's code names them, for g++: pipes and queues are first-in-first-out lists.

What computes is hls4ml's own code; with oneAPI on the `ac_types` library itself (hls4ml brings it, Intel's compiler has its own copy), with
Libero on AMD's `ap_fixed` in the place of SmartHLS' `ap_fixpt`, which is not public. No result here rests on icpx or SmartHLS.
"""

from __future__ import annotations

_LICENCE = "// SPDX-License-Identifier: Apache-2.0\n#pragma once\n"

# A task starts when it is called: an io_parallel design is one task.
_SYCL = (
    _LICENCE
    + """#include <cstdint>
#include <cstdlib>
#include <deque>
#include <exception>
#include <vector>
#define SYCL_EXTERNAL
namespace sycl {
typedef std::vector<std::exception_ptr> exception_list;
typedef std::exception exception;
namespace property { namespace queue { struct enable_profiling {}; } }
struct queue {
    template <class... arguments_T> queue(arguments_T &&...) {}
    template <class name_T, class kernel_T> void single_task(const kernel_T &kernel) { kernel(); }
    void wait() {}
};
namespace ext { namespace oneapi { namespace experimental {
struct properties_tag {};
template <class... properties_T> struct properties { properties(properties_T...) {} };
} } }
namespace ext { namespace intel {
struct fpga_emulator_selector {};
static const fpga_emulator_selector fpga_emulator_selector_v;
namespace experimental {
struct number { int value; };
template <int cycles> static const number ready_latency = {cycles};
template <class... none> static const number streaming_interface = {0};
template <class... none> static const number pipelined = {0};
template <class name_T, class data_T, int32_t capacity = 0, class properties_T = void> struct pipe {
    static std::deque<data_T> &waiting() {
        static std::deque<data_T> all;
        return all;
    }
    static void write(const data_T &value) { waiting().push_back(value); }
    static void write(queue &, const data_T &value) { write(value); }
    static data_T read() {
        if (waiting().empty())
            std::abort();
        const data_T value = waiting().front();
        waiting().pop_front();
        return value;
    }
    static data_T read(queue &) { return read(); }
};
template <auto &function> struct task_sequence {
    template <class... arguments_T> void async(arguments_T &&...given) { function(given...); }
};
} } }
}
"""
)
_AC = _LICENCE + '#include "ac_fixed.h"\n#include "ac_int.h"\n'
_SYCL_AGAIN = _LICENCE + '#include "sycl/sycl.hpp"\n'
ONEAPI = {
    "sycl/sycl.hpp": _SYCL,
    "sycl/ext/intel/fpga_extensions.hpp": _SYCL_AGAIN,
    "sycl/ext/intel/experimental/task_sequence.hpp": _SYCL_AGAIN,
    "sycl/ext/intel/ac_types/ac_fixed.hpp": _AC,
    "sycl/ext/intel/ac_types/ac_int.hpp": _AC,
    "sycl/ext/intel/ac_types/ac_fixed_math.hpp": _AC,
}

_SMART_HLS = (
    _LICENCE
    + """#include <cstdlib>
#include <deque>
#include "ap_fixed.h"
#include "ap_int.h"
namespace hls {
static const ap_q_mode AP_TRN = ::AP_TRN, AP_RND = ::AP_RND, AP_RND_CONV = ::AP_RND_CONV;
static const ap_o_mode AP_WRAP = ::AP_WRAP, AP_SAT = ::AP_SAT;
template <int bits, int integer, ap_q_mode rounding = ::AP_TRN, ap_o_mode overflow = ::AP_WRAP> using ap_fixpt = ap_fixed<bits, integer, rounding, overflow>;
template <int bits, int integer, ap_q_mode rounding = ::AP_TRN, ap_o_mode overflow = ::AP_WRAP> using ap_ufixpt = ap_ufixed<bits, integer, rounding, overflow>;
template <int bits> using ap_int = ::ap_int<bits>;
template <int bits> using ap_uint = ::ap_uint<bits>;
static const unsigned DEFAULT_FIFO_DEPTH = 2;
template <class data_T> struct FIFO {
    std::deque<data_T> waiting;
    FIFO(unsigned depth = 0) {}
    void write(const data_T &value) { waiting.push_back(value); }
    data_T read() {
        if (waiting.empty())
            std::abort();
        const data_T value = waiting.front();
        waiting.pop_front();
        return value;
    }
    bool empty() const { return waiting.empty(); }
};
}
using hls::DEFAULT_FIFO_DEPTH;  // hls4ml's bridge names it without a namespace
"""
)
_SMART_HLS_AGAIN = _LICENCE + '#include "hls/streaming.hpp"\n'
LIBERO = {"hls/streaming.hpp": _SMART_HLS, "hls/ap_fixpt.hpp": _SMART_HLS_AGAIN, "hls/ap_int.hpp": _SMART_HLS_AGAIN}
