// A prompt's products for compute capability 9.0a: dense layers, and both products of the chosen experts.
//
// Agrees with matmul.cu and moe_many.cu, whose arguments these kernels take; see README.md beside this for what differs in
// their launches. For 9.0a alone: compile with -gencode arch=compute_90a,code=sm_90a.

#include "matmul_90a.cuh"

struct WideJob : PromptJob {
    static constexpr Neighbours NEIGHBOURS = Neighbours::Four;
    static constexpr bool IS_PAIR = false;

    __device__ __forceinline__ void prepare(u32*) { count_rows(); }
    template <u32 WIDTH> __device__ __forceinline__ u32 pieces() const {
        return Cut<WIDE_TOKENS>{tokens}.template pieces<WIDTH>() * row_pieces;
    }
    template <u32 WIDTH> __device__ __forceinline__ Piece piece(u32 index) const {
        return rows_of(index % row_pieces, Cut<WIDE_TOKENS>{tokens}.template token<WIDTH>(index / row_pieces));
    }
    template <u32 COUNT>
    __device__ __forceinline__ void store(const Piece& piece, const u32* slots, const float (&sums)[COUNT], u8* stage) const {
        store_wide(piece, slots, sums, out + piece.matrix->output, out_stride, stage);
    }
};

// Writes what a lane's gates and ups give, 64 of each token, as bf16: turned over in shared memory, where a token's become
// neighbours. Each 16 rows of the products are eight gates, then the eight ups that belong to them, so a lane has both.
template <u32 COUNT, class Gate>
__device__ __forceinline__ void store_gated(const u32* slots, const float (&sums)[COUNT], u8* stage, bf16* out, u32 first,
                                            u32 inner, const Gate& gate) {
    const u32 lane = threadIdx.x % WARP, own = threadIdx.x / WARP * 8 + lane / 4;
    __syncthreads();
#pragma unroll
    for (u32 tile = 0; tile < COUNT / 4; tile++) {
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            u32 token = tile * 8 + lane % 4 * 2 + i;
            *(bf16*)(stage + chunk_offset<MATMUL_CHUNKS>(token, own / 8) + own % 8 * 2) =
                narrow(gate(sums[4 * tile + i], sums[4 * tile + 2 + i]));
        }
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < 2 * COUNT * MATMUL_CHUNKS; i += WIDE_THREADS) {
        u32 token = i / MATMUL_CHUNKS, chunk = i % MATMUL_CHUNKS, slot = slots[token];
        // Inner rows are a multiple of 8: the product after this one takes 64 columns at a time.
        if (slot == ~0u || first + chunk * CHUNK_FACTORS >= inner) continue;
        *(uint4*)(out + (size_t)slot * inner + first + chunk * CHUNK_FACTORS) =
            *(const uint4*)(stage + chunk_offset<MATMUL_CHUNKS>(token, chunk));
    }
}

struct WideGateUpJob : WideGroupedJob<WIDE_TOKENS> {
    static constexpr Neighbours NEIGHBOURS = Neighbours::All;
    static constexpr bool IS_PAIR = false;
    bf16* out;
    float alpha;
    float limit;

    template <u32 COUNT>
    __device__ __forceinline__ void store(const Piece& piece, const u32* slots, const float (&sums)[COUNT], u8* stage) const {
        const u32 row = piece.row + 2 * (threadIdx.x / WARP * 8 + threadIdx.x % WARP / 4);
        const Matrix& matrix = *piece.matrix;
        float gate = 0, up = 0;
        if (matrix.bias != nullptr && row + 1 < matrix.rows) gate = matrix.bias[row], up = matrix.bias[row + 1];
        store_gated(slots, sums, stage, out, piece.row / 2, matrix.rows / 2,
                    [&](float own, float other) { return gated(own + gate, other + up, alpha, limit); });
    }
};

// Both matrices of a dense layer's gate, rows taken in turn: out = silu(gate) * up, as silu_gate makes it of their results.
struct WideDenseGateJob : PromptJob {
    static constexpr Neighbours NEIGHBOURS = Neighbours::All;
    static constexpr bool IS_PAIR = true;
    bf16* gated_out;

    __device__ __forceinline__ void prepare(u32*) { row_pieces = (2 * matrices->rows + MATMUL_ROWS - 1) / MATMUL_ROWS; }
    template <u32 WIDTH> __device__ __forceinline__ u32 pieces() const {
        return Cut<WIDE_TOKENS>{tokens}.template pieces<WIDTH>() * row_pieces;
    }
    template <u32 WIDTH> __device__ __forceinline__ Piece piece(u32 index) const {
        u32 token = Cut<WIDE_TOKENS>{tokens}.template token<WIDTH>(index / row_pieces);
        return Piece{matrices, index % row_pieces * MATMUL_ROWS, 0, token, tokens};
    }
    template <u32 COUNT>
    __device__ __forceinline__ void store(const Piece& piece, const u32* slots, const float (&sums)[COUNT], u8* stage) const {
        const u32 row = piece.row / 2 + threadIdx.x / WARP * 8 + threadIdx.x % WARP / 4;
        float gate = 0, up = 0;
        if (row < matrices->rows) {
            gate = matrices[0].bias != nullptr ? matrices[0].bias[row] : 0.0f;
            up = matrices[1].bias != nullptr ? matrices[1].bias[row] : 0.0f;
        }
        store_gated(slots, sums, stage, gated_out, piece.row / 2, matrices->rows, [&](float own, float other) {
            own += gate;
            return own * ((other + up) / (1.0f + expf(-own)));
        });
    }
};

struct WideDownJob : WideGroupedJob<WIDE_TOKENS> {
    static constexpr Neighbours NEIGHBOURS = Neighbours::Four;
    static constexpr bool IS_PAIR = false;
    float* out;

    template <u32 COUNT>
    __device__ __forceinline__ void store(const Piece& piece, const u32* slots, const float (&sums)[COUNT], u8* stage) const {
        store_wide(piece, slots, sums, out, piece.matrix->rows, stage);
    }
};

// Macros, because entry points of a driver API need plain names and cannot be templates.
#define PROMPT_90A(NAME, FORMAT)                                                                                       \
    ENTRY __launch_bounds__(256, 1) matmul_##NAME##_90a(const Matrix* matrices, u32 matrix_count, const bf16* x,       \
                                                        u32 tokens, u32 columns, float* out, u32 out_stride,           \
                                                        const float* scale_values) {                                   \
        WideJob job{{matrices, matrix_count, x, tokens, out, out_stride, 0}};                                          \
        run_wide<FORMAT, WIDE_TOKENS>(job, columns, scale_values);                                                     \
    }

#define DENSE_GATE_90A(NAME, FORMAT)                                                                                   \
    ENTRY __launch_bounds__(256, 1) dense_gate_##NAME##_90a(const Matrix* matrices, const bf16* x, u32 tokens,         \
                                                            u32 columns, bf16* out, const float* scale_values) {       \
        WideDenseGateJob job{{matrices, 2, x, tokens, nullptr, 0, 0}, out};                                            \
        run_wide<FORMAT, WIDE_TOKENS>(job, columns, scale_values);                                                     \
    }

#define EXPERTS_90A(NAME, FORMAT)                                                                                      \
    ENTRY __launch_bounds__(256, 1) moe_gate_up_##NAME##_90a(                                                          \
        const Matrix* matrices, const u32* group_count, const u32* group_experts, const u32* group_firsts,             \
        const u32* group_slots, const bf16* x, u32 used, u32 columns, u32 rows, float alpha, float limit, bf16* inner, \
        const float* scale_values) {                                                                                   \
        GroupedJob base{matrices, groups_of_step(group_count), group_experts, group_firsts, group_slots, x, used,      \
                        (rows + MATMUL_ROWS - 1) / MATMUL_ROWS, 0, nullptr};                                           \
        run_wide<FORMAT, WIDE_TOKENS>(WideGateUpJob{{base}, inner, alpha, limit}, columns, scale_values);              \
    }                                                                                                                  \
    ENTRY __launch_bounds__(256, 1) moe_down_##NAME##_90a(                                                             \
        const Matrix* matrices, const u32* group_count, const u32* group_experts, const u32* group_firsts,             \
        const u32* group_slots, const bf16* inner, u32 columns, u32 rows, float* out, const float* scale_values) {     \
        GroupedJob base{matrices, groups_of_step(group_count), group_experts, group_firsts, group_slots, inner, 1,     \
                        (rows + MATMUL_ROWS - 1) / MATMUL_ROWS, 0, nullptr};                                           \
        run_wide<FORMAT, WIDE_TOKENS>(WideDownJob{{base}, out}, columns, scale_values);                                \
    }

PROMPT_90A(nf4, Nf4Plain)
PROMPT_90A(nf4_nested, Nf4Nested)
PROMPT_90A(mxfp4, Mxfp4)
PROMPT_90A(bf16, Bf16)
DENSE_GATE_90A(nf4, Nf4Plain)
DENSE_GATE_90A(nf4_nested, Nf4Nested)
DENSE_GATE_90A(mxfp4, Mxfp4)
DENSE_GATE_90A(bf16, Bf16)
EXPERTS_90A(nf4_many, Nf4Plain)
EXPERTS_90A(nf4_nested_many, Nf4Nested)
EXPERTS_90A(mxfp4_many, Mxfp4)
EXPERTS_90A(bf16_many, Bf16)
