// The product of many activations with a 4-bit or bf16 weight, for prompts: the core of the kernels for many tokens.
//
// A warp takes 16 rows and 64 activations, all columns in ascending order; the eight warps of a block take eight pieces of
// 16 rows, and the grid's second axis the activations, 64 at a time. Weights are decoded once for the 64, from tables in
// shared memory to registers; activations come through the first-level cache that the warps share. As in matvec.cuh a
// column's sum has the same bits whatever stands in the others, so a prompt's chunks change nothing; the order differs
// from that of the kernels for generated tokens.
//
// Shared memory: TABLE_BYTES + 1024.

#pragma once

#include "matvec.cuh"

constexpr u32 MATMUL_TILES = 8;
constexpr u32 MATMUL_COLUMNS = MATMUL_TILES * 8;

// Hands a warp's sums to the job: a lane has rows lane / 4 and 8 below, and two columns of each tile. The neighbour of a
// row is four lanes away.
template <class Format, class Job>
__device__ __forceinline__ void store_sums(const Job& job, const Item& item, const Sums<Format, MATMUL_TILES>& sums,
                                           u32 first_column, u32 count) {
    u32 lane = threadIdx.x % WARP;
#pragma unroll
    for (u32 tile = 0; tile < MATMUL_TILES; tile++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 column = first_column + tile * 8 + lane % 4 * 2 + i % 2, row = lane / 4 + i / 2 * 8;
            job.template store<4>(item, column, row, sums.value[tile][i], column < count);
        }
    }
}

template <class Format, class Job>
__device__ __forceinline__ void run_matmul(const Job& job, u32 columns, const float* scale_values) {
    SHARED_BYTES(shared);
    u32* table = (u32*)shared;
    float* map = (float*)(shared + Format::TABLE_BYTES);
    const u32 group = threadIdx.x % WARP / 4, blocks = columns / BLOCK_COLUMNS, base = blockIdx.y * MATMUL_COLUMNS;

    let_next_start();
    fill_tables<Format>(table, map, scale_values);
    wait_for_previous();
    __syncthreads();
    for (u32 index = blockIdx.x * MATVEC_WARPS + threadIdx.x / WARP;; index += gridDim.x * MATVEC_WARPS) {
        Item item = job.item(index);
        if (item.matrix == nullptr) return;
        u32 count = job.columns(item.group);
        if (base >= count) continue;
        Columns<MATMUL_TILES> own;
#pragma unroll
        for (u32 tile = 0; tile < MATMUL_TILES; tile++) {
            u32 column = base + tile * 8 + group;
            own.x[tile] = column < count ? job.x(item.group, column) : nullptr;
        }
        const ScaleSource source{map, item.matrix->nested, item.matrix->offset};
        const u32 last = item.matrix->rows - 1, first = item.row + group;
        const size_t indices[2] = {(size_t)(first < last ? first : last) * blocks,
                                   (size_t)(first + 8 < last ? first + 8 : last) * blocks};
        Sums<Format, MATMUL_TILES> sums = {};
        typename Format::Held held = {};
        load_block<Format>(item, 0, blocks, held);
        for (u32 block = 0; block < blocks; block++) {
            typename Format::Held now = held;
            load_block<Format>(item, block + 1, blocks, held);
            multiply_block<Format, MATMUL_TILES>(now, table, source, indices, own, block, sums);
        }
        store_sums<Format>(job, item, sums, base, count);
    }
}
