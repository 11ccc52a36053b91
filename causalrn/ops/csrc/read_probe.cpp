// Reads memory and does next to nothing else: what the kernels that stream weights and caches are measured against.
#include "simd.h"

namespace causalrn {
namespace CAUSALRN_ISA {

// Mirrored by benchmarks/read_probe.py.
struct ReadArguments {
    const float* x;
    float* out;
    int64_t count;
    int32_t threads;
};

// *out = sum of `count` floats, a multiple of 256 per thread, each thread its own contiguous share.
CAUSALRN_KERNEL(read_floats, ReadArguments) {
    const float* const x = arguments->x;
    const int n_threads = arguments->threads;
    const int64_t share = arguments->count / n_threads;
    float total = 0;
#pragma omp parallel for num_threads(n_threads) reduction(+ : total) schedule(static)
    for (int thread = 0; thread < n_threads; ++thread) {
        const float* from = x + thread * share;
        vec sums[8] = {};
        for (int64_t n = 0; n + 8 * kWidth <= share; n += 8 * kWidth)
            for (int part = 0; part < 8; ++part) {
                sums[part] += loadu(from + n + part * kWidth);
                __builtin_prefetch(from + n + part * kWidth + 2048, 0, 2);
            }
        vec all = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
        total += sum(all);
    }
    *arguments->out = total;
    return 0;
}

}  // namespace CAUSALRN_ISA
}  // namespace causalrn
