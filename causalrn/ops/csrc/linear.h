// What the passes of the linear relation share: arguments, rows in scratch memory, exponentials, the gate.
//
//     S_i = total + sum_{j<=i} exp(norm(k_j)),   l_i = norm(q_i) + log S_i,   y_i = norm_HD(exp(l_i))
//
// A sequence is taken in blocks of rows that fit into the second-level cache. Sums run in float inside a block and in
// double from block to block. Every result is the same for any number of threads.
#pragma once

#include <math.h>

#include "rows.h"

namespace causalrn {
namespace CAUSALRN_ISA {

// Mirrored by causalrn/ops/linear_native.py. q, k and dy are (B, T, H, D) of one type, with strides (in elements) of
// their own for B and T; y, dq, dk are contiguous; totals are (B, H, D), those passed in may be null.
struct LinearArguments {
    const void *q, *k, *dy;
    void *y, *dq, *dk;
    const float *total, *dtotal;
    float* total_out;
    int64_t batch, length, heads, channels;
    int64_t q_batch_stride, q_stride, k_batch_stride, k_stride, dy_batch_stride, dy_stride;
    float eps;
    int32_t causal, rms, bf16, threads;
};

// As load_row and store_lanes of rows.h, with the type known when compiled.
template <class Element>
CAUSALRN_INLINE vec load_lanes(const Element* p, int count) {
    return load_row(p, 0, count, sizeof(Element) == 2);
}
template <class Element>
CAUSALRN_INLINE void store_lanes(Element* p, vec value, int count) {
    store_lanes(p, 0, value, count, sizeof(Element) == 2);
}

// How a row lies in scratch memory: each head is padded to whole vectors. Padding of sums is -0, which tells it from
// every sum of exponentials; all other padding is 0.
struct Layout {
    int64_t heads, channels, head_stride, stride, rows, blocks;
    ivec tail;

    explicit Layout(const LinearArguments& a)
        : heads(a.heads),
          channels(a.channels),
          head_stride(padded(a.channels)),
          stride(a.heads * head_stride),
          // 96 KiB per scratch array of a block leave room for the inputs in a cache of 512 KiB or more.
          rows(min(a.length, max(int64_t(8), min(int64_t(64), 24576 / stride)))),
          blocks((a.length + rows - 1) / rows),
          tail{} {
        for (int lane = 0; lane < kWidth; ++lane) tail[lane] = lane < channels % kWidth ? -1 : 0;
    }
};

// The body of a loop over a head's vectors: offset in memory, channels, those as a mask, one of four independent sums.
#define CAUSALRN_EACH [&](int64_t d, int count, ivec lanes, int slot) __attribute__((always_inline))

template <class Body>
CAUSALRN_INLINE void each_vector(const Layout& l, Body body) {
    const ivec all = ~ivec{};
    int64_t d = 0;
    for (; d + 4 * kWidth <= l.channels; d += 4 * kWidth) {
        body(d, kWidth, all, 0);
        body(d + kWidth, kWidth, all, 1);
        body(d + 2 * kWidth, kWidth, all, 2);
        body(d + 3 * kWidth, kWidth, all, 3);
    }
    for (; d + kWidth <= l.channels; d += kWidth) body(d, kWidth, all, 0);
    if (d < l.channels) body(d, int(l.channels - d), l.tail, 1);
}

CAUSALRN_INLINE float sum_slots(const vec* slots) { return sum((slots[0] + slots[1]) + (slots[2] + slots[3])); }
CAUSALRN_INLINE float max_slots(const vec* slots) {
    return max_of(max(max(slots[0], slots[1]), max(slots[2], slots[3])));
}

CAUSALRN_INLINE void fill(const Layout& l, float* row, float value) {
    for (int64_t d = 0; d < l.stride; d += kWidth) store(row + d, broadcast(value));
}

// The normalisation of one head of one row: x -> (x - mean) * inverse.
struct Stats {
    float mean, std, inverse;
};

// Copies one head of a row into scratch, less its mean (unless rms).
template <class Element>
CAUSALRN_INLINE Stats centre(const Layout& l, const LinearArguments& a, const Element* x, float* out) {
    vec sums[4] = {}, squares[4] = {};
    if (!a.rms) each_vector(l, CAUSALRN_EACH { sums[slot] += load_lanes(x + d, count); });
    const float mean = sum_slots(sums) / float(l.channels);
    each_vector(l, CAUSALRN_EACH {
        vec value = select(lanes, load_lanes(x + d, count) - mean, vec{});
        store(out + d, value);
        squares[slot] += value * value;
    });
    const float std = sqrtf(sum_slots(squares) / float(l.channels));
    return {mean, std, 1 / (std + a.eps)};
}

// Row i of batch entry b: of an input, and of an output, which is contiguous.
template <class Element>
CAUSALRN_INLINE const Element* q_row(const LinearArguments& a, int64_t b, int64_t i) {
    return static_cast<const Element*>(a.q) + b * a.q_batch_stride + i * a.q_stride;
}
template <class Element>
CAUSALRN_INLINE const Element* k_row(const LinearArguments& a, int64_t b, int64_t i) {
    return static_cast<const Element*>(a.k) + b * a.k_batch_stride + i * a.k_stride;
}
template <class Element>
CAUSALRN_INLINE Element* out_row(const LinearArguments& a, void* out, int64_t b, int64_t i) {
    return static_cast<Element*>(out) + (b * a.length + i) * a.heads * a.channels;
}

// A block of consecutive rows of one batch entry.
struct Block {
    int64_t b, first, rows;
};

CAUSALRN_INLINE Block block_at(const Layout& l, const LinearArguments& a, int64_t b, int64_t index) {
    return {b, index * l.rows, min(l.rows, a.length - index * l.rows)};
}

// The sum of exp(norm(k)) over the rows of a block. Their exponentials go to exp_k + row * exp_stride, and (if wanted)
// the statistics of each row and head to `stats`.
template <class Element>
static void exp_rows(const Layout& l, const LinearArguments& a, Block block, float* exp_k, int64_t exp_stride,
                     float* block_sum, Stats* stats) {
    fill(l, block_sum, -0.0f);
    for (int64_t row = 0; row < block.rows; ++row) {
        for (int64_t h = 0; h < l.heads; ++h) {
            float *out = exp_k + row * exp_stride + h * l.head_stride, *total = block_sum + h * l.head_stride;
            const Stats s = centre(l, a, k_row<Element>(a, block.b, block.first + row) + h * l.channels, out);
            const vec scale = broadcast(s.inverse * kExpScale);
            each_vector(l, CAUSALRN_EACH {
                vec value = select(lanes, exp_steps(load(out + d), scale), broadcast(-0.0f));
                store(out + d, value);
                store(total + d, load(total + d) + value);
            });
            if (stats) stats[row * l.heads + h] = s;
        }
    }
}

// A row of exp(l) = exp(norm(q)) S up to a power of two, so that its greatest element lies between 0.7 and 4.
struct Gate {
    float mean, std, highest;
    // 1 / (std + eps * highest): eps is relative to the greatest element.
    float inverse;
};

// Where the sums S of the rows of a block come from, one row after the other: `start` is the sum before the block (all
// there is when not causal), `running` that of the rows so far, exp_k points at the row to come.
struct RowSums {
    const float* start;
    float* running;
    const float* exp_k;
};

// The processor's own prefetching stops where one row ends and another tensor's row comes in between.
template <class Element>
struct Ahead {
    const Element *first, *second;
    Element* out;
};

// The product exp(norm(q)) S could leave the range of floats, so the exponents of both are added as integers. Writes S,
// the centred q with its statistics per head, and the scaled exp(l); fetches the rows `ahead` meanwhile.
template <bool kCausal, class Element>
static Gate gate_row_of(const Layout& l, const LinearArguments& a, const Element* q, RowSums from,
                      Ahead<Element> ahead, Stats* stats, float* __restrict centred, float* __restrict sums,
                      float* __restrict value) {
    constexpr int kOctaveShift = 23 - kStepShift;
    const vec magic = broadcast(kRoundToInt);
    ivec octaves = ivec{} - 0x7f000000;
    for (int64_t h = 0; h < l.heads; ++h) {
        const int64_t start = h * l.head_stride, channel = h * l.channels;
        stats[h] = centre(l, a, q + channel, centred + start);
        const vec scale = broadcast(stats[h].inverse * kExpScale);
        each_vector(l, CAUSALRN_EACH {
            vec s = load(from.start + start + d);
            if (kCausal) {
                vec rows = load(from.running + start + d) + load(from.exp_k + start + d);
                store(from.running + start + d, rows);
                s += rows;
            }
            store(sums + start + d, s);
            ivec shifted = (ivec)(load(centred + start + d) * scale + magic);
            ivec octave = (shifted >> kOctaveShift) + ((ivec)s >> 23);
            octaves = octave > octaves ? octave : octaves;
            __builtin_prefetch(ahead.first + channel + d);
        });
    }
    int32_t top = octaves[0];
    for (int lane = 1; lane < kWidth; ++lane) top = max(top, octaves[lane]);
    // The top octave less what the bits of 1.5 * 2^23, which every shifted value carries, add to it.
    const int32_t lowered = int32_t(uint32_t(top - (0x4b400000 >> kOctaveShift)) << 23);
    vec total[4] = {}, greatest[4] = {}, squares[4] = {};
    for (int64_t h = 0; h < l.heads; ++h) {
        const int64_t start = h * l.head_stride, channel = h * l.channels;
        const vec scale = broadcast(stats[h].inverse * kExpScale);
        each_vector(l, CAUSALRN_EACH {
            __builtin_prefetch(ahead.second + channel + d);
            __builtin_prefetch(ahead.out + channel + d, 1);
            vec s = load(sums + start + d), x = load(centred + start + d);
            vec shifted = x * scale + magic;
            ivec exponent = (ivec)s & 0x7f800000;
            vec mantissa = s * (vec)(0x7f000000 - exponent);
            vec rest = x * scale - (shifted - magic);
            vec result = power_of_steps(shifted, exponent - lowered) * (power_of_rest(rest, broadcast(1)) * mantissa);
            ivec octave = ((ivec)shifted >> kOctaveShift) + ((ivec)s >> 23);
            // 2^-100 of the greatest element adds nothing to the row's sums; the padding is lower still.
            result = select(octave < top - 100, vec{}, result);
            store(value + start + d, result);
            total[slot] += result;
            greatest[slot] = max(greatest[slot], result);
        });
    }
    const float size = float(l.heads * l.channels), mean = a.rms ? 0 : sum_slots(total) / size;
    for (int64_t h = 0; h < l.heads; ++h)
        each_vector(l, CAUSALRN_EACH {
            vec deviation = select(lanes, load(value + h * l.head_stride + d) - mean, vec{});
            squares[slot] += deviation * deviation;
        });
    const float std = sqrtf(sum_slots(squares) / size), highest = max_slots(greatest);
    return {mean, std, highest, 1 / (std + a.eps * highest)};
}

template <class Element>
CAUSALRN_INLINE Gate gate_row(const Layout& l, const LinearArguments& a, const Element* q, RowSums from,
                              Ahead<Element> ahead, Stats* stats, float* centred, float* sums, float* value) {
    return a.causal ? gate_row_of<true>(l, a, q, from, ahead, stats, centred, sums, value)
                    : gate_row_of<false>(l, a, q, from, ahead, stats, centred, sums, value);
}

}  // namespace CAUSALRN_ISA
}  // namespace causalrn
