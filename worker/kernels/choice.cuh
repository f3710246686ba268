// The choice of a token's experts: one for generated tokens and for prompts, so that both choose alike.

#pragma once

#include "common.cuh"

constexpr u32 EXPERTS_MAX = 256;

// Orders floats as f32::total_cmp does, and the lower index first among equals.
__device__ __forceinline__ u64 rank_key(float value, u32 index) {
    u32 bits = __float_as_uint(value);
    u32 ordered = bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
    return (u64)ordered << 32 | (u32)~index;
}

// One warp picks the experts of one token.
__device__ __forceinline__ void choose_experts(const float* logits, u32 experts, u32 used, u32* chosen, float* weights) {
    u32 lane = threadIdx.x % WARP;
    u64 below = ~0ull;
    float largest = 0, own_power = 0, sum = 0;
    for (u32 rank = 0; rank < used; rank++) {
        u64 best = 0;
        for (u32 expert = lane; expert < experts; expert += WARP) {
            u64 key = rank_key(logits[expert], expert);
            if (key < below && key > best) best = key;
        }
        for (u32 distance = WARP / 2; distance > 0; distance /= 2) {
            u64 other = __shfl_xor_sync(ALL_LANES, best, distance);
            best = other > best ? other : best;
        }
        below = best;
        u32 expert = ~(u32)best;
        float logit = logits[expert];
        if (rank == 0) largest = logit;
        float power = expf(logit - largest);
        sum += power;
        if (lane == rank) own_power = power;
        if (lane == 0) chosen[rank] = expert;
    }
    if (lane < used) weights[lane] = own_power / sum;
}
