// Gradients of small tiles of pairs, of which the backward pass of the quadratic relation is made.
#pragma once

#include "quadratic.h"

namespace causalrn {
namespace CAUSALRN_ISA {

constexpr int kQueryBlock = 8;
constexpr int kKeyBlock = 16;
// A tile of pairs that share their loaded rows: two queries with four keys.
constexpr int kTileQueries = 2;
constexpr int kTileKeys = 4;
// Keys whose sums stand in registers together.
constexpr int kKeyTile = 8;

// Rows of one query of a tile, and statistics of its pairs.
struct TileQuery {
    const float *q, *grad;
    float* dq;
    float gain;
    const float *std, *inverse, *weight;
    // Receives `radial` of each pair.
    float* radial;
    double* dgain;
    const float* shift;
};

// Adds what does not point along x to the gradients of kQueries x kKeys pairs, and to dgain; forms `radial`.
template <class Act, bool kGained, int kQueries, int kKeys>
CAUSALRN_INLINE void add_tile(float per_channel, int64_t stride, const TileQuery* query, const float* k, float* dk) {
    vec products[kQueries][kTileKeys] = {}, scale[kQueries][kKeys], factor[kQueries][kKeys];
    for (int n = 0; n < kQueries; ++n) {
        for (int p = 0; p < kKeys; ++p) {
            scale[n][p] = broadcast(Act::kScale * query[n].gain * query[n].inverse[p]);
            factor[n][p] = broadcast(query[n].inverse[p] * (Act::kRelative ? 1.0f : query[n].weight[p]));
        }
    }
    for (int64_t d = 0; d < stride; d += kWidth) {
        vec dq[kQueries];
        for (int n = 0; n < kQueries; ++n) dq[n] = load(query[n].dq + d);
        for (int p = 0; p < kKeys; ++p) {
            vec row = load(k + p * stride + d), total = load(dk + p * stride + d);
            for (int n = 0; n < kQueries; ++n) {
                vec x = load(query[n].q + d) + row;
                vec value = load(query[n].grad + d);
                if constexpr (Act::kRelative)
                    value *= Act::scaled_derivative(x, scale[n][p], factor[n][p], broadcast(query[n].weight[p]),
                                                    load(query[n].shift + d));
                else
                    value *= Act::scaled_derivative(x, scale[n][p], factor[n][p]);
                products[n][p] += value * x;
                if (kGained) value *= broadcast(query[n].gain);
                dq[n] += value;
                total += value;
            }
            store(dk + p * stride + d, total);
        }
        for (int n = 0; n < kQueries; ++n) store(query[n].dq + d, dq[n]);
    }
    for (int n = 0; n < kQueries; ++n) {
        float sums[4];
        sum_four(products[n], sums);
        for (int p = 0; p < kKeys; ++p) {
            *query[n].dgain += sums[p];
            // Where x = 0 the norm is x / eps, without a second term.
            query[n].radial[p] =
                query[n].std[p] > 0 ? query[n].gain * query[n].inverse[p] * sums[p] * per_channel / query[n].std[p] : 0;
        }
    }
}

// The same for one query, which may be shifted.
template <class Act, bool kGained, int kKeys>
CAUSALRN_INLINE void add_query(bool shifted, float per_channel, int64_t stride, const TileQuery* query, const float* k,
                               float* dk) {
    if (Act::kShifts && shifted)
        add_tile<RelativeExp, kGained, 1, kKeys>(per_channel, stride, query, k, dk);
    else
        add_tile<Act, kGained, 1, kKeys>(per_channel, stride, query, k, dk);
}

// total += part and part = 0.
CAUSALRN_INLINE void flush(float* part, int64_t count, float* total) {
    for (int64_t n = 0; n < count; n += kWidth) {
        store(total + n, load(total + n) + load(part + n));
        store(part + n, vec{});
    }
}

// y -= factor * x for a row.
CAUSALRN_INLINE void subtract_row(float factor, const float* x, int64_t stride, float* y) {
    for (int64_t d = 0; d < stride; d += kWidth) store(y + d, load(y + d) - factor * load(x + d));
}

// The part of the gradients along x = q + k, radial_np for query n and key p, as two matrix products:
//     dq_n -= sum_p radial_np (q_n + k_p),   dk_p -= sum_n radial_np (q_n + k_p).
// Pairs that have been left out of it hold 0.
static void subtract_radial(const float (*radial)[kKeyBlock], int queries, int keys, const float* q, const float* k,
                            int64_t stride, float* dq, float* dk) {
    float of_query[kQueryBlock];
    alignas(64) float of_key[kKeyBlock] = {};
    for (int n = 0; n < queries; ++n) {
        vec row = {};
        for (int p = 0; p < kKeyBlock; p += kWidth) {
            row += load(radial[n] + p);
            store(of_key + p, load(of_key + p) + load(radial[n] + p));
        }
        of_query[n] = sum(row);
    }
    for (int64_t d = 0; d < stride; d += kWidth) {
        vec total[kQueryBlock] = {};
        for (int p = 0; p < keys; ++p) {
            vec row = load(k + p * stride + d);
#pragma GCC unroll 8
            for (int n = 0; n < kQueryBlock; ++n) total[n] += broadcast(radial[n][p]) * row;
        }
        for (int n = 0; n < queries; ++n) {
            float* const row = dq + n * stride + d;
            store(row, load(row) - total[n] - broadcast(of_query[n]) * load(q + n * stride + d));
        }
    }
    for (int first = 0; first < keys; first += kKeyTile) {
        for (int64_t d = 0; d < stride; d += kWidth) {
            vec total[kKeyTile];
#pragma GCC unroll 16
            for (int p = 0; p < kKeyTile; ++p) {
                total[p] = broadcast(of_key[first + p]) * load(k + (first + p) * stride + d);
            }
            for (int n = 0; n < queries; ++n) {
                vec row = load(q + n * stride + d);
#pragma GCC unroll 16
                for (int p = 0; p < kKeyTile; ++p) total[p] += broadcast(radial[n][first + p]) * row;
            }
            // No further than the last key.
            for (int p = 0; p < min(kKeyTile, keys - first); ++p) {
                float* const row = dk + (first + p) * stride + d;
                store(row, load(row) - total[p]);
            }
        }
    }
}

}  // namespace CAUSALRN_ISA
}  // namespace causalrn
