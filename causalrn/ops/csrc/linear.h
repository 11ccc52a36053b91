// Shared by the passes of the linear relation: arguments, rows in scratch memory, exponentials, the gate.
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

// Mirrored by causalrn/ops/linear/cpu.py. q, k and dy are (B, T, H, D) of one type, with strides (in elements) of
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

// The layout of a row in scratch memory: each head is padded to whole vectors, with zeros.
struct Layout {
    int64_t heads, channels, head_stride, stride, rows, blocks;
    ivec tail;
    // Octaves by which the gate's products are lowered to stay in range: with norm(x) <= sqrt(D) they are up to
    // exp(2 sqrt(D)) times the number of keys, for which there is room up to 2^31.
    int32_t lowered;

    explicit Layout(const LinearArguments& a)
        : heads(a.heads),
          channels(a.channels),
          head_stride(padded(a.channels)),
          stride(a.heads * head_stride),
          // 96 KiB per scratch array of a block leave room for the inputs in a cache of 512 KiB or more.
          rows(min(a.length, max(int64_t(8), min(int64_t(64), 24576 / stride)))),
          blocks((a.length + rows - 1) / rows),
          tail{},
          lowered(max(0, int(ceilf(2 * kLog2e * sqrtf(float(a.channels)))) + 31 - 125)) {
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

// The power of two that brings x > 0 between 1 and 2.
CAUSALRN_INLINE float unit_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = 0x7f000000u - (bits & 0x7f800000u);
    memcpy(&x, &bits, sizeof x);
    return x;
}

// The normalisation of one head of one row: x -> (x - mean) * inverse.
struct Stats {
    float mean, std, inverse;
};

// The statistics of the same head of N rows.
template <int N, class Element>
CAUSALRN_INLINE void statistics(const Layout& l, const LinearArguments& a, const Element* const (&x)[N],
                                Stats* const (&stats)[N]) {
    vec sums[N][4] = {}, squares[N][4] = {};
    float mean[N];
    if (!a.rms) each_vector(l, CAUSALRN_EACH {
        for (int n = 0; n < N; ++n) sums[n][slot] += load_lanes(x[n] + d, count);
    });
    for (int n = 0; n < N; ++n) mean[n] = sum_slots(sums[n]) / float(l.channels);
    each_vector(l, CAUSALRN_EACH {
        for (int n = 0; n < N; ++n) {
            vec value = select(lanes, load_lanes(x[n] + d, count) - mean[n], vec{});
            squares[n][slot] += value * value;
        }
    });
    for (int n = 0; n < N; ++n) {
        const float std = sqrtf(sum_slots(squares[n]) / float(l.channels));
        *stats[n] = {mean[n], std, 1 / (std + a.eps)};
    }
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

// exp(norm(k)) of one vector of a head whose statistics are known; the padding of sums is 0.
template <class Element>
CAUSALRN_INLINE vec exp_key(const Element* k, const Stats& s, vec scale, int count, ivec lanes) {
    return select(lanes, exp_steps(load_lanes(k, count) - s.mean, scale), vec{});
}
CAUSALRN_INLINE vec exp_scale(const Stats& s) { return broadcast(s.inverse * kExpScale); }

// The sum of exp(norm(k)) over the rows of a block. The exponentials (if wanted) go to exp_k, one row of scratch for
// each, and the statistics of each row and head to `stats`.
template <class Element>
static void exp_rows(const Layout& l, const LinearArguments& a, Block block, float* exp_k, float* block_sum,
                     Stats* stats) {
    fill(l, block_sum, 0);
    for (int64_t row = 0; row < block.rows; ++row) {
        for (int64_t h = 0; h < l.heads; ++h) {
            const Element* k = k_row<Element>(a, block.b, block.first + row) + h * l.channels;
            const int64_t start = h * l.head_stride;
            Stats s;
            statistics<1>(l, a, {k}, {&s});
            const vec scale = exp_scale(s);
            each_vector(l, CAUSALRN_EACH {
                __builtin_prefetch(k + a.k_stride + d);
                const vec value = separate(exp_key(k + d, s, scale, count, lanes));
                if (exp_k) store(exp_k + row * l.stride + start + d, value);
                store(block_sum + start + d, load(block_sum + start + d) + value);
            });
            if (stats) stats[row * l.heads + h] = s;
        }
    }
}

// Gives the sums S of the rows of a block, one row after the other. `start` is the sum before the block (all
// there is when not causal), `running` that of the block's rows so far.
struct RowSums {
    const float* start;
    float* running;
    // The exponentials of the row to come.
    float* exp_k;
};

// The state of the keys' exponentials when their row is added to the sums.
enum Keys {
    // They are in `start` already.
    kSummed,
    // They are at hand in exp_k.
    kAtHand,
    // They are made now, and written to exp_k if kKept.
    kMade,
    kKept,
};

// The processor's own prefetching stops where one row ends and another tensor's row comes in between.
template <class Element>
struct Ahead {
    const Element *first, *second, *third;
    Element* out;
};

// exp(l) = exp(norm(q)) S of one vector, lowered by 2^l.lowered. With many channels the product could leave the range
// of floats, so the exponents of both factors are added as integers. What falls below the range is nothing beside the
// row's greatest element, which is at least the number of keys: norm(q) and the logarithm of S over that number have a
// mean of 0 or more (of -1 or more without centring).
template <bool kWide>
CAUSALRN_INLINE vec gate_product(const Layout& l, vec centred, vec scale, vec sum) {
    if (!kWide) return exp_steps(centred, scale) * sum;
    constexpr int kOctaveShift = 23 - kStepShift;
    const vec magic = broadcast(kRoundToInt), shifted = centred * scale + magic;
    const vec rest = centred * scale - (shifted - magic);
    const ivec exponent = (ivec)sum & 0x7f800000;
    const vec mantissa = sum * (vec)(0x7f000000 - exponent);
    // Less what the bits of 1.5 * 2^23, which every shifted value carries, add to it.
    const ivec octave = ((ivec)shifted >> kOctaveShift) + (exponent >> 23) - ((0x4b400000 >> kOctaveShift) + l.lowered);
    const vec power = power_of_steps(shifted, exponent - ((127 + l.lowered) << 23));
    return select(octave < 1, vec{}, power) * (power_of_rest(rest, broadcast(1)) * mantissa);
}

// A row of exp(l) up to a power of two: `unit` times its elements lie below 2, the greatest (`highest`) above 1. The
// mean and the deviation are those of the row in this unit.
struct Gate {
    float unit, highest, mean, std;
    // 1 / (std + eps * unit * highest): eps is relative to the greatest element.
    float inverse;

    // Takes in the sum of squared deviations.
    void set_deviation(const LinearArguments& a, float squares, float size) {
        std = sqrtf(squares / size);
        inverse = 1 / (std + a.eps * (highest * unit));
    }
};

// One row: adds its key to the sums, writes exp(l) and the statistics of q (of k too where they are made) per head, and
// fetches the rows `ahead` meanwhile.
template <Keys kKeys, bool kWide, class Element>
static Gate gate_row_of(const Layout& l, const LinearArguments& a, const Element* q, const Element* k, RowSums from,
                        Ahead<Element> ahead, Stats* q_stats, Stats* k_stats, float* __restrict value) {
    constexpr bool kMakes = kKeys == kMade || kKeys == kKept;
    vec total[4] = {}, greatest[4] = {};
    for (int64_t h = 0; h < l.heads; ++h) {
        const int64_t start = h * l.head_stride, channel = h * l.channels;
        if (kMakes) {
            statistics<2>(l, a, {q + channel, k + channel}, {q_stats + h, k_stats + h});
        } else {
            statistics<1>(l, a, {q + channel}, {q_stats + h});
        }
        const Stats qs = q_stats[h], ks = kMakes ? k_stats[h] : Stats{};
        const vec q_scale = exp_scale(qs), k_scale = exp_scale(ks);
        each_vector(l, CAUSALRN_EACH {
            __builtin_prefetch(ahead.first + channel + d);
            __builtin_prefetch(ahead.second + channel + d);
            if (ahead.third) __builtin_prefetch(ahead.third + channel + d);
            __builtin_prefetch(ahead.out + channel + d, 1);
            vec sum = load(from.start + start + d);
            if (kKeys != kSummed) {
                vec key = kMakes ? separate(exp_key(k + channel + d, ks, k_scale, count, lanes))
                                 : load(from.exp_k + start + d);
                if (kKeys == kKept) store(from.exp_k + start + d, key);
                const vec rows = load(from.running + start + d) + key;
                store(from.running + start + d, rows);
                sum += rows;
            }
            const vec result = gate_product<kWide>(l, load_lanes(q + channel + d, count) - qs.mean, q_scale, sum);
            store(value + start + d, result);
            total[slot] += result;
            greatest[slot] = max(greatest[slot], result);
        });
    }
    const float highest = max_slots(greatest), unit = unit_of(highest);
    return {unit, highest, a.rms ? 0 : unit * sum_slots(total) / float(l.heads * l.channels), 0, 0};
}

template <Keys kKeys, class Element>
CAUSALRN_INLINE Gate gate_row(const Layout& l, const LinearArguments& a, const Element* q, const Element* k,
                              RowSums from, Ahead<Element> ahead, Stats* q_stats, Stats* k_stats, float* value) {
    return l.lowered ? gate_row_of<kKeys, true>(l, a, q, k, from, ahead, q_stats, k_stats, value)
                     : gate_row_of<kKeys, false>(l, a, q, k, from, ahead, q_stats, k_stats, value);
}

}  // namespace CAUSALRN_ISA
}  // namespace causalrn
