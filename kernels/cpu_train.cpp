// Forward and backward pass of a small GPT on a CPU, in one call: the loss of a batch, and its gradients.
//
// At a few hundred channels half of a step in torch goes to everything but the matrix products, and these reach three
// quarters of the processor's peak. Here the products run near the peak (cpu_gemm.h), what stands between them happens
// while the rows are in the nearest cache, and threads meet once a layer. Built and called by cpu_train.py; nothing here
// depends on torch.
//
// A thread owns whole sequences; gradients of weights, which sum over all tokens, are shared out by rows of the weight.
// No sum is split over threads, so the same bits come out of any number of them.
//
// Legend: B sequences, T tokens of each, M = B T, C channels, H query heads, G key/value heads, D channels per head,
// P = (H + 2 G) D, F = 4 C, V vocabulary.

#include "cpu_attention.h"
#include "cpu_optim.h"

#include <memory>
#include <new>

namespace {

enum Tensor { WTE, WPE, LAYERS };
enum LayerTensor { LN_1, LN_1_BIAS, QKV, QKV_BIAS, PROJ, PROJ_BIAS, LN_2, LN_2_BIAS, FC, FC_BIAS, OUT, OUT_BIAS, PER_LAYER };
enum LastTensor { LN_F, LN_F_BIAS, HEAD, HEAD_BIAS, LAST };

// What a layer keeps for its backward pass.
struct Kept {
    Panels x, h1, qkv, y, x2, h2, act, slope;
    float *mean_1, *rstd_1, *mean_2, *rstd_2, *qk_rstd, *lse;
};

// A linear layer's weights (N, C), packed for both directions.
struct Packed { int N, C; float *outputs, *inputs; };

// Gradients that tokens write and weights read; two sets, so that a thread may start on the next layer.
struct Flow { Panels dx2, dqkv, dfc, dproj, dout; };  // the last two where dropout stands behind a projection

struct Batch {
    int B, T;
    const int64_t *x, *y;     // (B, T); y is -1 where a token does not count
    const float* const* weights;
    float* const* grads;      // as weights; null for the loss alone
    const float* rope;        // (2, T', D / 2), T' at least T
    int64_t rope_length;
    const int64_t* seeds;     // dropout's, of each Site; null where nothing is dropped
    double scale;             // of the gradients
    bool add;                 // to the gradients that are there
};

// Where dropout stands: behind the embeddings; in layer l at l * 3 and one of the others.
enum Site { EMBEDDED, WEIGHTS, PROJECTED, FED };

inline void sum_into(float* to, const float* x) {
    for (int v = 0; v < WIDE; v += LANES_WIDE) vstore(to + v, vload(to + v) + vload(x + v));
}

// Pre-activations become activations; slope gets the derivatives.
template <int KIND>
void activate_with_slope(float* x, float* slope, int n) {
    for (int i = 0; i < n; i += LANES_WIDE) {
        vec u = vload(x + i), y, d;
        if constexpr (KIND == GELU) {
            vec z = vabs(u) * 0.70710678f, e = vexp(-z * z), t = 1.0f / (1.0f + 0.3275911f * z);
            vec poly = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
            vec tail = 0.5f * poly * e, phi = u < 0.0f ? tail : 1.0f - tail;
            y = u * phi;
            d = phi + u * 0.39894228f * e;
        } else if constexpr (KIND == GELU_TANH) {
            vec square = u * u, z = 1.59576912f * (u + 0.044715f * u * square), s = 1.0f / (1.0f + vexp(-z));
            y = u * s;
            d = s + y * (1.0f - s) * 1.59576912f * (1.0f + 0.134145f * square);
        } else {
            vec r = u > 0.0f ? u : vec{};
            y = KIND == RELU2 ? r * r : r;
            d = KIND == RELU2 ? 2.0f * r : u > 0.0f ? vset(1.0f) : vec{};
        }
        vstore(x + i, y);
        vstore(slope + i, d);
    }
}

void activate_with_slope(float* x, float* slope, int n, int kind) {
    switch (kind) {
        case GELU: return activate_with_slope<GELU>(x, slope, n);
        case GELU_TANH: return activate_with_slope<GELU_TANH>(x, slope, n);
        case RELU2: return activate_with_slope<RELU2>(x, slope, n);
        default: return activate_with_slope<RELU>(x, slope, n);
    }
}

struct Trainer {
    // the order of cpu_train.py's ints
    int L, C, H, G, D, V, rms, activation, qk_norm, rope, threads, positions, drop_threshold, drop_embedded;
    float softcap;
    int P, F, tensors;
    std::unique_ptr<Team> team;
    Arena weights_arena, arena;
    std::vector<Packed> packed;  // qkv, proj, fc, out of each layer, and the head
    int rows = 0, length = 0;
    bool training = false;
    std::vector<Kept> kept;
    Flow flow[2];
    Panels dx[3];  // of the residual stream after layer l - 1, in place l % 3: one more, as layer l writes what l - 1 reads
    Panels last_x, last_h, dlogits, dh, dy;
    float *last_mean = nullptr, *last_rstd = nullptr;
    std::vector<float> norm_grads;  // (B, 2 L + 1, 2, C): each sequence's share of the gradients of norms
    std::vector<double> losses;     // each sequence's
    std::vector<AttentionScratch> scratch;
    std::vector<std::atomic<int>> next;  // per phase: the next unit of work nobody has taken
    Batch batch;
    int64_t counted = 0;

    Trainer(const int64_t* n, double cap) : L(n[0]), C(n[1]), H(n[2]), G(n[3]), D(n[4]), V(n[5]), rms(n[6]), activation(n[7]),
        qk_norm(n[8]), rope(n[9]), threads(n[10]), positions(n[11]), drop_threshold(n[12]), drop_embedded(n[13]), softcap(float(cap)), P((H + 2 * G) * D), F(4 * C),
        tensors(LAYERS + L * PER_LAYER + LAST), team(new Team(threads)), scratch(threads), next(L + 3) {
        size_t bytes = 0;
        auto plan = [&](int N, int K) { packed.push_back({N, K, nullptr, nullptr}); bytes += room(N, K); };
        for (int l = 0; l < L; l++) { plan(P, C); plan(C, C); plan(F, C); plan(C, F); }
        plan(V, C);
        if (!weights_arena.reserve(bytes)) throw std::bad_alloc();
        for (auto& p : packed) {
            p.outputs = weights_arena.take<float>(size_t(panels(p.N)) * WIDE * p.C);
            p.inputs = weights_arena.take<float>(size_t(p.N) * p.C);
        }
    }
    static size_t room(int N, int K) { return (size_t(panels(N)) * WIDE + N) * K * sizeof(float) + 128; }

    int at(int l, LayerTensor which) const { return LAYERS + l * PER_LAYER + which; }
    int at(LastTensor which) const { return LAYERS + L * PER_LAYER + which; }
    const float* weight(int index) const { return batch.weights[index]; }
    float* grad(int index) const { return batch.grads[index]; }

    // Room for a batch of this shape; what is there already is kept where it is large enough and of the same length.
    void reserve(int M, int T, bool train) {
        if (rows == M && length == T && training >= train) return;
        rows = 0;
        // whole cache lines, and not a power of two apart: a row's panels would compete for the same few lines
        const ptrdiff_t stride = ptrdiff_t(M + (M % 64 == 0)) * WIDE;
        size_t bytes = 0;
        for (int pass = 0; pass < 2; pass++) {
            if (pass == 1) {
                arena.release();
                if (!arena.reserve(bytes)) throw std::bad_alloc();
            }
            auto floats = [&](size_t count) -> float* {
                if (pass == 1) return arena.take<float>(count);
                bytes += (count * sizeof(float) + 63) / 64 * 64;
                return nullptr;
            };
            auto matrix = [&](int channels) { return Panels{floats(size_t(panels(channels)) * stride), stride}; };
            kept.resize(train ? L : 1);
            for (auto& k : kept) {
                for (Panels* each : {&k.x, &k.h1, &k.y, &k.x2, &k.h2}) *each = matrix(C);
                k.qkv = matrix(P);
                k.act = matrix(F);
                k.slope = matrix(F);
                for (float** each : {&k.mean_1, &k.rstd_1, &k.mean_2, &k.rstd_2}) *each = floats(M);
                k.qk_rstd = floats(size_t(M) * (H + G));
                k.lse = floats(size_t(M) * H);
            }
            last_x = matrix(C);
            last_h = matrix(C);
            dlogits = matrix(V);
            last_mean = floats(M);
            last_rstd = floats(M);
            if (train) {
                for (auto& each : dx) each = matrix(C);
                for (auto& f : flow) {
                    f.dx2 = matrix(C);
                    f.dqkv = matrix(P);
                    f.dfc = matrix(F);
                    if (drop_threshold > 0) { f.dproj = matrix(C); f.dout = matrix(C); }
                }
                dh = matrix(C);
                dy = matrix(C);
            }
        }
        for (auto& each : scratch) each.reserve(T, D);
        rows = M; length = T; training = train;
    }

    // the layer's own memory in training; one for all where only the loss is wanted
    Kept& keep(int l) { return kept[training ? l : 0]; }
    Panels stream(int l) { return l < L ? keep(l).x : last_x; }

    double run(const Batch& given) {
        batch = given;
        const int B = batch.B, T = batch.T;
        reserve(B * T, T, batch.grads != nullptr);
        counted = 0;
        for (int m = 0; m < B * T; m++) counted += batch.y[m] >= 0;
        losses.assign(B, 0.0);
        norm_grads.assign(size_t(B) * (2 * L + 1) * 2 * C, 0.0f);
        for (auto& each : next) each = 0;
        team->run([](void* self, int me, int) { static_cast<Trainer*>(self)->work(me); }, this, team->size());
        double sum = 0.0;
        for (double each : losses) sum += each;
        return sum / double(counted);
    }

    void work(int me) {
        const int of = team->size();
        pack(me, of);
        team->barrier(of);
        pass(me, of);
        team->barrier(of);  // a call ends when every thread has
    }

    void pass(int me, int of) {
        const int b0 = int(int64_t(batch.B) * me / of), b1 = int(int64_t(batch.B) * (me + 1) / of);
        embed(b0, b1);
        for (int l = 0; l < L; l++) layer(l, b0, b1, scratch[me]);
        head(b0, b1);
        if (batch.grads == nullptr) return;
        head_backward(b0, b1);
        team->barrier(of);
        head_weights();
        for (int l = L - 1; l >= 0; l--) {
            layer_backward(l, b0, b1, scratch[me]);
            if (l == 0 && drop_embedded) drop(dx[0], dx[0], site(0, EMBEDDED), b0 * batch.T, b1 * batch.T);
            team->barrier(of);
            layer_weights(l);
        }
        team->barrier(of);  // the head's gradient is the embedding's where they share their weights
        embedding_weights(me, of);
    }

    void pack(int me, int of) {
        int unit = 0;
        for (size_t i = 0; i < packed.size(); i++) {
            const Packed& p = packed[i];
            const float* from = weight(i + 1 == packed.size() ? at(HEAD)
                                       : at(int(i) / 4, i % 4 == 0 ? QKV : i % 4 == 1 ? PROJ : i % 4 == 2 ? FC : OUT));
            for (int panel = 0; panel < panels(p.N); panel++)
                if (unit++ % of == me) pack_outputs(from, p.N, p.C, panel, p.outputs + size_t(panel) * WIDE * p.C);
            if (batch.grads == nullptr) continue;
            for (int panel = 0; panel < panels(p.C); panel++)
                if (unit++ % of == me) pack_inputs(from, p.N, p.C, panel, p.inputs + size_t(panel) * WIDE * p.N);
        }
    }

    // Rows m0 .. m1 of y = x W^T + bias, handed over tile by tile: then(R, P, m, panel, sums).
    template <class Then>
    void linear(const Packed& w, const float* bias, const Panels& x, int m0, int m1, Then&& then) {
        times(m0, m1, 0, panels(w.N), w.C, x, w.outputs, ptrdiff_t(w.C) * WIDE, [&](auto R, auto P, int m, int p, auto& sums) {
            if (bias) {
                float padded[P.value * WIDE] = {};
                std::memcpy(padded, bias + p * WIDE, std::min(P.value * WIDE, w.N - p * WIDE) * sizeof(float));
                for (int c = 0; c < P.value * VECS; c++) for (int r = 0; r < R.value; r++) sums[r][c] += vload(padded + c * LANES_WIDE);
            }
            then(R, P, m, p, sums);
        });
    }
    // Rows m0 .. m1 of dx = dy W.
    template <class Then>
    void linear_backward(const Packed& w, const Panels& dy_, int m0, int m1, Then&& then) {
        times(m0, m1, 0, panels(w.C), w.N, dy_, w.inputs, ptrdiff_t(w.N) * WIDE, then);
    }
    // y = sums, or other + sums with dropout
    static auto store_to(const Panels& y) {
        return [y](auto R, auto P, int m, int p, auto& sums) { put<R.value, P.value>(y, m, p, sums); };
    }
    static auto store_sum(const Panels& y, const Panels& other, const Dropout& dropout) {
        return [y, other, dropout](auto R, auto P, int m, int p, auto& sums) {
            if (dropout) for (int q = 0; q < P.value; q++) {
                float factors[(MR + DROP_ROWS) * WIDE];
                dropout.factors(0, m, R.value, p + q, factors);
                for (int r = 0; r < R.value; r++) for (int c = 0; c < VECS; c++)
                    sums[r][q * VECS + c] *= vload(factors + r * WIDE + c * LANES_WIDE);
            }
            for (int r = 0; r < R.value; r++) for (int c = 0; c < P.value * VECS; c++)
                sums[r][c] += vload(other.at(m + r, p + c / VECS) + (c % VECS) * LANES_WIDE);
            put<R.value, P.value>(y, m, p, sums);
        };
    }

    void embed(int b0, int b1) {
        const float *wte = weight(WTE), *wpe = weight(WPE);
        Panels x = stream(0);
        for (int m = b0 * batch.T; m < b1 * batch.T; m++) for (int p = 0; p < C / WIDE; p++) {
            float* to = x.at(m, p);
            std::memcpy(to, wte + size_t(batch.x[m]) * C + p * WIDE, WIDE * sizeof(float));
            if (wpe) sum_into(to, wpe + size_t(m % batch.T) * C + p * WIDE);
        }
        if (drop_embedded) drop(x, x, site(0, EMBEDDED), b0 * batch.T, b1 * batch.T);
    }

    Dropout site(int l, Site which) const {
        if (batch.seeds == nullptr) return {};
        return {uint64_t(batch.seeds[3 * l + which]), drop_threshold, batch.T};
    }

    // Rows m0 .. m1 of `to` = those of x with dropout.
    void drop(const Panels& x, const Panels& to, const Dropout& dropout, int m0, int m1) const {
        if (!dropout) return;
        float factors[DROP_ROWS * WIDE];
        for (int p = 0; p < C / WIDE; p++) for (int m = m0; m < m1; m += DROP_ROWS) {
            const int count = std::min(DROP_ROWS, m1 - m);
            dropout.factors(0, m, count, p, factors);
            for (int v = 0; v < count * WIDE; v += LANES_WIDE) vstore(to.at(m, p) + v, vload(x.at(m, p) + v) * vload(factors + v));
        }
    }

    void norm(const Panels& x, const Panels& y, int index, float* mean, float* rstd, int m0, int m1) {
        const float *w = weight(index), *bias = weight(index + 1);
        for (int m = m0; m < m1; m++) {
            vec sums{}, squares{};
            float mu = 0.0f;
            if (!rms) {
                over_channels([&](int p, int v) { sums += vload(x.at(m, p) + v); });
                mu = vsum(sums) / C;
            }
            over_channels([&](int p, int v) {
                vec d = vload(x.at(m, p) + v) - mu;
                squares += d * d;
            });
            const float inverse = 1.0f / std::sqrt(vsum(squares) / C + NORM_EPS);
            mean[m] = mu;
            rstd[m] = inverse;
            over_channels([&](int p, int v) {
                vec out = (vload(x.at(m, p) + v) - mu) * inverse;
                if (w) out *= vload(w + p * WIDE + v);
                if (bias) out += vload(bias + p * WIDE + v);
                vstore(y.at(m, p) + v, out);
            });
        }
    }

    // f(panel, lane) for every register of a row
    template <class F>
    void over_channels(F&& f) const {
        for (int p = 0; p < C / WIDE; p++)
#pragma GCC unroll 2
            for (int v = 0; v < WIDE; v += LANES_WIDE) f(p, v);
    }

    // to = residual + the gradient through the norm whose output's gradient is `grads`; `number` counts the norms.
    void norm_backward(const Panels& grads, const Panels& x, const Panels* residual, const Panels& to, int index, int number,
                       const float* mean, const float* rstd, int m0, int m1) {
        const float *w = weight(index), *bias = weight(index + 1);
        for (int m = m0, count; m < m1; m += count) {  // rows of one sequence, which has its own share of the weights' gradients
            count = std::min({m1 - m, NORM_ROWS, batch.T - m % batch.T});
            float* mine = &norm_grads[((size_t(m / batch.T) * (2 * L + 1)) + number) * 2 * C];
            vec sums[NORM_ROWS] = {}, products[NORM_ROWS] = {};
            over_channels([&](int p, int v) {  // a panel's rows are one stream; a row's panels would be too many at a time
                const float *g = grads.at(m, p) + v, *own_x = x.at(m, p) + v;
                const vec scales = w ? vload(w + p * WIDE + v) : vset(1.0f);
                float* own = mine + p * WIDE + v;
                vec share = vload(own), total = vload(own + C);  // row by row from here, so that no cut between rows shows
                for (int r = 0; r < count; r++) {
                    vec dy_ = vload(g + r * WIDE), d = (vload(own_x + r * WIDE) - mean[m + r]) * rstd[m + r];
                    total += dy_;
                    share += dy_ * d;
                    sums[r] += dy_ * scales;
                    products[r] += dy_ * scales * d;
                }
                vstore(own, share);
                vstore(own + C, total);
            });
            float centre[NORM_ROWS], slope[NORM_ROWS];
            for (int r = 0; r < count; r++) {
                centre[r] = rms ? 0.0f : vsum(sums[r]) / C;
                slope[r] = vsum(products[r]) / C;
            }
            over_channels([&](int p, int v) {
                const float *g = grads.at(m, p) + v, *own_x = x.at(m, p) + v, *other = residual ? residual->at(m, p) + v : nullptr;
                float* out = to.at(m, p) + v;
                const vec scales = w ? vload(w + p * WIDE + v) : vset(1.0f);
                for (int r = 0; r < count; r++) {
                    vec d = (vload(own_x + r * WIDE) - mean[m + r]) * rstd[m + r];
                    d = (vload(g + r * WIDE) * scales - centre[r] - d * slope[r]) * rstd[m + r];
                    vstore(out + r * WIDE, other ? vload(other + r * WIDE) + d : d);
                }
            });
        }
    }
    static constexpr int NORM_ROWS = 64;

    // Norm and rotation of the queries' and keys' heads in place; `back` takes gradients the other way.
    void shape_heads(const Panels& qkv, const Panels* dqkv, float* kept_rstd, int m0, int m1) {
        if (!qk_norm && !rope) return;
        const int half = D / 2;
        std::vector<float> room(2 * D);
        float *x = room.data(), *g = x + D;
        auto fetch = [&](const Panels& from, int m, int first, float* to) {
            for (int p = 0; p < D / WIDE; p++) std::memcpy(to + p * WIDE, from.at(m, first + p), WIDE * sizeof(float));
        };
        auto put_back = [&](const float* from, const Panels& to, int m, int first) {
            for (int p = 0; p < D / WIDE; p++) std::memcpy(to.at(m, first + p), from + p * WIDE, WIDE * sizeof(float));
        };
        for (int m = m0; m < m1; m++) for (int h = 0; h < H + G; h++) {
            const int first = h * D / WIDE;
            const float* cos = rope ? batch.rope + size_t(m % batch.T) * half : nullptr;
            const float* sin = rope ? cos + size_t(batch.rope_length) * half : nullptr;
            float& inverse = kept_rstd[size_t(m) * (H + G) + h];
            fetch(qkv, m, first, x);
            if (dqkv == nullptr) {
                if (qk_norm) {
                    v8 squares{};
                    for (int d = 0; d < D; d += LANES) { v8 v = load(x + d); squares += v * v; }
                    inverse = 1.0f / std::sqrt(sum(squares) / D + NORM_EPS);
                    for (int d = 0; d < D; d += LANES) store(x + d, load(x + d) * inverse);
                }
                if (rope) for (int d = 0; d < half; d += LANES) {
                    v8 left = load(x + d), right = load(x + d + half), c = load(cos + d), s = load(sin + d);
                    store(x + d, left * c - right * s);
                    store(x + d + half, left * s + right * c);
                }
                put_back(x, qkv, m, first);
                continue;
            }
            fetch(*dqkv, m, first, g);
            if (qk_norm) {  // a rotation changes no product, so the norm's part is taken before turning back
                v8 products{};
                for (int d = 0; d < D; d += LANES) products += load(x + d) * load(g + d);
                const float product = sum(products) / D;
                for (int d = 0; d < D; d += LANES) store(g + d, inverse * (load(g + d) - load(x + d) * product));
            }
            if (rope) for (int d = 0; d < half; d += LANES) {
                v8 left = load(g + d), right = load(g + d + half), c = load(cos + d), s = load(sin + d);
                store(g + d, left * c + right * s);
                store(g + d + half, right * c - left * s);
            }
            put_back(g, *dqkv, m, first);
        }
    }

    Head view(const Panels& qkv, int l, int b, int h) const {
        const int g = h / (H / G), first = b * batch.T;
        auto part = [&](int head) { return Panels{qkv.at(first, head * D / WIDE), qkv.stride}; };
        return {part(h), part(H + g), part(H + G + g), batch.T, D, 1.0f / std::sqrt(float(D)), site(l, WEIGHTS), b, h};
    }
    Panels view_of(const Panels& y, int b, int head) const { return {y.at(b * batch.T, head * D / WIDE), y.stride}; }

    void layer(int l, int b0, int b1, AttentionScratch& room) {
        Kept& k = keep(l);
        const int T = batch.T, m0 = b0 * T, m1 = b1 * T, some = rows_at_once(F);
        const Packed* w = &packed[4 * l];
        for (int m = m0; m < m1; m += some) {
            const int end = std::min(m1, m + some);
            norm(k.x, k.h1, at(l, LN_1), k.mean_1, k.rstd_1, m, end);
            linear(w[0], weight(at(l, QKV_BIAS)), k.h1, m, end, store_to(k.qkv));
            shape_heads(k.qkv, nullptr, k.qk_rstd, m, end);
        }
        for (int b = b0; b < b1; b++) for (int h = 0; h < H; h++)
            attend(view(k.qkv, l, b, h), view_of(k.y, b, h), k.lse + (size_t(b) * H + h) * T, room);
        Panels next_x = stream(l + 1);
        for (int m = m0; m < m1; m += some) {
            const int end = std::min(m1, m + some);
            linear(w[1], weight(at(l, PROJ_BIAS)), k.y, m, end, store_sum(k.x2, k.x, site(l, PROJECTED)));
            norm(k.x2, k.h2, at(l, LN_2), k.mean_2, k.rstd_2, m, end);
            linear(w[2], weight(at(l, FC_BIAS)), k.h2, m, end, [&](auto R, auto P, int row, int p, auto& sums) {
                put<R.value, P.value>(k.act, row, p, sums);
                for (int c = 0; c < P.value; c++)
                    activate_with_slope(k.act.at(row, p + c), k.slope.at(row, p + c), R.value * WIDE, activation);
            });
            linear(w[3], weight(at(l, OUT_BIAS)), k.act, m, end, store_sum(next_x, k.x2, site(l, FED)));
        }
    }

    // Logits, their losses, and where wanted their gradients in place.
    void head(int b0, int b1) {
        const int T = batch.T, some = rows_at_once(C);
        const bool train = batch.grads != nullptr;
        const float share = float(batch.scale / double(counted));
        for (int m = b0 * T; m < b1 * T; m += some) {
            const int end = std::min(b1 * T, m + some);
            norm(last_x, last_h, at(LN_F), last_mean, last_rstd, m, end);
            linear(packed[4 * L], weight(at(HEAD_BIAS)), last_h, m, end, store_to(dlogits));
            for (int row = m; row < end; row++) loss_of(row, share, train);
        }
    }

    void loss_of(int m, float share, bool train) {
        const int count = panels(V), target = int(batch.y[m]);
        const float low = -std::numeric_limits<float>::infinity();
        vec tops = vset(low), sums{};
        for (int p = 0; p < count; p++) {
            float* x = dlogits.at(m, p);
            for (int l = V - p * WIDE; l < WIDE; l++) x[l] = 0.0f;
            for (int v = 0; v < WIDE; v += LANES_WIDE) {
                vec u = vload(x + v);
                if (softcap > 0.0f) u = softcap * (1.0f - 2.0f / (1.0f + vexp(2.0f * u / softcap)));  // c tanh(x / c)
                vstore(x + v, u);
            }
            for (int l = V - p * WIDE; l < WIDE; l++) x[l] = low;
            for (int v = 0; v < WIDE; v += LANES_WIDE) tops = vmax(tops, vload(x + v));
        }
        float top = low;
        for (int l = 0; l < LANES_WIDE; l++) top = std::max(top, tops[l]);
        for (int p = 0; p < count; p++) for (int v = 0; v < WIDE; v += LANES_WIDE) {
            vec u = vload(dlogits.at(m, p) + v);
            sums += u == low ? vec{} : vexp(u - top);
        }
        const float lse = top + std::log(vsum(sums));
        if (target >= 0) losses[m / batch.T] += lse - dlogits.at(m, target / WIDE)[target % WIDE];
        if (!train) return;
        const float shared = target < 0 ? 0.0f : share;
        for (int p = 0; p < count; p++) for (int v = 0; v < WIDE; v += LANES_WIDE) {
            float* x = dlogits.at(m, p) + v;
            vec u = vload(x), d = u == low ? vec{} : vexp(u - lse);
            const int place = target - p * WIDE - v;  // of the target among these lanes, if it is there
            if (place >= 0 && place < LANES_WIDE) d[place] -= 1.0f;
            if (softcap > 0.0f) d = u == low ? vec{} : d * (1.0f - (u / softcap) * (u / softcap));
            vstore(x, d * shared);
        }
    }

    void head_backward(int b0, int b1) {
        const int T = batch.T, m0 = b0 * T, m1 = b1 * T;
        linear_backward(packed[4 * L], dlogits, m0, m1, store_to(dh));
        norm_backward(dh, last_x, nullptr, dx[L % 3], at(LN_F), 2 * L, last_mean, last_rstd, m0, m1);
    }

    // The gradients of what the MLP and the attention's projection put out.
    const Panels& fed(const Panels& given, const Flow& f) const { return batch.seeds ? f.dout : given; }
    const Panels& projected(const Flow& f) const { return batch.seeds ? f.dproj : f.dx2; }

    void layer_backward(int l, int b0, int b1, AttentionScratch& room) {
        Kept& k = keep(l);
        Flow& f = flow[l % 2];
        const Panels &given = dx[(l + 1) % 3], &passed_on = dx[l % 3];
        const int T = batch.T, m0 = b0 * T, m1 = b1 * T, some = rows_at_once(F);
        const Packed* w = &packed[4 * l];
        for (int m = m0; m < m1; m += some) {
            const int end = std::min(m1, m + some);
            drop(given, f.dout, site(l, FED), m, end);
            linear_backward(w[3], fed(given, f), m, end, [&](auto R, auto P, int row, int p, auto& sums) {
                for (int r = 0; r < R.value; r++) for (int c = 0; c < P.value * VECS; c++)
                    sums[r][c] *= vload(k.slope.at(row + r, p + c / VECS) + (c % VECS) * LANES_WIDE);
                put<R.value, P.value>(f.dfc, row, p, sums);
            });
            linear_backward(w[2], f.dfc, m, end, store_to(dh));
            norm_backward(dh, k.x2, &given, f.dx2, at(l, LN_2), 2 * l + 1, k.mean_2, k.rstd_2, m, end);
            drop(f.dx2, f.dproj, site(l, PROJECTED), m, end);
            linear_backward(w[1], projected(f), m, end, store_to(dy));
        }
        for (int b = b0; b < b1; b++) for (int h = 0; h < H; h++) {
            const int g = h / (H / G);
            attend_backward(view(k.qkv, l, b, h), view_of(k.y, b, h), k.lse + (size_t(b) * H + h) * T, view_of(dy, b, h),
                            view_of(f.dqkv, b, h), view_of(f.dqkv, b, H + g), view_of(f.dqkv, b, H + G + g),
                            h % (H / G) != 0, room);
        }
        for (int m = m0; m < m1; m += some) {
            const int end = std::min(m1, m + some);
            shape_heads(k.qkv, &f.dqkv, k.qk_rstd, m, end);
            linear_backward(w[0], f.dqkv, m, end, store_to(dh));
            norm_backward(dh, k.x, &f.dx2, passed_on, at(l, LN_1), 2 * l, k.mean_1, k.rstd_1, m, end);
        }
    }

    // One panel of outputs after another, taken by whoever is free.
    struct Product { const Panels &dy, &x; const Packed& w; int index; };
    void weight_gradients(std::initializer_list<Product> products, std::atomic<int>& counter) {
        const int M = batch.B * batch.T;
        int unit = counter++, first = 0;
        for (const Product& each : products) {
            const int count = panels(each.w.N);
            for (; unit < first + count; unit = counter++) {
                const int panel = unit - first;
                weight_gradient(M, each.w.N, each.w.C, each.dy, panel, each.x, grad(each.index), batch.add);
                if (float* bias = grad(each.index + 1)) {
                    float sums[WIDE] = {};
                    for (int m = 0; m < M; m++) sum_into(sums, each.dy.at(m, panel));
                    for (int l = 0; l < std::min(WIDE, each.w.N - panel * WIDE); l++) {
                        float& to = bias[panel * WIDE + l];
                        to = batch.add ? to + sums[l] : sums[l];
                    }
                }
            }
            first += count;
        }
    }
    void head_weights() { weight_gradients({{dlogits, last_h, packed[4 * L], at(HEAD)}}, next[L]); }
    void layer_weights(int l) {
        Kept& k = keep(l);
        Flow& f = flow[l % 2];
        const Packed* w = &packed[4 * l];
        weight_gradients({{fed(dx[(l + 1) % 3], f), k.act, w[3], at(l, OUT)}, {f.dfc, k.h2, w[2], at(l, FC)},
                          {f.dqkv, k.h1, w[0], at(l, QKV)}, {projected(f), k.y, w[1], at(l, PROJ)}}, next[l]);
    }

    // Gradients of the tables, and of the norms; each thread has panels of channels of its own.
    void embedding_weights(int me, int of) {
        const int T = batch.T, M = batch.B * T;
        const Panels& given = dx[0];
        float *wte = grad(WTE), *wpe = grad(WPE);
        const bool fresh = !batch.add && wte != grad(at(HEAD));
        for (int p = me; p < C / WIDE; p += of) {
            if (fresh) for (int v = 0; v < V; v++) std::memset(wte + size_t(v) * C + p * WIDE, 0, WIDE * sizeof(float));
            if (wpe && !batch.add)
                for (int t = 0; t < positions; t++) std::memset(wpe + size_t(t) * C + p * WIDE, 0, WIDE * sizeof(float));
            for (int m = 0; m < M; m++) {
                sum_into(wte + size_t(batch.x[m]) * C + p * WIDE, given.at(m, p));
                if (wpe) sum_into(wpe + size_t(m % T) * C + p * WIDE, given.at(m, p));
            }
            for (int number = 0; number < 2 * L + 1; number++) {
                const int index = number == 2 * L ? at(LN_F) : at(number / 2, number % 2 ? LN_2 : LN_1);
                for (int part = 0; part < 2; part++) if (float* to = grad(index + part)) {
                    float sums[WIDE] = {};
                    for (int b = 0; b < batch.B; b++)
                        sum_into(sums, &norm_grads[((size_t(b) * (2 * L + 1) + number) * 2 + part) * C + p * WIDE]);
                    for (int l = 0; l < WIDE; l++) to[p * WIDE + l] = batch.add ? to[p * WIDE + l] + sums[l] : sums[l];
                }
            }
        }
    }
    // Norms of the gradients, then clipping and the update of every tensor.
    void update(const std::vector<Update>& all, const Rules& given, double* norms) {
        updates = &all;
        rules = given;
        partial.assign(all.size(), {});
        for (size_t i = 0; i < all.size(); i++) partial[i].resize(pieces(all[i]));
        muon_scratch.resize(threads);
        for (auto& each : next) each = 0;
        team->run([](void* self, int me, int) { static_cast<Trainer*>(self)->update_share(me); }, this, team->size());
        for (size_t i = 0; i < all.size(); i++) norms[i] = norm_of(i);
    }
    double norm_of(size_t i) const {
        double sum = 0.0;
        for (double each : partial[i]) sum += each;
        return std::sqrt(sum);
    }

    // f(tensor, first element, end) for pieces that nobody has taken
    template <class F>
    void over_pieces(std::atomic<int>& counter, F&& f) {
        int64_t unit = counter++, first = 0;
        for (size_t i = 0; i < updates->size(); i++) {
            const Update& u = (*updates)[i];
            const int64_t count = pieces(u), size = u.rows * u.cols;
            for (; unit < first + count; unit = counter++) {
                const int64_t from = (unit - first) * PIECE;
                f(i, unit - first, from, std::min(size, from + PIECE));
            }
            first += count;
        }
    }

    void update_share(int me) {
        const int of = team->size();
        over_pieces(next[0], [&](size_t i, int64_t piece, int64_t from, int64_t to) {
            partial[i][piece] = sum_of_squares((*updates)[i].grad + from, to - from);
        });
        team->barrier(of);
        double square = 0.0;
        for (size_t i = 0; i < updates->size(); i++) square += norm_of(i) * norm_of(i);
        const double norm = std::sqrt(square);
        const float shrink = rules.clip > 0.0 ? float(std::min(1.0, rules.clip / (norm + 1e-6))) : 1.0f;
        for (size_t i = size_t(next[1]++); i < updates->size(); i = size_t(next[1]++))
            if ((*updates)[i].second == nullptr) muon((*updates)[i], rules, shrink, muon_scratch[me]);
        over_pieces(next[2], [&](size_t i, int64_t, int64_t from, int64_t to) {
            if ((*updates)[i].second) adamw((*updates)[i], rules, shrink, from, to);
        });
        team->barrier(of);
    }
    const std::vector<Update>* updates = nullptr;
    Rules rules{};
    std::vector<std::vector<double>> partial;
    std::vector<MuonScratch> muon_scratch;
};

}  // namespace

extern "C" {

// See Trainer for the order of `shape`; null if there is no memory.
void* ft_new(const int64_t* shape, double softcap) {
    try {
        return new Trainer(shape, softcap);
    } catch (...) { return nullptr; }
}

void ft_free(void* handle) { delete static_cast<Trainer*>(handle); }

// Bytes held for batches of the shape last seen, and for the packed weights.
int64_t ft_bytes(void* handle) {
    auto* trainer = static_cast<Trainer*>(handle);
    return int64_t(trainer->arena.size + trainer->weights_arena.size);
}

// The mean loss of a batch, and its gradients. 0, or 1 where there is no memory, or 2 where a token is out of range.
int ft_run(void* handle, int B, int T, const int64_t* x, const int64_t* y, const float* const* weights, float* const* grads,
           const float* rope, int64_t rope_length, const int64_t* seeds, double scale, int add, double* loss) {
    auto* trainer = static_cast<Trainer*>(handle);
    for (int m = 0; m < B * T; m++)
        if (x[m] < 0 || x[m] >= trainer->V || y[m] < -1 || y[m] >= trainer->V) return 2;
    try {
        *loss = trainer->run({B, T, x, y, weights, grads, rope, rope_length, seeds, scale, add != 0});
        return 0;
    } catch (...) { return 1; }
}

// Clips the gradients by their common norm and updates `count` weights; norms gets each one's, before clipping. Tensors
// without `second` are matrices for Muon. 0, or 1 where there is no memory.
int ft_update(void* handle, int count, const Update* updates, const Rules* rules, double* norms) {
    try {
        static_cast<Trainer*>(handle)->update(std::vector<Update>(updates, updates + count), *rules, norms);
        return 0;
    } catch (...) { return 1; }
}

}
