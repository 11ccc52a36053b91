// The vectorised exponential by itself: over an array, for its tests, and in a bare loop, as the limit of the machine.
#include "simd.h"

namespace causalrn {
namespace CAUSALRN_ISA {

// out[n] = exp(x[n]); bounded: by the form without range checks that the kernels use when the range is known.
CAUSALRN_EXPORT(void, exp_array)(const float* x, float* out, int64_t count, int bounded) {
    for (int64_t n = 0; n < count; n += kWidth) {
        int part = int(min(int64_t(kWidth), count - n));
        vec value = load_part(x + n, part);
        store_part(out + n, bounded ? exp_steps(value, broadcast(kExpScale)) : exp(value), part);
    }
}

// Sums exp over `count` floats (a multiple of 64 that fits into L1), `repeats` times on each of `n_threads` threads.
CAUSALRN_EXPORT(float, exp_bare_loop)(const float* x, int64_t count, int64_t repeats, int n_threads) {
    float total = 0;
#pragma omp parallel num_threads(n_threads) reduction(+ : total)
    {
        vec sums[4] = {};
        for (int64_t repeat = 0; repeat < repeats; ++repeat) {
            // The scale depends on the repeat, so that no pass can be left out.
            vec scale = broadcast(kExpScale + 1e-9f * float(repeat & 1));
            for (int64_t n = 0; n < count; n += 4 * kWidth)
                for (int part = 0; part < 4; ++part) sums[part] += exp_steps(loadu(x + n + part * kWidth), scale);
        }
        total += sum(sums[0] + sums[1] + sums[2] + sums[3]);
    }
    return total;
}

}  // namespace CAUSALRN_ISA
}  // namespace causalrn
