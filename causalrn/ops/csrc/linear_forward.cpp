// The forward pass of the linear relation: each block of q and k is read once, each block of y written once.
#include "linear_sums.h"

namespace causalrn {
namespace CAUSALRN_ISA {

template <class Element>
static int forward(const LinearArguments& a) {
    const Layout l(a);
    const int64_t per_thread = (l.rows + 7) * l.stride;
    Chain chain(l, a, a.total);
    // A bidirectional row sees every block, so that their sums come first.
    BlockStarts starts(l, a.causal ? 0 : a.batch);
    Floats scratch(a.threads * per_thread);
    if (!chain.ready() || !starts.memory.p || !scratch.p) return kOutOfMemory;
#pragma omp parallel num_threads(a.threads)
    {
        float* const exp_k = scratch.p + thread_index() * per_thread;
        float *block_sum = exp_k + l.rows * l.stride, *start = block_sum + l.stride, *running = start + l.stride;
        float *sums = running + l.stride, *centred = sums + l.stride, *value = centred + l.stride;
        // A head has at least as many padded channels as a Stats has floats.
        Stats* stats = reinterpret_cast<Stats*>(value + l.stride);
        if (!a.causal) starts.fill<Element>(a, exp_k);
        for (Turn turn = chain.before(); chain.advance(turn);) {
            const Block block = block_at(l, a, turn.b, turn.index);
            if (a.causal) {
                exp_rows<Element>(l, a, block, exp_k, l.stride, block_sum, nullptr);
                chain.pass_on(turn, block_sum, start);
            }
            RowSums row_sums{a.causal ? start : starts.row(turn.b, turn.index), running, exp_k};
            fill(l, running, -0.0f);
            for (int64_t row = 0; row < block.rows; ++row) {
                const Element* q = q_row<Element>(a, block.b, block.first + row);
                Element* y = out_row<Element>(a, a.y, block.b, block.first + row);
                const Ahead<Element> ahead{q + a.q_stride, q + a.q_stride, y};
                const Gate gate = gate_row(l, a, q, row_sums, ahead, stats, centred, sums, value);
                row_sums.exp_k += l.stride;
                for (int64_t h = 0; h < l.heads; ++h) {
                    const float* head = value + h * l.head_stride;
                    each_vector(l, CAUSALRN_EACH {
                        store_lanes(y + h * l.channels + d, (load(head + d) - gate.mean) * gate.inverse, count);
                    });
                }
            }
        }
    }
    if (a.causal) {
        write_totals(l, a, chain.carry, l.stride);
    } else {
        write_totals(l, a, starts.row(0, 0), l.blocks * l.stride);
    }
    return kDone;
}

CAUSALRN_EXPORT(int, linear_forward)(const LinearArguments* a) {
    return a->bf16 ? forward<uint16_t>(*a) : forward<float>(*a);
}

// The sum of exp(norm(k)) alone.
template <class Element>
static int pool(const LinearArguments& a) {
    const Layout l(a);
    Chain chain(l, a, nullptr);
    Floats scratch(a.threads * 3 * l.stride);
    if (!chain.ready() || !scratch.p) return kOutOfMemory;
#pragma omp parallel num_threads(a.threads)
    {
        float* const exp_k = scratch.p + thread_index() * 3 * l.stride;
        for (Turn turn = chain.before(); chain.advance(turn);) {
            exp_rows<Element>(l, a, block_at(l, a, turn.b, turn.index), exp_k, 0, exp_k + l.stride, nullptr);
            chain.pass_on(turn, exp_k + l.stride, exp_k + 2 * l.stride);
        }
    }
    write_totals(l, a, chain.carry, l.stride);
    return kDone;
}

CAUSALRN_EXPORT(int, linear_pool)(const LinearArguments* a) { return a->bf16 ? pool<uint16_t>(*a) : pool<float>(*a); }

}  // namespace CAUSALRN_ISA
}  // namespace causalrn
