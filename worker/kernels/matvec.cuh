// The product of a few activations with a 4-bit or bf16 weight: the core of matvec.cu and moe.cu.
//
// A block of 256 threads takes 16 rows at a time; its eight warps share the columns, 64 at a time, warp w taking blocks
// w, w + 8, w + 16 and so on; their sums are added in the order of the warps. Activations are the columns of the tensor
// cores' tiles, eight to a tile: a column's sum is the same bits whatever stands in the others, so a token's result is
// the same alone and among sixteen. Weights of the next 16 rows are fetched while these are multiplied.
//
// Shared memory: pair table, scale map, sums of the warps, and (where the caller says `staged`) the activations; with
// TILES = 1 for up to 8 activations and TILES = 2 for up to 16:
//   bytes = TABLE_BYTES + 1024 + TILES * 4096 + (staged ? activations * (columns + 8) * 2 : 0)

#pragma once

#include "formats.cuh"

constexpr u32 MATVEC_WARPS = 8;
constexpr u32 MATVEC_ROWS = 16;
// Activations in shared memory stand apart by this many more elements than they are long: no bank conflicts.
constexpr u32 STAGE_PADDING = 8;

// Blocks of 64 columns that a warp holds while they are on their way. More tiles leave fewer registers for them; the
// order of the sums is the same.
template <class Format, u32 TILES> constexpr u32 DEPTH = TILES == 1 ? Format::DEPTH : Format::DEPTH / 2;

// One piece of work: 16 rows of one matrix with its group of activations.
struct Item {
    const Matrix* matrix;  // null past the last item
    u32 row;
    u32 group;
};

template <class Format, u32 TILES> struct Sums {
    float value[TILES][4];
};

// The activations that a lane multiplies with: a row for each tile, or null.
template <u32 TILES> struct Columns {
    const bf16* x[TILES];
};

template <class Format>
__device__ __forceinline__ void fill_tables(u32* table, float* scale_map, const float* scale_values) {
    if (Format::TABLE_BYTES > 0) {
        for (u32 i = threadIdx.x; i < 256 * WARP / 4; i += blockDim.x) {
            u32 pair = byte_pair<Format::HIGH_FIRST>(Format::values(), i / (WARP / 4));
            ((uint4*)table)[i] = make_uint4(pair, pair, pair, pair);
        }
    }
    if (Format::NESTED) scale_map[threadIdx.x] = scale_values[threadIdx.x];
}

template <class Format>
__device__ __forceinline__ void load_block(const Item& item, u32 block, u32 blocks, typename Format::Held& held) {
    if (item.matrix == nullptr || block >= blocks) return;
    u32 group = threadIdx.x % WARP / 4, last = item.matrix->rows - 1;
    // Rows past the end are read from the last one and never written.
    u32 first = item.row + group, second = first + 8;
    Format::load(*item.matrix, 0, first < last ? first : last, block, blocks, held);
    Format::load(*item.matrix, 1, second < last ? second : last, block, blocks, held);
}

template <class Format>
__device__ __forceinline__ float load_activations(const bf16* x, u32 block, u32 (&pairs)[8]) {
    uint4 first = make_uint4(0, 0, 0, 0), second = first;
    if (x != nullptr) {
        const bf16* at = x + block * BLOCK_COLUMNS;
        first = *(const uint4*)(at + Format::column(threadIdx.x % 4, 0));
        second = *(const uint4*)(at + Format::column(threadIdx.x % 4, 1));
    }
    pairs[0] = first.x, pairs[1] = first.y, pairs[2] = first.z, pairs[3] = first.w;
    pairs[4] = second.x, pairs[5] = second.y, pairs[6] = second.z, pairs[7] = second.w;
    return normalise_pairs(pairs);
}

template <class Format, u32 TILES>
__device__ __forceinline__ void multiply_block(const typename Format::Held& held, const u32* table,
                                               const ScaleSource& source, const size_t (&indices)[2],
                                               const Columns<TILES>& columns, u32 block, Sums<Format, TILES>& sums) {
    Factors factors;
    float row_scales[2] = {1.0f, 1.0f};
    Format::decode(held, table, factors, row_scales);
#pragma unroll
    for (u32 tile = 0; tile < TILES; tile++) {
        u32 pairs[8];
        float first_scale, second_scale;
        column_scales(load_activations<Format>(columns.x[tile], block, pairs), first_scale, second_scale);
#pragma unroll
        for (u32 group = 0; group < Format::GROUPS; group++) {
            float d[4] = {0, 0, 0, 0};
#pragma unroll
            for (u32 step = group * 4 / Format::GROUPS; step < (group + 1) * 4 / Format::GROUPS; step++) {
                multiply_tile(d, factors.pair[0][2 * step], factors.pair[1][2 * step], factors.pair[0][2 * step + 1],
                              factors.pair[1][2 * step + 1], pairs[2 * step], pairs[2 * step + 1]);
            }
            float upper = Format::scale(held, 0, group, source, indices[0] + block) * row_scales[0];
            float lower = Format::scale(held, 1, group, source, indices[1] + block) * row_scales[1];
            float(&sum)[4] = sums.value[tile];
            sum[0] = fmaf(d[0] * first_scale, upper, sum[0]);
            sum[1] = fmaf(d[1] * second_scale, upper, sum[1]);
            sum[2] = fmaf(d[2] * first_scale, lower, sum[2]);
            sum[3] = fmaf(d[3] * second_scale, lower, sum[3]);
        }
    }
}

// Adds up the warps' sums. Thread 16 * c + r gets row r of column c; only threads of columns that exist call for it.
// Begins with the barrier that makes the sums visible; the caller puts one before the next item's sums.
template <class Format, u32 TILES>
__device__ __forceinline__ float collect_sums(const Sums<Format, TILES>& sums, float* slots) {
    constexpr u32 SIZE = TILES * 8 * MATVEC_ROWS;
    u32 lane = threadIdx.x % WARP, row = lane / 4, column = lane % 4 * 2;
    float* own = slots + threadIdx.x / WARP * SIZE;
#pragma unroll
    for (u32 tile = 0; tile < TILES; tile++) {
        float* at = own + (tile * 8 + column) * MATVEC_ROWS + row;
        at[0] = sums.value[tile][0];
        at[MATVEC_ROWS] = sums.value[tile][1];
        at[8] = sums.value[tile][2];
        at[MATVEC_ROWS + 8] = sums.value[tile][3];
    }
    __syncthreads();
    float total = 0;
    if (threadIdx.x < SIZE) {
#pragma unroll
        for (u32 warp = 0; warp < MATVEC_WARPS; warp++) total += slots[warp * SIZE + threadIdx.x];
    }
    return total;
}

// Runs a job's items in this block. A Job says: `item(index)`, `columns(group)`,
// `x(group, column)` a row of activations, `store<D>(item, column, row, total, is_real)`, called by whole warps in
// which the neighbour of an even row is D lanes away, and whether its items are known before the kernels before this one are done.
template <class Format, u32 TILES, class Job>
__device__ __forceinline__ void run_matvec(const Job& job, u32 columns, const float* scale_values, bool is_staged) {
    constexpr u32 HELD = DEPTH<Format, TILES>;
    SHARED_BYTES(shared);
    u32* table = (u32*)shared;
    float* map = (float*)(shared + Format::TABLE_BYTES);
    float* slots = (float*)(shared + Format::TABLE_BYTES + SCALE_MAP_BYTES);
    bf16* stage = (bf16*)((u8*)slots + TILES * 4096);
    const u32 warp = threadIdx.x / WARP, group = threadIdx.x % WARP / 4, blocks = columns / BLOCK_COLUMNS;
    const u32 chunks = (blocks + MATVEC_WARPS * HELD - 1) / (MATVEC_WARPS * HELD);

    let_next_start();
    typename Format::Held held[HELD] = {};
    u32 index = blockIdx.x;
    if (!Job::KNOWN_BEFORE) wait_for_previous();
    Item item = job.item(index);
#pragma unroll
    for (u32 i = 0; i < HELD; i++) load_block<Format>(item, i * MATVEC_WARPS + warp, blocks, held[i]);
    fill_tables<Format>(table, map, scale_values);
    if (Job::KNOWN_BEFORE) wait_for_previous();
    __syncthreads();

    u32 staged_group = ~0u;
    while (item.matrix != nullptr) {
        u32 count = job.columns(item.group);
        if (is_staged && staged_group != item.group) {
            for (u32 column = 0; column < count; column++) {
                uint4* to = (uint4*)(stage + column * (columns + STAGE_PADDING));
                const uint4* from = (const uint4*)job.x(item.group, column);
                for (u32 i = threadIdx.x; i < columns / 8; i += blockDim.x) to[i] = from[i];
            }
            __syncthreads();
            staged_group = item.group;
        }
        Columns<TILES> own;
#pragma unroll
        for (u32 tile = 0; tile < TILES; tile++) {
            u32 column = tile * 8 + group;
            own.x[tile] = column >= count ? nullptr
                          : is_staged     ? stage + column * (columns + STAGE_PADDING)
                                          : job.x(item.group, column);
        }
        index += gridDim.x;
        Item next = job.item(index);
        const ScaleSource source{map, item.matrix->nested, item.matrix->offset};
        const u32 last = item.matrix->rows - 1, first = item.row + group;
        const size_t indices[2] = {(size_t)(first < last ? first : last) * blocks,
                                   (size_t)(first + 8 < last ? first + 8 : last) * blocks};
        Sums<Format, TILES> sums = {};
        for (u32 chunk = 0; chunk < chunks; chunk++) {
            const bool is_last = chunk + 1 == chunks;
            const u32 start = is_last ? 0 : (chunk + 1) * HELD;
#pragma unroll
            for (u32 i = 0; i < HELD; i++) {
                u32 block = (chunk * HELD + i) * MATVEC_WARPS + warp;
                typename Format::Held now = held[i];
                load_block<Format>(is_last ? next : item, (start + i) * MATVEC_WARPS + warp, blocks, held[i]);
                if (block < blocks) {
                    multiply_block<Format, TILES>(now, table, source, indices, own, block, sums);
                }
            }
        }
        float total = collect_sums<Format, TILES>(sums, slots);
        u32 column = threadIdx.x / MATVEC_ROWS;
        if (column < TILES * 8) job.template store<1>(item, column, threadIdx.x % MATVEC_ROWS, total, column < count);
        __syncthreads();
        item = next;
    }
}
