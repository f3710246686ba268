// How the weights of a few activations' product come to a warp and are multiplied: the inner part of matvec.cuh.
//
// A warp has 16 rows of an item and a share of their columns. What it multiplies it fetched well before, through registers
// or through shared memory; either way a column's sum is the same bits whatever stands in the others.

#pragma once

#include "formats.cuh"

constexpr u32 MATVEC_WARPS = 8;
// Rows of a tensor core's tile.
constexpr u32 TILE_ROWS = 16;
// Rows that a block takes at a time where WAYS warps share the columns.
template <u32 WAYS> constexpr u32 ITEM_ROWS = MATVEC_WARPS / WAYS * TILE_ROWS;

// Blocks of 64 columns that a warp holds while they are on their way. More tiles leave fewer registers for them; the
// order of the sums is the same.
template <class Format, u32 TILES> constexpr u32 DEPTH = TILES == 1 ? Format::DEPTH : Format::DEPTH / 2;

// One piece of work: 16 rows of one matrix with its group of activations, from one on.
struct Item {
    const Matrix* matrix;  // null past the last item
    u32 row;
    u32 group;
    u32 first_column;
};

template <class Format, u32 TILES> struct Sums {
    float value[TILES][4];
};

// The activations that a lane multiplies with: a row for each tile.
template <u32 TILES> struct Columns {
    const bf16* x[TILES];
};

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
    const bf16* at = x + block * BLOCK_COLUMNS;
    uint4 first = *(const uint4*)(at + Format::column(threadIdx.x % 4, 0));
    uint4 second = *(const uint4*)(at + Format::column(threadIdx.x % 4, 1));
    pairs[0] = first.x, pairs[1] = first.y, pairs[2] = first.z, pairs[3] = first.w;
    pairs[4] = second.x, pairs[5] = second.y, pairs[6] = second.z, pairs[7] = second.w;
    return normalise_pairs(pairs);
}

// Multiplies one block's factors with every tile's activations; a row's products count by the scale of their group.
template <class Format, u32 TILES>
__device__ __forceinline__ void multiply_factors(const Factors& factors, const float (&upper)[Format::GROUPS],
                                                 const float (&lower)[Format::GROUPS], const Columns<TILES>& columns,
                                                 u32 block, Sums<Format, TILES>& sums, u32 count) {
#pragma unroll
    for (u32 tile = 0; tile < TILES; tile++) {
        // Tiles without activations cost nothing: few experts have as many tokens as the kernel takes.
        if (tile > 0 && tile * 8 >= count) break;
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
            float(&sum)[4] = sums.value[tile];
            sum[0] = fmaf(d[0] * first_scale, upper[group], sum[0]);
            sum[1] = fmaf(d[1] * second_scale, upper[group], sum[1]);
            sum[2] = fmaf(d[2] * first_scale, lower[group], sum[2]);
            sum[3] = fmaf(d[3] * second_scale, lower[group], sum[3]);
        }
    }
}

template <class Format, u32 TILES>
__device__ __forceinline__ void multiply_block(const typename Format::Held& held, const u32* table,
                                               const ScaleSource& source, const size_t (&indices)[2],
                                               const Columns<TILES>& columns, u32 block, Sums<Format, TILES>& sums,
                                               u32 count) {
    Factors factors;
    float row_scales[2] = {1.0f, 1.0f}, upper[Format::GROUPS], lower[Format::GROUPS];
    Format::decode(held, table, factors, row_scales);
#pragma unroll
    for (u32 group = 0; group < Format::GROUPS; group++) {
        upper[group] = Format::scale(held, 0, group, source, indices[0] + block) * row_scales[0];
        lower[group] = Format::scale(held, 1, group, source, indices[1] + block) * row_scales[1];
    }
    multiply_factors<Format, TILES>(factors, upper, lower, columns, block, sums, count);
}

// What a warp multiplies: the tables, how long the rows are, the item at hand, its activations and the sums so far.
template <class Format, u32 TILES> struct Work {
    const u32* table;
    const float* map;
    u32 blocks;
    Item item;
    u32 count;  // activations, of those that the tiles hold
    Columns<TILES> own;
    Sums<Format, TILES> sums;
};

// How weights come to a warp, which holds HELD units of an item at a time. `aim` says of which item to fetch, `advance` that
// its next HELD units are meant, `fetch` starts to load one of them into its slot; `begin` says that an item is now
// multiplied, `turn` multiplies what is in a slot and fetches into it, `pass` ends a round of slots.
//
// Through registers: a lane holds its own share. For bf16, and on Turing, whose shared memory has no room.
template <class Format, u32 TILES, u32 WAYS> struct RegisterPipe {
    static constexpr u32 UNIT_BLOCKS = 1;
    static constexpr u32 HELD = DEPTH<Format, TILES>;
    static constexpr u32 WARP_BYTES = 0;
    typename Format::Held held[HELD];
    Item aimed;
    u32 fetched;     // the block in the next slot 0
    u32 multiplied;  // the block in slot 0
    ScaleSource source;
    size_t indices[2];

    __device__ __forceinline__ RegisterPipe(u8*, const u32*) : held{} {}
    __device__ __forceinline__ void aim(const Item& item, u32) {
        aimed = item, fetched = threadIdx.x / WARP % WAYS;
        aimed.row += threadIdx.x / WARP / WAYS * TILE_ROWS;
    }
    __device__ __forceinline__ void advance() { fetched += HELD * WAYS; }
    __device__ __forceinline__ void fetch(u32 slot, u32 blocks) {
        load_block<Format>(aimed, fetched + slot * WAYS, blocks, held[slot]);
    }
    __device__ __forceinline__ void begin(const Work<Format, TILES>& work) {
        const Matrix& matrix = *work.item.matrix;
        source = ScaleSource{work.map, matrix.nested, matrix.offset};
        u32 last = matrix.rows - 1;
        u32 first = work.item.row + threadIdx.x / WARP / WAYS * TILE_ROWS + threadIdx.x % WARP / 4;
        indices[0] = (size_t)(first < last ? first : last) * work.blocks;
        indices[1] = (size_t)(first + 8 < last ? first + 8 : last) * work.blocks;
        multiplied = threadIdx.x / WARP % WAYS;
    }
    __device__ __forceinline__ void turn(u32 slot, Work<Format, TILES>& work) {
        typename Format::Held now = held[slot];
        fetch(slot, work.blocks);
        u32 block = multiplied + slot * WAYS;
        if (block < work.blocks) {
            multiply_block<Format, TILES>(now, work.table, source, indices, work.own, block, work.sums, work.count);
        }
    }
    __device__ __forceinline__ void pass(Work<Format, TILES>&) { multiplied += HELD * WAYS; }
};

// Units of two blocks that a warp of SharedPipe holds.
constexpr u32 SHARED_DEPTH = 3;
constexpr u32 UNIT_BYTES = 2 * TILE_ROWS * 32;

// Through shared memory, copied past the registers: 4-bit codes [block of the unit][row][32 bytes], 16 bytes a lane and
// copy, so that a unit's row is 64 bytes in one place. A lane keeps one scale of a unit, of row lane / 4 (8 below for the
// upper half of its four) and block lane % 2, and restores it for the four.
//
// What a lane needs for a unit is a fixed distance from what it needs for the one before, so addresses are made once an
// item: multiplying is bound by the number of instructions.
template <class Format, u32 TILES, u32 WAYS> struct SharedPipe {
    static constexpr u32 UNIT_BLOCKS = 2;
    static constexpr u32 HELD = SHARED_DEPTH;
    static constexpr u32 WARP_BYTES = HELD * UNIT_BYTES;
    // Blocks from one unit of a warp to its next.
    static constexpr u32 STEP = WAYS * UNIT_BLOCKS;
    typename Format::Scale scales[HELD];
    Near own_table;
    Near own_codes;       // in the slots: where the lane takes its codes from
    Near own_copies;      // and where it copies to
    const u8* codes;      // of the aimed item: the upper of the lane's two rows
    u32 lower;            // how much further the lower one stands
    const u8* scale_at;
    const float* nested;
    u32 scale_index;
    int aimed_left;       // blocks of the aimed item, from the unit that goes to slot 0 next
    int blocks_left;      // blocks of the item at hand, from the unit in slot 0 on
    float offset;

    __device__ __forceinline__ SharedPipe(u8* slots, const u32* table) : scales{} {
        u32 lane = threadIdx.x % WARP;
        own_table = near_of(table + lane);
        own_codes = near_of(slots + Format::own_codes(lane));
        own_copies = near_of(slots + lane % 4 / 2 * (UNIT_BYTES / 2) + lane / 4 * 32 + lane % 2 * 16);
    }
    __device__ __forceinline__ void aim(const Item& item, u32 blocks) {
        aimed_left = 0;
        if (item.matrix == nullptr) return;
        const Matrix& matrix = *item.matrix;
        u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % WAYS;
        // Rows past the end are read from the last one and never written.
        u32 last = matrix.rows - 1, first = item.row + threadIdx.x / WARP / WAYS * TILE_ROWS + lane / 4, own = first + lane % 4 / 2 * 8, second = first + 8;
        first = first < last ? first : last, second = second < last ? second : last;
        codes = matrix.codes + warp * 64 + lane % 4 * 16 + (size_t)first * blocks * 32;
        lower = (second - first) * blocks * 32;
        scale_index = (own < last ? own : last) * blocks + warp * UNIT_BLOCKS + lane % 2;
        scale_at = matrix.scales + (size_t)scale_index * Format::SCALE_BYTES;
        nested = matrix.nested;
        aimed_left = (int)(blocks - warp * UNIT_BLOCKS);
    }
    __device__ __forceinline__ void advance() {
        codes += HELD * STEP * 32;
        scale_at += HELD * STEP * Format::SCALE_BYTES, scale_index += HELD * STEP;
        aimed_left -= HELD * STEP;
    }
    // A bit of the lane's number: it stands in the address of the lane's table, so it costs no register.
    __device__ __forceinline__ int lane_bit(u32 bit) const { return (int)(((size_t)own_table >> (2 + bit)) & 1u); }
    __device__ __forceinline__ void fetch(u32 slot, u32) {
        if (aimed_left - (int)(slot * STEP) > lane_bit(1)) {
            start_copy<16>(own_copies + slot * UNIT_BYTES, codes + slot * STEP * 32);
            start_copy<16>(own_copies + slot * UNIT_BYTES + 8 * 32, codes + lower + slot * STEP * 32);
        }
        end_copies();
        Format::load_scale(aimed_left - (int)(slot * STEP) > lane_bit(0), scale_at + slot * STEP * Format::SCALE_BYTES, nested,
                           scale_index + slot * STEP, scales[slot]);
    }
    __device__ __forceinline__ void begin(Work<Format, TILES>& work) {
        offset = work.item.matrix->offset;
        u32 warp = threadIdx.x / WARP % WAYS;
        blocks_left = (int)(work.blocks - warp * UNIT_BLOCKS);
#pragma unroll
        for (u32 tile = 0; tile < TILES; tile++) work.own.x[tile] += warp * UNIT_BLOCKS * BLOCK_COLUMNS;
    }
    __device__ __forceinline__ void turn(u32 slot, Work<Format, TILES>& work) {
        wait_for_copies<HELD - 1>();
        __syncwarp();
        if (blocks_left > (int)(slot * STEP)) multiply_unit(slot, work);
        __syncwarp();
        fetch(slot, 0);
    }
    __device__ __forceinline__ void pass(Work<Format, TILES>& work) {
        blocks_left -= HELD * STEP;
#pragma unroll
        for (u32 tile = 0; tile < TILES; tile++) work.own.x[tile] += HELD * STEP * BLOCK_COLUMNS;
    }
    __device__ __forceinline__ void multiply_unit(u32 slot, Work<Format, TILES>& work) {
        u32 word = Format::word(scales[slot], work.map, offset);
#pragma unroll
        for (u32 half = 0; half < UNIT_BLOCKS; half++) {
            if (blocks_left <= (int)(slot * STEP + half)) break;
            u32 upper_word = __shfl_sync(ALL_LANES, word, half, 4), lower_word = __shfl_sync(ALL_LANES, word, 2 + half, 4);
            typename Format::Held held;
            Format::take(own_codes + slot * UNIT_BYTES + half * (UNIT_BYTES / 2), held);
            Factors factors;
            Format::decode_own(held, own_table, factors);
            float upper[Format::GROUPS], lower[Format::GROUPS];
#pragma unroll
            for (u32 i = 0; i < Format::GROUPS; i++) {
                upper[i] = Format::spread(upper_word, i);
                lower[i] = Format::spread(lower_word, i);
            }
            multiply_factors<Format, TILES>(factors, upper, lower, work.own, slot * STEP + half, work.sums,
                                                  work.count);
        }
    }
};

#if defined(BULKHEAD_HALF)
template <class Format, u32 TILES, u32 WAYS> struct PipeOf : RegisterPipe<Format, TILES, WAYS> {
    using RegisterPipe<Format, TILES, WAYS>::RegisterPipe;
};
#else
template <class Format, u32 TILES, u32 WAYS> struct PipeOf : SharedPipe<Format, TILES, WAYS> {
    using SharedPipe<Format, TILES, WAYS>::SharedPipe;
};
template <u32 TILES, u32 WAYS> struct PipeOf<Bf16, TILES, WAYS> : RegisterPipe<Bf16, TILES, WAYS> {
    using RegisterPipe<Bf16, TILES, WAYS>::RegisterPipe;
};
#endif
