// Dropout's masks on a CPU: philox.py's bits, a few rows of sixteen columns at a time.
//
// Whether a value is kept depends on (seed, batch, head, row, column) alone, so the backward pass draws again what the
// forward pass drew and nothing is stored.
#pragma once

#include "cpu_gemm.h"

namespace {

// 32-bit words, each in the low half of a lane of 64 bits; what stands above it is never read.
typedef uint64_t words __attribute__((vector_size(LANES_WIDE * 4)));
typedef uint32_t low_words __attribute__((vector_size(LANES_WIDE * 2)));
typedef int16_t draws __attribute__((vector_size(LANES_WIDE * 2)));
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

    // The factors that the low words' halves draw, lane by lane.
    vec kept_or_0(words drawn) const {
        const draws shifted = draws(__builtin_convertvector(drawn, low_words)) ^ int16_t(-32768);  // now signed
        const ivec kept = __builtin_convertvector(shifted >= draws{} + int16_t(threshold - 32768), ivec);
        return vec(kept & ivec(vec{} + float(1.0 / (1.0 - threshold / 65536.0))));
    }

    // Factors, 0 or 1 / (probability to keep), for `count` rows from m on, (row of the batch, b T + t), and the sixteen
    // columns of a panel. `out` has room for whole DROP_ROWS.
    void factors(int head, int m, int count, int panel, float* out) const {
        for (int r = 0; r < count; r += DROP_ROWS) {
            words c0, c1, c2 = words{} + uint64_t(head), c3, lower;
            for (int lane = 0; lane < COUNTERS; lane++) {
                const int row = m + r + lane / 4, t = row % T;
                c0[lane] = uint64_t(panel) * 4 + lane % 4;
                c1[lane] = uint64_t(t / 16 * 8 + t % 8);
                c3[lane] = uint64_t(row / T);
                lower[lane] = t % 16 < 8 ? 0 : ~uint64_t(0);
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
            // A call's first two words are of the upper eight rows of a block, the others of the lower eight; and one of
            // the two is of the left eight columns.
            const words left = (c0 & ~lower) | (c2 & lower), right = (c1 & ~lower) | (c3 & lower);
            const vec sides[2] = {kept_or_0(left), kept_or_0(right)};
            for (int side = 0; side < 2; side++) for (int row = 0; row < DROP_ROWS; row++)
                std::memcpy(out + (r + row) * WIDE + side * 8, (const float*)&sides[side] + row * 8, 8 * sizeof(float));
        }
    }
};

}  // namespace
