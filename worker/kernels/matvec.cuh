// The product of a few activations with a 4-bit or bf16 weight: the core of matvec.cu and moe.cu.
//
// A block of 256 threads takes 16 rows at a time, or 32: WAYS of its eight warps, 8 or 4, share the columns of 16 rows, a
// unit at a time, warp w taking units w, w + WAYS and so on; their sums are added in the order of the warps. Activations are the columns of the tensor
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

#include "pipe.cuh"

// Activations in shared memory stand apart by this many more elements than they are long: no bank conflicts.
constexpr u32 STAGE_PADDING = 8;

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

// Blocks of a kernel that a multiprocessor is to hold: registers are given out by it. On 12.0 its shared memory has no room
// for three, and their share of the registers would be too small.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr u32 BLOCKS_HELD_MOST = 2;
#else
constexpr u32 BLOCKS_HELD_MOST = 3;
#endif
template <class Format, u32 TILES>
constexpr u32 BLOCKS_HELD =
    TILES == 4 ? 1 : TILES == 1 && PipeOf<Format, TILES, 1>::WARP_BYTES != 0 ? BLOCKS_HELD_MOST : 2;

// Sums of the warps: two sets, taken in turn, where they are small, so that one barrier an item is enough.
template <u32 TILES> constexpr u32 SUM_BYTES = TILES * 8 * TILE_ROWS * MATVEC_WARPS * 4;
template <u32 TILES> constexpr u32 SUM_SETS = TILES == 1 ? 2 : 1;

// Puts a warp's sums where the others see them after a barrier: [warp][column][row].
template <class Format, u32 TILES>
__device__ __forceinline__ void show_sums(const Sums<Format, TILES>& sums, u32 count, float* slots) {
    u32 lane = threadIdx.x % WARP, row = lane / 4, column = lane % 4 * 2;
    float* own = slots + threadIdx.x / WARP * (TILES * 8 * TILE_ROWS);
#pragma unroll
    for (u32 tile = 0; tile < TILES; tile++) {
        if (tile * 8 + column >= count) break;
        float* at = own + (tile * 8 + column) * TILE_ROWS + row;
        at[0] = sums.value[tile][0];
        at[TILE_ROWS] = sums.value[tile][1];
        at[8] = sums.value[tile][2];
        at[TILE_ROWS + 8] = sums.value[tile][3];
    }
}

// The rows' biases that a thread is to add: of each tile of rows that it collects.
template <u32 TILES, u32 WAYS> struct Biases {
    // With one tile of activations the block's threads are enough for all tiles of rows at once.
    static constexpr u32 COUNT = TILES == 1 ? 1 : MATVEC_WARPS / WAYS;
    float value[COUNT];
    template <class Job> __device__ __forceinline__ Biases(const Job& job, const Item& item) {
#pragma unroll
        for (u32 i = 0; i < COUNT; i++) value[i] = job.bias(item, row(i));
    }
    __device__ static __forceinline__ u32 row(u32 i) {
        return (TILES == 1 ? threadIdx.x / (8 * TILE_ROWS) : i) * TILE_ROWS + threadIdx.x % TILE_ROWS;
    }
};

// Adds up the warps' sums and hands them to the job: of each tile of rows, thread 16 * c + r has row r of column c.
template <u32 TILES, u32 WAYS, class Job>
__device__ __forceinline__ void collect_sums(const Job& job, const Item& item, u32 count, const Biases<TILES, WAYS>& biases,
                                             const float* slots) {
    constexpr u32 SIZE = TILES * 8 * TILE_ROWS;
#pragma unroll
    for (u32 i = 0; i < Biases<TILES, WAYS>::COUNT; i++) {
        u32 row = Biases<TILES, WAYS>::row(i);
        if (row >= ITEM_ROWS<WAYS>) break;
        const float* own = slots + row / TILE_ROWS * WAYS * SIZE;
#pragma unroll 1
        for (u32 at = TILES == 1 ? threadIdx.x % SIZE : threadIdx.x; at < SIZE; at += MATVEC_WARPS * WARP) {
            // A warp has two columns: it goes on as a whole.
            if (at / WARP * 2 >= count) break;
            u32 column = at / TILE_ROWS;
            float total = 0;
#pragma unroll
            for (u32 way = 0; way < WAYS; way++) total += own[way * SIZE + at];
            job.template put<1>(item, item.first_column + column, row, total + biases.value[i], column < count);
        }
    }
}

// The first item of a block's share where all cost alike: neighbours, and the blocks of a multiprocessor have alike many.
__device__ __forceinline__ u32 even_share(u32 items, u32 block) {
    u32 all = items / gridDim.x, more = items % gridDim.x;
    return block * all + (block < more ? block : more);
}

// The item after one, whose number is `index`: the same rows for the group's next activations, or the next rows.
template <u32 TILES, class Job> __device__ __forceinline__ Item next_item(const Job& job, Item item, u32& index, u32 end) {
    item.first_column += TILES * 8;
    if (item.first_column < job.columns(item.group)) return item;
    if (++index >= end) return Item{};
    if (item.row + ITEM_ROWS<Job::WAYS> >= job.rows(item)) return job.item(index);
    item.row += ITEM_ROWS<Job::WAYS>;
    item.first_column = 0;
    return item;
}

// What a block needs now and then: in registers it would lie through the whole product.
struct Plan {
    Item items[2];  // at hand, taken in turn
    u32 end;        // of the block's share
};

// The activations in shared memory: all of a group's, or none, so that a block that takes them a piece at a time does not
// bring them again and again.
struct Stage {
    bf16* rows;
    u32 room;   // for this many
    u32 group;  // whose they are
    u32 alone;  // which row of activations is the only one, or ~0: another group may read the same

    // Brings the activations of an item's group, where there is room. Says whether they are here; a piece of them begins
    // at its first column.
    template <class Job> __device__ __forceinline__ bool hold(const Job& job, const Item& item, u32 columns) {
        u32 count = job.columns(item.group);
        if (count > room) return false;
        if (group == item.group) return true;
        u32 first = job.source(item.group, 0);
        group = item.group;
        if (count == 1 && alone == first) return true;
        alone = count == 1 ? first : ~0u;
        // Asked for at once, not row after row: the wait is one trip to memory. The weights on their way are waited for too.
        for (u32 column = 0; column < count; column++) {
            const bf16* from = job.x(item.group, column);
            bf16* to = rows + column * (columns + STAGE_PADDING);
            for (u32 i = threadIdx.x * 8; i < columns; i += blockDim.x * 8) start_copy<16>(near_of(to + i), from + i);
        }
        end_copies();
        wait_for_copies<0>();
        __syncthreads();
        return true;
    }
};

// Activations of an item's piece.
template <u32 TILES, class Job> __device__ __forceinline__ u32 count_columns(const Job& job, const Item& item) {
    u32 rest = job.columns(item.group) - item.first_column;
    return rest < TILES * 8 ? rest : TILES * 8;
}

// Multiplies an item and starts to fetch the next one; `aim` has been called for the item, and its first units are held.
template <u32 WAYS, class Format, u32 TILES>
__device__ __forceinline__ void multiply_item(PipeOf<Format, TILES, WAYS>& pipe, Work<Format, TILES>& work,
                                              const Item& next) {
    using Pipe = PipeOf<Format, TILES, WAYS>;
    constexpr u32 ROUND = WAYS * Pipe::HELD * Pipe::UNIT_BLOCKS;
    pipe.begin(work);
    work.sums = {};
    for (u32 done = 0; done < work.blocks; done += ROUND) {
        if (done + ROUND < work.blocks) {
            pipe.advance();
        } else {
            pipe.aim(next, work.blocks);
        }
#pragma unroll
        for (u32 i = 0; i < Pipe::HELD; i++) pipe.turn(i, work);
        pipe.pass(work);
    }
}

// Runs a job's items in this block. A Job says: `touch()` before the wait, `prepare()` before its items are asked for,
// `share<TILES>(block, room)` the first item of a block's share, `item(index)`, `rows(item)` of its matrix, `columns(group)`, `source(group,
// column)` which row of activations and `x(group, column)` the row itself, `bias(item, row)`, `put<D>(item, column, row,
// value, is_real)`, called by whole warps in which the neighbour of an even row is D lanes away, and whether its items
// are known before the kernels before this one are done.
template <class Format, u32 TILES, class Job>
__device__ __forceinline__ void run_matvec(Job& job, u32 columns, const float* scale_values, u32 stage_columns) {
    constexpr u32 WAYS = Job::WAYS;
    using Pipe = PipeOf<Format, TILES, WAYS>;
    SHARED_BYTES(shared);
    __shared__ Plan plan;
    float* map = (float*)(shared + Format::TABLE_BYTES);
    u8* room = (u8*)map + SCALE_MAP_BYTES;
    float* slots = (float*)(room + MATVEC_WARPS * Pipe::WARP_BYTES);
    Stage stage{(bf16*)((u8*)slots + SUM_SETS<TILES> * SUM_BYTES<TILES>), stage_columns, ~0u, ~0u};
    const u32 warp = threadIdx.x / WARP, group = threadIdx.x % WARP / 4;

    if (Job::KNOWN_BEFORE) let_next_start();
    job.touch();
    if (!Job::KNOWN_BEFORE) {
        fill_tables<Format>((u32*)shared, map, scale_values);
        wait_for_previous();
        let_next_start();
    }
    job.prepare();
    u32 index = job.template share<TILES>(blockIdx.x, stage_columns);
    const u32 end = job.template share<TILES>(blockIdx.x + 1, stage_columns);
    if (threadIdx.x == 0) plan.end = end;
    Pipe pipe(room + warp * Pipe::WARP_BYTES, (const u32*)shared);
    Work<Format, TILES> work{(const u32*)shared, map, columns / BLOCK_COLUMNS,
                            index < end ? job.item(index) : Item{}, 0, {}, {}};
    pipe.aim(work.item, work.blocks);
#pragma unroll
    for (u32 i = 0; i < Pipe::HELD; i++) pipe.fetch(i, work.blocks);
    if (Job::KNOWN_BEFORE) {
        fill_tables<Format>((u32*)shared, map, scale_values);
        wait_for_previous();
    }
    __syncthreads();

    for (u32 turn = 0; work.item.matrix != nullptr; turn++) {
        Item next = next_item<TILES>(job, work.item, index, plan.end);
        u32 first_column = work.item.first_column;
        work.count = count_columns<TILES>(job, work.item);
        if (threadIdx.x == 0) plan.items[turn % 2] = work.item;
        // Asked for now: at the end it would be waited for.
        Biases<TILES, WAYS> biases(job, work.item);
        // Two copies of the product, so that the compiler knows where the activations are. A lane without an activation
        // takes another's: what it multiplies is not looked at.
        if (stage.hold(job, work.item, columns)) {
#pragma unroll
            for (u32 tile = 0; tile < TILES; tile++) {
                u32 column = first_column + (tile * 8 + group < work.count ? tile * 8 + group : 0);
                work.own.x[tile] = stage.rows + column * (columns + STAGE_PADDING);
            }
            multiply_item<WAYS, Format, TILES>(pipe, work, next);
        } else {
#pragma unroll
            for (u32 tile = 0; tile < TILES; tile++) {
                u32 column = first_column + (tile * 8 + group < work.count ? tile * 8 + group : 0);
                work.own.x[tile] = job.x(work.item.group, column);
            }
            multiply_item<WAYS, Format, TILES>(pipe, work, next);
        }
        work.item = next;
        float* own = slots + turn % SUM_SETS<TILES> * (SUM_BYTES<TILES> / 4);
        show_sums<Format, TILES>(work.sums, work.count, own);
        __syncthreads();
        Item item = plan.items[turn % 2];
        collect_sums<TILES, WAYS>(job, item, count_columns<TILES>(job, item), biases, own);
        if (SUM_SETS<TILES> == 1) __syncthreads();
    }
}
