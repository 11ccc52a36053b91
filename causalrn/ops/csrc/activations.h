// The activations of the quadratic relation, each with its derivative, on vectors.
#pragma once

#include "simd.h"

namespace causalrn {
namespace CAUSALRN_ISA {

// Each gives its value, and a factor times its derivative, at z = x * scale / kScale.
struct PlainActivation {
    // Whether there are shifted rows, for which RelativeExp takes its place; see quadratic.h.
    static constexpr bool kShifts = false;
    static constexpr bool kRelative = false;
};
struct BoundedExp : PlainActivation {
    static constexpr float kScale = kExpScale;
    CAUSALRN_INLINE vec value(vec x, vec scale) { return exp_steps(x, scale); }
    // The factor goes into the coefficients of the polynomial.
    CAUSALRN_INLINE vec scaled_derivative(vec x, vec scale, vec factor) { return exp_steps(x, scale, factor); }
};
struct ShiftedExp : BoundedExp {
    static constexpr bool kShifts = true;
};
// exp(z + offset - shift) for a shifted row, in which the weight of a pair is the offset. Never above 1.
struct RelativeExp : PlainActivation {
    static constexpr float kScale = 1;
    static constexpr bool kRelative = true;
    CAUSALRN_INLINE vec scaled_derivative(vec x, vec scale, vec factor, vec offset, vec shift) {
        return factor * exp(x * scale + offset - shift);
    }
};
struct Exp : PlainActivation {
    static constexpr float kScale = 1;
    CAUSALRN_INLINE vec value(vec x, vec scale) { return exp(x * scale); }
    CAUSALRN_INLINE vec scaled_derivative(vec x, vec scale, vec factor) { return factor * exp(x * scale); }
};
struct Relu : PlainActivation {
    static constexpr float kScale = 1;
    CAUSALRN_INLINE vec value(vec x, vec scale) { return select(x * scale < 0.0f, vec{}, x * scale); }
    CAUSALRN_INLINE vec scaled_derivative(vec x, vec scale, vec factor) { return select(x * scale > 0.0f, factor, vec{}); }
};
struct Elu : PlainActivation {
    static constexpr float kScale = 1;
    CAUSALRN_INLINE vec value(vec x, vec scale) {
        vec z = x * scale;
        return select(z > 0.0f, z, exp(z) - 1.0f);
    }
    CAUSALRN_INLINE vec scaled_derivative(vec x, vec scale, vec factor) {
        vec z = x * scale;
        return factor * select(z > 0.0f, broadcast(1), exp(z));
    }
};
struct Gelu : PlainActivation {
    static constexpr float kScale = 1;
    // The normal distribution function through the complementary error function's Chebyshev fit in 1 / (1 + |t| / 2)
    // (Numerical Recipes, section 6.2): relative error below 1.2e-7.
    CAUSALRN_INLINE vec distribution(vec z) {
        vec t = select(z < 0.0f, -z, z) * 0.70710678f;
        vec u = 1.0f / (1.0f + 0.5f * t);
        vec poly = ((0.17087277f * u - 0.82215223f) * u + 1.48851587f) * u - 1.13520398f;
        poly = (((poly * u + 0.27886807f) * u - 0.18628806f) * u + 0.09678418f) * u + 0.37409196f;
        poly = (poly * u + 1.00002368f) * u - 1.26551223f;
        vec tail = 0.5f * u * exp(poly - t * t);
        return select(z < 0.0f, tail, 1.0f - tail);
    }
    CAUSALRN_INLINE vec value(vec x, vec scale) { return x * scale * distribution(x * scale); }
    CAUSALRN_INLINE vec scaled_derivative(vec x, vec scale, vec factor) {
        vec z = x * scale;
        return factor * (distribution(z) + z * 0.39894228f * exp(-0.5f * z * z));
    }
};

}  // namespace CAUSALRN_ISA
}  // namespace causalrn
