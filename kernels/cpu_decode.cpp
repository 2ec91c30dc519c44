// One decoding step of a small GPT on a CPU, for every layer, in one call.
//
// At one token a step is bound by reading the weights once, so what matters is: packed weights in large pages, read as
// streams; one pass over the layers without leaving native code; and threads that wait by spinning, because a layer takes
// less time than waking a thread. Built and called by cpu_decode.py; nothing here depends on torch.
//
// Each output is one accumulator that runs over the inputs in order, whatever the number of tokens M in the call. So a
// token's logits are the same, bit for bit, alone and in a batch: speculative decoding below relies on it.
//
// Legend: M tokens in a call, C channels, H query heads, G key/value heads, D channels per head, S window (block_size),
// R slots of the cache (at least S), V vocabulary.

#include "cpu_common.h"

namespace {

constexpr int PANEL = 16;  // outputs whose weights lie side by side

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
        if (wide) { w = wide->take<float>(count(n, k)); std::memset(w, 0, count(n, k) * sizeof(float)); }
        if (narrow) { q = narrow->take<int8_t>(count(n, k)); std::memset(q, 0, count(n, k)); }
        for (int i = 0; i < n; i++) {
            const float* row = weight + size_t(i) * k;
            float* wide_to = w + size_t(i / PANEL) * PANEL * k + i % PANEL;
            if (wide) for (int j = 0; j < k; j++) wide_to[size_t(j) * PANEL] = row[j];
            if (!narrow) continue;
            int8_t* narrow_to = q + size_t(i / PANEL) * PANEL * ((k + 1) / 2 * 2) + i % PANEL * 2;
            float top = 0.0f;
            for (int j = 0; j < k; j++) top = std::max(top, std::fabs(row[j]));
            float step = top > 0.0f ? top / 127.0f : 1.0f;
            scale[i] = step;
            for (int j = 0; j < k; j++)
                narrow_to[size_t(j / 2) * PANEL * 2 + j % 2] = int8_t(std::lrint(row[j] / step));
        }
    }
};

// Inputs of a layer: as they are, or rounded to 16-bit numbers of which two with an int8 weight each never overflow the
// sum: 2**13 * 2**7 * K stays below 2**31 for K up to 2048, and longer rows take fewer bits.
struct Wide { const float* x; int ld; };
struct Narrow { const int16_t* x; const float* scale; int ld; };

int levels(int k) {
    int top = 8191;
    while (int64_t(top) * 127 * k >= INT32_MAX) top /= 2;
    return top;
}

void quantise(const float* x, int k, int16_t* to, float* scale) {
    float top = 0.0f;
    for (int j = 0; j < k; j++) { float a = std::fabs(x[j]); top = a > top ? a : top; }
    float step = top > 0.0f ? top / levels(k) : 1.0f, inverse = 1.0f / step;
    for (int j = 0; j < k; j++) {
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
inline void tile(const Linear& l, const Wide& in, int panel, int m0, v8 (&acc)[ROWS][COUNT][2]) {
    constexpr int AHEAD = 32 * PANEL;  // 2 KB of each stream in flight
    size_t stride = size_t(l.k) * PANEL;
    const float* w = l.w + panel * stride;
    const float* x = in.x + size_t(m0) * in.ld;
    for (int m = 0; m < ROWS; m++) for (int c = 0; c < COUNT; c++) acc[m][c][0] = acc[m][c][1] = splat(0.0f);
    for (int j = 0; j < l.k; j++) {
        v8 a[ROWS];
        for (int m = 0; m < ROWS; m++) a[m] = splat(x[size_t(m) * in.ld + j]);
        for (int c = 0; c < COUNT; c++) {
            const float* at = w + c * stride + size_t(j) * PANEL;
            __builtin_prefetch(at + AHEAD);
            v8 lo = load(at), hi = load(at + LANES);
            for (int m = 0; m < ROWS; m++) { acc[m][c][0] += lo * a[m]; acc[m][c][1] += hi * a[m]; }
        }
    }
}

// the sums of products of 8 outputs' weight pairs with one pair of inputs
inline i8 pairs(const int8_t* w, const int16_t* x) {
#if defined(__AVX2__)
    int32_t both;
    std::memcpy(&both, x, 4);
    __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
    return i8(_mm256_madd_epi16(wide, _mm256_set1_epi32(both)));
#else
    i8 out;
    for (int i = 0; i < LANES; i++) out[i] = int32_t(w[2 * i]) * x[0] + int32_t(w[2 * i + 1]) * x[1];
    return out;
#endif
}

template <int ROWS, int COUNT>
inline void tile(const Linear& l, const Narrow& in, int panel, int m0, v8 (&acc)[ROWS][COUNT][2]) {
    constexpr int AHEAD = 32 * 2 * PANEL;
    size_t stride = size_t((l.k + 1) / 2) * 2 * PANEL;
    const int8_t* w = l.q + panel * stride;
    const int16_t* x = in.x + size_t(m0) * in.ld;
    i8 sums[ROWS][COUNT][2] = {};
    for (int j = 0; j < l.k; j += 2) {
        for (int c = 0; c < COUNT; c++) {
            const int8_t* at = w + c * stride + size_t(j) * PANEL;
            __builtin_prefetch(at + AHEAD);
            for (int m = 0; m < ROWS; m++) {
                const int16_t* pair = x + size_t(m) * in.ld + j;
                sums[m][c][0] += pairs(at, pair);
                sums[m][c][1] += pairs(at + 2 * LANES, pair);
            }
        }
    }
    for (int m = 0; m < ROWS; m++) for (int c = 0; c < COUNT; c++) for (int h = 0; h < 2; h++)
        acc[m][c][h] = __builtin_convertvector(sums[m][c][h], v8) * splat(in.scale[m0 + m])
                       * load(&l.scale[(panel + c) * PANEL + h * LANES]);
}

enum Then { STORE, ADD, ACTIVATE };

struct Output { float* y; int ldy; Then then; int activation; };

template <int ROWS, int COUNT, class In>
void block(const Linear& l, const In& in, int panel, int m0, const Output& out) {
    v8 acc[ROWS][COUNT][2];
    tile<ROWS, COUNT>(l, in, panel, m0, acc);
    for (int m = 0; m < ROWS; m++) for (int c = 0; c < COUNT; c++) {
        int first = (panel + c) * PANEL, width = std::min(PANEL, l.n - first);
        float y[PANEL];
        for (int h = 0; h < 2; h++) store(y + h * LANES, acc[m][c][h] + load(&l.bias[first + h * LANES]));
        if (out.then == ACTIVATE) activate(y, PANEL, out.activation);
        float* to = out.y + size_t(m0 + m) * out.ldy + first;
        if (out.then == ADD) for (int i = 0; i < width; i++) to[i] += y[i];
        else for (int i = 0; i < width; i++) to[i] = y[i];
    }
}

// The thread's share of a linear layer for M tokens. One token takes four panels at a time, to keep enough products in
// flight; several take one or two panels and reuse each weight that was read.
template <class In>
void linear(const Linear& l, const In& in, int M, const Output& out, int me, int of) {
    int first = int(int64_t(l.panels) * me / of), end = int(int64_t(l.panels) * (me + 1) / of);
    if (M == 1) {
        int p = first;
        for (; p + 4 <= end; p += 4) block<1, 4>(l, in, p, 0, out);
        for (; p + 2 <= end; p += 2) block<1, 2>(l, in, p, 0, out);
        for (; p < end; p++) block<1, 1>(l, in, p, 0, out);
        return;
    }
    for (int p = first; p < end; p++) {
        int m = 0;
        for (; m + 6 <= M; m += 6) block<6, 1>(l, in, p, m, out);
        switch (M - m) {
            case 5: block<5, 1>(l, in, p, m, out); break;
            case 4: block<4, 1>(l, in, p, m, out); break;
            case 3: block<3, 1>(l, in, p, m, out); break;
            case 2: block<2, 1>(l, in, p, m, out); break;
            case 1: block<1, 1>(l, in, p, m, out); break;
        }
    }
}

struct Norm { std::vector<float> w, b; };

struct Layer { Norm ln_1, ln_2; Linear qkv, proj, fc, out; };

struct Call {
    int M = 0;
    const int32_t *tokens = nullptr, *rows = nullptr, *positions = nullptr;
    bool narrow = false;  // int8 weights
    float* logits = nullptr;
};

struct Model {
    // the order of cpu_decode.py's INTS
    int n_layer, C, H, G, D, S, V, rms, activation, qk_norm, rope, threads, keep_wide, keep_narrow;
    float softcap;
    std::vector<float> wte, wpe;
    std::vector<Layer> layers;
    Norm ln_f;
    Linear head;
    Arena wide, narrow;
    Team* team = nullptr;
    // the cache and the rotary tables belong to the caller: kv [layer][2][B][G][R][D], table [2][length][D / 2]
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

    // Every thread normalises all rows for itself: cheaper than waiting for each other.
    const float* normalise(const Norm& p, int me) {
        std::vector<float>& own = normed[me];
        for (int m = 0; m < call.M; m++) norm(p, &x[size_t(m) * C], &own[size_t(m) * C]);
        return own.data();
    }

    void apply(const Linear& l, const float* in, int ld, const Output& out, int me) {
        if (call.narrow) {
            std::vector<int16_t>& own = rounded[me];
            std::vector<float>& scale = scales[me];
            int even = (ld + 1) / 2 * 2;
            for (int m = 0; m < call.M; m++) quantise(in + size_t(m) * ld, ld, &own[size_t(m) * even], &scale[m]);
            linear(l, Narrow{own.data(), scale.data(), even}, call.M, out, me, running);
        } else {
            linear(l, Wide{in, ld}, call.M, out, me, running);
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

    float dot(const float* a, const float* b) const {
        v8 s = splat(0.0f);
        int d = 0;
        for (; d + LANES <= D; d += LANES) s += load(a + d) * load(b + d);
        float total = sum(s);
        for (; d < D; d++) total += a[d] * b[d];
        return total;
    }

    // A thread takes whole key/value heads, for all tokens: it writes their keys and values before any of them looks.
    void attend(int layer, int me) {
        int width = (H + 2 * G) * D, group = H / G;
        float* k_base = kv + int64_t(layer) * 2 * B * G * R * D;
        float* v_base = k_base + B * G * R * D;
        float scale = 1.0f / std::sqrt(float(D));
        float* s = scores[me].data();
        for (int g = G * me / running; g < G * (me + 1) / running; g++) {
            for (int m = 0; m < call.M; m++) {
                float* k = &qkv[size_t(m) * width + size_t(H + g) * D];
                prepare_head(k, call.positions[m]);
                int64_t at = ((call.rows[m] * G + g) * R + call.positions[m] % R) * D;
                std::copy(k, k + D, k_base + at);
                std::copy(k + G * D, k + G * D + D, v_base + at);
            }
            for (int m = 0; m < call.M; m++) for (int i = 0; i < group; i++) {
                int head = g * group + i;
                float* q = &qkv[size_t(m) * width + size_t(head) * D];
                prepare_head(q, call.positions[m]);
                int64_t end = call.positions[m] + 1, start = std::max<int64_t>(0, end - S), count = end - start;
                const float* keys = k_base + (call.rows[m] * G + g) * R * D;
                const float* values = v_base + (call.rows[m] * G + g) * R * D;
                float top = -INFINITY;
                int64_t slot = start % R;
                for (int64_t t = 0; t < count; t++) {
                    s[t] = dot(q, keys + slot * D) * scale;
                    top = std::max(top, s[t]);
                    if (++slot == R) slot = 0;
                }
                for (int64_t t = 0; t < count; t++) s[t] = fast_exp(s[t] - top);
                float total = 0.0f;
                for (int64_t t = 0; t < count; t++) total += s[t];
                mix(s, values, start % R, count, 1.0f / total, &y[size_t(m) * H * D + size_t(head) * D]);
            }
        }
        team->barrier(running);
    }

    // to[d] = inverse * sum of s[t] * values[t][d], in blocks of channels that stay in registers
    void mix(const float* s, const float* values, int64_t slot0, int64_t count, float inverse, float* to) const {
        int d = 0;
        for (; d + 4 * LANES <= D; d += 4 * LANES) {
            v8 a[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
            int64_t slot = slot0;
            for (int64_t t = 0; t < count; t++) {
                const float* v = values + slot * D + d;
                v8 p = splat(s[t]);
                for (int i = 0; i < 4; i++) a[i] += p * load(v + i * LANES);
                if (++slot == R) slot = 0;
            }
            for (int i = 0; i < 4; i++) store(to + d + i * LANES, a[i] * splat(inverse));
        }
        for (; d < D; d++) {
            float a = 0.0f;
            int64_t slot = slot0;
            for (int64_t t = 0; t < count; t++) { a += s[t] * values[slot * D + d]; if (++slot == R) slot = 0; }
            to[d] = a * inverse;
        }
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
            apply(l.qkv, normalise(l.ln_1, me), C, {qkv.data(), width, STORE, 0}, me);
            attend(i, me);
            apply(l.proj, y.data(), H * D, {x.data(), C, ADD, 0}, me);
            apply(l.fc, normalise(l.ln_2, me), C, {h.data(), 4 * C, ACTIVATE, activation}, me);
            apply(l.out, h.data(), 4 * C, {x.data(), C, ADD, 0}, me);
        }
        apply(head, normalise(ln_f, me), C, {call.logits, V, STORE, 0}, me);
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
        if (softcap > 0.0f) for (size_t i = 0; i < M * V; i++) c.logits[i] = softcap * std::tanh(c.logits[i] / softcap);
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
    m->scores.assign(m->threads, std::vector<float>(size_t(m->S)));
    return m;
}

void fc_free(void* model) { delete static_cast<Model*>(model); }

void fc_attach(void* model, float* kv, int64_t batch, int64_t slots, const float* table, int64_t table_length) {
    Model* m = static_cast<Model*>(model);
    m->kv = kv; m->B = batch; m->R = slots; m->table = table; m->table_length = table_length;
}

// Append M tokens (those of one row in order): logits (M, V).
void fc_step(void* model, int narrow, int M, const int32_t* tokens, const int32_t* rows, const int32_t* positions,
             float* logits) {
    static_cast<Model*>(model)->run({M, tokens, rows, positions, narrow != 0, logits});
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
        m->run({1, &tokens[i], &rows[i], &positions[i], true, logits.data()});
        tokens[i + 1] = draw(logits.data(), vocab, float(temperature), top_k, u[i], m->spare);
        if (tokens[i + 1] >= vocab) { ahead = i; break; }
    }
    m->run({ahead + 1, tokens.data(), rows.data(), positions.data(), false, logits.data()});
    for (int i = 0;; i++) {
        out[i] = draw(&logits[size_t(i) * m->V], vocab, float(temperature), top_k, u[i], m->spare);
        if (i == ahead || out[i] != tokens[i + 1]) return i + 1;
    }
}

}  // extern "C"
