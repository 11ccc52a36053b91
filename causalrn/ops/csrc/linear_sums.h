// Sums over the positions of a sequence, carried from block to block in double.
#pragma once

#include <sched.h>

#include "linear.h"

namespace causalrn {
namespace CAUSALRN_ISA {

// Scratch memory that frees itself; p is nullptr when there was none left.
struct Floats {
    float* const p;
    explicit Floats(int64_t count) : p(allocate_floats(count)) {}
    ~Floats() { free(p); }
    Floats(const Floats&) = delete;
};

// Element `d` of a padded row of totals (B, H, D) that may be missing.
CAUSALRN_INLINE double initial(const Layout& l, const float* totals, int64_t b, int64_t d) {
    const int64_t channel = d % l.head_stride;
    if (channel >= l.channels) return 0;
    return totals ? totals[(b * l.heads + d / l.head_stride) * l.channels + channel] : 0.0;
}

// Writes the first padded row of each batch entry to total_out.
template <class Number>
static void write_totals(const Layout& l, const LinearArguments& a, const Number* padded, int64_t batch_stride) {
    for (int64_t b = 0; b < a.batch; ++b)
        for (int64_t h = 0; h < l.heads; ++h) {
            const Number* row = padded + b * batch_stride + h * l.head_stride;
            for (int64_t d = 0; d < l.channels; ++d) a.total_out[(b * l.heads + h) * l.channels + d] = float(row[d]);
        }
}

// A thread's place in a chain: which batch entry, and how many of its blocks come before.
struct Turn {
    int64_t b, index;
};

// Hands the sum over the blocks done so far from block to block of a sequence. Each thread takes whole sequences as
// long as there is one for every thread; the blocks of the rest are taken by turns, so that few sequences keep all
// threads busy. Turns are handed out in order: the one waited for is always under way.
struct Chain {
    const Layout& l;
    const int64_t batch, whole;
    int64_t next = 0;
    double* const carry;
    int64_t* const done;

    Chain(const Layout& layout, const LinearArguments& a, const float* totals)
        : l(layout),
          batch(a.batch),
          whole(a.batch - a.batch % a.threads),
          carry(reinterpret_cast<double*>(allocate_floats(2 * a.batch * l.stride))),
          done(static_cast<int64_t*>(calloc(size_t(a.batch), sizeof(int64_t)))) {
        if (!ready()) return;
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t d = 0; d < l.stride; ++d) carry[b * l.stride + d] = initial(l, totals, b, d);
    }
    ~Chain() {
        free(carry);
        free(done);
    }
    Chain(const Chain&) = delete;
    bool ready() const { return carry && done; }

    // A thread's place before its first turn.
    Turn before() const { return {batch, 0}; }

    // The thread's next turn, or false when there is none left.
    bool advance(Turn& turn) {
        if (turn.b < whole && ++turn.index < l.blocks) return true;
        int64_t item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        turn = {item, 0};
        if (item < whole) return true;
        item -= whole;
        if (item >= (batch - whole) * l.blocks) return false;
        turn = {whole + item % (batch - whole), item / (batch - whole)};
        return true;
    }

    // Whether other threads wait for the turns of this sequence.
    bool shared(Turn turn) const { return turn.b >= whole; }

    // Waits for the turn and copies what came before into `start`.
    void take(Turn turn, float* __restrict start) {
        for (int spins = 1; __atomic_load_n(&done[turn.b], __ATOMIC_ACQUIRE) != turn.index; ++spins)
            if (spins % 1024 == 0) sched_yield();
        const double* __restrict sum = carry + turn.b * l.stride;
        for (int64_t d = 0; d < l.stride; ++d) start[d] = float(sum[d]);
    }

    // Adds this block's sum and ends the turn.
    void pass_on(Turn turn, const float* __restrict block_sum) {
        double* __restrict sum = carry + turn.b * l.stride;
        for (int64_t d = 0; d < l.stride; ++d) sum[d] += double(block_sum[d]);
        __atomic_store_n(&done[turn.b], turn.index + 1, __ATOMIC_RELEASE);
    }
};

// The sum that each block starts from: over the blocks before it, or over the whole sequence when not causal. Made
// in a pass of its own over k, for the passes that need it before they come to the block.
struct BlockStarts {
    const Layout& l;
    Floats memory;

    BlockStarts(const Layout& layout, int64_t batch) : l(layout), memory(batch * layout.blocks * layout.stride) {}

    float* row(int64_t b, int64_t block) const { return memory.p + (b * l.blocks + block) * l.stride; }

    // Called by every thread of a team together.
    template <class Element>
    void fill(const LinearArguments& a) const {
#pragma omp for schedule(static)
        for (int64_t item = 0; item < a.batch * l.blocks; ++item) {
            const int64_t b = item / l.blocks, block = item % l.blocks;
            exp_rows<Element>(l, a, block_at(l, a, b, block), nullptr, row(b, block), nullptr);
        }
        const int64_t parts = l.stride / kWidth;
#pragma omp for schedule(static)
        for (int64_t item = 0; item < a.batch * parts; ++item) {
            const int64_t b = item / parts, start = item % parts * kWidth;
            double carry[kWidth];
            for (int lane = 0; lane < kWidth; ++lane) carry[lane] = initial(l, a.total, b, start + lane);
            for (int64_t block = 0; block < l.blocks; ++block) {
                float* sum = row(b, block) + start;
                for (int lane = 0; lane < kWidth; ++lane) {
                    const double before = carry[lane];
                    carry[lane] += double(sum[lane]);
                    sum[lane] = float(before);
                }
            }
            if (a.causal) continue;
            for (int64_t block = 0; block < l.blocks; ++block)
                for (int lane = 0; lane < kWidth; ++lane) row(b, block)[start + lane] = float(carry[lane]);
        }
    }
};

}  // namespace CAUSALRN_ISA
}  // namespace causalrn
