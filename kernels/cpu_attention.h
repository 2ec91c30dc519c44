// Causal attention of one head of one sequence on a CPU, forward and backward, without a T x T matrix in memory.
//
// A few query rows at a time: their scores against every key that they see fit in the nearest cache, so the softmax needs
// no second pass. The backward pass recomputes the probabilities from the kept log-sum-exp.
#pragma once

#include "cpu_dropout.h"

#include <limits>

namespace {

// A head of a sequence: panels of D channels whose row 0 is the sequence's first token.
struct Head {
    Panels q, k, v;
    int T, D;
    float scale;
    Dropout dropout;  // of the weights
    int b, h;         // whose they are
};

constexpr int QUERIES = MR * (96 / MR);  // query rows of the backward pass at a time

// Scratch of a thread, for sequences of up to T tokens.
struct AttentionScratch {
    std::vector<float> keys, values, scores, weights, grads, factors;
    void reserve(int T, int D) {
        size_t wide = size_t(panels(T)) * WIDE;
        keys.resize(wide * D);
        values.resize(wide * D);
        scores.resize(wide * MR);
        factors.resize(wide * (MR + DROP_ROWS));
        weights.resize(wide * QUERIES);
        grads.resize(wide * QUERIES);
    }
};

// (T, D) transposed to [T / 16][D][16], zeros past T: the right factor of q k^T.
inline void transpose(const Panels& x, int T, int D, float* to) {
    for (int j0 = 0; j0 < T; j0 += WIDE, to += size_t(D) * WIDE) {
        int rows = std::min(WIDE, T - j0);
        if (rows < WIDE) std::memset(to, 0, size_t(D) * WIDE * sizeof(float));
        for (int p = 0; p < D / WIDE; p++) {
            const float* from = x.at(j0, p);
            float* at = to + p * WIDE * WIDE;
            if (rows == WIDE)
                for (int j = 0; j < WIDE; j += LANES)
                    for (int d = 0; d < WIDE; d += LANES) transpose_block(from + j * WIDE + d, WIDE, at + d * WIDE + j, WIDE);
            else
                for (int j = 0; j < rows; j++)
                    for (int d = 0; d < WIDE; d++) at[d * WIDE + j] = from[j * WIDE + d];
        }
    }
}

// Puts a value where a row of scores has keys after query i: panels from its own on.
inline void hide(float* row, ptrdiff_t span, int i, int seen, float value) {
    for (int p = (i + 1) / WIDE; p < seen; p++)
        for (int l = std::max(0, i + 1 - p * WIDE); l < WIDE; l++) row[p * span + l] = value;
}

// Dropout's factors for `rows` queries from i on and the keys of the first `seen` panels, as scores lie.
inline void draw_factors(const Head& h, int i, int rows, int seen, float* factors) {
    for (int p = 0; p < seen; p++) h.dropout.factors(h.h, h.b * h.T + i, rows, p, factors + p * MR * WIDE);
}

// y = softmax(scale q k^T) v and lse, one value a query.
inline void attend(const Head& h, const Panels& y, float* lse, AttentionScratch& scratch) {
    const int T = h.T, D = h.D;
    const ptrdiff_t span = MR * WIDE;  // from one panel of keys to the next, in scores
    transpose(h.k, T, D, scratch.keys.data());
    float* scores = scratch.scores.data();
    in_steps<MR>(0, T, [&](auto R, int i0) {
        const int seen = panels(i0 + R.value);
        band<R.value>(0, seen, D, h.q.at(i0, 0), h.q.stride, scratch.keys.data(), ptrdiff_t(D) * WIDE,
            [&](auto P, int p, auto& sums) {
                for (int r = 0; r < R.value; r++) for (int c = 0; c < P.value * VECS; c++)
                    vstore(scores + (p + c / VECS) * span + r * WIDE + (c % VECS) * LANES_WIDE, sums[r][c] * h.scale);
            });
        float* const factors = scratch.factors.data();
        if (h.dropout) draw_factors(h, i0, R.value, seen, factors);
        float inverse[MR];
        for (int r = 0; r < R.value; r++) {
            float* row = scores + r * WIDE;
            hide(row, span, i0 + r, seen, -std::numeric_limits<float>::infinity());
            vec tops = vload(row), sums{};
            for (int p = 0; p < seen; p++) for (int v = 0; v < WIDE; v += LANES_WIDE)
                tops = vmax(tops, vload(row + p * span + v));
            float top = tops[0];
            for (int l = 1; l < LANES_WIDE; l++) top = std::max(top, tops[l]);
            for (int p = 0; p < seen; p++) for (int v = 0; v < WIDE; v += LANES_WIDE) {
                float* s = row + p * span + v;
                vec e = vexp(vload(s) - top);
                vstore(s, h.dropout ? e * vload(factors + (s - scores)) : e);  // the sum is of all, dropped or not
                sums += e;
            }
            hide(row, span, i0 + r, seen, 0.0f);  // vexp gives e**-87 at least: nothing in the sum, but not 0
            const float total = vsum(sums);
            inverse[r] = 1.0f / total;
            lse[i0 + r] = top + std::log(total);
        }
        band<R.value>(0, D / WIDE, i0 + R.value, scores, span, h.v.p, h.v.stride, [&](auto P, int p, auto& sums) {
            for (int r = 0; r < R.value; r++) for (int c = 0; c < P.value * VECS; c++) sums[r][c] *= inverse[r];
            put<R.value, P.value>(y, i0, p, sums);
        });
    });
}

// Gradients of attend: dq is written; dk and dv are written, or added to where `add` (further queries of the same keys).
inline void attend_backward(const Head& h, const Panels& y, const float* lse, const Panels& dy, const Panels& dq,
                            const Panels& dk, const Panels& dv, bool add, AttentionScratch& scratch) {
    const int T = h.T, D = h.D, parts = D / WIDE;
    const ptrdiff_t span = ptrdiff_t(QUERIES) * WIDE;
    transpose(h.k, T, D, scratch.keys.data());
    transpose(h.v, T, D, scratch.values.data());
    float *weights = scratch.weights.data(), *grads = scratch.grads.data();
    for (int block = 0; block < T; block += QUERIES) {
        const int end = std::min(T, block + QUERIES);
        in_steps<MR>(block, end, [&](auto R, int i0) {
            const int seen = panels(i0 + R.value);
            float delta[MR];
            for (int r = 0; r < R.value; r++) {
                vec sums{};
                for (int p = 0; p < parts; p++) for (int v = 0; v < WIDE; v += LANES_WIDE)
                    sums += vload(dy.at(i0 + r, p) + v) * vload(y.at(i0 + r, p) + v);
                delta[r] = vsum(sums);
            }
            float* const own = weights + (i0 - block) * WIDE;
            float* const own_grads = grads + (i0 - block) * WIDE;
            float* const factors = scratch.factors.data();
            if (h.dropout) draw_factors(h, i0, R.value, seen, factors);
            band<R.value>(0, seen, D, h.q.at(i0, 0), h.q.stride, scratch.keys.data(), ptrdiff_t(D) * WIDE,
                [&](auto P, int p, auto& sums) {
                    for (int r = 0; r < R.value; r++) for (int c = 0; c < P.value * VECS; c++)
                        vstore(own + (p + c / VECS) * span + r * WIDE + (c % VECS) * LANES_WIDE, sums[r][c] * h.scale - lse[i0 + r]);
                });
            for (int p = 0; p < seen; p++) for (int v = 0; v < R.value * WIDE; v += LANES_WIDE)
                vstore(own + p * span + v, vexp(vload(own + p * span + v)));
            for (int r = 0; r < R.value; r++) hide(own + r * WIDE, span, i0 + r, seen, 0.0f);
            band<R.value>(0, seen, D, dy.at(i0, 0), dy.stride, scratch.values.data(), ptrdiff_t(D) * WIDE,
                [&](auto P, int p, auto& sums) {
                    for (int r = 0; r < R.value; r++) for (int c = 0; c < P.value * VECS; c++) {
                        ptrdiff_t at = (p + c / VECS) * span + r * WIDE + (c % VECS) * LANES_WIDE;
                        if (h.dropout)
                            sums[r][c] *= vload(factors + (p + c / VECS) * MR * WIDE + r * WIDE + (c % VECS) * LANES_WIDE);
                        vstore(own_grads + at, vload(own + at) * (sums[r][c] - delta[r]) * h.scale);
                    }
                });
            if (h.dropout)
                for (int p = 0; p < seen; p++) for (int v = 0; v < R.value * WIDE; v += LANES_WIDE)
                    vstore(own + p * span + v, vload(own + p * span + v) * vload(factors + p * MR * WIDE + v));
            band<R.value>(0, parts, i0 + R.value, own_grads, span, h.k.p, h.k.stride, [&](auto P, int p, auto& sums) {
                put<R.value, P.value>(dq, i0, p, sums);
            });
        });
        for (int j = 0; j < panels(end); j++) {
            // queries before these keys do not see them; the first block that does, writes
            const int first = std::max(block, j * WIDE), valid = std::min(WIDE, T - j * WIDE);
            const bool more = add || j * WIDE < block;
            auto product = [&](const float* left, const Panels& right, const Panels& to) {
                column_product(end - first, left + j * span + (first - block) * WIDE, valid, right, first, 0, parts,
                    [&](auto R, auto P, int row, int p, auto& sums) {
                        for (int r = 0; r < R.value; r++) for (int c = 0; c < P.value * VECS; c++) {
                            float* at = to.at(j * WIDE + row + r, p + c / VECS) + (c % VECS) * LANES_WIDE;
                            vstore(at, more ? vload(at) + sums[r][c] : sums[r][c]);
                        }
                    });
            };
            product(weights, dy, dv);
            product(grads, h.q, dk);
        }
    }
}

}  // namespace
