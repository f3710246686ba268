// The core of a prompt's products for compute capability 9.0a: wgmma with weights decoded to registers.
//
// A block of two warpgroups takes 128 rows of a weight, 64 each, and TOKENS activations, all columns in ascending order,
// 64 at a time. Activations are copied to shared memory, four blocks deep; 4-bit weights go from memory to registers,
// where the next block's are decoded as in matmul.cuh while the tensor cores multiply this one's. bf16 weights are copied
// to shared memory beside the activations.
//
// Every element is one chain of products over ascending columns, so no tile, no TOKENS and no other token changes a bit of
// it. The bits are not those of matmul.cuh: a card runs all its prompts with one of the two.

#pragma once

#include "choice.cuh"
#include "matmul.cuh"
#include "wgmma.cuh"

constexpr u32 WIDE_THREADS = 256;
constexpr u32 WIDE_STAGES = 4;
constexpr u32 GROUP_ROWS = 64;
// Activations of a piece: of most, and of the last ones of a group.
constexpr u32 WIDE_TOKENS = 256;
constexpr u32 MIDDLE_TOKENS = 128;
constexpr u32 NARROW_TOKENS = 64;
// Tiles lie on multiples of this, as the exchange of chunks asks.
constexpr u32 TILE_ALIGNMENT = 1024;

template <class Format, u32 TOKENS> struct Wide {
    static constexpr bool IS_BF16 = Format::TABLE_BYTES == 0;
    static constexpr u32 TOKEN_BYTES = TOKENS * BLOCK_COLUMNS * 2;
    static constexpr u32 STAGE_BYTES = TOKEN_BYTES + (IS_BF16 ? ROW_TILE_BYTES : 0);
    static constexpr u32 COPIES = TOKENS * MATMUL_CHUNKS / WIDE_THREADS;
    static constexpr u32 ROW_COPIES = MATMUL_ROWS * MATMUL_CHUNKS / WIDE_THREADS;
};

// Which of its 128 rows stands in row 0 to 127 of the products. Where gate and up are wanted by one lane they stand
// eight rows apart, else rows stand as they are.
template <Neighbours NEIGHBOURS> __device__ __forceinline__ u32 row_of_place(u32 place) {
    if (NEIGHBOURS == Neighbours::Four) return place;
    return place / 16 * 16 + place % 8 * 2 + place / 8 % 2;
}

// 64 weights of a lane's two rows, rows apart by 8 in the products, while they are on their way.
struct HeldPair {
    uint4 codes[2][2];
    u32 scale[2];
    float nested[2];
};

// A thread's place in a piece.
template <class Format, u32 TOKENS> struct WideHands {
    const Matrix* matrix;
    const bf16* activations;
    u32 columns;
    u32 base;                             // the piece's first row
    u32 rows[Wide<Format, TOKENS>::COPIES];  // which activations
    u32 first[2];                         // indices of the lane's rows' first blocks
};

template <class Format, u32 TOKENS, class Job>
__device__ __forceinline__ void copy_wide(const WideHands<Format, TOKENS>& hands, u32 block, u32 blocks, u8* shared) {
    using Own = Wide<Format, TOKENS>;
    if (block < blocks) {
        u32 chunk = threadIdx.x % MATMUL_CHUNKS, line = threadIdx.x / MATMUL_CHUNKS;
        u32 column = block * BLOCK_COLUMNS + chunk * CHUNK_FACTORS;
        u8* to = shared + block % WIDE_STAGES * Own::STAGE_BYTES;
#pragma unroll
        for (u32 i = 0; i < Own::COPIES; i++) {
            copy_chunk(to + chunk_offset<MATMUL_CHUNKS>(line + i * 32, chunk),
                       hands.activations + (size_t)hands.rows[i] * hands.columns + column, true);
        }
        if (Own::IS_BF16) {
            const u32 last = hands.matrix->rows - 1;
#pragma unroll
            for (u32 i = 0; i < Own::ROW_COPIES; i++) {
                u32 place = line + i * 32, row = hands.base + row_of_place<Job::NEIGHBOURS>(place);
                row = row < last ? row : last;
                copy_chunk(to + Own::TOKEN_BYTES + chunk_offset<MATMUL_CHUNKS>(place, chunk),
                           (const bf16*)hands.matrix->codes + (size_t)row * hands.columns + column, true);
            }
        }
    }
    end_copies();
}

template <class Format, u32 TOKENS>
__device__ __forceinline__ void load_pair(const WideHands<Format, TOKENS>& hands, u32 block, u32 blocks, HeldPair& held) {
    if (block >= blocks) return;
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        size_t index = hands.first[i] + block;
        const uint4* codes = (const uint4*)(hands.matrix->codes + index * 32);
        held.codes[i][0] = codes[0];
        held.codes[i][1] = codes[1];
        HeldRow row = {};
        Decoder<Format>::load_scale(*hands.matrix, index, row);
        held.scale[i] = row.scale, held.nested[i] = row.nested;
    }
}

// Decodes a lane's share of its rows: of each word of eight codes the byte of its number in the quad, which is the pair
// of columns that multiply_tile's places ask for.
template <class Format>
__device__ __forceinline__ void decode_pair(const HeldPair& held, const float* map, float offset, u32 (&factors)[4][4]) {
    const u32 member = threadIdx.x % 4, own = member | (member + 4) << 4;
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        HeldRow row = {};
        row.scale = held.scale[i], row.nested = held.nested[i];
        Values values;
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            if (half < Format::GROUPS) scale_values_to<Format>(values, Decoder<Format>::scale(row, half, map, offset));
            uint4 four = held.codes[i][half];
            u32 word = pick_bytes(pick_bytes(four.x, four.y, own), pick_bytes(four.z, four.w, own), 0x5410u);
            uint4 pairs = decode_word<Format::HIGH_FIRST>(values, word);
            factors[2 * half][i] = pairs.x, factors[2 * half][i + 2] = pairs.y;
            factors[2 * half + 1][i] = pairs.z, factors[2 * half + 1][i + 2] = pairs.w;
        }
    }
}

// Starts the products of a block.
template <class Format, u32 TOKENS>
__device__ __forceinline__ void multiply_stage(const u8* stage, u32 (&factors)[4][4], float (&sums)[TOKENS / 2]) {
    using Own = Wide<Format, TOKENS>;
    u64 tokens = tile_descriptor(stage);
    u64 rows = tile_descriptor(stage + Own::TOKEN_BYTES + threadIdx.x / 128 * GROUP_ROWS * 128);
    begin_products();
#pragma unroll
    for (u32 step = 0; step < 4; step++) {
        // 16 columns are 32 bytes, and addresses are told in 16 bytes.
        if (Own::IS_BF16) multiply_wide(sums, rows + 2 * step, tokens + 2 * step);
        else multiply_wide(sums, factors[step], tokens + 2 * step);
    }
    close_products();
}

template <class Format, u32 TOKENS, class Job> struct WidePiece {
    const WideHands<Format, TOKENS>& hands;
    u8* shared;
    const float* map;
    u32 blocks;
    HeldPair held;

    // Multiplies a block by the factors `now` and decodes the next one's to `next`. The products of the block before are
    // complete when its factors are overwritten, and those of the one before that when its stage is.
    __device__ __forceinline__ void advance(u32 block, u32 (&now)[4][4], u32 (&next)[4][4], float (&sums)[TOKENS / 2]) {
        wait_for_copies<1>();
        show_to_tensor_cores();
        __syncthreads();
        copy_wide<Format, TOKENS, Job>(hands, block + 2, blocks, shared);
        multiply_stage<Format, TOKENS>(shared + block % WIDE_STAGES * Wide<Format, TOKENS>::STAGE_BYTES, now, sums);
        wait_for_products<1>();
        if (!Wide<Format, TOKENS>::IS_BF16 && block + 1 < blocks) {
            decode_pair<Format>(held, map, hands.matrix->offset, next);
            load_pair(hands, block + 2, blocks, held);
        }
    }

    __device__ __forceinline__ void multiply(float (&sums)[TOKENS / 2]) {
        u32 even[4][4] = {}, odd[4][4] = {};
        copy_wide<Format, TOKENS, Job>(hands, 0, blocks, shared);
        copy_wide<Format, TOKENS, Job>(hands, 1, blocks, shared);
        if (!Wide<Format, TOKENS>::IS_BF16) {
            load_pair(hands, 0, blocks, held);
            decode_pair<Format>(held, map, hands.matrix->offset, even);
            load_pair(hands, 1, blocks, held);
        }
        // Without this the compiler sets a sum to zero between two products, and so makes each wait for the one before.
        if (Wide<Format, TOKENS>::IS_BF16) pin(sums);
        for (u32 block = 0; block < blocks; block += 2) {
            advance(block, even, odd, sums);
            if (block + 1 < blocks) advance(block + 1, odd, even, sums);
        }
        wait_for_products<0>();
        pin(sums);
    }
};

// Where a block keeps what all its pieces use: after the stages of the largest.
template <class Format, u32 MOST> struct WideRoom {
    u8* stages;

    // The values of nested scales' codes.
    __device__ __forceinline__ float* map() const {
        return (float*)(stages + WIDE_STAGES * Wide<Format, MOST>::STAGE_BYTES);
    }
    // Where the results of the piece's tokens go; ~0 for none.
    __device__ __forceinline__ u32* slots() const { return (u32*)map() + 256; }
    __device__ __forceinline__ u32* lists() const { return slots() + MOST; }
};

template <class Format, u32 TOKENS, u32 MOST, class Job>
__device__ __forceinline__ void run_piece(const Job& job, const Piece& piece, u32 columns, const WideRoom<Format, MOST>& room) {
    // The room of the piece before is read by other warps until here, and the map is written.
    __syncthreads();
    if (threadIdx.x < TOKENS) {
        u32 token = piece.token + threadIdx.x;
        room.slots()[threadIdx.x] = token < piece.count ? job.slot(piece, token) : ~0u;
    }
    const u32 last = piece.matrix->rows - 1;
    WideHands<Format, TOKENS> hands{piece.matrix, job.activations, columns, piece.row};
#pragma unroll
    for (u32 i = 0; i < Wide<Format, TOKENS>::COPIES; i++) {
        u32 token = piece.token + threadIdx.x / MATMUL_CHUNKS + i * 32;
        // Tokens past the end are read from the last one and never written.
        hands.rows[i] = job.activation(piece, token < piece.count ? token : piece.count - 1);
    }
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        u32 place = threadIdx.x / WARP * 16 + threadIdx.x % WARP / 4 + i * 8;
        u32 row = piece.row + row_of_place<Job::NEIGHBOURS>(place);
        hands.first[i] = (row < last ? row : last) * (columns / BLOCK_COLUMNS);
    }
    float sums[TOKENS / 2] = {};
    WidePiece<Format, TOKENS, Job> work{hands, room.stages, room.map(), columns / BLOCK_COLUMNS, {}};
    work.multiply(sums);
    job.store(piece, room.slots(), sums, room.stages);
}

// Which pieces a group's activations are cut into: of MOST, and its last ones of the smallest width that holds them.
template <u32 MOST> struct Cut {
    u32 count;

    __device__ __forceinline__ u32 rest() const { return count % MOST; }
    // Pieces of MOST.
    __device__ __forceinline__ u32 whole() const {
        return count / MOST + (rest() > MIDDLE_TOKENS || (MOST <= MIDDLE_TOKENS && rest() > 0));
    }
    template <u32 WIDTH> __device__ __forceinline__ u32 pieces() const {
        if (WIDTH == MOST) return whole();
        if (WIDTH == MIDDLE_TOKENS) return rest() > NARROW_TOKENS && rest() <= MIDDLE_TOKENS;
        return rest() > 0 && rest() <= NARROW_TOKENS;
    }
    template <u32 WIDTH> __device__ __forceinline__ u32 token(u32 piece) const {
        return WIDTH == MOST ? piece * MOST : whole() * MOST;
    }
};

// Runs the pieces of one width, from `index` on; gives where this block goes on among the pieces of the next width.
template <u32 WIDTH, class Format, u32 MOST, class Job>
__device__ __forceinline__ u32 run_pieces(const Job& job, u32 index, u32 columns, const WideRoom<Format, MOST>& room) {
    const u32 total = job.template pieces<WIDTH>();
    for (; index < total; index += gridDim.x) {
        run_piece<Format, WIDTH, MOST>(job, job.template piece<WIDTH>(index), columns, room);
    }
    return index - total;
}

// Runs a job's pieces in this block, a loop for each width: in one loop their registers add up. A Job says: `NEIGHBOURS`,
// `prepare(room)` once, for each width `pieces()` and `piece(index)`, `activation(piece, token)`, `slot(piece, token)`
// where a token's result goes, and `store(piece, slots, sums, stage)` with the slots of the piece's tokens, the lane's sums and
// room in shared memory for results.
template <class Format, u32 MOST, class Job>
__device__ __forceinline__ void run_wide(Job job, u32 columns, const float* scale_values) {
    SHARED_BYTES(bytes);
    const u32 past = (u32)__cvta_generic_to_shared(bytes) % TILE_ALIGNMENT;
    const WideRoom<Format, MOST> room{bytes + (TILE_ALIGNMENT - past) % TILE_ALIGNMENT};
    let_next_start();
    if (Format::NESTED) room.map()[threadIdx.x] = scale_values[threadIdx.x];
    wait_for_previous();
    job.prepare(room.lists());
    u32 index = run_pieces<MOST>(job, blockIdx.x, columns, room);
    if (MOST > MIDDLE_TOKENS) index = run_pieces<MIDDLE_TOKENS>(job, index, columns, room);
    if (MOST > NARROW_TOKENS) run_pieces<NARROW_TOKENS>(job, index, columns, room);
}

// Activations of all experts, cut for each expert apart. The lists of pieces stand one after the other in shared memory.
template <u32 MOST> struct WideGroupedJob : GroupedJob {
    static constexpr u32 LIST = EXPERTS_MAX + 1;

    template <u32 WIDTH> __device__ static __forceinline__ u32 list() {
        return WIDTH == MOST ? 0 : WIDTH == MIDDLE_TOKENS ? LIST : 2 * LIST;
    }
    __device__ __forceinline__ u32 count(u32 group) const { return firsts[group + 1] - firsts[group]; }
    __device__ __forceinline__ void prepare(u32* room) {
        for (u32 group = threadIdx.x; group <= groups; group += blockDim.x) {
            u32 most = 0, middle = 0, narrow = 0;
            for (u32 i = 0; i < group; i++) {
                Cut<MOST> cut{count(i)};
                most += cut.whole();
                if (MOST > MIDDLE_TOKENS) middle += cut.template pieces<MIDDLE_TOKENS>();
                if (MOST > NARROW_TOKENS) narrow += cut.template pieces<NARROW_TOKENS>();
            }
            room[group] = most, room[LIST + group] = middle, room[2 * LIST + group] = narrow;
        }
        __syncthreads();
        piece_firsts = room;
    }
    template <u32 WIDTH> __device__ __forceinline__ u32 pieces() const {
        return piece_firsts[list<WIDTH>() + groups] * row_pieces;
    }
    template <u32 WIDTH> __device__ __forceinline__ Piece piece(u32 index) const {
        u32 own = index / row_pieces, group = group_of(piece_firsts + list<WIDTH>(), own);
        u32 token = Cut<MOST>{count(group)}.template token<WIDTH>(own - piece_firsts[list<WIDTH>() + group]);
        return Piece{matrices + experts[group], (index - own * row_pieces) * MATMUL_ROWS, group, token, count(group)};
    }
};

// Writes sums as f32: a lane's eight neighbours in the warp have the rows beside its own, 32 bytes of a token.
template <u32 COUNT>
__device__ __forceinline__ void store_wide(const Piece& piece, const u32* slots, const float (&sums)[COUNT], float* out,
                                           u32 stride) {
    const Matrix& matrix = *piece.matrix;
    u32 row = piece.row + threadIdx.x / WARP * 16 + threadIdx.x % WARP / 4, member = threadIdx.x % 4;
#pragma unroll
    for (u32 i = 0; i < 2; i++, row += 8) {
        if (row >= matrix.rows) continue;
        float bias = matrix.bias != nullptr ? matrix.bias[row] : 0.0f;
#pragma unroll
        for (u32 j = 0; j < COUNT / 2; j++) {
            u32 slot = slots[j / 2 * 8 + member * 2 + j % 2];
            if (slot != ~0u) out[(size_t)slot * stride + row] = sums[j / 2 * 4 + i * 2 + j % 2] + bias;
        }
    }
}
