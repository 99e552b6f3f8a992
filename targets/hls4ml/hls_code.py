# SPDX-License-Identifier: Apache-2.0
"""The HLS functions that isthmus adds to hls4ml's: each exact by construction, each for arrays (io_parallel) and for streams (io_stream).

`CONFIG_T` is a struct that `kernels.py` writes; what varies by layer (tables, places, weights) lies in its static functions, so that
HLS makes wires or ROMs of it. What differs by backend stands in front: the fixed-point types, the stream, and behind: oneAPI's arrays.
"""

from __future__ import annotations

_AP = """// SPDX-License-Identifier: Apache-2.0
#ifndef NNET_ISTHMUS_H_
#define NNET_ISTHMUS_H_

#include "hls_stream.h"
#include "nnet_common.h"

namespace nnet {

template <class T> using isthmus_stream = hls::stream<T>;

// An int8 activation and its steps: its bits, whatever the scale.
template <class T> T isthmus_value(int steps) {
    #pragma HLS INLINE
    T value = 0;
    value.range(T::width - 1, 0) = steps;
    return value;
}

template <class T> int isthmus_steps(T value) {
    #pragma HLS INLINE
    ap_int<T::width> steps = 0;
    steps.range(T::width - 1, 0) = value.range(T::width - 1, 0);
    return steps.to_int();
}

"""

# The pragmas below are AMD's: Catapult and icpx pass over them, and fold by their own rules.
_AC_VALUES = """template <class T> T isthmus_value(int steps) {
    T value = 0;
    value.set_slc(0, ac_int<T::width, true>(steps));
    return value;
}

template <class T> int isthmus_steps(T value) {
    return value.template slc<T::width>(0).to_int();
}

"""

_CATAPULT = (
    """// SPDX-License-Identifier: Apache-2.0
#ifndef NNET_ISTHMUS_H_
#define NNET_ISTHMUS_H_

#include <ac_channel.h>
#include <ac_fixed.h>
#include "nnet_common.h"
#include "nnet_types.h"
#define PRAGMA_DATA_PACK(pack)

// As the config structs name exact types.
template <int bits, int integer> using ap_fixed = ac_fixed<bits, integer, true>;

namespace nnet {

template <class T> using isthmus_stream = ac_channel<T>;

"""
    + _AC_VALUES
)

_ONEAPI = (
    """// SPDX-License-Identifier: Apache-2.0
#ifndef NNET_ISTHMUS_H_
#define NNET_ISTHMUS_H_

#include "nnet_common.h"
#include "nnet_types.h"

// As the config structs name exact types.
template <int bits, int integer> using ap_fixed = ac_fixed<bits, integer, true>;

namespace nnet {

"""
    + _AC_VALUES
)

_ARRAYS = """// Half to even; divisor > 0.
template <class int_T> int_T isthmus_divided(int_T total, int_T divisor) {
    #pragma HLS INLINE
    int_T quotient = total / divisor;
    const int_T rest = total % divisor;
    const int_T twice = 2 * (rest < 0 ? -rest : rest);
    if (twice > divisor || (twice == divisor && (quotient & 1) != 0))
        quotient += total < 0 ? -1 : 1;
    return quotient;
}

template <class int_T> int isthmus_saturated(int_T steps) {
    #pragma HLS INLINE
    return steps < -128 ? -128 : steps > 127 ? 127 : int(steps);
}

// ---- a function of one number: 256 entries, one table or one a channel
template <class data_T, class res_T, typename CONFIG_T> res_T isthmus_look_up(data_T value, unsigned channel) {
    #pragma HLS INLINE
    return isthmus_value<res_T>(CONFIG_T::entry(channel, isthmus_steps<data_T>(value) & 255));
}

template <class data_T, class res_T, typename CONFIG_T> void isthmus_table(data_T data[CONFIG_T::n_in], res_T res[CONFIG_T::n_in]) {
    #pragma HLS PIPELINE II=CONFIG_T::reuse_factor
    for (unsigned i = 0; i < CONFIG_T::n_in; i++) {
        #pragma HLS UNROLL
        res[i] = isthmus_look_up<data_T, res_T, CONFIG_T>(data[i], i % CONFIG_T::n_channels);
    }
}

// ---- the same values in the same order, as a layer of its own; a stream may have other packs
template <class data_T, class res_T, typename CONFIG_T> void isthmus_copy(data_T data[CONFIG_T::n_in], res_T res[CONFIG_T::n_in]) {
    #pragma HLS PIPELINE II=CONFIG_T::reuse_factor
    for (unsigned i = 0; i < CONFIG_T::n_in; i++) {
        #pragma HLS UNROLL
        res[i] = data[i];
    }
}

// ---- values that only change their place: source(row, column, channel) is a place in the data, or below 0: -129 - steps of a constant
template <class data_T, class res_T, typename CONFIG_T> void isthmus_move(data_T data[CONFIG_T::n_in], res_T res[CONFIG_T::n_out]) {
    #pragma HLS PIPELINE II=CONFIG_T::reuse_factor
    for (unsigned row = 0; row < CONFIG_T::rows; row++) {
        for (unsigned column = 0; column < CONFIG_T::columns; column++) {
            for (unsigned channel = 0; channel < CONFIG_T::channels; channel++) {
                const int from = CONFIG_T::source(row, column, channel);
                const unsigned place = (row * CONFIG_T::columns + column) * CONFIG_T::channels + channel;
                if (from < 0)
                    res[place] = isthmus_value<res_T>(-129 - from);
                else
                    res[place] = data[from];
            }
        }
    }
}

// ---- two tensors in one: source() counts on through the second
template <class data1_T, class data2_T, class res_T, typename CONFIG_T>
void isthmus_join(data1_T data1[CONFIG_T::n_in1], data2_T data2[CONFIG_T::n_in2], res_T res[CONFIG_T::n_out]) {
    #pragma HLS PIPELINE II=CONFIG_T::reuse_factor
    for (unsigned row = 0; row < CONFIG_T::rows; row++) {
        for (unsigned column = 0; column < CONFIG_T::columns; column++) {
            for (unsigned channel = 0; channel < CONFIG_T::channels; channel++) {
                const unsigned from = CONFIG_T::source(row, column, channel);
                const unsigned place = (row * CONFIG_T::columns + column) * CONFIG_T::channels + channel;
                if (from < CONFIG_T::n_in1)
                    res[place] = data1[from];
                else
                    res[place] = data2[from - CONFIG_T::n_in1];
            }
        }
    }
}

// ---- products of two tensors: (batches, rows, depth) x (batches, depth, columns), row by row
template <class data1_T, class data2_T, class res_T, typename CONFIG_T>
void isthmus_product(data1_T data1[CONFIG_T::n_in1], data2_T data2[CONFIG_T::n_in2], res_T res[CONFIG_T::n_out]) {
    #pragma HLS PIPELINE II=CONFIG_T::reuse_factor
    for (unsigned batch = 0; batch < CONFIG_T::batches; batch++) {
        for (unsigned row = 0; row < CONFIG_T::rows; row++) {
            for (unsigned column = 0; column < CONFIG_T::columns; column++) {
                typename CONFIG_T::accum_t total = 0;
                for (unsigned k = 0; k < CONFIG_T::depth; k++)
                    total += data1[(batch * CONFIG_T::rows + row) * CONFIG_T::depth + k] * data2[(batch * CONFIG_T::depth + k) * CONFIG_T::columns + column];
                res[(batch * CONFIG_T::rows + row) * CONFIG_T::columns + column] = total;
            }
        }
    }
}

// ---- linear interpolation: whole weights over one whole divisor, one division at the end
template <class data_T, class res_T, typename CONFIG_T> void isthmus_interpolate(data_T data[CONFIG_T::n_in], res_T res[CONFIG_T::n_out]) {
    #pragma HLS PIPELINE II=CONFIG_T::reuse_factor
    typedef typename CONFIG_T::accum_t accum_t;
    for (unsigned row = 0; row < CONFIG_T::rows; row++) {
        for (unsigned column = 0; column < CONFIG_T::columns; column++) {
            for (unsigned channel = 0; channel < CONFIG_T::channels; channel++) {
                accum_t total = 0;
                for (unsigned down = 0; down < 2; down++) {
                    for (unsigned right = 0; right < 2; right++) {
                        const unsigned from = CONFIG_T::row_source(row, down) * CONFIG_T::in_columns + CONFIG_T::column_source(column, right);
                        const accum_t weight = accum_t(CONFIG_T::row_weight(row, down)) * CONFIG_T::column_weight(column, right);
                        total += weight * isthmus_steps<data_T>(data[from * CONFIG_T::channels + channel]);
                    }
                }
                const accum_t steps = isthmus_divided<accum_t>(total * CONFIG_T::factor, CONFIG_T::divisor);
                res[(row * CONFIG_T::columns + column) * CONFIG_T::channels + channel] = isthmus_value<res_T>(isthmus_saturated<accum_t>(steps));
            }
        }
    }
}

"""

_STREAMS = """// ---- the same for streams: a whole tensor from one, and into one
template <class data_T, unsigned n> void isthmus_read(isthmus_stream<data_T> &data, typename data_T::value_type values[n]) {
IsthmusRead:
    for (unsigned i = 0; i < n / data_T::size; i++) {
        #pragma HLS PIPELINE
        const data_T pack = data.read();
        for (unsigned j = 0; j < data_T::size; j++) {
            #pragma HLS UNROLL
            values[i * data_T::size + j] = pack[j];
        }
    }
}

template <class res_T, unsigned n> void isthmus_write(typename res_T::value_type values[n], isthmus_stream<res_T> &res) {
IsthmusWrite:
    for (unsigned i = 0; i < n / res_T::size; i++) {
        #pragma HLS PIPELINE
        res_T pack;
        PRAGMA_DATA_PACK(pack)
        for (unsigned j = 0; j < res_T::size; j++) {
            #pragma HLS UNROLL
            pack[j] = values[i * res_T::size + j];
        }
        res.write(pack);
    }
}

template <class data_T, class res_T, typename CONFIG_T> void isthmus_table(isthmus_stream<data_T> &data, isthmus_stream<res_T> &res) {
IsthmusTable:
    for (unsigned i = 0; i < CONFIG_T::n_in / data_T::size; i++) {
        #pragma HLS PIPELINE
        const data_T pack = data.read();
        res_T out;
        PRAGMA_DATA_PACK(out)
        for (unsigned j = 0; j < data_T::size; j++) {
            #pragma HLS UNROLL
            out[j] = isthmus_look_up<typename data_T::value_type, typename res_T::value_type, CONFIG_T>(pack[j], j % CONFIG_T::n_channels);
        }
        res.write(out);
    }
}

template <class data_T, class res_T, typename CONFIG_T> void isthmus_copy(isthmus_stream<data_T> &data, isthmus_stream<res_T> &res) {
    data_T pack;
    unsigned next = data_T::size;
IsthmusCopy:
    for (unsigned i = 0; i < CONFIG_T::n_in / res_T::size; i++) {
        res_T out;
        PRAGMA_DATA_PACK(out)
        for (unsigned j = 0; j < res_T::size; j++) {
            if (next == data_T::size) {
                pack = data.read();
                next = 0;
            }
            out[j] = pack[next++];
        }
        res.write(out);
    }
}

template <class data_T, class res_T, typename CONFIG_T> void isthmus_move(isthmus_stream<data_T> &data, isthmus_stream<res_T> &res) {
    typename data_T::value_type kept[CONFIG_T::n_in];
    isthmus_read<data_T, CONFIG_T::n_in>(data, kept);
IsthmusMove:
    for (unsigned row = 0; row < CONFIG_T::rows; row++) {
        for (unsigned column = 0; column < CONFIG_T::columns; column++) {
            #pragma HLS PIPELINE
            res_T pack;
            PRAGMA_DATA_PACK(pack)
            for (unsigned channel = 0; channel < CONFIG_T::channels; channel++) {
                #pragma HLS UNROLL
                const int from = CONFIG_T::source(row, column, channel);
                if (from < 0)
                    pack[channel] = isthmus_value<typename res_T::value_type>(-129 - from);
                else
                    pack[channel] = kept[from];
            }
            res.write(pack);
        }
    }
}

template <class data1_T, class data2_T, class res_T, typename CONFIG_T>
void isthmus_join(isthmus_stream<data1_T> &data1, isthmus_stream<data2_T> &data2, isthmus_stream<res_T> &res) {
    typename data1_T::value_type kept1[CONFIG_T::n_in1];
    typename data2_T::value_type kept2[CONFIG_T::n_in2];
    typename res_T::value_type joined[CONFIG_T::n_out];
    isthmus_read<data1_T, CONFIG_T::n_in1>(data1, kept1);
    isthmus_read<data2_T, CONFIG_T::n_in2>(data2, kept2);
    isthmus_join<typename data1_T::value_type, typename data2_T::value_type, typename res_T::value_type, CONFIG_T>(kept1, kept2, joined);
    isthmus_write<res_T, CONFIG_T::n_out>(joined, res);
}

template <class data1_T, class data2_T, class res_T, typename CONFIG_T>
void isthmus_product(isthmus_stream<data1_T> &data1, isthmus_stream<data2_T> &data2, isthmus_stream<res_T> &res) {
    typename data1_T::value_type kept1[CONFIG_T::n_in1];
    typename data2_T::value_type kept2[CONFIG_T::n_in2];
    typename res_T::value_type products[CONFIG_T::n_out];
    isthmus_read<data1_T, CONFIG_T::n_in1>(data1, kept1);
    isthmus_read<data2_T, CONFIG_T::n_in2>(data2, kept2);
    isthmus_product<typename data1_T::value_type, typename data2_T::value_type, typename res_T::value_type, CONFIG_T>(kept1, kept2, products);
    isthmus_write<res_T, CONFIG_T::n_out>(products, res);
}

template <class data_T, class res_T, typename CONFIG_T> void isthmus_interpolate(isthmus_stream<data_T> &data, isthmus_stream<res_T> &res) {
    typename data_T::value_type kept[CONFIG_T::n_in];
    typename res_T::value_type between[CONFIG_T::n_out];
    isthmus_read<data_T, CONFIG_T::n_in>(data, kept);
    isthmus_interpolate<typename data_T::value_type, typename res_T::value_type, CONFIG_T>(kept, between);
    isthmus_write<res_T, CONFIG_T::n_out>(between, res);
}

"""

# oneAPI's arrays are std::array, by reference; the functions above take their elements.
_OF_ARRAYS = "".join(
    f"""template <class data_T, class res_T, typename CONFIG_T> void isthmus_{name}(const data_T &data, res_T &res) {{
    typedef typename data_T::value_type value_T;
    isthmus_{name}<value_T, typename res_T::value_type, CONFIG_T>(const_cast<value_T *>(data.data()), res.data());
}}

"""
    for name in ("table", "copy", "move", "interpolate")
) + "".join(
    f"""template <class data1_T, class data2_T, class res_T, typename CONFIG_T> void isthmus_{name}(const data1_T &data1, const data2_T &data2, res_T &res) {{
    typedef typename data1_T::value_type value1_T;
    typedef typename data2_T::value_type value2_T;
    isthmus_{name}<value1_T, value2_T, typename res_T::value_type, CONFIG_T>(
        const_cast<value1_T *>(data1.data()), const_cast<value2_T *>(data2.data()), res.data());
}}

"""
    for name in ("join", "product")
)

_END = "} // namespace nnet\n\n#endif\n"


def extension_code(backend: str) -> str:
    """The header for one of hls4ml's backends."""
    if backend == "oneAPI":
        return _ONEAPI + _ARRAYS + _OF_ARRAYS + _END
    return (_CATAPULT if backend == "Catapult" else _AP) + _ARRAYS + _STREAMS + _END
