// A prompt's products for compute capability 9.0a: dense layers, and both products of the chosen experts.
//
// Agrees with matmul.cu and moe_many.cu, whose arguments these kernels take; see README.md beside this for what differs in
// their launches. For 9.0a alone: compile with -gencode arch=compute_90a,code=sm_90a.

#include "matmul_90a.cuh"

struct WideJob : PromptJob {
    static constexpr Neighbours NEIGHBOURS = Neighbours::Four;

    __device__ __forceinline__ void prepare(u32*) { count_rows(); }
    template <u32 WIDTH> __device__ __forceinline__ u32 pieces() const {
        return Cut<WIDE_TOKENS>{tokens}.template pieces<WIDTH>() * row_pieces;
    }
    template <u32 WIDTH> __device__ __forceinline__ Piece piece(u32 index) const {
        return rows_of(index % row_pieces, Cut<WIDE_TOKENS>{tokens}.template token<WIDTH>(index / row_pieces));
    }
    template <u32 COUNT>
    __device__ __forceinline__ void store(const Piece& piece, const u32* slots, const float (&sums)[COUNT], u8*) const {
        store_wide(piece, slots, sums, out + piece.matrix->output, out_stride);
    }
};

// Each 16 rows of the products are eight gates, then the eight ups that belong to them: a lane has both.
struct WideGateUpJob : WideGroupedJob<WIDE_TOKENS> {
    static constexpr Neighbours NEIGHBOURS = Neighbours::All;
    bf16* out;
    float alpha;
    float limit;

    // Turns 64 results of each token over in shared memory, where rows of a token become neighbours.
    template <u32 COUNT>
    __device__ __forceinline__ void store(const Piece& piece, const u32* slots, const float (&sums)[COUNT], u8* stage) const {
        const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, own = warp * 8 + lane / 4;
        const Matrix& matrix = *piece.matrix;
        float gate = 0, up = 0;
        if (matrix.bias != nullptr && piece.row + 2 * own + 1 < matrix.rows) {
            gate = matrix.bias[piece.row + 2 * own], up = matrix.bias[piece.row + 2 * own + 1];
        }
        __syncthreads();
#pragma unroll
        for (u32 tile = 0; tile < COUNT / 4; tile++) {
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                float value = gated(sums[4 * tile + i] + gate, sums[4 * tile + 2 + i] + up, alpha, limit);
                u32 token = tile * 8 + lane % 4 * 2 + i;
                *(bf16*)(stage + chunk_offset<MATMUL_CHUNKS>(token, own / 8) + own % 8 * 2) = narrow(value);
            }
        }
        __syncthreads();
        const u32 inner = matrix.rows / 2, first = piece.row / 2;
        for (u32 i = threadIdx.x; i < 2 * COUNT * MATMUL_CHUNKS; i += WIDE_THREADS) {
            u32 token = i / MATMUL_CHUNKS, chunk = i % MATMUL_CHUNKS, slot = slots[token];
            // Inner rows are a multiple of 8: the product after this one takes 64 columns at a time.
            if (slot == ~0u || first + chunk * CHUNK_FACTORS >= inner) continue;
            *(uint4*)(out + (size_t)slot * inner + first + chunk * CHUNK_FACTORS) =
                *(const uint4*)(stage + chunk_offset<MATMUL_CHUNKS>(token, chunk));
        }
    }
};

struct WideDownJob : WideGroupedJob<WIDE_TOKENS> {
    static constexpr Neighbours NEIGHBOURS = Neighbours::Four;
    float* out;

    template <u32 COUNT>
    __device__ __forceinline__ void store(const Piece& piece, const u32* slots, const float (&sums)[COUNT], u8*) const {
        store_wide(piece, slots, sums, out, piece.matrix->rows);
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
EXPERTS_90A(nf4_many, Nf4Plain)
EXPERTS_90A(nf4_nested_many, Nf4Nested)
EXPERTS_90A(mxfp4_many, Mxfp4)
EXPERTS_90A(bf16_many, Bf16)
