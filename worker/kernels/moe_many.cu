// Mixture of experts for a prompt's tokens: router, choice, grouping, and both products of the chosen experts.
//
// Agrees with: Mixture::run (worker/src/model/moe.rs), for activations rounded to bf16 before each expert's product;
// the router reads them as f32. A slot is one choice of one token: slot = token * used + rank. Results stay apart by
// slot and are added by rank in add_norm, so a token's result does not depend on the others.

#include "choice.cuh"
#include "matmul.cuh"

constexpr u32 ROUTER_TILE = 32;
// Columns at a time, and what they stand apart in shared memory: neighbours' four lie in different banks.
constexpr u32 ROUTER_COLUMNS = 32;
constexpr u32 ROUTER_STRIDE = ROUTER_COLUMNS + 4;

__device__ __forceinline__ float dot_of_four(float4 a, float4 b, float sum) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// Judges 32 experts for 32 tokens in f32, each column in turn; a thread takes two of each.
ENTRY __launch_bounds__(256) moe_router_many(const bf16* weight, const float* bias, const float* x, u32 tokens, u32 experts,
                                             u32 hidden, float* logits) {
    alignas(16) __shared__ float own_x[ROUTER_TILE * ROUTER_STRIDE];
    alignas(16) __shared__ float own_weight[ROUTER_TILE * ROUTER_STRIDE];
    const u32 first_token = blockIdx.x * ROUTER_TILE, first_expert = blockIdx.y * ROUTER_TILE;
    const u32 line = threadIdx.x / 8, column = threadIdx.x % 8 * 4, token = threadIdx.x / 16, expert = threadIdx.x % 16;
    const float* from_x = x + (size_t)(first_token + line < tokens ? first_token + line : 0) * hidden + column;
    const bf16* from_weight = weight + (size_t)(first_expert + line < experts ? first_expert + line : 0) * hidden + column;
    let_next_start();
    wait_for_previous();
    float sums[2][2] = {};
    // The next columns are on their way while these are multiplied: a prompt of a few tokens has few blocks.
    float4 four = *(const float4*)from_x;
    uint2 words = *(const uint2*)from_weight;
    for (u32 start = 0; start < hidden; start += ROUTER_COLUMNS) {
        __syncthreads();
        *(float4*)(own_x + line * ROUTER_STRIDE + column) = four;
        *(float4*)(own_weight + line * ROUTER_STRIDE + column) =
            float4{widen_low(words.x), widen_high(words.x), widen_low(words.y), widen_high(words.y)};
        __syncthreads();
        if (start + ROUTER_COLUMNS < hidden) {
            four = *(const float4*)(from_x + start + ROUTER_COLUMNS);
            words = *(const uint2*)(from_weight + start + ROUTER_COLUMNS);
        }
#pragma unroll
        for (u32 k = 0; k < ROUTER_COLUMNS; k += 4) {
            float4 a[2], b[2];
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                a[i] = *(const float4*)(own_x + (token + 16 * i) * ROUTER_STRIDE + k);
                b[i] = *(const float4*)(own_weight + (expert + 16 * i) * ROUTER_STRIDE + k);
            }
#pragma unroll
            for (u32 i = 0; i < 4; i++) sums[i / 2][i % 2] = dot_of_four(a[i / 2], b[i % 2], sums[i / 2][i % 2]);
        }
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        u32 own_token = first_token + token + i / 2 * 16, own_expert = first_expert + expert + i % 2 * 16;
        if (own_token >= tokens || own_expert >= experts) continue;
        logits[(size_t)own_token * experts + own_expert] = sums[i / 2][i % 2] + bias[own_expert];
    }
}

// A token's experts by a warp each, as moe_route chooses them.
ENTRY __launch_bounds__(256) moe_choose_many(const float* logits, u32 tokens, u32 experts, u32 used, u32* chosen,
                                             float* weights) {
    let_next_start();
    wait_for_previous();
    u32 token = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (token >= tokens) return;
    choose_experts(logits + (size_t)token * experts, experts, used, chosen + token * used, weights + token * used);
}

// The lanes of a warp that hold the same number below EXPERTS_MAX.
__device__ __forceinline__ u32 lanes_alike(u32 number) {
    u32 alike = ALL_LANES;
#pragma unroll
    for (u32 bit = 1; bit < EXPERTS_MAX; bit *= 2) {
        u32 set = __ballot_sync(ALL_LANES, (number & bit) != 0);
        alike &= (number & bit) != 0 ? set : ~set;
    }
    return alike;
}

constexpr u32 GROUP_WARPS = 32;

// Groups the slots by expert, in ascending order. One block: each warp counts the slots of its own stretch by expert,
// and after the stretches' counts are added up, puts its slots where those of the warps before it end.
ENTRY __launch_bounds__(1024) moe_group_many(const u32* chosen, u32 tokens, u32 experts, u32 used, u32* group_count,
                                             u32* group_experts, u32* group_firsts, u32* group_slots) {
    __shared__ u32 places[GROUP_WARPS][EXPERTS_MAX];
    __shared__ u32 counts[EXPERTS_MAX];
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, slots = tokens * used;
    let_next_start();
    wait_for_previous();
    u32 length = (slots + GROUP_WARPS * WARP - 1) / (GROUP_WARPS * WARP) * WARP;
    u32 start = warp * length, end = start + length < slots ? start + length : slots;
    for (u32 expert = lane; expert < experts; expert += WARP) places[warp][expert] = 0;
    __syncwarp();
    for (u32 base = start; base < end; base += WARP) {
        u32 slot = base + lane, expert = slot < end ? chosen[slot] : EXPERTS_MAX - 1;
        u32 alike = lanes_alike(expert) & __ballot_sync(ALL_LANES, slot < end);
        if (slot < end && (alike & ((1u << lane) - 1)) == 0) places[warp][expert] += __popc(alike);
        __syncwarp();
    }
    __syncthreads();
    for (u32 expert = threadIdx.x; expert < experts; expert += blockDim.x) {
        u32 sum = 0;
        for (u32 i = 0; i < GROUP_WARPS; i++) {
            u32 own = places[i][expert];
            places[i][expert] = sum;
            sum += own;
        }
        counts[expert] = sum;
    }
    __syncthreads();
    u32 group = 0, first = 0;
    if (threadIdx.x < experts) {
        for (u32 before = 0; before < threadIdx.x; before++) {
            group += counts[before] > 0;
            first += counts[before];
        }
        u32 own = counts[threadIdx.x], groups = group + (own > 0);
        if (own > 0) {
            group_experts[group] = threadIdx.x;
            group_firsts[group] = first;
        }
        if (threadIdx.x + 1 == experts) {
            group_firsts[groups] = first + own;
            *group_count = groups;
        }
        for (u32 i = 0; i < GROUP_WARPS; i++) places[i][threadIdx.x] += first;
    }
    __syncthreads();
    for (u32 base = start; base < end; base += WARP) {
        u32 slot = base + lane, expert = slot < end ? chosen[slot] : EXPERTS_MAX - 1;
        u32 alike = lanes_alike(expert) & __ballot_sync(ALL_LANES, slot < end);
        u32 rank = __popc(alike & ((1u << lane) - 1)), place = slot < end ? places[warp][expert] : 0;
        if (slot < end) group_slots[place + rank] = slot;
        __syncwarp();
        if (slot < end && rank == 0) places[warp][expert] = place + __popc(alike);
        __syncwarp();
    }
}

// Gate and up stand in neighbouring rows, so a lane has both; its results are neighbours too.
template <u32 TOKENS> struct ManyGateUpJob : GroupedJob {
    static constexpr Neighbours NEIGHBOURS = Neighbours::All;
    bf16* out;
    float alpha;
    float limit;

    __device__ __forceinline__ void prepare(u32* room) { count_pieces<TOKENS>(room); }
    __device__ __forceinline__ Piece piece(u32 index) const { return find_piece<TOKENS>(index); }
    template <u32 COUNT>
    __device__ __forceinline__ void store(const Piece& piece, u32 token, u32 row, float (&sums)[COUNT]) const {
        row += threadIdx.x % 4 * COUNT;
        const u32 rows = piece.matrix->rows;
        const float* bias = piece.matrix->bias;
        u32 words[COUNT / 4];
#pragma unroll
        for (u32 i = 0; i < COUNT; i += 4) {
            float4 four = bias != nullptr && row + i + 3 < rows ? *(const float4*)(bias + row + i) : float4{0, 0, 0, 0};
            words[i / 4] = narrow_pair(gated(sums[i] + four.x, sums[i + 1] + four.y, alpha, limit),
                                       gated(sums[i + 2] + four.z, sums[i + 3] + four.w, alpha, limit));
        }
        // Two words at a time, for rows are a multiple of 8: the product after this one takes 64 columns at a time.
        u32* to = (u32*)(out + (size_t)slot(piece, token) * (rows / 2) + row / 2);
#pragma unroll
        for (u32 i = 0; i < COUNT / 4; i += 2) {
            if (row + 4 * i < rows) *(uint2*)(to + i) = uint2{words[i], words[i + 1]};
        }
    }
};

template <u32 TOKENS> struct ManyDownJob : GroupedJob {
    static constexpr Neighbours NEIGHBOURS = Neighbours::Four;
    float* out;

    __device__ __forceinline__ void prepare(u32* room) { count_pieces<TOKENS>(room); }
    __device__ __forceinline__ Piece piece(u32 index) const { return find_piece<TOKENS>(index); }
    template <u32 COUNT>
    __device__ __forceinline__ void store(const Piece& piece, u32 token, u32 row, float (&sums)[COUNT]) const {
        store_floats(*piece.matrix, row, sums, out + (size_t)slot(piece, token) * piece.matrix->rows);
    }
};

#define EXPERT_KERNELS_MANY(NAME, FORMAT, TOKENS)                                                                      \
    ENTRY __launch_bounds__(128, 2) moe_gate_up_##NAME(                                                                \
        const Matrix* matrices, const u32* group_count, const u32* group_experts, const u32* group_firsts,             \
        const u32* group_slots, const bf16* x, u32 used, u32 columns, u32 rows, float alpha, float limit, bf16* inner, \
        const float* scale_values) {                                                                                   \
        GroupedJob base{matrices, groups_of_step(group_count), group_experts, group_firsts, group_slots, x, used,      \
                        (rows + MATMUL_ROWS - 1) / MATMUL_ROWS, 0, nullptr};                                           \
        run_matmul<FORMAT, TOKENS>(ManyGateUpJob<TOKENS>{base, inner, alpha, limit}, columns, scale_values);           \
    }                                                                                                                  \
    ENTRY __launch_bounds__(128, 2) moe_down_##NAME(                                                                   \
        const Matrix* matrices, const u32* group_count, const u32* group_experts, const u32* group_firsts,             \
        const u32* group_slots, const bf16* inner, u32 columns, u32 rows, float* out, const float* scale_values) {     \
        GroupedJob base{matrices, groups_of_step(group_count), group_experts, group_firsts, group_slots, inner, 1,     \
                        (rows + MATMUL_ROWS - 1) / MATMUL_ROWS, 0, nullptr};                                           \
        run_matmul<FORMAT, TOKENS>(ManyDownJob<TOKENS>{base, out}, columns, scale_values);                             \
    }

EXPERT_KERNELS_MANY(nf4_many, Nf4Plain, PROMPT_TOKENS)
EXPERT_KERNELS_MANY(nf4_few, Nf4Plain, FEW_TOKENS)
EXPERT_KERNELS_MANY(nf4_nested_many, Nf4Nested, PROMPT_TOKENS)
EXPERT_KERNELS_MANY(nf4_nested_few, Nf4Nested, FEW_TOKENS)
EXPERT_KERNELS_MANY(mxfp4_many, Mxfp4, PROMPT_TOKENS)
EXPERT_KERNELS_MANY(mxfp4_few, Mxfp4, FEW_TOKENS)
EXPERT_KERNELS_MANY(bf16_many, Bf16, PROMPT_TOKENS)
EXPERT_KERNELS_MANY(bf16_few, Bf16, FEW_TOKENS)
