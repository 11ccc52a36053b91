// Vectors of floats as wide as one instruction set allows, with the exponential the kernels are made of.
//
// Every source that includes this header is compiled once per instruction set (CAUSALRN_ISA = plain, avx2 or
// avx512) into the same library. Everything therefore lives in the namespace causalrn::CAUSALRN_ISA and is static:
// a function shared between the copies (a template of the standard library that is not inlined, for instance)
// could be linked from the AVX-512 copy and stop on a CPU without it. For the same reason nothing here is
// initialised when the library is loaded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef CAUSALRN_ISA
#define CAUSALRN_ISA plain
#endif

#define CAUSALRN_JOIN_(a, b) causalrn_##a##_##b
#define CAUSALRN_JOIN(a, b) CAUSALRN_JOIN_(a, b)
// Declares a function of the library: CAUSALRN_EXPORT(int, name)(...) is found as causalrn_<name>_<isa>.
#define CAUSALRN_EXPORT(type, name) \
    extern "C" __attribute__((visibility("default"))) type CAUSALRN_JOIN(name, CAUSALRN_ISA)
// Declares a kernel: a function of one structure, of which `threads` is the last field, that returns a status; and beside
// it causalrn_<name>_bytes_<isa>, by which causalrn/ops/native.py tells whether its own copy of the structure is the same.
// The bytes end behind the last field: the padding behind it could hide another field.
#define CAUSALRN_KERNEL(name, Arguments)                                                                      \
    CAUSALRN_EXPORT(int64_t, name##_bytes)() { return offsetof(Arguments, threads) + sizeof(Arguments::threads); } \
    CAUSALRN_EXPORT(int, name)(const Arguments* arguments)

#define CAUSALRN_INLINE static inline __attribute__((always_inline))

namespace causalrn {
namespace CAUSALRN_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
// 2^x is taken apart into steps of 1/kSteps octave: the step is looked up in registers, the rest is a polynomial.
constexpr int kSteps = 32;
constexpr int kStepShift = 18;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kSteps = 8;
constexpr int kStepShift = 20;
#else
constexpr int kWidth = 4;
constexpr int kSteps = 1;
constexpr int kStepShift = 23;
#endif

typedef float vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t ivec __attribute__((vector_size(4 * kWidth)));
typedef uint16_t hvec __attribute__((vector_size(2 * kWidth)));
typedef uint32_t uvec __attribute__((vector_size(4 * kWidth)));

// Subtracting 0 leaves every float as it is, and so compiles to nothing but the broadcast.
CAUSALRN_INLINE vec broadcast(float x) { return x - vec{}; }

// Aligned accesses to scratch memory, unaligned ones to the user's.
CAUSALRN_INLINE vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
CAUSALRN_INLINE void store(float* p, vec x) { *reinterpret_cast<vec*>(p) = x; }
CAUSALRN_INLINE vec loadu(const float* p) {
    vec x;
    memcpy(&x, p, sizeof x);
    return x;
}
CAUSALRN_INLINE void storeu(float* p, vec x) { memcpy(p, &x, sizeof x); }

CAUSALRN_INLINE vec select(ivec mask, vec a, vec b) { return mask ? a : b; }
CAUSALRN_INLINE vec max(vec a, vec b) { return a > b ? a : b; }
CAUSALRN_INLINE vec min(vec a, vec b) { return a < b ? a : b; }
CAUSALRN_INLINE int min(int a, int b) { return a < b ? a : b; }
CAUSALRN_INLINE int max(int a, int b) { return a > b ? a : b; }
CAUSALRN_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
CAUSALRN_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// x itself, rounded to floats: a product is otherwise contracted with the sum it goes into, in one place and not in another.
CAUSALRN_INLINE vec separate(vec x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
    return x;
}

CAUSALRN_INLINE float sum(vec x) {
    float total = 0;
#if defined(__AVX512F__)
    total = _mm512_reduce_add_ps((__m512)x);
#else
    for (int lane = 0; lane < kWidth; ++lane) total += x[lane];
#endif
    return total;
}

// sums[n] = sum(x[n]) for four vectors at once.
CAUSALRN_INLINE void sum_four(const vec* x, float* sums) {
#if defined(__AVX512F__)
    __m512 a = (__m512)x[0], b = (__m512)x[1], c = (__m512)x[2], d = (__m512)x[3];
    __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    // Each 128-bit lane holds one part of the four sums.
    __m512 parts = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(parts),
                                _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(parts), 1)));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX2__)
    __m256 a = (__m256)x[0], b = (__m256)x[1], c = (__m256)x[2], d = (__m256)x[3];
    __m256d ab = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)));
    __m256d cd = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)));
    __m256 parts = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)), _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(parts), _mm256_extractf128_ps(parts, 1)));
#else
    for (int n = 0; n < 4; ++n) sums[n] = sum(x[n]);
#endif
}

CAUSALRN_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
CAUSALRN_INLINE vec square_root(vec x) {
#if defined(__AVX512F__)
    return (vec)_mm512_sqrt_ps((__m512)x);
#else
    for (int lane = 0; lane < kWidth; ++lane) x[lane] = square_root(x[lane]);
    return x;
#endif
}

CAUSALRN_INLINE bool any_of(ivec mask) {
#if defined(__AVX512DQ__)
    return _mm512_movepi32_mask((__m512i)mask) != 0;
#else
    int32_t any = 0;
    for (int lane = 0; lane < kWidth; ++lane) any |= mask[lane];
    return any != 0;
#endif
}

CAUSALRN_INLINE float max_of(vec x) {
    float best = x[0];
    for (int lane = 1; lane < kWidth; ++lane) best = x[lane] > best ? x[lane] : best;
    return best;
}

// bfloat16 is the upper half of a float; storing rounds to nearest even and keeps NaN a NaN.
CAUSALRN_INLINE vec loadu_bf16(const uint16_t* p) {
    hvec half;
    memcpy(&half, p, sizeof half);
    return (vec)(__builtin_convertvector(half, uvec) << 16);
}
CAUSALRN_INLINE void storeu_bf16(uint16_t* p, vec x) {
    uvec bits = (uvec)x;
    uvec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    hvec half = __builtin_convertvector((ivec)(x != x) ? (bits >> 16) | 0x40u : rounded, hvec);
    memcpy(p, &half, sizeof half);
}
CAUSALRN_INLINE float float_from_bf16(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}
CAUSALRN_INLINE uint16_t bf16_from_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return uint16_t((bits >> 16) | 0x40u);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Lanes of which only the first `count` are read or written; the others read as `fill`.
CAUSALRN_INLINE vec load_part(const float* p, int count, float fill = 0) {
#if defined(__AVX512F__)
    return (vec)_mm512_mask_loadu_ps((__m512)broadcast(fill), __mmask16((1u << count) - 1), p);
#endif
    alignas(64) float lanes[kWidth];
    for (int lane = 0; lane < kWidth; ++lane) lanes[lane] = lane < count ? p[lane] : fill;
    return load(lanes);
}
CAUSALRN_INLINE void store_part(float* p, vec x, int count) {
#if defined(__AVX512F__)
    return _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)x);
#endif
    alignas(64) float lanes[kWidth];
    store(lanes, x);
    for (int lane = 0; lane < count; ++lane) p[lane] = lanes[lane];
}

// The first `count` lanes of x, and 0 in the others.
CAUSALRN_INLINE vec select_first(vec x, int count) {
    for (int lane = 0; lane < kWidth; ++lane) x[lane] = lane < count ? x[lane] : 0;
    return x;
}

constexpr float kLog2e = 1.44269504088896341f;
// exp(x) = exp_steps(x, broadcast(kExpScale)); a factor on x can be folded into the scale.
constexpr float kExpScale = kSteps * kLog2e;

constexpr float kPowersOfTwo[32] = {
    1.0f, 1.0218972f, 1.0442737f, 1.0671405f, 1.0905077f, 1.1143868f, 1.1387886f, 1.1637249f,
    1.1892071f, 1.2152474f, 1.2418578f, 1.269051f, 1.2968396f, 1.3252367f, 1.3542556f, 1.38391f,
    1.4142135f, 1.4451808f, 1.4768262f, 1.5091645f, 1.5422108f, 1.5759809f, 1.6104903f, 1.6457555f,
    1.6817929f, 1.7186193f, 1.7562522f, 1.7947091f, 1.8340081f, 1.8741677f, 1.9152066f, 1.9571441f};

// 2^(step / kSteps) for the low bits of `step`, less the step's own contribution to the exponent field.
CAUSALRN_INLINE ivec lookup_step(ivec step) {
#if defined(__AVX512F__)
    __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i upper = _mm512_add_epi32(lane, _mm512_set1_epi32(16));
    __m512i a = _mm512_sub_epi32(_mm512_castps_si512(_mm512_loadu_ps(kPowersOfTwo)), _mm512_slli_epi32(lane, kStepShift));
    __m512i b =
        _mm512_sub_epi32(_mm512_castps_si512(_mm512_loadu_ps(kPowersOfTwo + 16)), _mm512_slli_epi32(upper, kStepShift));
    return (ivec)_mm512_permutex2var_epi32(a, (__m512i)step, b);
#elif defined(__AVX2__)
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256 values = _mm256_setr_ps(kPowersOfTwo[0], kPowersOfTwo[4], kPowersOfTwo[8], kPowersOfTwo[12],
                                   kPowersOfTwo[16], kPowersOfTwo[20], kPowersOfTwo[24], kPowersOfTwo[28]);
    __m256i table = _mm256_sub_epi32(_mm256_castps_si256(values), _mm256_slli_epi32(lane, kStepShift));
    return (ivec)_mm256_permutevar8x32_epi32(table, (__m256i)step);
#else
    (void)step;
    return (ivec)broadcast(1.0f);
#endif
}

// Adding 1.5 * 2^23 to a float rounds it to an integer, which then sits in the low bits.
constexpr float kRoundToInt = 12582912.0f;

// 2^(n / kSteps) for the integer n in the low bits of `shifted`, times 2^e where `exponent` is e << 23.
CAUSALRN_INLINE vec power_of_steps(vec shifted, ivec exponent) {
    return (vec)(lookup_step((ivec)shifted) + ((ivec)shifted << kStepShift) + exponent);
}

// factor * 2^(rest / kSteps) for |rest| <= 1/2: minimax polynomials, relative error below 6e-8, 2e-8, 2e-9.
CAUSALRN_INLINE vec power_of_rest(vec rest, vec factor) {
#if defined(__AVX512F__)
    return (0.00023459448129869998f * factor * rest + 0.021661167964339256f * factor) * rest + factor;
#elif defined(__AVX2__)
    vec poly = 0.00010839628521353006f * factor * rest + 0.003754126140847802f * factor;
    return (poly * rest + 0.08664339780807495f * factor) * rest + factor;
#else
    vec poly = (0.00015345800784416497f * rest + 0.0013399944873526692f) * rest + 0.009618489071726799f;
    poly = ((poly * rest + 0.05550328642129898f) * rest + 0.24022646248340607f) * rest + 0.6931471824645996f;
    return (poly * rest + 1.0f) * factor;
#endif
}

// factor * exp(x * scale / kExpScale) for results that are normal floats: |argument| < 87, or NaN. Relative error < 1.2e-7
// beside the rounding of x * scale. The product comes last, so that `sum += exp_steps(...)` is one FMA.
CAUSALRN_INLINE vec exp_steps(vec x, vec scale, vec factor) {
    const vec magic = broadcast(kRoundToInt);
    vec shifted = x * scale + magic;
    vec rest = x * scale - (shifted - magic);
    return power_of_steps(shifted, ivec{}) * power_of_rest(rest, factor);
}
CAUSALRN_INLINE vec exp_steps(vec x, vec scale) { return exp_steps(x, scale, broadcast(1)); }

// exp(x) for every float: 0 below -87.33 (where expf would be subnormal), infinity above 88.72, NaN for NaN.
CAUSALRN_INLINE vec exp(vec x) {
    const vec low = broadcast(-87.33f), high = broadcast(88.0f), ln2 = broadcast(0.693147181f);
    // 2^128 has no float, so the last octave is doubled at the end; 89 overflows there.
    ivec large = x > high;
    vec bounded = select(x < low, low, select(x > 89.0f, broadcast(89.0f), x));
    vec y = exp_steps(select(large, bounded - ln2, bounded), broadcast(kExpScale));
    return select(x < low, vec{}, select(large, y + y, y));
}

// Scratch memory on a cache-line boundary; nullptr when there is none left. Free with free().
CAUSALRN_INLINE float* allocate_floats(int64_t count) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, sizeof(float) * size_t(count > 0 ? count : 1))) return nullptr;
    return static_cast<float*>(p);
}

}  // namespace CAUSALRN_ISA
}  // namespace causalrn
