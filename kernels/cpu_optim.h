// Clipping, AdamW and Muon on a CPU, over every tensor of a model in one call.
//
// Sums over gradients are taken in pieces of a fixed size and added up in order: the same bits from any number of threads.
#pragma once

#include "cpu_gemm.h"

namespace {

// One tensor. With `second` it is AdamW's; without, Muon's, a matrix of rows x cols.
struct Update {
    float *weight, *grad, *first, *second;
    int64_t rows, cols;
    double rate, decay, scale;  // learning rate, weight decay, Muon's factor for the shape
};

struct Rules { double clip, beta1, beta2, eps, correction1, correction2, momentum; };

constexpr int64_t PIECE = 16384;

inline int64_t pieces(const Update& u) { return (u.rows * u.cols + PIECE - 1) / PIECE; }

inline double sum_of_squares(const float* x, int64_t n) {
    vec sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES_WIDE <= n; i += 4 * LANES_WIDE)
        for (int c = 0; c < 4; c++) { vec v = vload(x + i + c * LANES_WIDE); sums[c] += v * v; }
    double rest = 0.0;
    for (; i < n; i++) rest += double(x[i]) * x[i];
    return double(vsum((sums[0] + sums[1]) + (sums[2] + sums[3]))) + rest;
}

inline vec vsqrt(vec x) {
    for (int l = 0; l < LANES_WIDE; l++) x[l] = std::sqrt(x[l]);
    return x;
}

// Decoupled weight decay (arXiv:1711.05101); `shrink` scales the gradient.
inline void adamw(const Update& u, const Rules& r, float shrink, int64_t from, int64_t to) {
    const float keep = float(1.0 - u.rate * u.decay), b1 = float(1.0 - r.beta1), b2 = float(r.beta2), c2 = float(1.0 - r.beta2);
    const float root = float(1.0 / std::sqrt(r.correction2)), rate = float(u.rate / r.correction1), eps = float(r.eps);
    int64_t i = from;
    for (; i + LANES_WIDE <= to; i += LANES_WIDE) {
        vec g = vload(u.grad + i) * shrink, m = vload(u.first + i), v = vload(u.second + i);
        m += (g - m) * b1;
        v = v * b2 + g * g * c2;
        vstore(u.first + i, m);
        vstore(u.second + i, v);
        vstore(u.weight + i, vload(u.weight + i) * keep - rate * m / (vsqrt(v) * root + eps));
    }
    for (; i < to; i++) {
        float g = u.grad[i] * shrink, &m = u.first[i], &v = u.second[i];
        m += (g - m) * b1;
        v = v * b2 + g * g * c2;
        u.weight[i] = u.weight[i] * keep - rate * m / (std::sqrt(v) * root + eps);
    }
}

// Muon's scratch of a thread: the matrix with its smaller side in panels, its Gram matrix and polynomials of it.
struct MuonScratch {
    std::vector<float> x, y, gram, power, factor, product;
    void reserve(int64_t tall, int64_t side) {
        x.resize(std::max<size_t>(x.size(), tall * side));
        y.resize(std::max<size_t>(y.size(), tall * side));
        for (auto* each : {&gram, &power, &factor, &product}) each->resize(std::max<size_t>(each->size(), side * side));
    }
};

// to = left right for symmetric factors that commute: symmetric too, so half of it is computed and the rest copied.
// All are (n, n) in panels.
inline void symmetric_product(int n, const float* left, const float* right, float* to) {
    const ptrdiff_t stride = ptrdiff_t(n) * WIDE;
    const Panels a{const_cast<float*>(left), stride}, out{to, stride};
    for (int p = 0; p < n / WIDE; p++) {
        const int end = std::min(n, (p + 1) * WIDE);
        // rows up to this panel's own: the upper triangle, in panels
        in_steps<MR>(0, end, [&](auto R, int m) {
            vec sums[R.value][VECS];
            row_tile<R.value, 1>(n, a.at(m, 0), stride, right + p * stride, 0, sums);
            put<R.value, 1>(out, m, p, sums);
        });
    }
    for (int p = 0; p < n / WIDE; p++) for (int m = (p + 1) * WIDE; m < n; m++) for (int l = 0; l < WIDE; l++)
        out.at(m, p)[l] = out.at(p * WIDE + l, m / WIDE)[m % WIDE];
}

// The matrix's momentum, orthogonalised by five steps of a quintic Newton-Schulz iteration (Muon, K. Jordan 2024).
//
// The iteration x <- p(x x^T) x only ever multiplies x by polynomials of its Gram matrix, which commute. So it runs on
// that small symmetric matrix alone, and x is multiplied once, at the end, by the product of them all.
inline void orthogonalise(float* x, int64_t tall, int n, MuonScratch& s, float* out) {
    constexpr float A = 3.4445f, B = -4.7750f, C = 2.0315f;
    constexpr int STEPS = 5;
    const ptrdiff_t stride = ptrdiff_t(n) * WIDE;
    const Panels panels_of_x{x, tall * WIDE}, gram{s.gram.data(), stride};
    const float norm = float(1.0 / (std::sqrt(sum_of_squares(x, tall * n)) + 1e-7));
    for (int p = 0; p < n / WIDE; p++) for (int q = p; q < n / WIDE; q++) {
        float* to = gram.at(p * WIDE, q);
        for (int64_t m0 = 0; m0 < tall; m0 += 256)
            column_product(int(std::min<int64_t>(256, tall - m0)), panels_of_x.at(m0, p), WIDE, panels_of_x, int(m0), q, q + 1,
                [&](auto R, auto P, int first, int, auto& sums) {
                    for (int r = 0; r < R.value; r++) for (int c = 0; c < P.value * VECS; c++) {
                        float* at = to + (first + r) * WIDE + c * LANES_WIDE;
                        vec value = sums[r][c] * (norm * norm);
                        vstore(at, m0 ? vload(at) + value : value);
                    }
                });
        if (q > p) for (int r = 0; r < WIDE; r++) for (int l = 0; l < WIDE; l++) gram.at(q * WIDE + l, p)[r] = to[r * WIDE + l];
    }
    float *power = s.power.data(), *factor = s.factor.data(), *product = s.product.data();
    for (int step = 0; step < STEPS; step++) {
        symmetric_product(n, s.gram.data(), s.gram.data(), power);
        for (int64_t i = 0; i < int64_t(n) * n; i += LANES_WIDE)  // p = A + B g + C g^2
            vstore(power + i, B * vload(s.gram.data() + i) + C * vload(power + i));
        for (int i = 0; i < n; i++) power[i / WIDE * stride + i * WIDE + i % WIDE] += A;
        if (step == 0) s.factor.swap(s.power), std::swap(factor, power);
        else {
            symmetric_product(n, factor, power, product);
            s.factor.swap(s.product);
            std::swap(factor, product);
        }
        if (step + 1 == STEPS) break;
        const float* p = step == 0 ? factor : power;
        symmetric_product(n, s.gram.data(), p, product);
        symmetric_product(n, product, p, s.gram.data());
    }
    // out = x factor, with the norm
    over_panels(0, n / WIDE, [&](auto P, int p) {
        in_steps<MR>(0, int(tall), [&](auto R, int m) {
            vec sums[R.value][P.value * VECS];
            row_tile<R.value, P.value>(n, panels_of_x.at(m, 0), panels_of_x.stride, factor + p * stride, stride, sums);
            for (int r = 0; r < R.value; r++) for (int c = 0; c < P.value * VECS; c++) sums[r][c] *= norm;
            put<R.value, P.value>(Panels{out, tall * WIDE}, m, p, sums);
        });
    });
}

// One step of Muon with Nesterov momentum for one matrix.
inline void muon(const Update& u, const Rules& r, float shrink, MuonScratch& s) {
    const int64_t n = u.rows * u.cols;
    const bool turned = u.rows < u.cols;  // the smaller side goes into panels
    const int64_t tall = turned ? u.cols : u.rows;
    const int side = int(turned ? u.rows : u.cols);
    s.reserve(tall, side);
    const float keep = float(1.0 - r.momentum), share = float(r.momentum);
    for (int64_t i = 0; i < n; i++) {
        float g = u.grad[i] * shrink;
        u.first[i] += (g - u.first[i]) * keep;
        u.grad[i] = g + (u.first[i] - g) * share;
    }
    for (int p = 0; p < side / WIDE; p++) {
        float* to = s.x.data() + p * tall * WIDE;
        if (turned) pack_outputs(u.grad, int(u.rows), int(u.cols), p, to);
        else pack_inputs(u.grad, int(u.rows), int(u.cols), p, to);
    }
    orthogonalise(s.x.data(), tall, side, s, s.y.data());
    const float decay = float(1.0 - u.rate * u.decay), rate = float(u.rate * u.scale);
    for (int64_t row = 0; row < u.rows; row++) for (int64_t col = 0; col < u.cols; col++) {
        const int64_t m = turned ? col : row, c = turned ? row : col;
        float& w = u.weight[row * u.cols + col];
        w = w * decay - rate * s.y[c / WIDE * tall * WIDE + m * WIDE + c % WIDE];
    }
}

}  // namespace
