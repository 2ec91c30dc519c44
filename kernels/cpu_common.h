// What the native code for CPUs shares: vectors, e**x and GELU, memory in large pages, and a team of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <unistd.h>

namespace {

typedef float v8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));

constexpr int LANES = 8;
constexpr float NORM_EPS = 1e-5f;

inline v8 load(const float* p) { v8 v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, v8 v) { std::memcpy(p, &v, sizeof v); }
inline float sum(v8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
inline v8 splat(float x) { return v8{x, x, x, x, x, x, x, x}; }

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// e**x in about 2 ulp, without branches so that loops over it become vector code: 2**n times a polynomial on
// [-ln2 / 2, ln2 / 2]; adding 1.5 * 2**23 rounds to an integer that then stands in the low bits.
inline float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float shifted = x * 1.44269504088896f + 12582912.0f;
    float n = shifted - 12582912.0f;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits, scale;
    std::memcpy(&bits, &shifted, 4);
    scale = (bits - 0x4B400000 + 127) << 23;
    float two_to_n;
    std::memcpy(&two_to_n, &scale, 4);
    return p * two_to_n;
}

// x * Phi(x); erf by Abramowitz & Stegun 7.1.26, whose error of 1.5e-7 is fp32's own.
inline float gelu(float x) {
    float z = std::fabs(x) * 0.70710678f;
    float t = 1.0f / (1.0f + 0.3275911f * z);
    float poly = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    float tail = 0.5f * poly * fast_exp(-z * z);  // 1 - Phi(|x|)
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

// GPT-2's own form, x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), written as x times a logistic function.
inline float gelu_tanh(float x) {
    float z = 1.59576912f * (x + 0.044715f * x * x * x);
    return x / (1.0f + fast_exp(-z));
}

enum Activation { GELU = 0, RELU = 1, RELU2 = 2, GELU_TANH = 3 };

void activate(float* x, int n, int kind) {
    if (kind == GELU) for (int i = 0; i < n; i++) x[i] = gelu(x[i]);
    else if (kind == GELU_TANH) for (int i = 0; i < n; i++) x[i] = gelu_tanh(x[i]);
    else for (int i = 0; i < n; i++) {
        float r = x[i] > 0.0f ? x[i] : 0.0f;
        x[i] = kind == RELU2 ? r * r : r;
    }
}

// Memory that lives as long as the model, in large pages where the system has them: 4 KiB pages halve the bandwidth.
struct Arena {
    char* base = nullptr;
    size_t size = 0, used = 0;
    bool reserve(size_t bytes) {
        constexpr size_t large = size_t(2) << 20;
        size = (bytes + large - 1) / large * large;
        if (posix_memalign(reinterpret_cast<void**>(&base), large, size)) { base = nullptr; return false; }
#if defined(__linux__)
        madvise(base, size, MADV_HUGEPAGE);
#endif
        return true;
    }
    template <class T> T* take(size_t count) {
        char* p = base + used;
        used += (count * sizeof(T) + 63) / 64 * 64;
        return reinterpret_cast<T*>(p);
    }
    void release() { std::free(base); base = nullptr; size = used = 0; }
    ~Arena() { std::free(base); }
};

// Threads that spin between the phases of a step, and sleep when no step comes for a while.
class Team {
  public:
    explicit Team(int n) : size_(n), owner_(getpid()) {
        for (int i = 1; i < n; i++) threads_.emplace_back([this, i] { work(i); });
    }
    ~Team() {
        if (getpid() != owner_) {  // a forked child has no threads to join
            for (auto& t : threads_) t.detach();
            return;
        }
        quit_ = true;
        announce();
        for (auto& t : threads_) t.join();
    }
    // How many will run `run`: a forked child has only the thread that forked.
    int size() const { return getpid() == owner_ ? size_ : 1; }
    void run(void (*job)(void*, int, int), void* data, int n) {
        if (n > 1) { job_ = job; data_ = data; announce(); }
        job(data, 0, n);
    }
    void barrier(int n) {
        if (n == 1) return;
        int round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == n - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++)
            spins < 4000 ? relax() : std::this_thread::yield();  // others may need this core
    }

  private:
    void announce() {
        {
            std::lock_guard<std::mutex> hold(mutex_);
            ticket_.fetch_add(1, std::memory_order_release);
        }
        if (asleep_.load() > 0) wake_.notify_all();
    }
    void work(int me) {
        for (int seen = 0;; seen++) {
            for (int spins = 0; ticket_.load(std::memory_order_acquire) == seen; spins++) {
                if (spins < 20000) { relax(); continue; }
                std::unique_lock<std::mutex> hold(mutex_);
                asleep_++;
                wake_.wait(hold, [&] { return ticket_.load() != seen; });
                asleep_--;
            }
            if (quit_) return;
            job_(data_, me, size_);
        }
    }
    int size_;
    pid_t owner_;
    void (*job_)(void*, int, int) = nullptr;
    void* data_ = nullptr;
    std::atomic<int> ticket_{0}, arrived_{0}, round_{0}, asleep_{0};
    std::atomic<bool> quit_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> threads_;
};

}  // namespace
