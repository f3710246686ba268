// The product of a few activations with a 4-bit or bf16 weight: the core of matvec.cu and moe.cu.
//
// A block of 256 threads takes 16 rows at a time; its eight warps share the columns, a unit at a time, warp w taking units
// w, w + 8, w + 16 and so on; their sums are added in the order of the warps. Activations are the columns of the tensor
// cores' tiles, eight to a tile: a column's sum is the same bits whatever stands in the others, so a token's result is
// the same alone and among many. More activations than a kernel's tiles hold are taken a piece at a time.
//
// Weights are fetched well before they are multiplied, the next rows' while these are (see Pipe). A block's rows are
// neighbours, so that it meets few groups of activations and keeps them in shared memory where there is room.
//
// Shared memory: pair table, scale map, the pipe's, sums of the warps, and room for `stage_columns` activations:
//   bytes = TABLE_BYTES + 1024 + pipe + (TILES = 4 ? 16384 : 8192) + stage_columns * (columns + 8) * 2
// where the pipe takes 8 * SHARED_DEPTH * 1024 for 4-bit formats from 8.0 on and else nothing.

#pragma once

#include "formats.cuh"

constexpr u32 MATVEC_WARPS = 8;
constexpr u32 MATVEC_ROWS = 16;
// Activations in shared memory stand apart by this many more elements than they are long: no bank conflicts.
constexpr u32 STAGE_PADDING = 8;

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

// Multiplies one block's factors with every tile's activations; a row's products count by the scale of their group.
template <class Format, u32 TILES>
__device__ __forceinline__ void multiply_factors(const Factors& factors, const float (&upper)[Format::GROUPS],
                                                 const float (&lower)[Format::GROUPS], const Columns<TILES>& columns,
                                                 u32 block, Sums<Format, TILES>& sums) {
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
                                               const Columns<TILES>& columns, u32 block, Sums<Format, TILES>& sums) {
    Factors factors;
    float row_scales[2] = {1.0f, 1.0f}, upper[Format::GROUPS], lower[Format::GROUPS];
    Format::decode(held, table, factors, row_scales);
#pragma unroll
    for (u32 group = 0; group < Format::GROUPS; group++) {
        upper[group] = Format::scale(held, 0, group, source, indices[0] + block) * row_scales[0];
        lower[group] = Format::scale(held, 1, group, source, indices[1] + block) * row_scales[1];
    }
    multiply_factors<Format, TILES>(factors, upper, lower, columns, block, sums);
}

// What a warp multiplies: the tables, how long the rows are, the item at hand, its activations and the sums so far.
template <class Format, u32 TILES> struct Work {
    const u32* table;
    const float* map;
    u32 blocks;
    Item item;
    Columns<TILES> own;
    Sums<Format, TILES> sums;
};

// How weights come to a warp. `aim` says of which item to fetch, `fetch` starts to load a unit of it, `begin` says that
// the item is now multiplied, `turn` multiplies the unit in a slot and fetches another one into it.
//
// Through registers: a lane holds its own share. For bf16, and on Turing, whose shared memory has no room.
template <class Format, u32 TILES> struct RegisterPipe {
    static constexpr u32 UNIT_BLOCKS = 1;
    static constexpr u32 HELD = DEPTH<Format, TILES>;
    static constexpr u32 WARP_BYTES = 0;
    typename Format::Held held[HELD];
    Item aimed;
    ScaleSource source;
    size_t indices[2];

    __device__ __forceinline__ explicit RegisterPipe(u8*) : held{} {}
    __device__ __forceinline__ void aim(const Item& item, u32) { aimed = item; }
    __device__ __forceinline__ void fetch(u32 slot, u32 unit, u32 blocks) {
        load_block<Format>(aimed, unit, blocks, held[slot]);
    }
    __device__ __forceinline__ void begin(const Work<Format, TILES>& work) {
        const Matrix& matrix = *work.item.matrix;
        source = ScaleSource{work.map, matrix.nested, matrix.offset};
        u32 last = matrix.rows - 1, first = work.item.row + threadIdx.x % WARP / 4;
        indices[0] = (size_t)(first < last ? first : last) * work.blocks;
        indices[1] = (size_t)(first + 8 < last ? first + 8 : last) * work.blocks;
    }
    __device__ __forceinline__ void turn(u32 slot, u32 unit, u32 next, Work<Format, TILES>& work) {
        typename Format::Held now = held[slot];
        fetch(slot, next, work.blocks);
        if (unit < work.blocks) {
            multiply_block<Format, TILES>(now, work.table, source, indices, work.own, unit, work.sums);
        }
    }
};

// Units of two blocks that a warp of SharedPipe holds.
#if !defined(SHARED_DEPTH)
#define SHARED_DEPTH 3
#endif
constexpr u32 UNIT_BYTES = 2 * MATVEC_ROWS * 32;

// Through shared memory, copied past the registers: 4-bit codes [block of the unit][row][32 bytes], 16 bytes a lane and
// copy, so that a unit's row is 64 bytes in one place. A lane keeps one scale of a unit, of row lane / 2 and block lane % 2,
// and restores it for all.
template <class Format, u32 TILES> struct SharedPipe {
    static constexpr u32 UNIT_BLOCKS = 2;
    static constexpr u32 HELD = SHARED_DEPTH;
    static constexpr u32 WARP_BYTES = HELD * UNIT_BYTES;
    typename Format::Scale scales[HELD];
    u8* slots;
    const u8* codes[2];
    const u8* aimed_scales;
    const float* aimed_nested;
    u32 scale_index;
    float offset;

    __device__ __forceinline__ explicit SharedPipe(u8* room) : scales{}, slots(room) {}
    __device__ __forceinline__ void aim(const Item& item, u32 blocks) {
        codes[0] = nullptr;
        if (item.matrix == nullptr) return;
        u32 lane = threadIdx.x % WARP, last = item.matrix->rows - 1, first = item.row + lane / 4, own = item.row + lane / 2;
        // Rows past the end are read from the last one and never written.
        const u8* base = item.matrix->codes + lane % 4 * 16;
        codes[0] = base + (size_t)(first < last ? first : last) * blocks * 32;
        codes[1] = base + (size_t)(first + 8 < last ? first + 8 : last) * blocks * 32;
        aimed_scales = item.matrix->scales;
        aimed_nested = item.matrix->nested;
        scale_index = (own < last ? own : last) * blocks + lane % 2;
    }
    __device__ __forceinline__ void fetch(u32 slot, u32 unit, u32 blocks) {
        u32 lane = threadIdx.x % WARP;
        if (codes[0] != nullptr && 2 * unit + lane % 4 / 2 < blocks) {
            u8* to = slots + slot * UNIT_BYTES + lane % 4 / 2 * (UNIT_BYTES / 2) + lane / 4 * 32 + lane % 2 * 16;
            start_copy<16>(to, codes[0] + unit * 64);
            start_copy<16>(to + 8 * 32, codes[1] + unit * 64);
        }
        end_copies();
        if (codes[0] != nullptr && 2 * unit + lane % 2 < blocks) {
            Format::load_scale(aimed_scales, aimed_nested, scale_index + 2 * unit, scales[slot]);
        }
    }
    __device__ __forceinline__ void begin(const Work<Format, TILES>& work) { offset = work.item.matrix->offset; }
    __device__ __forceinline__ void turn(u32 slot, u32 unit, u32 next, Work<Format, TILES>& work) {
        wait_for_copies<HELD - 1>();
        __syncwarp();
        if (2 * unit < work.blocks) multiply_unit(slot, unit, work);
        __syncwarp();
        fetch(slot, next, work.blocks);
    }
    __device__ __forceinline__ void multiply_unit(u32 slot, u32 unit, Work<Format, TILES>& work) {
        u32 word = Format::word(scales[slot], work.map, offset), group = threadIdx.x % WARP / 4;
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            u32 upper_word = __shfl_sync(ALL_LANES, word, group * 2 + half);
            u32 lower_word = __shfl_sync(ALL_LANES, word, group * 2 + 16 + half);
            if (2 * unit + half >= work.blocks) break;
            typename Format::Held held;
            Format::take(slots + slot * UNIT_BYTES + half * (UNIT_BYTES / 2), held);
            Factors factors;
            float row_scales[2], upper[Format::GROUPS], lower[Format::GROUPS];
            Format::decode(held, work.table, factors, row_scales);
#pragma unroll
            for (u32 i = 0; i < Format::GROUPS; i++) {
                upper[i] = Format::spread(upper_word, i);
                lower[i] = Format::spread(lower_word, i);
            }
            multiply_factors<Format, TILES>(factors, upper, lower, work.own, 2 * unit + half, work.sums);
        }
    }
};

#if defined(BULKHEAD_HALF)
template <class Format, u32 TILES> struct PipeOf : RegisterPipe<Format, TILES> {
    using RegisterPipe<Format, TILES>::RegisterPipe;
};
#else
template <class Format, u32 TILES> struct PipeOf : SharedPipe<Format, TILES> {
    using SharedPipe<Format, TILES>::SharedPipe;
};
template <u32 TILES> struct PipeOf<Bf16, TILES> : RegisterPipe<Bf16, TILES> {
    using RegisterPipe<Bf16, TILES>::RegisterPipe;
};
#endif

// Blocks of a kernel that a multiprocessor is to hold: registers are given out by it.
template <class Format, u32 TILES>
constexpr u32 BLOCKS_HELD = TILES == 4 ? 1 : TILES == 1 && PipeOf<Format, TILES>::WARP_BYTES != 0 ? 3 : 2;

// Sums of the warps: two sets, taken in turn, where they are small, so that one barrier an item is enough.
template <u32 TILES> constexpr u32 SUM_BYTES = TILES * 8 * MATVEC_ROWS * MATVEC_WARPS * 4;
template <u32 TILES> constexpr u32 SUM_SETS = TILES == 1 ? 2 : 1;

// Puts a warp's sums where the others see them after a barrier: [warp][column][row].
template <class Format, u32 TILES>
__device__ __forceinline__ void show_sums(const Sums<Format, TILES>& sums, u32 count, float* slots) {
    u32 lane = threadIdx.x % WARP, row = lane / 4, column = lane % 4 * 2;
    float* own = slots + threadIdx.x / WARP * (TILES * 8 * MATVEC_ROWS);
#pragma unroll
    for (u32 tile = 0; tile < TILES; tile++) {
        if (tile * 8 + column >= count) break;
        float* at = own + (tile * 8 + column) * MATVEC_ROWS + row;
        at[0] = sums.value[tile][0];
        at[MATVEC_ROWS] = sums.value[tile][1];
        at[8] = sums.value[tile][2];
        at[MATVEC_ROWS + 8] = sums.value[tile][3];
    }
}

// Adds up the warps' sums and hands them to the job: thread 16 * c + r has row r of column c.
template <class Format, u32 TILES, class Job>
__device__ __forceinline__ void collect_sums(const Job& job, const Item& item, u32 count, float bias, const float* slots) {
    constexpr u32 SIZE = TILES * 8 * MATVEC_ROWS;
#pragma unroll 1
    for (u32 at = threadIdx.x; at < SIZE; at += MATVEC_WARPS * WARP) {
        // A warp has two columns: it goes on as a whole.
        if (at / WARP * 2 >= count) break;
        u32 column = at / MATVEC_ROWS;
        float total = 0;
#pragma unroll
        for (u32 warp = 0; warp < MATVEC_WARPS; warp++) total += slots[warp * SIZE + at];
        job.template put<1>(item, item.first_column + column, at % MATVEC_ROWS, total + bias, column < count);
    }
}

// The block's share of a job's items: neighbours, and so that the blocks of a multiprocessor have alike many.
template <u32 TILES, class Job> struct Walk {
    u32 index;
    u32 end;
    __device__ __forceinline__ explicit Walk(const Job& job) {
        u32 items = job.items(), share = items / gridDim.x, more = items % gridDim.x;
        index = blockIdx.x * share + (blockIdx.x < more ? blockIdx.x : more);
        end = index + share + (blockIdx.x < more ? 1 : 0);
    }
    __device__ __forceinline__ Item first(const Job& job) const { return index < end ? job.item(index) : Item{}; }
    // The same rows for the group's next activations, or the next rows.
    __device__ __forceinline__ Item next(const Job& job, Item item) {
        item.first_column += TILES * 8;
        if (item.first_column < job.columns(item.group)) return item;
        index++;
        return index < end ? job.item(index) : Item{};
    }
};

// The activations in shared memory.
struct Stage {
    bf16* rows;
    u32 room;         // for this many
    u32 group;        // whose
    u32 first_column;
    const bf16* alone;  // the only one, if it is: another group may read the same

    // Brings an item's activations, where there is room for all of them. Says whether they are here.
    template <class Job>
    __device__ __forceinline__ bool hold(const Job& job, const Item& item, u32 count, u32 columns) {
        if (count > room) return false;
        if (group == item.group && first_column == item.first_column) return true;
        const bf16* first = job.x(item.group, item.first_column);
        group = item.group, first_column = item.first_column;
        if (count == 1 && alone == first) return true;
        alone = count == 1 ? first : nullptr;
        for (u32 column = 0; column < count; column++) {
            uint4* to = (uint4*)(rows + column * (columns + STAGE_PADDING));
            const uint4* from = (const uint4*)job.x(item.group, item.first_column + column);
            for (u32 i = threadIdx.x; i < columns / 8; i += blockDim.x) to[i] = from[i];
        }
        __syncthreads();
        return true;
    }
};

// Multiplies an item and starts to fetch the next one; `aim` has been called for the item, and its first units are held.
template <class Format, u32 TILES>
__device__ __forceinline__ void multiply_item(PipeOf<Format, TILES>& pipe, Work<Format, TILES>& work, const Item& next) {
    using Pipe = PipeOf<Format, TILES>;
    const u32 warp = threadIdx.x / WARP, units = (work.blocks + Pipe::UNIT_BLOCKS - 1) / Pipe::UNIT_BLOCKS;
    const u32 rounds = (units + MATVEC_WARPS * Pipe::HELD - 1) / (MATVEC_WARPS * Pipe::HELD);
    pipe.begin(work);
    work.sums = {};
    for (u32 round = 0; round < rounds; round++) {
        const bool is_last = round + 1 == rounds;
        if (is_last) pipe.aim(next, work.blocks);
        const u32 start = is_last ? 0 : (round + 1) * Pipe::HELD;
#pragma unroll
        for (u32 i = 0; i < Pipe::HELD; i++) {
            pipe.turn(i, (round * Pipe::HELD + i) * MATVEC_WARPS + warp, (start + i) * MATVEC_WARPS + warp, work);
        }
    }
}

// Runs a job's items in this block. A Job says: `prepare()`, called by all before its items are asked for, `items()` how
// many, `item(index)`, `columns(group)`, `x(group, column)` a row of activations, `bias(item, row)`, `put<D>(item, column,
// row, value, is_real)`, called by whole warps in which the neighbour of an even row is D lanes away, and whether its
// items are known before the kernels before this one are done.
template <class Format, u32 TILES, class Job>
__device__ __forceinline__ void run_matvec(Job& job, u32 columns, const float* scale_values, u32 stage_columns) {
    using Pipe = PipeOf<Format, TILES>;
    SHARED_BYTES(shared);
    float* map = (float*)(shared + Format::TABLE_BYTES);
    u8* room = (u8*)map + SCALE_MAP_BYTES;
    float* slots = (float*)(room + MATVEC_WARPS * Pipe::WARP_BYTES);
    Stage stage{(bf16*)((u8*)slots + SUM_SETS<TILES> * SUM_BYTES<TILES>), stage_columns, ~0u, 0, nullptr};
    const u32 warp = threadIdx.x / WARP, group = threadIdx.x % WARP / 4;

    if (Job::KNOWN_BEFORE) let_next_start();
    if (!Job::KNOWN_BEFORE) {
        fill_tables<Format>((u32*)shared, map, scale_values);
        wait_for_previous();
        let_next_start();
    }
    job.prepare();
    Walk<TILES, Job> walk(job);
    Pipe pipe(room + warp * Pipe::WARP_BYTES);
    Work<Format, TILES> work{(const u32*)shared, map, columns / BLOCK_COLUMNS, walk.first(job), {}, {}};
    pipe.aim(work.item, work.blocks);
#pragma unroll
    for (u32 i = 0; i < Pipe::HELD; i++) pipe.fetch(i, i * MATVEC_WARPS + warp, work.blocks);
    if (Job::KNOWN_BEFORE) {
        fill_tables<Format>((u32*)shared, map, scale_values);
        wait_for_previous();
    }
    __syncthreads();

    for (u32 set = 0; work.item.matrix != nullptr; set = (set + 1) % SUM_SETS<TILES>) {
        u32 rest = job.columns(work.item.group) - work.item.first_column, count = rest < TILES * 8 ? rest : TILES * 8;
        // Asked for now: at the end it would be waited for.
        float bias = job.bias(work.item, threadIdx.x % MATVEC_ROWS);
        bool is_staged = stage.hold(job, work.item, count, columns);
#pragma unroll
        for (u32 tile = 0; tile < TILES; tile++) {
            u32 column = tile * 8 + group;
            work.own.x[tile] = column >= count ? nullptr
                               : is_staged     ? stage.rows + column * (columns + STAGE_PADDING)
                                               : job.x(work.item.group, work.item.first_column + column);
        }
        Item item = work.item, next = walk.next(job, item);
        multiply_item<Format, TILES>(pipe, work, next);
        float* own = slots + set * (SUM_BYTES<TILES> / 4);
        show_sums<Format, TILES>(work.sums, count, own);
        __syncthreads();
        collect_sums<Format, TILES>(job, item, count, bias, own);
        if (SUM_SETS<TILES> == 1) __syncthreads();
        work.item = next;
    }
}
