// Decoding steps of a small GPT on a CPU, for every layer, in one call.
//
// At one token a step is bound by reading the weights once, so what matters is: packed weights in large pages, read as
// streams; one pass over the layers without leaving native code; and threads that wait by spinning, because a layer takes
// less time than waking a thread. Built and called by cpu_decode.py; nothing here depends on torch.
//
// Legend: M tokens in a call, C channels, H query heads, G key/value heads, D channels per head, S window (block_size),
// R slots of the cache (at least S), V vocabulary.

#include "cpu_decode_linear.h"

namespace {

struct Norm { std::vector<float> w, b; };

struct Layer { Norm ln_1, ln_2; Linear qkv, proj, fc, out; };

struct Call {
    int M = 0;
    const int32_t *tokens = nullptr, *rows = nullptr, *positions = nullptr;
    bool narrow = false;  // int8 weights
    int wanted = 0;       // logits are computed for so many of the last tokens, at least one
    float* logits = nullptr;
};

struct Model {
    // the order of cpu_decode.py's INTS
    int n_layer, C, H, G, D, S, V, rms, activation, qk_norm, rope, threads, keep_wide, keep_narrow;
    int E = 0;
    float softcap, scale = 1.0f;  // scale: 1 / sqrt(D)
    std::vector<float> wte, wpe;
    std::vector<Layer> layers;
    Norm ln_f;
    Linear head;
    Arena wide, narrow;
    Team* team = nullptr;
    // The cache and the rotary tables belong to the caller; table [2][length][D / 2]. A layer's part of kv: its keys, slots
    // in blocks of WIDE, [B][G][R / WIDE][D][WIDE], and its values [B][G][R][E], zeros past D; E is D in whole panels.
    float* kv = nullptr;
    int64_t B = 0, R = 0;
    const float* table = nullptr;
    int64_t table_length = 0;
    // scratch, grown to the largest M seen
    std::vector<float> x, qkv, y, h, spare;
    std::vector<std::vector<float>> normed, scores, scales;
    std::vector<std::vector<int16_t>> rounded;
    Call call;
    int running = 1;

    ~Model() { delete team; }

    void norm(const Norm& p, const float* in, float* to) const {
        v8 s = splat(0.0f);
        float total = 0.0f, mean = 0.0f;
        int c = 0;
        if (!rms) {
            for (; c + LANES <= C; c += LANES) s += load(in + c);
            total = sum(s);
            for (; c < C; c++) total += in[c];
            mean = total / C;
        }
        s = splat(0.0f);
        total = 0.0f;
        for (c = 0; c + LANES <= C; c += LANES) { v8 d = load(in + c) - splat(mean); s += d * d; }
        total = sum(s);
        for (; c < C; c++) total += (in[c] - mean) * (in[c] - mean);
        float inverse = 1.0f / std::sqrt(total / C + NORM_EPS);
        for (c = 0; c < C; c++) to[c] = (in[c] - mean) * inverse;
        if (!p.w.empty()) for (c = 0; c < C; c++) to[c] *= p.w[c];
        if (!p.b.empty()) for (c = 0; c < C; c++) to[c] += p.b[c];
    }

    // Rows from `first` on. Every thread normalises them all for itself: cheaper than waiting for each other.
    const float* normalise(const Norm& p, int first, int me) {
        std::vector<float>& own = normed[me];
        for (int m = first; m < call.M; m++) norm(p, &x[size_t(m) * C], &own[size_t(m) * C]);
        return &own[size_t(first) * C];
    }

    // The layer's outputs for the last M tokens of the call, whose inputs begin at `in`.
    void apply(const Linear& l, const float* in, int ld, int M, const Output& out, int me) {
        if (call.narrow) {
            std::vector<int16_t>& own = rounded[me];
            std::vector<float>& scale = scales[me];
            int even = (ld + 1) / 2 * 2;
            for (int m = 0; m < M; m++) quantise(in + size_t(m) * ld, ld, &own[size_t(m) * even], &scale[m]);
            linear(l, Narrow{own.data(), scale.data(), even}, M, out, me, running);
        } else {
            linear(l, Wide{in, ld}, M, out, me, running);
        }
        team->barrier(running);
    }

    void prepare_head(float* q, int64_t position) const {
        if (qk_norm) {
            float total = 0.0f;
            for (int d = 0; d < D; d++) total += q[d] * q[d];
            float inverse = 1.0f / std::sqrt(total / D + NORM_EPS);
            for (int d = 0; d < D; d++) q[d] *= inverse;
        }
        if (!rope) return;
        int half = D / 2;
        const float* cosine = table + position * half;
        const float* sine = table + (table_length + position) * half;
        for (int d = 0; d < half; d++) {
            float left = q[d], right = q[d + half];
            q[d] = left * cosine[d] - right * sine[d];
            q[d + half] = left * sine[d] + right * cosine[d];
        }
    }

    // A thread takes whole key/value heads, for all tokens: it writes their keys and values before any of them looks.
    // Tokens before `first` only leave their keys and values.
    void attend(int layer, int first, int me) {
        int width = (H + 2 * G) * D, group = H / G;
        float* k_base = kv + int64_t(layer) * B * G * R * (D + E);
        float* v_base = k_base + B * G * R * D;
        for (int g = G * me / running; g < G * (me + 1) / running; g++) {
            for (int m = 0; m < call.M; m++) {
                float* k = &qkv[size_t(m) * width + size_t(H + g) * D];
                prepare_head(k, call.positions[m]);
                int64_t slot = call.positions[m] % R, head = (call.rows[m] * G + g) * R;
                float* to = k_base + head * D + slot / WIDE * WIDE * D + slot % WIDE;
                for (int d = 0; d < D; d++) to[d * WIDE] = k[d];
                std::copy(k + G * D, k + G * D + D, v_base + (head + slot) * E);
            }
            for (int m = first; m < call.M; m++) for (int i = 0; i < group; i++) {
                int head = g * group + i;
                float* q = &qkv[size_t(m) * width + size_t(head) * D];
                prepare_head(q, call.positions[m]);
                int64_t at = (call.rows[m] * G + g) * R;
                look(q, k_base + at * D, v_base + at * E, call.positions[m], scores[me].data(),
                     &y[size_t(m) * H * D + size_t(head) * D]);
            }
        }
        team->barrier(running);
    }

    // One query over the window that ends at its position. The window's slots are one run of the ring or two.
    void look(const float* q, const float* keys, const float* values, int64_t position, float* s, float* to) const {
        int64_t start = std::max<int64_t>(0, position + 1 - S), from = start % R, end = from + position + 1 - start;
        int64_t runs[2][2] = {{from, std::min(end, R)}, {0, end - R}};
        int count = end > R ? 2 : 1;
        vec tops = vset(-INFINITY), sums = vec{};
        for (int r = 0; r < count; r++)
            for (int64_t t = runs[r][0] / WIDE * WIDE; t < runs[r][1]; t += WIDE) {
                score(q, keys + t * D, s + t);
                // what lies outside the run is nobody's
                for (int64_t i = t; i < runs[r][0]; i++) s[i] = -INFINITY;
                for (int64_t i = runs[r][1]; i < t + WIDE; i++) s[i] = -INFINITY;
                for (int v = 0; v < VECS; v++) tops = vmax(vload(s + t + v * LANES_WIDE), tops);
            }
        float top = tops[0];
        for (int l = 1; l < LANES_WIDE; l++) top = std::max(top, tops[l]);
        for (int r = 0; r < count; r++) {
            for (int64_t t = runs[r][0] / WIDE * WIDE; t < runs[r][1]; t += WIDE) {
                for (int v = 0; v < VECS; v++) {
                    float* at = s + t + v * LANES_WIDE;
                    vstore(at, vexp(vload(at) - top));
                }
                for (int64_t i = t; i < runs[r][0]; i++) s[i] = 0.0f;
                for (int64_t i = runs[r][1]; i < t + WIDE; i++) s[i] = 0.0f;
                for (int v = 0; v < VECS; v++) sums += vload(s + t + v * LANES_WIDE);
            }
        }
        mix(s, values, runs, count, 1.0f / vsum(sums), to);
    }

    // s[i] = q . key i of a block of WIDE keys, [D][WIDE], times 1 / sqrt(D)
    void score(const float* q, const float* keys, float* s) const {
        vec even[VECS] = {}, odd[VECS] = {};
        int d = 0;
        for (; d + 2 <= D; d += 2)
            for (int v = 0; v < VECS; v++) {
                even[v] += q[d] * vload(keys + d * WIDE + v * LANES_WIDE);
                odd[v] += q[d + 1] * vload(keys + (d + 1) * WIDE + v * LANES_WIDE);
            }
        if (d < D) for (int v = 0; v < VECS; v++) even[v] += q[d] * vload(keys + d * WIDE + v * LANES_WIDE);
        for (int v = 0; v < VECS; v++) vstore(s + v * LANES_WIDE, (even[v] + odd[v]) * scale);
    }

    // to[d] = inverse * sum of s[t] * values[t][d] over the runs, two panels of channels at a time, or the last one
    void mix(const float* s, const float* values, const int64_t (*runs)[2], int count, float inverse, float* to) const {
        int d = 0;
        for (; d + 2 * WIDE <= E; d += 2 * WIDE) mix_panels<2>(s, values + d, runs, count, inverse, to + d, D - d);
        if (d < E) mix_panels<1>(s, values + d, runs, count, inverse, to + d, D - d);
    }

    template <int P>
    void mix_panels(const float* s, const float* values, const int64_t (*runs)[2], int count, float inverse, float* to,
                    int width) const {
        constexpr int N = P * VECS, TURNS = 8 / N;  // several sums take turns: one alone would wait for itself
        vec sums[TURNS][N] = {};
        for (int r = 0; r < count; r++) {
            int64_t t = runs[r][0];
            for (; t + TURNS <= runs[r][1]; t += TURNS) {
#pragma GCC unroll 8
                for (int turn = 0; turn < TURNS; turn++)
#pragma GCC unroll 4
                    for (int i = 0; i < N; i++)
                        sums[turn][i] += s[t + turn] * vload(values + (t + turn) * E + i * LANES_WIDE);
            }
            for (; t < runs[r][1]; t++)
                for (int i = 0; i < N; i++) sums[0][i] += s[t] * vload(values + t * E + i * LANES_WIDE);
        }
        float out[P * WIDE];
        for (int i = 0; i < N; i++) {
            for (int turn = 1; turn < TURNS; turn++) sums[0][i] += sums[turn][i];
            vstore(out + i * LANES_WIDE, sums[0][i] * inverse);
        }
        std::copy(out, out + std::min(P * WIDE, width), to);
    }

    void work(int me) {
        int width = (H + 2 * G) * D, M = call.M;
        for (int m = M * me / running; m < M * (me + 1) / running; m++)
            for (int c = 0; c < C; c++)
                x[size_t(m) * C + c] = wte[size_t(call.tokens[m]) * C + c]
                                       + (rope ? 0.0f : wpe[size_t(call.positions[m]) * C + c]);
        team->barrier(running);
        for (int i = 0; i < n_layer; i++) {
            Layer& l = layers[i];
            apply(l.qkv, normalise(l.ln_1, 0, me), C, M, {qkv.data(), width, STORE, 0}, me);
            // past the last layer's keys and values nothing is asked of the tokens whose logits are not wanted
            int first = i + 1 < n_layer ? 0 : M - call.wanted, rest = M - first;
            float* to = x.data() + size_t(first) * C;
            attend(i, first, me);
            apply(l.proj, &y[size_t(first) * H * D], H * D, rest, {to, C, ADD, 0}, me);
            apply(l.fc, normalise(l.ln_2, first, me), C, rest, {h.data(), 4 * C, ACTIVATE, activation}, me);
            apply(l.out, h.data(), 4 * C, rest, {to, C, ADD, 0}, me);
        }
        apply(head, normalise(ln_f, M - call.wanted, me), C, call.wanted, {call.logits, V, STORE, 0}, me);
    }

    void run(const Call& c) {
        call = c;
        running = team->size();
        size_t M = size_t(c.M);
        if (x.size() < M * C) {
            x.resize(M * C); y.resize(M * C); h.resize(M * 4 * C); qkv.resize(M * (H + 2 * G) * D);
            for (auto& own : normed) own.resize(M * C);
            for (auto& own : rounded) own.resize(M * (4 * C + 2));
            for (auto& own : scales) own.resize(M);
        }
        team->run([](void* self, int me, int) { static_cast<Model*>(self)->work(me); }, this, running);
        if (softcap > 0.0f) for (size_t i = 0; i < size_t(c.wanted) * V; i++) c.logits[i] = softcap * std::tanh(c.logits[i] / softcap);
    }
};

// The draw of sampling.py for temperature and top_k: the first token whose cumulative probability exceeds u; below
// temperature 0 there is nothing to draw. Returns V where the logits are not finite.
int32_t draw(const float* logits, int V, float temperature, int top_k, double u, std::vector<float>& z) {
    z.assign(logits, logits + V);
    if (temperature == 0.0f || top_k == 1) {
        int best = int(std::max_element(z.begin(), z.end()) - z.begin());
        return std::isfinite(z[best]) ? best : V;
    }
    if (temperature != 1.0f) for (float& l : z) l /= temperature;
    float floor = -INFINITY, top = *std::max_element(z.begin(), z.end());
    if (top_k > 0 && top_k < V) {
        std::vector<float> order(z);
        std::nth_element(order.begin(), order.begin() + (top_k - 1), order.end(), std::greater<float>());
        floor = order[top_k - 1];
    }
    thread_local std::vector<double> cumulative;
    cumulative.resize(V);
    double total = 0.0;
    for (int i = 0; i < V; i++) {
        if (!(z[i] < floor)) total += std::exp(double(z[i] - top));
        cumulative[i] = total;
    }
    double goal = total * u;
    return int32_t(std::upper_bound(cumulative.begin(), cumulative.end(), goal) - cumulative.begin());
}

}  // namespace

extern "C" {

// Weights in the order of cpu_decode.py: wte, wpe, each layer's twelve, ln_f's two, the head's two; null where absent.
void* fc_new(const int64_t* ints, double softcap, const float* const* w) {
    Model* m = new Model();
    int* fields[] = {&m->n_layer, &m->C, &m->H, &m->G, &m->D, &m->S, &m->V, &m->rms, &m->activation, &m->qk_norm,
                     &m->rope, &m->threads, &m->keep_wide, &m->keep_narrow};
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) *fields[i] = int(ints[i]);
    m->softcap = float(softcap);
    m->scale = 1.0f / std::sqrt(float(m->D));
    m->E = ::panels(m->D) * WIDE;
    int C = m->C, P = (m->H + 2 * m->G) * m->D;
    size_t each = Linear::count(P, C) + Linear::count(C, m->H * m->D) + 2 * Linear::count(4 * C, C) + 64 * PANEL;
    size_t all = each * m->n_layer + Linear::count(m->V, C) + 65536;  // prefetching runs on past the last panel
    if ((m->keep_wide && !m->wide.reserve(all * sizeof(float))) || (m->keep_narrow && !m->narrow.reserve(all))) {
        delete m;
        return nullptr;
    }
    Arena *wide = m->keep_wide ? &m->wide : nullptr, *narrow = m->keep_narrow ? &m->narrow : nullptr;
    auto vec = [](const float* p, size_t n) { return p ? std::vector<float>(p, p + n) : std::vector<float>(); };
    m->wte = vec(w[0], size_t(m->V) * C);
    m->wpe = vec(w[1], size_t(m->S) * C);
    w += 2;
    m->layers.resize(m->n_layer);
    for (Layer& l : m->layers) {
        l.ln_1 = {vec(w[0], C), vec(w[1], C)};
        l.qkv.pack(w[2], w[3], P, C, wide, narrow);
        l.proj.pack(w[4], w[5], C, m->H * m->D, wide, narrow);
        l.ln_2 = {vec(w[6], C), vec(w[7], C)};
        l.fc.pack(w[8], w[9], 4 * C, C, wide, narrow);
        l.out.pack(w[10], w[11], C, 4 * C, wide, narrow);
        w += 12;
    }
    m->ln_f = {vec(w[0], C), vec(w[1], C)};
    m->head.pack(w[2], w[3], m->V, C, wide, narrow);
    m->team = new Team(m->threads);
    m->normed.resize(m->threads);
    m->rounded.resize(m->threads);
    m->scales.resize(m->threads);
    return m;
}

void fc_free(void* model) { delete static_cast<Model*>(model); }

void fc_attach(void* model, float* kv, int64_t batch, int64_t slots, const float* table, int64_t table_length) {
    Model* m = static_cast<Model*>(model);
    m->kv = kv; m->B = batch; m->R = slots; m->table = table; m->table_length = table_length;
    m->scores.assign(m->threads, std::vector<float>(size_t(slots)));
}

// Append M tokens at their positions, in any order: logits (wanted, V) of the token after each of the last `wanted`.
void fc_step(void* model, int narrow, int M, const int32_t* tokens, const int32_t* rows, const int32_t* positions,
             int wanted, float* logits) {
    static_cast<Model*>(model)->run({M, tokens, rows, positions, narrow != 0, wanted, logits});
}

// Append a token to each of M rows and draw `count` more for each, by u (M, count): out (count, M). Returns how many
// steps were taken: fewer than `count` where logits were not finite, which the last step's tokens then show.
int fc_decode(void* model, int narrow, int M, const int32_t* tokens, const int32_t* rows, const int32_t* positions,
              int count, int vocab, double temperature, int top_k, const double* u, int32_t* out) {
    Model* m = static_cast<Model*>(model);
    std::vector<int32_t> now(tokens, tokens + M), at(positions, positions + M);
    std::vector<float> logits(size_t(M) * m->V);
    for (int step = 0; step < count; step++, out += M) {
        m->run({M, now.data(), rows, at.data(), narrow != 0, M, logits.data()});
        bool finite = true;
        for (int i = 0; i < M; i++) {
            out[i] = now[i] = draw(&logits[size_t(i) * m->V], vocab, float(temperature), top_k, u[i * count + step], m->spare);
            at[i]++;
            finite = finite && out[i] < vocab;
        }
        if (!finite) return step + 1;
    }
    return count;
}

// A token for each of M rows of logits, over the first `vocab` tokens.
void fc_draw(void* model, int M, const float* logits, int vocab, double temperature, int top_k, const double* u,
             int32_t* out) {
    Model* m = static_cast<Model*>(model);
    for (int i = 0; i < M; i++)
        out[i] = draw(logits + size_t(i) * m->V, vocab, float(temperature), top_k, u[i], m->spare);
}

// Speculative decoding of one row: the int8 weights draft `ahead` tokens after `token`, the fp32 weights then predict
// after `token` and every drafted one in a single pass, and what they draw is what counts. A drafted token is drawn with
// the same u as the token that will judge it, so the two nearly always agree; what comes out is, token for token, what
// fp32 alone would have drawn. Returns how many tokens are in `out`: the agreeing ones and the one after; up to ahead + 1.
int fc_speculate(void* model, int row, int position, int token, int ahead, int vocab, double temperature, int top_k,
                 const double* u, int32_t* out) {
    Model* m = static_cast<Model*>(model);
    std::vector<int32_t> tokens(ahead + 1), rows(ahead + 1, row), positions(ahead + 1);
    std::vector<float> logits(size_t(ahead + 1) * m->V);
    tokens[0] = token;
    for (int i = 0; i <= ahead; i++) positions[i] = position + i;
    for (int i = 0; i < ahead; i++) {
        m->run({1, &tokens[i], &rows[i], &positions[i], true, 1, logits.data()});
        tokens[i + 1] = draw(logits.data(), vocab, float(temperature), top_k, u[i], m->spare);
        if (tokens[i + 1] >= vocab) { ahead = i; break; }
    }
    m->run({ahead + 1, tokens.data(), rows.data(), positions.data(), false, ahead + 1, logits.data()});
    for (int i = 0;; i++) {
        out[i] = draw(&logits[size_t(i) * m->V], vocab, float(temperature), top_k, u[i], m->spare);
        if (i == ahead || out[i] != tokens[i + 1]) return i + 1;
    }
}

}  // extern "C"
