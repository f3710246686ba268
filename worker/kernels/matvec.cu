// Dense layers, for some tokens at a time and for many: the projections of attention and the output matrix.
//
// Agrees with: Cpu::matmul (worker/src/quant/cpu), for activations rounded to bf16.
// See README.md beside this for each kernel's launch contract.

#include "matvec.cuh"

// Matrices that read the same activations: a layer's q, k and v, or one alone.
struct DenseJob {
    static constexpr bool KNOWN_BEFORE = true;
    static constexpr u32 WAYS = 8;
    static constexpr u32 ROWS = ITEM_ROWS<WAYS>;
    const Matrix* matrices;
    u32 matrix_count;
    const bf16* activations;
    u32 batch;
    u32 length;
    float* out;
    u32 out_stride;

    __device__ __forceinline__ void touch() const {}
    __device__ __forceinline__ void prepare() {}
    template <u32 TILES> __device__ __forceinline__ u32 share(u32 block, u32) const {
        u32 items = 0;
        for (u32 i = 0; i < matrix_count; i++) items += (matrices[i].rows + ROWS - 1) / ROWS;
        return even_share(items, block);
    }
    __device__ __forceinline__ Item item(u32 index) const {
        for (u32 i = 0; i < matrix_count; i++) {
            u32 tiles = (matrices[i].rows + ROWS - 1) / ROWS;
            if (index < tiles) return Item{matrices + i, index * ROWS, 0, 0};
            index -= tiles;
        }
        return Item{};
    }
    __device__ __forceinline__ u32 rows(const Item& item) const { return item.matrix->rows; }
    __device__ __forceinline__ u32 columns(u32) const { return batch; }
    __device__ __forceinline__ u32 source(u32, u32 column) const { return column; }
    __device__ __forceinline__ const bf16* x(u32, u32 column) const { return activations + (size_t)column * length; }
    __device__ __forceinline__ float bias(const Item& item, u32 row) const {
        row += item.row;
        return item.matrix->bias != nullptr && row < item.matrix->rows ? item.matrix->bias[row] : 0.0f;
    }
    template <u32 ROW_DISTANCE>
    __device__ __forceinline__ void put(const Item& item, u32 column, u32 row, float value, bool is_real) const {
        row += item.row;
        if (!is_real || row >= item.matrix->rows) return;
        out[(size_t)column * out_stride + item.matrix->output + row] = value;
    }
};

// Macros, because entry points of a driver API need plain names and cannot be templates.
#define MATVEC(NAME, FORMAT, TILES)                                                                                    \
    ENTRY __launch_bounds__(256, (BLOCKS_HELD<FORMAT, TILES>))                                                         \
        NAME(const Matrix* matrices, u32 matrix_count, const bf16* x, u32 batch, u32 columns, float* out,              \
             u32 out_stride, const float* scale_values, u32 stage_columns) {                                           \
        DenseJob job{matrices, matrix_count, x, batch, columns, out, out_stride};                                      \
        run_matvec<FORMAT, TILES>(job, columns, scale_values, stage_columns);                                          \
    }

MATVEC(matvec_nf4_8, Nf4Plain, 1)
MATVEC(matvec_nf4_16, Nf4Plain, 2)
MATVEC(matvec_nf4_32, Nf4Plain, 4)
MATVEC(matvec_nf4_nested_8, Nf4Nested, 1)
MATVEC(matvec_nf4_nested_16, Nf4Nested, 2)
MATVEC(matvec_nf4_nested_32, Nf4Nested, 4)
MATVEC(matvec_mxfp4_8, Mxfp4, 1)
MATVEC(matvec_mxfp4_16, Mxfp4, 2)
MATVEC(matvec_mxfp4_32, Mxfp4, 4)
MATVEC(matvec_bf16_8, Bf16, 1)
MATVEC(matvec_bf16_16, Bf16, 2)
MATVEC(matvec_bf16_32, Bf16, 4)
