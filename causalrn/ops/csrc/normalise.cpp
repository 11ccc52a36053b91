// Plain normalisation of rows, (x - mean) / (std + eps) or x / (rms + eps), and its gradient, one pass over memory each.
#include "quadratic.h"

namespace causalrn {
namespace CAUSALRN_ISA {

// Mirrored by causalrn/ops/normalisation.py. Rows are contiguous, all tensors of one type; `spread` is the standard
// deviation (or root mean square) of each row, without eps.
struct NormaliseArguments {
    const void *x, *grad;
    void* out;
    float* spread;
    int64_t rows, channels;
    float eps;
    int32_t centre, bf16, threads;
};

// Calls visit(offset, lanes, values) for each vector of a row; lanes beyond the row read as 0.
template <class Visit>
CAUSALRN_INLINE void each_vector(const void* tensor, int64_t start, int64_t channels, bool bf16, Visit visit) {
    int64_t d = 0;
    for (; d + kWidth <= channels; d += kWidth) visit(start + d, kWidth, load_row(tensor, start + d, kWidth, bf16));
    if (d < channels) visit(start + d, int(channels - d), load_row(tensor, start + d, int(channels - d), bf16));
}

template <bool kBf16>
static void normalise_row(const NormaliseArguments& a, int64_t row) {
    const int64_t start = row * a.channels;
    const float share = 1.0f / float(a.channels);
    vec total = {};
    if (a.centre) each_vector(a.x, start, a.channels, kBf16, [&](int64_t, int, vec x) { total += x; });
    const float mean = sum(total) * share;
    vec squares = {};
    float beyond = 0;
    each_vector(a.x, start, a.channels, kBf16, [&](int64_t, int lanes, vec x) {
        squares += (x - mean) * (x - mean);
        beyond = float(kWidth - lanes) * mean * mean;
    });
    const float left = sum(squares) - beyond;
    const float spread = __builtin_sqrtf((left > 0 ? left : 0) * share);
    a.spread[row] = spread;
    const float factor = 1.0f / (spread + a.eps);
    each_vector(a.x, start, a.channels, kBf16, [&](int64_t offset, int lanes, vec x) {
        store_lanes(a.out, offset, (x - mean) * factor, lanes, kBf16);
    });
}

// With y = x r, r = 1 / (s + eps): dx = r (g - mean(g) - y mean(g y) / (s r)); where s is 0, so is y.
template <bool kBf16>
static void differentiate_row(const NormaliseArguments& a, int64_t row) {
    const int64_t start = row * a.channels;
    const float share = 1.0f / float(a.channels), spread = a.spread[row];
    vec total = {}, products = {};
    each_vector(a.grad, start, a.channels, kBf16, [&](int64_t offset, int lanes, vec g) {
        total += g;
        products += g * load_row(a.x, offset, lanes, kBf16);
    });
    const float mean = a.centre ? sum(total) * share : 0.0f;
    const float factor = 1.0f / (spread + a.eps);
    const float along = spread > 0 ? sum(products) * share / (spread * factor) : 0.0f;
    each_vector(a.grad, start, a.channels, kBf16, [&](int64_t offset, int lanes, vec g) {
        vec y = load_row(a.x, offset, lanes, kBf16);
        store_lanes(a.out, offset, (g - mean - y * along) * factor, lanes, kBf16);
    });
}

template <class Row>
static void each_row(const NormaliseArguments& a, Row row) {
#pragma omp parallel for num_threads(a.threads) schedule(static)
    for (int64_t i = 0; i < a.rows; ++i) row(i);
}

CAUSALRN_KERNEL(normalise_forward, NormaliseArguments) {
    const NormaliseArguments& a = *arguments;
    if (a.bf16) {
        each_row(a, [&](int64_t row) { normalise_row<true>(a, row); });
    } else {
        each_row(a, [&](int64_t row) { normalise_row<false>(a, row); });
    }
    return kDone;
}

CAUSALRN_KERNEL(normalise_backward, NormaliseArguments) {
    const NormaliseArguments& a = *arguments;
    if (a.bf16) {
        each_row(a, [&](int64_t row) { differentiate_row<true>(a, row); });
    } else {
        each_row(a, [&](int64_t row) { differentiate_row<false>(a, row); });
    }
    return kDone;
}

}  // namespace CAUSALRN_ISA
}  // namespace causalrn
