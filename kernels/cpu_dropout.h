// Dropout's masks on a CPU: philox.py's bits, a few rows of sixteen columns at a time.
//
// Whether a value is kept depends on (seed, batch, head, row, column) alone, so the backward pass draws again what the
// forward pass drew and nothing is stored.
#pragma once

#include "cpu_gemm.h"

namespace {

// 32-bit words, each in the low half of a lane of 64 bits; what stands above it is never read.
typedef uint64_t words __attribute__((vector_size(LANES_WIDE * 4)));
constexpr int COUNTERS = LANES_WIDE / 2;        // at a time; each gives a row four of the sixteen columns
constexpr int DROP_ROWS = COUNTERS / 4;         // rows of sixteen columns that makes
constexpr uint64_t LOW_WORD = 0xFFFFFFFF;

// The product of the low halves, whole.
inline words multiply(words a, words b) {
#if defined(__AVX512F__)
    return words(_mm512_mul_epu32(__m512i(a), __m512i(b)));
#elif defined(__AVX2__)
    return words(_mm256_mul_epu32(__m256i(a), __m256i(b)));
#else
    return (a & LOW_WORD) * (b & LOW_WORD);
#endif
}

// One site of dropout in one call: attention weights of a layer, or a tensor of B T rows.
struct Dropout {
    uint64_t seed = 0;
    int threshold = 0;   // draws of 16 bits below it are dropped; 0 drops nothing
    int T = 1;           // rows of a sequence
    explicit operator bool() const { return threshold > 0; }

    // Factors, 0 or 1 / (probability to keep), for `count` rows from m on, (row of the batch, b T + t), and the sixteen
    // columns of a panel. `out` has room for whole DROP_ROWS.
    void factors(int head, int m, int count, int panel, float* out) const {
        const float kept = float(1.0 / (1.0 - threshold / 65536.0));
        for (int r = 0; r < count; r += DROP_ROWS) {
            words c0, c1, c2 = words{} + uint64_t(head), c3;
            for (int lane = 0; lane < COUNTERS; lane++) {
                const int row = m + r + lane / 4, t = row % T;
                c0[lane] = uint64_t(panel) * 4 + lane % 4;
                c1[lane] = uint64_t(t / 16 * 8 + t % 8);
                c3[lane] = uint64_t(row / T);
            }
            const words a = words{} + 0xD2511F53u, b = words{} + 0xCD9E8D57u;
            uint64_t k0 = seed & LOW_WORD, k1 = seed >> 32;
            for (int round = 0; round < 7; round++) {
                const words pa = multiply(c0, a), pb = multiply(c2, b);
                c0 = (pb >> 32) ^ c1 ^ k0;
                c1 = pb;
                c2 = (pa >> 32) ^ c3 ^ k1;
                c3 = pa;
                k0 = (k0 + 0x9E3779B9u) & LOW_WORD;
                k1 = (k1 + 0xBB67AE85u) & LOW_WORD;
            }
            const words drawn[4] = {c0, c1, c2, c3};
            for (int lane = 0; lane < COUNTERS; lane++) for (int right = 0; right < 2; right++) {
                const int lower = (m + r + lane / 4) % T % 16 / 8;
                const uint32_t word = uint32_t(drawn[2 * lower + right][lane]);
                float* to = out + (r + lane / 4) * WIDE + right * 8 + lane % 4 * 2;
                to[0] = int(word & 0xFFFF) >= threshold ? kept : 0.0f;
                to[1] = int(word >> 16) >= threshold ? kept : 0.0f;
            }
        }
    }
};

}  // namespace
