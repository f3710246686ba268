// Dense layers for a prompt's tokens: the projections of attention.
//
// Agrees with: Cpu::matmul (worker/src/quant/cpu), for activations rounded to bf16.
// See README.md beside this for each kernel's launch contract.

#include "matmul.cuh"

struct ManyJob : PromptJob {
    static constexpr Neighbours NEIGHBOURS = Neighbours::Four;

    __device__ __forceinline__ void prepare(u32*) { count_rows(); }
    __device__ __forceinline__ Piece piece(u32 index) const { return find_piece<PROMPT_TOKENS>(index); }
    template <u32 COUNT>
    __device__ __forceinline__ void store(const Piece& piece, u32 token, u32 row, float (&sums)[COUNT]) const {
        store_floats(*piece.matrix, row, sums, out + (size_t)token * out_stride + piece.matrix->output);
    }
};

// Macros, because entry points of a driver API need plain names and cannot be templates.
#define MATMUL(NAME, FORMAT)                                                                                           \
    ENTRY __launch_bounds__(128, 2) NAME(const Matrix* matrices, u32 matrix_count, const bf16* x, u32 tokens,          \
                                         u32 columns, float* out, u32 out_stride, const float* scale_values) {         \
        ManyJob job{{matrices, matrix_count, x, tokens, out, out_stride, 0}};                                          \
        run_matmul<FORMAT, PROMPT_TOKENS>(job, columns, scale_values);                                                 \
    }

MATMUL(matmul_nf4, Nf4Plain)
MATMUL(matmul_nf4_nested, Nf4Nested)
MATMUL(matmul_mxfp4, Mxfp4)
MATMUL(matmul_bf16, Bf16)
