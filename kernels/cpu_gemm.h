// Matrix products for training a small GPT on a CPU: near the processor's peak at widths of a few hundred.
//
// Activations live in panels: 16 channels of every token side by side, [C / 16][M][16]. In that layout every operand of
// every product is read as a stream and nothing is copied: as the left factor of y = x W^T and dx = dy W (one value of a
// few rows at a time), and as both factors of dW = dy^T x (16 channels of a token at a time). Only the weights are
// packed, once a step, twice: by outputs and by inputs.
#pragma once

#include "cpu_common.h"

#include <cstddef>
#include <utility>

namespace {

#if defined(__AVX512F__)
constexpr int LANES_WIDE = 16, MR = 12, MP = 2, MC = 8;  // 32 registers of 16 lanes
#else
constexpr int LANES_WIDE = 8, MR = 6, MP = 1, MC = 6;    // 16 registers of 8 lanes
#endif
constexpr int WIDE = 16;                                  // channels in a panel
constexpr int VECS = WIDE / LANES_WIDE;                      // registers for a row of a panel

typedef float vec __attribute__((vector_size(LANES_WIDE * 4)));

typedef int32_t ivec __attribute__((vector_size(LANES_WIDE * 4)));

inline vec vload(const float* p) { vec v; std::memcpy(&v, p, sizeof v); return v; }
inline void vstore(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
inline vec vset(float x) { return x - vec{}; }
inline vec vmax(vec a, vec b) { return a > b ? a : b; }
inline vec vabs(vec x) { return x < 0.0f ? -x : x; }
inline float vsum(vec v) {
    float part[LANES_WIDE];
    vstore(part, v);
    for (int half = LANES_WIDE / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++) part[l] += part[l + half];
    return part[0];
}

// fast_exp, written for vectors: compilers leave a loop over the scalar form as it is.
inline vec vexp(vec x) {
    x = x < -87.0f ? vset(-87.0f) : x;
    x = x > 88.0f ? vset(88.0f) : x;
    vec shifted = x * 1.44269504088896f + 12582912.0f;
    vec n = shifted - 12582912.0f;
    vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec bits, scale;
    std::memcpy(&bits, &shifted, sizeof bits);
    scale = (bits - 0x4B400000 + 127) << 23;
    vec two_to_n;
    std::memcpy(&two_to_n, &scale, sizeof scale);
    return p * two_to_n;
}

inline int panels(int channels) { return (channels + WIDE - 1) / WIDE; }

// A matrix in panels: element (m, c) stands at p[c / 16 * stride + m * 16 + c % 16].
struct Panels {
    float* p = nullptr;
    ptrdiff_t stride = 0;
    float* at(ptrdiff_t m, int panel) const { return p + panel * stride + m * WIDE; }
    Panels from(int panel) const { return {p + panel * stride, stride}; }
};

// sums[r][c] = rows r of a times panels c of b. a: R rows in panels, K channels; b: [K][16] for each of P panels.
template <int R, int P>
inline void row_tile(int K, const float* a, ptrdiff_t a_stride, const float* b, ptrdiff_t b_stride, vec (&sums)[R][P * VECS]) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < P * VECS; c++) sums[r][c] = vec{};
    auto step = [&](int k) __attribute__((always_inline)) {
        vec right[P * VECS];
#pragma GCC unroll 4
        for (int c = 0; c < P * VECS; c++) right[c] = vload(b + (c / VECS) * b_stride + k * WIDE + (c % VECS) * LANES_WIDE);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int c = 0; c < P * VECS; c++) sums[r][c] += a[r * WIDE + k] * right[c];
    };
    for (; K >= WIDE; K -= WIDE, a += a_stride, b += WIDE * WIDE) {
#pragma GCC unroll 4
        for (int k = 0; k < WIDE; k++) step(k);
    }
    for (int k = 0; k < K; k++) step(k);
}

// sums[r][c] = columns r of a times panels c of b, over K rows of both. a: [K][16], b: [K][16] for each of P panels.
template <int R, int P>
inline void column_tile(int K, const float* a, const float* b, ptrdiff_t b_stride, vec (&sums)[R][P * VECS]) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < P * VECS; c++) sums[r][c] = vec{};
#pragma GCC unroll 4
    for (int k = 0; k < K; k++, a += WIDE, b += WIDE) {
        vec right[P * VECS];
#pragma GCC unroll 4
        for (int c = 0; c < P * VECS; c++) right[c] = vload(b + (c / VECS) * b_stride + (c % VECS) * LANES_WIDE);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int c = 0; c < P * VECS; c++) sums[r][c] += a[r] * right[c];
    }
}

template <int N> using Constant = std::integral_constant<int, N>;

// f(Constant<n>, m) over m0 .. m1 in steps of n: MAX as long as that fits, then fours, pairs and single rows.
template <int MAX, class F>
inline void in_steps(int m0, int m1, F&& f) {
    int m = m0;
    for (; m + MAX <= m1; m += MAX) f(Constant<MAX>{}, m);
    if constexpr (MAX > 4) for (; m + 4 <= m1; m += 4) f(Constant<4>{}, m);
    for (; m + 2 <= m1; m += 2) f(Constant<2>{}, m);
    if (m < m1) f(Constant<1>{}, m);
}

// f(Constant<n>, p) over panels p0 .. p1, as many at a time as the registers hold.
template <class F>
inline void over_panels(int p0, int p1, F&& f) {
    int p = p0;
    for (; p + MP <= p1; p += MP) f(Constant<MP>{}, p);
    if constexpr (MP > 1) if (p < p1) f(Constant<1>{}, p);
}

// R rows of a, the first at `a`, times panels p0 .. p1 of b: then(Constant<P>, panel, sums).
template <int R, class Then>
inline void band(int p0, int p1, int K, const float* a, ptrdiff_t a_stride, const float* b, ptrdiff_t b_stride, Then&& then) {
    over_panels(p0, p1, [&](auto P, int p) {
        vec sums[R][P.value * VECS];
        row_tile<R, P.value>(K, a, a_stride, b + p * b_stride, b_stride, sums);
        then(P, p, sums);
    });
}

// For rows m0 .. m1 of a and panels p0 .. p1 of b, in tiles: then(Constant<R>, Constant<P>, m, panel, sums). b: one panel
// every b_stride, each [K][16].
template <class Then>
inline void times(int m0, int m1, int p0, int p1, int K, const Panels& a, const float* b, ptrdiff_t b_stride, Then&& then) {
    over_panels(p0, p1, [&](auto P, int p) {
        in_steps<MR>(m0, m1, [&](auto R, int m) {
            vec sums[R.value][P.value * VECS];
            row_tile<R.value, P.value>(K, a.at(m, 0), a.stride, b + p * b_stride, b_stride, sums);
            then(R, P, m, p, sums);
        });
    });
}

// How many rows at a time keep a's share of the cache beside a panel of b.
inline int rows_at_once(int K) { return std::max(MR, std::min(96, 98304 / std::max(1, K)) / MR * MR); }

// R rows of P panels to memory, or added to it.
template <int R, int P>
inline void put(const Panels& y, int m, int panel, const vec (&sums)[R][P * VECS]) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < P * VECS; c++) vstore(y.at(m + r, panel + c / VECS) + (c % VECS) * LANES_WIDE, sums[r][c]);
}

// Columns first .. first + count of a panel of dy, times panels p0 .. p1 of x, over rows m0 .. m1: rows of dW (row n at
// grad + n * ld), written or added to. Only the first `valid` columns of the panel are rows of dW.
template <class Out>
inline void column_product(int K, const float* dy, int valid, const Panels& x, int m0, int p0, int p1, Out&& out) {
    over_panels(p0, p1, [&](auto P, int p) {
        auto tile = [&](auto R, int first) {
            vec sums[R.value][P.value * VECS];
            column_tile<R.value, P.value>(K, dy + first, x.at(m0, p), x.stride, sums);
            out(R, P, first, p, sums);
        };
        // 16 = 5 + 5 + 6 or 8 + 8: each tile has products enough to fill the multipliers
        if (valid == WIDE) {
            if constexpr (MC == 8) { tile(Constant<8>{}, 0); tile(Constant<8>{}, 8); }
            else { tile(Constant<5>{}, 0); tile(Constant<5>{}, 5); tile(Constant<6>{}, 10); }
        } else in_steps<MC>(0, valid, tile);
    });
}

// Rows of dW (N, C) that panel `panel` of dy gives, over M tokens; `add` keeps what is there.
inline void weight_gradient(int M, int N, int C, const Panels& dy, int panel, const Panels& x, float* grad, bool add) {
    constexpr int TOKENS = 256;  // a block of both factors stays in the nearest cache
    int valid = std::min(WIDE, N - panel * WIDE), parts = panels(C);
    for (int m0 = 0; m0 < M; m0 += TOKENS) {
        bool more = add || m0 > 0;
        column_product(std::min(TOKENS, M - m0), dy.at(m0, panel), valid, x, m0, 0, parts,
            [&](auto R, auto P, int first, int p, auto& sums) {
                for (int r = 0; r < R.value; r++) for (int c = 0; c < P.value * VECS; c++) {
                    float* to = grad + size_t(panel * WIDE + first + r) * C + (p + c / VECS) * WIDE + (c % VECS) * LANES_WIDE;
                    vstore(to, more ? vload(to) + sums[r][c] : sums[r][c]);
                }
            });
    }
}

// A block of 8 x 8 turned over: to[c][r] = from[r][c].
inline void transpose_block(const float* from, ptrdiff_t from_stride, float* to, ptrdiff_t to_stride) {
    v8 r[LANES], s[LANES];
    for (int i = 0; i < LANES; i++) r[i] = load(from + i * from_stride);
#if defined(__clang__)
#define FC_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FC_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, i8{__VA_ARGS__})
#endif
    for (int i = 0; i < LANES; i += 2) {
        s[i] = FC_SHUFFLE(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        s[i + 1] = FC_SHUFFLE(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < LANES; i += 4) for (int j = 0; j < 2; j++) {
        r[i + 2 * j] = FC_SHUFFLE(s[i + j], s[i + 2 + j], 0, 1, 8, 9, 4, 5, 12, 13);
        r[i + 2 * j + 1] = FC_SHUFFLE(s[i + j], s[i + 2 + j], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    for (int i = 0; i < LANES / 2; i++) {
        store(to + i * to_stride, FC_SHUFFLE(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11));
        store(to + (i + 4) * to_stride, FC_SHUFFLE(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15));
    }
#undef FC_SHUFFLE
}

// Weights (N, C) by outputs, [N / 16][C][16], zeros past N: the right factor of y = x W^T. One panel.
inline void pack_outputs(const float* weight, int N, int C, int panel, float* to) {
    int valid = std::min(WIDE, N - panel * WIDE);
    if (valid < WIDE) std::memset(to, 0, size_t(C) * WIDE * sizeof(float));
    const float* from = weight + size_t(panel) * WIDE * C;
    if (valid == WIDE && C % LANES == 0) {
        for (int c = 0; c < C; c += LANES)
            for (int i = 0; i < WIDE; i += LANES) transpose_block(from + size_t(i) * C + c, C, to + size_t(c) * WIDE + i, WIDE);
        return;
    }
    for (int i = 0; i < valid; i++)
        for (int c = 0; c < C; c++) to[size_t(c) * WIDE + i] = from[size_t(i) * C + c];
}

// Weights (N, C) by inputs, [C / 16][N][16]: the right factor of dx = dy W. One panel.
inline void pack_inputs(const float* weight, int N, int C, int panel, float* to) {
    for (int n = 0; n < N; n++) std::memcpy(to + size_t(n) * WIDE, weight + size_t(n) * C + panel * WIDE, WIDE * sizeof(float));
}

}  // namespace
