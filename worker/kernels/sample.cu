// The choice of the next token, on the device: 8 bytes a row go back to the host instead of the logits.
//
// Agrees with: Sampler::sample (worker/src/engine/sampler.rs) where a request has no penalty and no filter (top_k, top_p,
// min_p): the most likely token at temperature 0, the lowest id among equals; else a draw from exp(logit / temperature)
// in the order of the ids, by the same counter-based random number. Sums are f64 in a fixed order that is not the
// CPU's, so a draw within rounding of a border may fall to the neighbour. Requests with a filter or penalty copy their
// logits to the host.

#include "common.cuh"

constexpr u32 CHUNK = 1024;
constexpr u32 SAMPLE_THREADS = 256;
constexpr u32 OWN = CHUNK / SAMPLE_THREADS;
constexpr u32 NONE = 0xffffffffu;

// What a chunk of the vocabulary comes to, 24 bytes.
struct Partial {
    double sum;    // of exp((logit - largest) / temperature)
    float largest;
    u32 token;     // the first with the largest logit
    u32 broken;    // the first whose logit is not finite, or NONE
    u32 reserved;
};

// What is chosen for a row, 8 bytes: `broken` is NONE, or the first token whose logit is not finite.
struct Chosen {
    u32 token;
    u32 broken;
};

__device__ __forceinline__ bool is_finite(float value) { return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u; }

__device__ __forceinline__ double power(float logit, float largest, float temperature) {
    return exp(((double)logit - (double)largest) / (double)temperature);
}

// Sums f64 over the block in the order of the threads.
__device__ __forceinline__ double ordered_sum(double value, double* slots) {
    slots[threadIdx.x] = value;
    __syncthreads();
    double total = 0;
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < SAMPLE_THREADS; i++) total += slots[i];
    }
    return total;
}

__device__ __forceinline__ bool is_better(float logit, u32 token, float than, u32 than_token) {
    return logit > than || (logit == than && token < than_token);
}

// The best of the threads' candidates and the first broken token; valid in every thread.
__device__ __forceinline__ void best_of_block(float& largest, u32& token, u32& broken, float* logits, u32* tokens, u32* brokens) {
    logits[threadIdx.x] = largest;
    tokens[threadIdx.x] = token;
    brokens[threadIdx.x] = broken;
    __syncthreads();
    for (u32 distance = SAMPLE_THREADS / 2; distance > 0; distance /= 2) {
        if (threadIdx.x < distance) {
            u32 other = threadIdx.x + distance;
            if (is_better(logits[other], tokens[other], logits[threadIdx.x], tokens[threadIdx.x])) {
                logits[threadIdx.x] = logits[other];
                tokens[threadIdx.x] = tokens[other];
            }
            brokens[threadIdx.x] = brokens[other] < brokens[threadIdx.x] ? brokens[other] : brokens[threadIdx.x];
        }
        __syncthreads();
    }
    largest = logits[0], token = tokens[0], broken = brokens[0];
}

// Thread t of a chunk owns its tokens 4 t .. 4 t + 3.
ENTRY __launch_bounds__(256) choose_scan(const float* logits, u32 vocabulary, const float* temperatures, Partial* partials) {
    __shared__ float bests[SAMPLE_THREADS];
    __shared__ u32 tokens[SAMPLE_THREADS], brokens[SAMPLE_THREADS];
    __shared__ double sums[SAMPLE_THREADS];
    let_next_start();
    wait_for_previous();
    const float* own = logits + (size_t)blockIdx.y * vocabulary;
    u32 first = blockIdx.x * CHUNK + threadIdx.x * OWN, token = NONE, broken = NONE;
    float largest = float_of_bits(0xff800000u), temperature = temperatures[blockIdx.y];
    for (u32 i = first; i < first + OWN && i < vocabulary; i++) {
        if (!is_finite(own[i])) broken = i < broken ? i : broken;
        if (is_better(own[i], i, largest, token)) largest = own[i], token = i;
    }
    best_of_block(largest, token, broken, bests, tokens, brokens);
    double sum = 0;
    if (temperature > 0.0f) {
        for (u32 i = first; i < first + OWN && i < vocabulary; i++) sum += power(own[i], largest, temperature);
        sum = ordered_sum(sum, sums);
    }
    if (threadIdx.x == 0) partials[blockIdx.y * gridDim.x + blockIdx.x] = Partial{sum, largest, token, broken, 0};
}

__device__ __forceinline__ u64 mix(u64 z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// `uniform` of the sampler: a number from 0 to below 1 that follows from seed and position.
__device__ __forceinline__ double uniform(u64 seed, u64 position) {
    const u64 gamma = 0x9e3779b97f4a7c15ull;
    return (double)(mix(mix(seed + gamma) ^ ((position + 1) * gamma)) >> 11) * (1.0 / 9007199254740992.0);
}

// Walks the chunks up to the one where the draw falls. Gives its index and what is left of the draw in its own scale.
__device__ __forceinline__ u32 find_chunk(const Partial* partials, u32 chunks, float largest, float temperature,
                                          double share, double& left) {
    double total = 0;
    for (u32 i = 0; i < chunks; i++) total += partials[i].sum * power(partials[i].largest, largest, temperature);
    left = share * total;
    u32 chosen = 0;
    for (u32 i = 0; i < chunks; i++) {
        double scale = power(partials[i].largest, largest, temperature), weight = partials[i].sum * scale;
        if (!(weight > 0)) continue;
        chosen = i;
        if (left < weight) break;
        left -= weight;
    }
    left = left / power(partials[chosen].largest, largest, temperature);
    return chosen;
}

// The token of a chunk where the draw falls; thread 0 walks the threads' sums, then that thread's tokens.
__device__ __forceinline__ u32 find_token(const float* own, u32 chunk, u32 vocabulary, float largest, float temperature,
                                          double left, double* sums) {
    u32 first = chunk * CHUNK + threadIdx.x * OWN;
    double sum = 0;
    for (u32 i = first; i < first + OWN && i < vocabulary; i++) sum += power(own[i], largest, temperature);
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return 0;
    u32 thread = 0;
    for (u32 i = 0; i < SAMPLE_THREADS; i++) {
        if (!(sums[i] > 0)) continue;
        thread = i;
        if (left < sums[i]) break;
        left -= sums[i];
    }
    u32 token = 0;
    first = chunk * CHUNK + thread * OWN;
    for (u32 i = first; i < first + OWN && i < vocabulary; i++) {
        double weight = power(own[i], largest, temperature);
        if (!(weight > 0)) continue;
        token = i;
        left -= weight;
        if (left < 0) break;
    }
    return token;
}

ENTRY __launch_bounds__(256) choose_pick(const float* logits, u32 vocabulary, const float* temperatures, const u64* seeds,
                                         const u64* positions, const Partial* partials, u32 chunks, Chosen* chosen) {
    __shared__ float bests[SAMPLE_THREADS];
    __shared__ u32 tokens[SAMPLE_THREADS], brokens[SAMPLE_THREADS];
    __shared__ double sums[SAMPLE_THREADS];
    __shared__ double shared_left;
    __shared__ u32 shared_chunk;
    let_next_start();
    wait_for_previous();
    u32 row = blockIdx.x, token = NONE, broken = NONE;
    const Partial* own = partials + (size_t)row * chunks;
    float largest = float_of_bits(0xff800000u), temperature = temperatures[row];
    for (u32 i = threadIdx.x; i < chunks; i += SAMPLE_THREADS) {
        if (is_better(own[i].largest, own[i].token, largest, token)) largest = own[i].largest, token = own[i].token;
        broken = own[i].broken < broken ? own[i].broken : broken;
    }
    best_of_block(largest, token, broken, bests, tokens, brokens);
    if (temperature > 0.0f && broken == NONE) {
        if (threadIdx.x == 0) {
            shared_chunk = find_chunk(own, chunks, largest, temperature, uniform(seeds[row], positions[row]), shared_left);
        }
        __syncthreads();
        u32 chunk = shared_chunk;
        token = find_token(logits + (size_t)row * vocabulary, chunk, vocabulary, own[chunk].largest, temperature,
                           shared_left, sums);
    }
    if (threadIdx.x == 0) chosen[row] = Chosen{token, broken};
}
