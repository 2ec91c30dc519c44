// Linear layers of decoding: few tokens, weights read once. Packed weights are read as streams, in fp32 or int8.
//
// Each output is one accumulator that runs over the inputs in order, whatever the number of tokens M in the call. So a
// token's outputs are the same, bit for bit, alone and in a batch: speculative decoding relies on it.
#pragma once

#include "cpu_gemm.h"

namespace {

constexpr int PANEL = WIDE;  // outputs whose weights lie side by side

// A linear layer: weights in panels, in fp32 [N / PANEL][K][PANEL] and, where asked for, in int8 with a scale per output,
// [N / PANEL][K / 2][PANEL][2]: two inputs side by side, because processors multiply and add 16-bit numbers in pairs.
struct Linear {
    int n = 0, k = 0, panels = 0;
    float* w = nullptr;
    int8_t* q = nullptr;
    std::vector<float> scale, bias;  // padded to whole panels

    static size_t count(int n, int k) { return size_t((n + PANEL - 1) / PANEL) * PANEL * ((k + 1) / 2 * 2); }

    void pack(const float* weight, const float* b, int rows, int cols, Arena* wide, Arena* narrow) {
        n = rows; k = cols; panels = (n + PANEL - 1) / PANEL;
        bias.assign(size_t(panels) * PANEL, 0.0f);
        scale.assign(size_t(panels) * PANEL, 1.0f);
        if (b) std::copy(b, b + n, bias.begin());
        if (wide) {
            w = wide->take<float>(count(n, k));
            for (int p = 0; p < panels; p++) pack_outputs(weight, n, k, p, w + size_t(p) * PANEL * k);
        }
        if (!narrow) return;
        q = narrow->take<int8_t>(count(n, k));
        std::memset(q, 0, count(n, k));
        for (int i = 0; i < n; i++) {
            const float* row = weight + size_t(i) * k;
            int8_t* to = q + size_t(i / PANEL) * PANEL * ((k + 1) / 2 * 2) + i % PANEL * 2;
            float top = 0.0f;
            for (int j = 0; j < k; j++) top = std::max(top, std::fabs(row[j]));
            float step = top > 0.0f ? top / 127.0f : 1.0f;
            scale[i] = step;
            for (int j = 0; j < k; j++) to[size_t(j / 2) * PANEL * 2 + j % 2] = int8_t(std::lrint(row[j] / step));
        }
    }
};

// Inputs of a layer: as they are, or rounded to 16-bit numbers of which two with an int8 weight each never overflow the
// sum: 2**13 * 2**7 * K stays below 2**31 for K up to 2048, and longer rows take fewer bits.
struct Wide { const float* x; int ld; };
struct Narrow { const int16_t* x; const float* scale; int ld; };

inline int levels(int k) {
    int top = 8191;
    while (int64_t(top) * 127 * k >= INT32_MAX) top /= 2;
    return top;
}

inline void quantise(const float* x, int k, int16_t* to, float* scale) {
    vec tops = vset(0.0f);
    int j = 0;
    for (; j + LANES_WIDE <= k; j += LANES_WIDE) tops = vmax(vabs(vload(x + j)), tops);
    float top = 0.0f;
    for (int l = 0; l < LANES_WIDE; l++) top = std::max(top, tops[l]);
    for (; j < k; j++) top = std::max(top, std::fabs(x[j]));
    float step = top > 0.0f ? top / levels(k) : 1.0f, inverse = 1.0f / step;
    for (j = 0; j < k; j++) {
        // adding 1.5 * 2**23 rounds, as in fast_exp
        float shifted = x[j] * inverse + 12582912.0f;
        int32_t bits;
        std::memcpy(&bits, &shifted, 4);
        to[j] = int16_t(bits - 0x4B400000);
    }
    if (k % 2) to[k] = 0;
    *scale = step;
}

// acc[m][c] = the outputs of panels `panel` .. `panel + COUNT - 1` for ROWS tokens from m0 on, in registers.
template <int ROWS, int COUNT>
inline void tile(const Linear& l, const Wide& in, int panel, int m0, vec (&acc)[ROWS][COUNT * VECS]) {
    constexpr int AHEAD = 32 * PANEL;  // 2 KB of each stream in flight
    size_t stride = size_t(l.k) * PANEL, ld = size_t(in.ld);
    const float* w = l.w + panel * stride;
    const float* x = in.x + m0 * ld;
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 8
        for (int c = 0; c < COUNT * VECS; c++) acc[m][c] = vec{};
#pragma GCC unroll 2
    for (int j = 0; j < l.k; j++) {
        vec right[COUNT * VECS];
#pragma GCC unroll 8
        for (int c = 0; c < COUNT * VECS; c++) {
            const float* at = w + (c / VECS) * stride + size_t(j) * PANEL + (c % VECS) * LANES_WIDE;
            if (c % VECS == 0) __builtin_prefetch(at + AHEAD);
            right[c] = vload(at);
        }
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 8
            for (int c = 0; c < COUNT * VECS; c++) acc[m][c] += x[m * ld + j] * right[c];
    }
}

// sums + the products of LANES_WIDE outputs' weight pairs with one pair of inputs
inline ivec pairs(ivec sums, const int8_t* w, const int16_t* x) {
    int32_t both;
    std::memcpy(&both, x, 4);
#if defined(__AVX512BW__)
    __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
#if defined(__AVX512VNNI__)
    return ivec(_mm512_dpwssd_epi32(__m512i(sums), wide, _mm512_set1_epi32(both)));
#else
    return sums + ivec(_mm512_madd_epi16(wide, _mm512_set1_epi32(both)));
#endif
#elif defined(__AVX2__) && !defined(__AVX512F__)
    __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
    return sums + ivec(_mm256_madd_epi16(wide, _mm256_set1_epi32(both)));
#else
    for (int i = 0; i < LANES_WIDE; i++) sums[i] += int32_t(w[2 * i]) * x[0] + int32_t(w[2 * i + 1]) * x[1];
    return sums;
#endif
}

template <int ROWS, int COUNT>
inline void tile(const Linear& l, const Narrow& in, int panel, int m0, vec (&acc)[ROWS][COUNT * VECS]) {
    constexpr int AHEAD = 32 * 2 * PANEL;
    size_t stride = size_t((l.k + 1) / 2) * 2 * PANEL, ld = size_t(in.ld);
    const int8_t* w = l.q + panel * stride;
    const int16_t* x = in.x + m0 * ld;
    ivec sums[ROWS][COUNT * VECS] = {};
#pragma GCC unroll 2
    for (int j = 0; j < l.k; j += 2) {
#pragma GCC unroll 8
        for (int c = 0; c < COUNT * VECS; c++) {
            const int8_t* at = w + (c / VECS) * stride + size_t(j) * PANEL + (c % VECS) * 2 * LANES_WIDE;
            if (c % VECS == 0) __builtin_prefetch(at + AHEAD);
#pragma GCC unroll 16
            for (int m = 0; m < ROWS; m++) sums[m][c] = pairs(sums[m][c], at, x + m * ld + j);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 8
        for (int c = 0; c < COUNT * VECS; c++)
            acc[m][c] = __builtin_convertvector(sums[m][c], vec) * in.scale[m0 + m]
                        * vload(&l.scale[size_t(panel) * PANEL + c * LANES_WIDE]);
}

enum Then { STORE, ADD, ACTIVATE };

struct Output { float* y; int ldy; Then then; int activation; };

template <int ROWS, int COUNT, class In>
void block(const Linear& l, const In& in, int panel, int m0, const Output& out) {
    vec acc[ROWS][COUNT * VECS];
    tile<ROWS, COUNT>(l, in, panel, m0, acc);
    for (int m = 0; m < ROWS; m++) for (int c = 0; c < COUNT; c++) {
        int first = (panel + c) * PANEL, width = std::min(PANEL, l.n - first);
        float y[PANEL];
        for (int v = 0; v < VECS; v++)
            vstore(y + v * LANES_WIDE, acc[m][c * VECS + v] + vload(&l.bias[first + v * LANES_WIDE]));
        if (out.then == ACTIVATE) activate(y, PANEL, out.activation);
        float* to = out.y + size_t(m0 + m) * out.ldy + first;
        if (out.then == ADD) for (int i = 0; i < width; i++) to[i] += y[i];
        else for (int i = 0; i < width; i++) to[i] = y[i];
    }
}

// ROWS tokens and panels p0 .. p1: few tokens take more panels at a time, to keep enough products in flight.
template <int ROWS, class In>
inline void rows_of(const Linear& l, const In& in, int p0, int p1, int m0, const Output& out) {
    constexpr int MOST = ROWS == 1 || (VECS == 1 && ROWS <= 5) ? 4 : MP;
    int p = p0;
    for (; p + MOST <= p1; p += MOST) block<ROWS, MOST>(l, in, p, m0, out);
    if constexpr (MOST > 2) for (; p + 2 <= p1; p += 2) block<ROWS, 2>(l, in, p, m0, out);
    for (; p < p1; p++) block<ROWS, 1>(l, in, p, m0, out);
}

template <int ROWS, class In>
inline void rest_of(const Linear& l, const In& in, int p0, int p1, int m0, int rows, const Output& out) {
    if (rows == ROWS) rows_of<ROWS>(l, in, p0, p1, m0, out);
    else if constexpr (ROWS > 1) rest_of<ROWS - 1>(l, in, p0, p1, m0, rows, out);
}

// The thread's share of a linear layer for M tokens.
template <class In>
void linear(const Linear& l, const In& in, int M, const Output& out, int me, int of) {
    int first = int(int64_t(l.panels) * me / of), end = int(int64_t(l.panels) * (me + 1) / of);
    if (M <= MR) return rest_of<MR>(l, in, first, end, 0, M, out);
    // a weight that was read serves every token before the next is
    for (int p = first; p < end; p += MP) {
        int stop = std::min(end, p + MP), m = 0;
        for (; m + MR <= M; m += MR) rows_of<MR>(l, in, p, stop, m, out);
        if (m < M) rest_of<MR>(l, in, p, stop, m, M - m, out);
    }
}

}  // namespace
