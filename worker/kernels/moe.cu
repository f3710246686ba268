// Mixture of experts for 1 to 16 tokens: router, choice, grouping, and both products of the chosen experts.
//
// Agrees with: Mixture::run (worker/src/model/moe.rs), for activations rounded to bf16 before each expert's product; the
// router reads them as f32. A slot is one choice of one token: slot = token * used + rank. Results stay apart by slot and
// are added by rank in add_norm, so a token's result does not depend on the others.

#include "choice.cuh"
#include "matvec.cuh"

__device__ __forceinline__ float dot_of_words(uint4 words, const float* x, float sum) {
    float4 first = *(const float4*)x, second = *(const float4*)(x + 4);
    sum = fmaf(widen_low(words.x), first.x, sum);
    sum = fmaf(widen_high(words.x), first.y, sum);
    sum = fmaf(widen_low(words.y), first.z, sum);
    sum = fmaf(widen_high(words.y), first.w, sum);
    sum = fmaf(widen_low(words.z), second.x, sum);
    sum = fmaf(widen_high(words.z), second.y, sum);
    sum = fmaf(widen_low(words.w), second.z, sum);
    return fmaf(widen_high(words.w), second.w, sum);
}

// Judges the experts: a block of 128 threads for each expert and token; thread t sums columns 8 t .. 8 t + 7 of every 1024.
ENTRY __launch_bounds__(128) moe_router(const bf16* weight, const float* bias, const float* x, u32 hidden, float* logits) {
    __shared__ float slots[WARP];
    u32 expert = blockIdx.x, token = blockIdx.y;
    const bf16* row = weight + (size_t)expert * hidden;
    const float* activations = x + (size_t)token * hidden;
    let_next_start();
    wait_for_previous();
    float sum = 0;
#pragma unroll 3
    for (u32 column = threadIdx.x * 8; column < hidden; column += blockDim.x * 8) {
        sum = dot_of_words(*(const uint4*)(row + column), activations + column, sum);
    }
    sum = block_sum(sum, slots);
    if (threadIdx.x == 0) logits[token * gridDim.x + expert] = sum + bias[expert];
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

// Chooses experts for every token and groups the slots by expert. One block.
ENTRY __launch_bounds__(1024) moe_route(const float* logits, u32 tokens, u32 experts, u32 used, u32* chosen,
                                        float* weights, u32* group_count, u32* group_experts, u32* group_firsts,
                                        u32* group_slots) {
    __shared__ u32 counts[EXPERTS_MAX];
    __shared__ u32 firsts[EXPERTS_MAX];
    u32 warp = threadIdx.x / WARP, warps = blockDim.x / WARP, lane = threadIdx.x % WARP, slots = tokens * used;
    let_next_start();
    wait_for_previous();
    for (u32 token = warp; token < tokens; token += warps) {
        choose_experts(logits + token * experts, experts, used, chosen + token * used, weights + token * used);
    }
    __syncthreads();
    for (u32 expert = warp; expert < experts; expert += warps) {
        u32 count = count_slots(chosen, slots, expert);
        if (lane == 0) counts[expert] = count;
    }
    __syncthreads();
    for (u32 expert = threadIdx.x; expert < experts; expert += blockDim.x) {
        u32 group = 0, first = 0;
        for (u32 before = 0; before < expert; before++) {
            group += counts[before] > 0;
            first += counts[before];
        }
        firsts[expert] = first;
        if (counts[expert] > 0) {
            group_experts[group] = expert;
            group_firsts[group] = first;
        }
        if (expert + 1 == experts) {
            u32 groups = group + (counts[expert] > 0);
            group_firsts[groups] = first + counts[expert];
            *group_count = groups;
        }
    }
    __syncthreads();
    for (u32 expert = warp; expert < experts; expert += warps) {
        if (counts[expert] > 0) list_slots(chosen, slots, expert, group_slots + firsts[expert]);
    }
}

// The chosen experts' matrices with the slots that each one serves.
struct ExpertJob {
    static constexpr bool KNOWN_BEFORE = false;
    const Matrix* matrices;
    u32 groups;
    const u32* experts;
    const u32* firsts;
    const u32* slots;
    const bf16* activations;
    u32 slots_per_row;
    u32 length;
    u32 tiles;

    __device__ __forceinline__ Item item(u32 index) const {
        u32 group = index / tiles;
        if (group >= groups) return Item{};
        return Item{matrices + experts[group], (index - group * tiles) * MATVEC_ROWS, group};
    }
    __device__ __forceinline__ u32 columns(u32 group) const { return firsts[group + 1] - firsts[group]; }
    __device__ __forceinline__ u32 slot(u32 group, u32 column) const { return slots[firsts[group] + column]; }
    __device__ __forceinline__ const bf16* x(u32 group, u32 column) const {
        return activations + (size_t)(slot(group, column) / slots_per_row) * length;
    }
    __device__ __forceinline__ float with_bias(const Item& item, u32 row, float total) const {
        return row < item.matrix->rows && item.matrix->bias != nullptr ? total + item.matrix->bias[row] : total;
    }
};

// Gate and up stand in neighbouring rows; what is not a number passes the clamps.
struct GateUpJob : ExpertJob {
    bf16* out;
    float alpha;
    float limit;

    template <u32 ROW_DISTANCE>
    __device__ __forceinline__ void store(const Item& item, u32 column, u32 row, float total, bool is_real) const {
        row += item.row;
        float value = with_bias(item, row, total);
        float up = __shfl_xor_sync(ALL_LANES, value, ROW_DISTANCE), gate = value;
        if (!is_real || row % 2 != 0 || row >= item.matrix->rows) return;
        gate = gate > limit ? limit : gate;
        up = up > limit ? limit : up < -limit ? -limit : up;
        float result = (up + 1.0f) * (gate / (1.0f + expf(-alpha * gate)));
        out[(size_t)slot(item.group, column) * (item.matrix->rows / 2) + row / 2] = narrow(result);
    }
};

struct DownJob : ExpertJob {
    float* out;

    template <u32 ROW_DISTANCE>
    __device__ __forceinline__ void store(const Item& item, u32 column, u32 row, float total, bool is_real) const {
        row += item.row;
        if (!is_real || row >= item.matrix->rows) return;
        out[(size_t)slot(item.group, column) * item.matrix->rows + row] = with_bias(item, row, total);
    }
};

// The group count is read inside the job's first use, after run_matvec has waited.
template <class Format, u32 TILES, class Job>
__device__ __forceinline__ void run_experts(Job job, const u32* group_count, u32 columns, const float* scale_values,
                                            u32 is_staged) {
    wait_for_previous();
    job.groups = *group_count;
    run_matvec<Format, TILES>(job, columns, scale_values, is_staged != 0);
}

#define EXPERT_KERNELS(NAME, FORMAT, TILES)                                                                            \
    ENTRY __launch_bounds__(256, 2) moe_gate_up_##NAME(                                                                \
        const Matrix* matrices, const u32* group_count, const u32* group_experts, const u32* group_firsts,             \
        const u32* group_slots, const bf16* x, u32 used, u32 columns, u32 rows, float alpha, float limit, bf16* inner, \
        const float* scale_values, u32 is_staged) {                                                                    \
        ExpertJob base{matrices, 0, group_experts, group_firsts, group_slots, x, used, columns,                        \
                       (rows + MATVEC_ROWS - 1) / MATVEC_ROWS};                                                        \
        run_experts<FORMAT, TILES>(GateUpJob{base, inner, alpha, limit}, group_count, columns, scale_values,           \
                                   is_staged);                                                                         \
    }                                                                                                                  \
    ENTRY __launch_bounds__(256, 2) moe_down_##NAME(                                                                   \
        const Matrix* matrices, const u32* group_count, const u32* group_experts, const u32* group_firsts,             \
        const u32* group_slots, const bf16* inner, u32 columns, u32 rows, float* out, const float* scale_values,       \
        u32 is_staged) {                                                                                               \
        ExpertJob base{matrices, 0, group_experts, group_firsts, group_slots, inner, 1, columns,                       \
                       (rows + MATVEC_ROWS - 1) / MATVEC_ROWS};                                                        \
        run_experts<FORMAT, TILES>(DownJob{base, out}, group_count, columns, scale_values, is_staged);                 \
    }

EXPERT_KERNELS(nf4_8, Nf4Plain, 1)
EXPERT_KERNELS(nf4_16, Nf4Plain, 2)
EXPERT_KERNELS(nf4_nested_8, Nf4Nested, 1)
EXPERT_KERNELS(nf4_nested_16, Nf4Nested, 2)
EXPERT_KERNELS(mxfp4_8, Mxfp4, 1)
EXPERT_KERNELS(mxfp4_16, Mxfp4, 2)
EXPERT_KERNELS(bf16_8, Bf16, 1)
EXPERT_KERNELS(bf16_16, Bf16, 2)
