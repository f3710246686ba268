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

// 1 / temperature by Newton's steps from a float: the compiler's division is a call, for which registers are spilled.
__device__ __forceinline__ double inverse_of(float temperature) {
    double inverse = (double)(1.0f / temperature);
    inverse = fma(inverse, fma(-(double)temperature, inverse, 1.0), inverse);
    return fma(inverse, fma(-(double)temperature, inverse, 1.0), inverse);
}

// `inverse` is that of the temperature.
__device__ __forceinline__ double power(float logit, float largest, double inverse) {
    return exp(((double)logit - (double)largest) * inverse);
}

__device__ __forceinline__ bool is_better(float logit, u32 token, float than, u32 than_token) {
    return logit > than || (logit == than && token < than_token);
}

constexpr u32 SAMPLE_WARPS = SAMPLE_THREADS / WARP;

// Shared room of both kernels.
struct Room {
    float logits[SAMPLE_WARPS];
    u32 tokens[SAMPLE_WARPS];
    u32 brokens[SAMPLE_WARPS];
    double sums[SAMPLE_WARPS];
    u32 firsts[SAMPLE_WARPS];
    u32 lasts[SAMPLE_WARPS];
    double left;
    u32 index;
};

__device__ __forceinline__ void keep_better(float& largest, u32& token, u32& broken, float logit, u32 other, u32 other_broken) {
    if (is_better(logit, other, largest, token)) largest = logit, token = other;
    broken = other_broken < broken ? other_broken : broken;
}

// The best of the threads' candidates and the first broken token; valid in every thread.
__device__ __forceinline__ void best_of_block(float& largest, u32& token, u32& broken, Room& room) {
#pragma unroll
    for (u32 distance = WARP / 2; distance > 0; distance /= 2) {
        float logit = __shfl_xor_sync(ALL_LANES, largest, distance);
        u32 other = __shfl_xor_sync(ALL_LANES, token, distance), other_broken = __shfl_xor_sync(ALL_LANES, broken, distance);
        keep_better(largest, token, broken, logit, other, other_broken);
    }
    if (threadIdx.x % WARP == 0) {
        room.logits[threadIdx.x / WARP] = largest;
        room.tokens[threadIdx.x / WARP] = token;
        room.brokens[threadIdx.x / WARP] = broken;
    }
    __syncthreads();
    for (u32 warp = 0; warp < SAMPLE_WARPS; warp++) {
        keep_better(largest, token, broken, room.logits[warp], room.tokens[warp], room.brokens[warp]);
    }
}

// What the threads before this one have, and all together; in an order that the number of threads fixes.
struct Running {
    double before;
    double total;
};

__device__ __forceinline__ Running run_sum(double own, Room& room) {
    u32 lane = threadIdx.x % WARP;
    double with_own = own;
#pragma unroll
    for (u32 distance = 1; distance < WARP; distance *= 2) {
        double lower = __shfl_sync(ALL_LANES, with_own, lane >= distance ? lane - distance : lane);
        if (lane >= distance) with_own += lower;
    }
    if (lane == WARP - 1) room.sums[threadIdx.x / WARP] = with_own;
    double before = __shfl_sync(ALL_LANES, with_own, lane > 0 ? lane - 1 : 0);
    before = lane > 0 ? before : 0.0;
    __syncthreads();
    double base = 0, total = 0;
    for (u32 warp = 0; warp < SAMPLE_WARPS; warp++) {
        if (warp == threadIdx.x / WARP) base = total;
        total += room.sums[warp];
    }
    return Running{base + before, total};
}

// Thread t of a chunk owns its tokens 4 t .. 4 t + 3.
ENTRY __launch_bounds__(256) choose_scan(const float* logits, u32 vocabulary, const float* temperatures, Partial* partials) {
    __shared__ Room room;
    let_next_start();
    wait_for_previous();
    const float* own = logits + (size_t)blockIdx.y * vocabulary;
    u32 first = blockIdx.x * CHUNK + threadIdx.x * OWN, token = NONE, broken = NONE;
    float largest = float_of_bits(0xff800000u), temperature = temperatures[blockIdx.y], values[OWN];
#pragma unroll
    for (u32 i = 0; i < OWN; i++) values[i] = first + i < vocabulary ? own[first + i] : float_of_bits(0xff800000u);
#pragma unroll
    for (u32 i = 0; i < OWN; i++) {
        if (first + i >= vocabulary) break;
        if (!is_finite(values[i])) broken = first + i < broken ? first + i : broken;
        if (is_better(values[i], first + i, largest, token)) largest = values[i], token = first + i;
    }
    best_of_block(largest, token, broken, room);
    double sum = 0, inverse = inverse_of(temperature);
    if (temperature > 0.0f) {
#pragma unroll
        for (u32 i = 0; i < OWN; i++) {
            if (first + i < vocabulary) sum += power(values[i], largest, inverse);
        }
        sum = run_sum(sum, room).total;
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

// Finds the thread in whose weights a draw falls: the first that it does not pass, or the last that has any. That thread
// leaves what is left of the draw in `room.left`; every thread gets its number.
__device__ __forceinline__ u32 find_thread(double own, double before, double draw, Room& room) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u32 some = __ballot_sync(ALL_LANES, own > 0), hit = __ballot_sync(ALL_LANES, own > 0 && draw < before + own);
    // The lowest bit of `hit` and the highest of `some`.
    if (lane == 0) {
        room.firsts[warp] = hit != 0 ? warp * WARP + __popc((hit & (0u - hit)) - 1) : NONE;
        u32 top = some;
        for (u32 shift = 1; shift < WARP; shift *= 2) top |= top >> shift;
        room.lasts[warp] = some != 0 ? warp * WARP + __popc(top) - 1 : NONE;
    }
    __syncthreads();
    u32 first = NONE, last = 0;
    for (u32 i = 0; i < SAMPLE_WARPS; i++) {
        first = room.firsts[i] < first ? room.firsts[i] : first;
        last = room.lasts[i] != NONE ? room.lasts[i] : last;
    }
    return first != NONE ? first : last;
}

// Of a thread's `count` weights, the one where the draw falls: the first that it does not pass, or the last there is.
template <class Weight> __device__ __forceinline__ u32 find_own(u32 first, u32 count, Weight weight, double& left) {
    u32 chosen = first;
    for (u32 i = first; i < first + count; i++) {
        double own = weight(i);
        if (!(own > 0)) continue;
        chosen = i;
        if (left < own) break;
        left -= own;
    }
    return chosen;
}

// The chunk where the draw falls, known to all; leaves what is left of the draw, in the chunk's scale, in `room.left`.
__device__ __forceinline__ u32 find_chunk(const Partial* partials, u32 chunks, float largest, double inverse,
                                          double share, Room& room) {
    u32 each = (chunks + SAMPLE_THREADS - 1) / SAMPLE_THREADS, first = threadIdx.x * each;
    u32 count = first >= chunks ? 0 : chunks - first < each ? chunks - first : each;
    auto weight = [&](u32 i) { return partials[i].sum * power(partials[i].largest, largest, inverse); };
    double own = 0;
    for (u32 i = first; i < first + count; i++) own += weight(i);
    Running running = run_sum(own, room);
    double draw = share * running.total;
    // Every thread looks, so that none waits for one: only what the right one finds counts.
    double left = draw - running.before;
    u32 chunk = find_own(first, count, weight, left);
    if (find_thread(own, running.before, draw, room) == threadIdx.x) {
        room.index = chunk;
        room.left = left * power(largest, partials[chunk].largest, inverse);
    }
    __syncthreads();
    return room.index;
}

// The token of a chunk where the draw falls; valid in every thread.
__device__ __forceinline__ u32 find_token(const float* own, u32 chunk, u32 vocabulary, float largest, double inverse,
                                          Room& room) {
    u32 first = chunk * CHUNK + threadIdx.x * OWN;
    u32 count = first >= vocabulary ? 0 : vocabulary - first < OWN ? vocabulary - first : OWN;
    auto weight = [&](u32 i) { return power(own[i], largest, inverse); };
    double sum = 0, draw = room.left;
    for (u32 i = first; i < first + count; i++) sum += weight(i);
    Running running = run_sum(sum, room);
    double left = draw - running.before;
    u32 token = find_own(first, count, weight, left);
    if (find_thread(sum, running.before, draw, room) == threadIdx.x) room.index = token;
    __syncthreads();
    return room.index;
}

ENTRY __launch_bounds__(256, 1) choose_pick(const float* logits, u32 vocabulary, const float* temperatures, const u64* seeds,
                                         const u64* positions, const Partial* partials, u32 chunks, Chosen* chosen) {
    __shared__ Room room;
    let_next_start();
    wait_for_previous();
    u32 row = blockIdx.x, token = NONE, broken = NONE;
    const Partial* own = partials + (size_t)row * chunks;
    float largest = float_of_bits(0xff800000u), temperature = temperatures[row];
    double inverse = inverse_of(temperature);
    for (u32 i = threadIdx.x; i < chunks; i += SAMPLE_THREADS) {
        keep_better(largest, token, broken, own[i].largest, own[i].token, own[i].broken);
    }
    best_of_block(largest, token, broken, room);
    if (temperature > 0.0f && broken == NONE) {
        u32 chunk = find_chunk(own, chunks, largest, inverse, uniform(seeds[row], positions[row]), room);
        token = find_token(logits + (size_t)row * vocabulary, chunk, vocabulary, own[chunk].largest, inverse, room);
    }
    if (threadIdx.x == 0) chosen[row] = Chosen{token, broken};
}
