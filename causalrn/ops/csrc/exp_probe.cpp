// The vectorised exponential by itself: over an array, for its tests, and in a bare loop, as the limit of the machine.
#include "simd.h"

namespace causalrn {
namespace CAUSALRN_ISA {

// Mirrored by causalrn/ops/exp_probe.py. exp_array reads x and writes `out` (count); exp_bare_loop reads x and writes one
// number.
struct ExpArguments {
    const float* x;
    float* out;
    int64_t count, repeats;
    int32_t bounded, threads;
};

// out[n] = exp(x[n]); bounded: by the form without range checks that the kernels use when the range is known.
CAUSALRN_KERNEL(exp_array, ExpArguments) {
    const ExpArguments& a = *arguments;
    for (int64_t n = 0; n < a.count; n += kWidth) {
        int part = int(min(int64_t(kWidth), a.count - n));
        vec value = load_part(a.x + n, part);
        store_part(a.out + n, a.bounded ? exp_steps(value, broadcast(kExpScale)) : exp(value), part);
    }
    return 0;
}

// Sums exp over `count` floats (a multiple of 64 that fits into L1), `repeats` times on each thread.
CAUSALRN_KERNEL(exp_bare_loop, ExpArguments) {
    const float* const x = arguments->x;
    const int64_t count = arguments->count, repeats = arguments->repeats;
    float total = 0;
#pragma omp parallel num_threads(arguments->threads) reduction(+ : total)
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
    *arguments->out = total;
    return 0;
}

}  // namespace CAUSALRN_ISA
}  // namespace causalrn
