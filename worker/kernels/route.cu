// The way to the experts: adds attention's result, normalises, judges the experts, chooses, and groups the choices.
//
// Agrees with: Decoder::forward's addition, rms_norm and the start of Mixture::run (worker/src/model/moe.rs). A slot is one
// choice of one token: slot = token * used + rank.
//
// One launch: a token's blocks each normalise its row and judge some experts; the last of them chooses, and the last of all
// tokens' groups. Which block that is changes no bit. An expert's sum is over the row times the norm's weight and is scaled
// by the norm afterwards, so that both are summed at once.

#include "common.cuh"

constexpr u32 EXPERTS_MAX = 256;
constexpr u32 USED_MAX = 32;
constexpr u32 ROUTE_THREADS = 256;
constexpr u32 ROUTE_WARPS = ROUTE_THREADS / WARP;
// Columns that a thread has at a time, neighbours.
constexpr u32 OWN = 8;
// A thread's times as many, and experts that are judged at a time: what is held of the router is fetched early.
constexpr u32 HELD_WORDS = 8;
// Slots that are grouped from shared memory.
constexpr u32 SLOTS_NEAR = 1024;

// What the launch is about.
struct Route {
    const float* x;
    const float* change;
    const float* norm_weight;
    float epsilon;
    u32 hidden;
    float* sum;
    bf16* out;
    const bf16* router;
    const float* router_bias;
    u32 experts;
    u32 used;
    float* logits;
    u32* chosen;
    float* weights;
};

struct Groups {
    u32* count;
    u32* experts;
    u32* firsts;
    u32* slots;
};

struct RouteShared {
    float sums[1 + HELD_WORDS][ROUTE_WARPS];
    u32 keys[EXPERTS_MAX];
    float logits[EXPERTS_MAX];
    u32 chosen[USED_MAX];
    u32 counts[EXPERTS_MAX];
    u32 firsts[EXPERTS_MAX];
    u32 slots[SLOTS_NEAR];
    u32 is_last;
};

__device__ __forceinline__ float dot_of_words(uint4 words, const float (&x)[OWN], float sum) {
    sum = fmaf(widen_low(words.x), x[0], sum);
    sum = fmaf(widen_high(words.x), x[1], sum);
    sum = fmaf(widen_low(words.y), x[2], sum);
    sum = fmaf(widen_high(words.y), x[3], sum);
    sum = fmaf(widen_low(words.z), x[4], sum);
    sum = fmaf(widen_high(words.z), x[5], sum);
    sum = fmaf(widen_low(words.w), x[6], sum);
    return fmaf(widen_high(words.w), x[7], sum);
}

__device__ __forceinline__ void load_own(const float* from, float (&to)[OWN]) {
    float4 first = *(const float4*)from, second = *(const float4*)(from + 4);
    to[0] = first.x, to[1] = first.y, to[2] = first.z, to[3] = first.w;
    to[4] = second.x, to[5] = second.y, to[6] = second.z, to[7] = second.w;
}

// Sums COUNT values over the block, each in a fixed order; every thread gets all of them.
template <u32 COUNT>
__device__ __forceinline__ void sum_all(float (&values)[COUNT], float (&slots)[1 + HELD_WORDS][ROUTE_WARPS]) {
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) {
        values[i] = warp_sum(values[i]);
        if (threadIdx.x % WARP == 0) slots[i][threadIdx.x / WARP] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) {
        values[i] = 0;
#pragma unroll
        for (u32 warp = 0; warp < ROUTE_WARPS; warp++) values[i] += slots[i][warp];
    }
    __syncthreads();
}

// Normalises a token's row and judges the experts of this block: blockIdx.x, then gridDim.x further, and so on.
template <u32 ROUNDS> __device__ __forceinline__ void judge(const Route& route, RouteShared& shared) {
    constexpr u32 AT_ONCE = HELD_WORDS / ROUNDS;
    u32 token = blockIdx.y, first = threadIdx.x * OWN;
    constexpr u32 STRIDE = ROUTE_THREADS * OWN;
    uint4 words[AT_ONCE][ROUNDS] = {};
    float own[ROUNDS][OWN] = {}, gains[ROUNDS][OWN] = {};
    u32 base = blockIdx.x;
    auto fetch = [&]() {
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; i++) {
            u32 expert = base + i * gridDim.x;
#pragma unroll
            for (u32 round = 0; round < ROUNDS; round++) {
                u32 at = round * STRIDE + first;
                if (expert >= route.experts || at >= route.hidden) continue;
                words[i][round] = *(const uint4*)(route.router + (size_t)expert * route.hidden + at);
            }
        }
    };
    fetch();
#pragma unroll
    for (u32 round = 0; round < ROUNDS; round++) {
        if (round * STRIDE + first < route.hidden) load_own(route.norm_weight + round * STRIDE + first, gains[round]);
    }
    wait_for_previous();
    float sums[1 + AT_ONCE] = {};
#pragma unroll
    for (u32 round = 0; round < ROUNDS; round++) {
        u32 at = round * STRIDE + first;
        if (at >= route.hidden) continue;
        size_t place = (size_t)token * route.hidden + at;
        float change[OWN];
        load_own(route.x + place, own[round]);
        load_own(route.change + place, change);
#pragma unroll
        for (u32 i = 0; i < OWN; i++) {
            own[round][i] += change[i];
            sums[0] = fmaf(own[round][i], own[round][i], sums[0]);
        }
        if (blockIdx.x == 0) {
            float4* to = (float4*)(route.sum + place);
            to[0] = float4{own[round][0], own[round][1], own[round][2], own[round][3]};
            to[1] = float4{own[round][4], own[round][5], own[round][6], own[round][7]};
        }
#pragma unroll
        for (u32 i = 0; i < OWN; i++) own[round][i] *= gains[round][i];
    }
    float scale = 0;
    for (bool is_first = true; base < route.experts; is_first = false) {
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; i++) {
            sums[1 + i] = 0;
#pragma unroll
            for (u32 round = 0; round < ROUNDS; round++) sums[1 + i] = dot_of_words(words[i][round], own[round], sums[1 + i]);
        }
        sum_all(sums, shared.sums);
        if (is_first) scale = 1.0f / sqrtf(sums[0] / (float)route.hidden + route.epsilon);
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; i++) {
            u32 expert = base + i * gridDim.x;
            if (threadIdx.x != i || expert >= route.experts) continue;
            route.logits[token * route.experts + expert] = fmaf(sums[1 + i], scale, route.router_bias[expert]);
        }
        base += AT_ONCE * gridDim.x;
        if (base < route.experts) fetch();
    }
    if (blockIdx.x != 0) return;
#pragma unroll
    for (u32 round = 0; round < ROUNDS; round++) {
        u32 at = round * STRIDE + first;
        if (at >= route.hidden) continue;
        const float(&row)[OWN] = own[round];
        *(uint4*)(route.out + (size_t)token * route.hidden + at) =
            make_uint4(narrow_pair(row[0] * scale, row[1] * scale), narrow_pair(row[2] * scale, row[3] * scale),
                       narrow_pair(row[4] * scale, row[5] * scale), narrow_pair(row[6] * scale, row[7] * scale));
    }
}

// Orders floats as f32::total_cmp does.
__device__ __forceinline__ u32 order_key(float value) {
    u32 bits = __float_as_uint(value);
    return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}

// Chooses a token's experts: a thread for each expert counts the better ones, the lower index first among equals.
__device__ __forceinline__ void choose(const Route& route, RouteShared& shared) {
    u32 token = blockIdx.y, own = threadIdx.x;
    if (own < route.experts) {
        shared.logits[own] = read_through(route.logits + token * route.experts + own);
        shared.keys[own] = order_key(shared.logits[own]);
    }
    __syncthreads();
    if (own < route.experts) {
        u32 rank = 0, key = shared.keys[own];
#pragma unroll 8
        for (u32 other = 0; other < route.experts; other++) {
            u32 theirs = shared.keys[other];
            rank += theirs > key || (theirs == key && other < own);
        }
        if (rank < route.used) {
            shared.chosen[rank] = own;
            route.chosen[token * route.used + rank] = own;
        }
    }
    __syncthreads();
    if (own < route.used) {
        float largest = shared.logits[shared.chosen[0]], sum = 0;
#pragma unroll 4
        for (u32 rank = 0; rank < route.used; rank++) sum += expf(shared.logits[shared.chosen[rank]] - largest);
        route.weights[token * route.used + own] = expf(shared.logits[shared.chosen[own]] - largest) / sum;
    }
}

// Lists each expert's slots in ascending order: a warp counts an expert's slots, then writes them from its first on.
__device__ __forceinline__ u32 count_slots(const u32* chosen, u32 slots, u32 expert) {
    u32 count = 0;
    for (u32 start = 0; start < slots; start += WARP) {
        u32 slot = start + threadIdx.x % WARP;
        count += __popc(__ballot_sync(ALL_LANES, slot < slots && chosen[slot] == expert));
    }
    return count;
}

__device__ __forceinline__ void list_slots(const u32* chosen, u32 slots, u32 expert, u32* list) {
    u32 lane = threadIdx.x % WARP, done = 0;
    for (u32 start = 0; start < slots; start += WARP) {
        u32 slot = start + lane;
        bool is_mine = slot < slots && chosen[slot] == expert;
        u32 found = __ballot_sync(ALL_LANES, is_mine);
        if (is_mine) list[done + __popc(found & ((1u << lane) - 1))] = slot;
        done += __popc(found);
    }
}

// The groups of a single token: its experts in ascending order, one slot each.
__device__ __forceinline__ void group_one(const Route& route, const Groups& groups, const RouteShared& shared) {
    u32 rank = threadIdx.x;
    if (rank >= route.used) return;
    u32 group = 0, own = shared.chosen[rank];
    for (u32 other = 0; other < route.used; other++) group += shared.chosen[other] < own;
    groups.experts[group] = own;
    groups.firsts[group] = group;
    groups.slots[group] = rank;
    if (rank != 0) return;
    groups.firsts[route.used] = route.used;
    *groups.count = route.used;
}

// Groups all tokens' slots by expert.
__device__ __forceinline__ void group(const Route& route, const Groups& groups, u32 slots, RouteShared& shared) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const u32* chosen = route.chosen;
    if (slots <= SLOTS_NEAR) {
        for (u32 slot = threadIdx.x; slot < slots; slot += ROUTE_THREADS) shared.slots[slot] = read_through(chosen + slot);
        chosen = shared.slots;
    }
    __syncthreads();
    for (u32 expert = warp; expert < route.experts; expert += ROUTE_WARPS) {
        u32 count = count_slots(chosen, slots, expert);
        if (lane == 0) shared.counts[expert] = count;
    }
    __syncthreads();
    for (u32 expert = threadIdx.x; expert < route.experts; expert += ROUTE_THREADS) {
        u32 group = 0, first = 0;
        for (u32 before = 0; before < expert; before++) {
            group += shared.counts[before] > 0;
            first += shared.counts[before];
        }
        shared.firsts[expert] = first;
        if (shared.counts[expert] > 0) {
            groups.experts[group] = expert;
            groups.firsts[group] = first;
        }
        if (expert + 1 == route.experts) {
            u32 count = group + (shared.counts[expert] > 0);
            groups.firsts[count] = first + shared.counts[expert];
            *groups.count = count;
        }
    }
    __syncthreads();
    for (u32 expert = warp; expert < route.experts; expert += ROUTE_WARPS) {
        if (shared.counts[expert] > 0) list_slots(chosen, slots, expert, groups.slots + shared.firsts[expert]);
    }
}

// counters: a word for each token, then one for all.
ENTRY __launch_bounds__(256, 2)
    norm_route(const float* x, const float* change, const float* norm_weight, float epsilon, u32 hidden, float* sum,
               bf16* out, const bf16* router, const float* router_bias, u32 experts, u32 used, float* logits, u32* chosen,
               float* weights, u32* group_count, u32* group_experts, u32* group_firsts, u32* group_slots, u32* counters) {
    __shared__ RouteShared shared;
    let_next_start();
    Route route{x,           change,  norm_weight, epsilon, hidden, sum, out, router, router_bias, experts, used, logits,
                chosen, weights};
    if (hidden <= ROUTE_THREADS * OWN * 2) {
        judge<2>(route, shared);
    } else {
        judge<4>(route, shared);
    }
    u32 tokens = gridDim.y;
    if (!is_last_block(counters + blockIdx.y, gridDim.x, &shared.is_last)) return;
    choose(route, shared);
    const Groups groups{group_count, group_experts, group_firsts, group_slots};
    if (tokens == 1) return group_one(route, groups, shared);
    if (!is_last_block(counters + tokens, tokens, &shared.is_last)) return;
    group(route, groups, tokens * used, shared);
}
