// Which instruction sets this CPU and operating system run: compiled once, without any special flags.

// 0: plain, 1: AVX2 with FMA, 2: AVX-512 (F, BW, DQ, VL).
extern "C" __attribute__((visibility("default"))) int causalrn_cpu_level() {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}
