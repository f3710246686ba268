// The core of a prompt's products for compute capability 9.0a: wgmma with tiles in shared memory.
//
// A block of two warpgroups takes 128 rows of a weight, 64 each, and TOKENS activations, all columns in ascending order,
// 64 at a time. Activations are copied to shared memory, four blocks deep, and bf16 weights beside them. 4-bit codes are
// copied too, and the next block's are decoded to a tile while the tensor cores multiply this one's: to shared memory and not
// to registers, which leaves these for the addresses of what is copied next.
//
// Every element is one chain of products over ascending columns, so no tile, no TOKENS and no other token changes a bit of
// it. The bits are not those of matmul.cuh: a card runs all its prompts with one of the two.

#pragma once

#include "choice.cuh"
#include "matmul.cuh"
#include "wgmma.cuh"

constexpr u32 WIDE_THREADS = 256;
constexpr u32 WIDE_STAGES = 4;
// Of a warpgroup.
constexpr u32 GROUP_THREADS = WIDE_THREADS / 2;
constexpr u32 GROUP_ROWS = 64;
// Activations of a piece: of most, and of the last ones of a group.
constexpr u32 WIDE_TOKENS = 256;
constexpr u32 MIDDLE_TOKENS = 128;
constexpr u32 NARROW_TOKENS = 64;
// Tiles lie on multiples of this, as the exchange of chunks asks.
constexpr u32 TILE_ALIGNMENT = 1024;
// 4-bit codes are copied two blocks at a time, 64 bytes a row, so that a row is looked for half as often.
constexpr u32 CODE_STAGES = 4;
constexpr u32 CODE_ROW_BYTES = 64;
constexpr u32 CODE_STAGE_BYTES = MATMUL_ROWS * CODE_ROW_BYTES;
// Threads that share the 64 columns of a row, a word of codes each, and blocks whose scales they fetch at once.
constexpr u32 ROW_THREADS = 8;
// Rows that a thread decodes of each block.
constexpr u32 OWN_ROWS = GROUP_ROWS * ROW_THREADS / GROUP_THREADS;

template <class Format, u32 TOKENS> struct Wide {
    static constexpr bool IS_BF16 = Format::TABLE_BYTES == 0;
    static constexpr u32 TOKEN_BYTES = TOKENS * BLOCK_COLUMNS * 2;
    static constexpr u32 STAGE_BYTES = TOKEN_BYTES + (IS_BF16 ? ROW_TILE_BYTES : 0);
    static constexpr u32 COPIES = TOKENS * MATMUL_CHUNKS / WIDE_THREADS;
    static constexpr u32 ROW_COPIES = MATMUL_ROWS * MATMUL_CHUNKS / WIDE_THREADS;
    static constexpr u32 CODE_COPIES = MATMUL_ROWS * CODE_ROW_BYTES / CHUNK_BYTES / WIDE_THREADS;
};

// Which of its 128 rows stands in row 0 to 127 of the products. Where gate and up are wanted by one lane they stand
// eight rows apart, else rows stand as they are.
template <Neighbours NEIGHBOURS> __device__ __forceinline__ u32 row_of_place(u32 place) {
    if (NEIGHBOURS == Neighbours::Four) return place;
    return place / 16 * 16 + place % 8 * 2 + place / 8 % 2;
}

// What of a matrix is read now and then, at hand.
struct ScaleSources {
    const u8* scales;
    const float* nested;
    float offset;
};

// A thread's place in a piece. What it copies next is at hand as addresses, so that a copy is one instruction: what comes
// between the products of two blocks keeps the tensor cores waiting.
template <class Format, u32 TOKENS> struct WideHands {
    using Own = Wide<Format, TOKENS>;
    const Matrix* matrix;
    u32 columns;
    u32 base;                               // the piece's first row
    Near own;                               // where the thread's first chunk goes in the first stage
    Near own_codes;                         // and its first chunk of codes
    const u8* activations[Own::COPIES];     // its chunks of the next even block
    const u8* codes[Own::CODE_COPIES];      // and of codes, of that block and the next
    ScaleSources sources;                   // of the rows that the thread decodes
    u32 first[OWN_ROWS];                    // indices of their first blocks
};

// The matrix of a row of the products' places: pairs take their odd rows from the next one.
template <class Job> __device__ __forceinline__ const Matrix& matrix_of(const Matrix* matrix, u32 odd) {
    return matrix[Job::IS_PAIR ? odd : 0];
}

// A row of a piece as its matrix counts them, at most its last one.
template <class Job> __device__ __forceinline__ u32 own_row(const Matrix* matrix, u32 row) {
    u32 own = Job::IS_PAIR ? row / 2 : row, last = matrix_of<Job>(matrix, row % 2).rows - 1;
    return own < last ? own : last;
}

// Copies a block of activations and of bf16 weights, and ends the group of copies.
template <u32 ODD, class Format, u32 TOKENS, class Job>
__device__ __forceinline__ void copy_wide(WideHands<Format, TOKENS>& hands, u32 block, u32 blocks) {
    using Own = Wide<Format, TOKENS>;
    // Lines of a thread are apart by a multiple of 8, so all its chunks have one place in their rows.
    constexpr u32 LINES = WIDE_THREADS / MATMUL_CHUNKS, LINE_BYTES = LINES * MATMUL_CHUNKS * CHUNK_BYTES;
    if (block < blocks) {
        Near to = hands.own + block % WIDE_STAGES * Own::STAGE_BYTES;
#pragma unroll
        for (u32 i = 0; i < Own::COPIES; i++) {
            start_copy<16>(to + i * LINE_BYTES, hands.activations[i] + ODD * (BLOCK_COLUMNS * 2));
            if (ODD) hands.activations[i] += 2 * BLOCK_COLUMNS * 2;
        }
        if (Own::IS_BF16) {
            u32 column = block * BLOCK_COLUMNS + threadIdx.x % MATMUL_CHUNKS * CHUNK_FACTORS;
#pragma unroll
            for (u32 i = 0; i < Own::ROW_COPIES; i++) {
                u32 place = threadIdx.x / MATMUL_CHUNKS + i * LINES;
                u32 row = hands.base + row_of_place<Job::NEIGHBOURS>(place);
                const bf16* codes = (const bf16*)matrix_of<Job>(hands.matrix, row % 2).codes;
                start_copy<16>(to + Own::TOKEN_BYTES + i * LINE_BYTES,
                               codes + (size_t)own_row<Job>(hands.matrix, row) * hands.columns + column);
            }
        }
    }
    end_copies();
}

// Copies the codes of two blocks, from an even one on, those of its rows by each warpgroup; belongs to the group of copies
// that is ended next.
template <class Format, u32 TOKENS>
__device__ __forceinline__ void copy_codes(WideHands<Format, TOKENS>& hands, u32 block, u32 blocks) {
    constexpr u32 CHUNKS = CODE_ROW_BYTES / CHUNK_BYTES;
    if (block + threadIdx.x % CHUNKS / 2 >= blocks) return;
    Near to = hands.own_codes + block / 2 % CODE_STAGES * CODE_STAGE_BYTES;
#pragma unroll
    for (u32 i = 0; i < Wide<Format, TOKENS>::CODE_COPIES; i++) {
        start_copy<16>(to + i * (GROUP_THREADS * CHUNK_BYTES), hands.codes[i]);
        hands.codes[i] += CODE_ROW_BYTES;
    }
}

// The sixteen values in bf16, their low bytes and then their high ones: what scale_values_to makes of them at a scale of 1.
__device__ const u32 NF4_BYTES[8] = {0xca063280u, 0x00ba3d92u, 0xad7c25a3u, 0x803910e2u,
                                     0xbebfbfbfu, 0x00bdbebeu, 0x3e3e3e3du, 0x3f3f3f3eu};
__device__ const u32 FP4_BYTES[8] = {0xc0800000u, 0xc0804000u, 0xc0800000u, 0xc0804000u,
                                     0x3f3f3f00u, 0x40404040u, 0xbfbfbf80u, 0xc0c0c0c0u};

// Reads them past the compiler, which would else write the numbers it knows anew for each use.
template <class Format> __device__ __forceinline__ Values plain_values() {
    const u32* from = Format::GROUPS == 2 ? FP4_BYTES : NF4_BYTES;
    Values values;
#pragma unroll
    for (u32 i = 0; i < 4; i++) values.low[i] = read_through(from + i), values.high[i] = read_through(from + 4 + i);
    return values;
}

// Two bf16 that scale a value: of NF4 the scale and what that leaves out, of MXFP4 the scales of either 32 columns.
template <class Format> __device__ __forceinline__ u32 scale_parts(u32 word) {
    float scale = Format::spread(word, 0);
    if (Format::GROUPS == 2) return narrow_pair(scale, Format::spread(word, 1));
    return narrow_pair(scale, scale - widen_low(narrow_pair(scale, scale)));
}

// Scales a pair of values: rounded once, as far as the two parts of the scale tell it. MXFP4's scales are powers of two and
// have one part.
template <class Format> __device__ __forceinline__ u32 scale_pair(u32 pair, u32 coarse, u32 fine) {
    u32 scaled;
    if (Format::GROUPS == 2) {
        asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(scaled) : "r"(pair), "r"(coarse));
        return scaled;
    }
    u32 rest;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(rest) : "r"(pair), "r"(fine));
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(scaled) : "r"(pair), "r"(coarse), "r"(rest));
    return scaled;
}

// Decodes eight columns, of the thread's number among those of a row. Values are looked up unscaled, so that the tables stay
// what they are, and scaled by pairs: the units that pick bytes are the busiest here.
template <class Format> __device__ __forceinline__ uint4 decode_eight(const Values& values, u32 codes, u32 parts) {
    // Which part is whose: bytes of both of a pair.
    constexpr u32 FIRST = 0x1010u, SECOND = 0x3232u;
    const bool is_second = Format::GROUPS == 2 && threadIdx.x % ROW_THREADS >= ROW_THREADS / 2;
    const u32 coarse = pick_bytes(parts, parts, is_second ? SECOND : FIRST), fine = pick_bytes(parts, parts, SECOND);
    uint4 pairs = decode_word<Format::HIGH_FIRST>(values, codes);
    return make_uint4(scale_pair<Format>(pairs.x, coarse, fine), scale_pair<Format>(pairs.y, coarse, fine),
                      scale_pair<Format>(pairs.z, coarse, fine), scale_pair<Format>(pairs.w, coarse, fine));
}

// Starts the products of a block: of its activations with its rows, both from shared memory.
template <class Format, u32 TOKENS>
__device__ __forceinline__ void multiply_stage(const u8* stage, const u8* tile, float (&sums)[TOKENS / 2]) {
    // Told by one lane to all, so that the compiler knows it to be alike in them: descriptors are.
    const u32 group = __shfl_sync(ALL_LANES, threadIdx.x / GROUP_THREADS, 0);
    u64 tokens = tile_descriptor(stage);
    u64 rows = tile_descriptor(tile + group * (GROUP_ROWS * 128));
    begin_products();
    // 16 columns are 32 bytes, and addresses are told in 16 bytes.
#pragma unroll
    for (u32 step = 0; step < 4; step++) multiply_wide(sums, rows + 2 * step, tokens + 2 * step);
    close_products();
}

template <class Format, u32 TOKENS, class Job> struct WidePiece {
    using Own = Wide<Format, TOKENS>;
    WideHands<Format, TOKENS>& hands;
    u8* shared;
    const u8* codes;  // where the thread finds its rows' codes in the first stage
    u8* tiles;        // of decoded rows, two in turn
    u32 own;          // where the thread's columns of its first row stand in one
    const float* map;
    u32 blocks;
    Values values;
    typename Format::Scale coming[OWN_ROWS];  // of the thread's block of the next ROW_THREADS
    u32 parts[OWN_ROWS];                      // restored, of those at hand

    __device__ __forceinline__ void load_scales(u32 block) {
        block += threadIdx.x % ROW_THREADS;
        const ScaleSources& from = hands.sources;
#pragma unroll
        for (u32 i = 0; i < OWN_ROWS; i++) {
            u32 index = hands.first[i] + block;
            Format::load_scale(block < blocks, from.scales + (size_t)index * Format::SCALE_BYTES, from.nested, index, coming[i]);
        }
    }

    // Decodes the thread's columns of its rows. The products that read this tile last are complete.
    template <u32 ODD> __device__ __forceinline__ void decode(u32 block) {
        if (block % ROW_THREADS == 0) {
#pragma unroll
            for (u32 i = 0; i < OWN_ROWS; i++) {
                parts[i] = scale_parts<Format>(Format::word(coming[i], map, hands.sources.offset));
            }
            load_scales(block + ROW_THREADS);
        }
        constexpr u32 ROWS_APART = GROUP_ROWS / OWN_ROWS;
        const u8* from = codes + block / 2 % CODE_STAGES * CODE_STAGE_BYTES + ODD * 32;
        u8* to = tiles + ODD * ROW_TILE_BYTES + own;
        u32 words[OWN_ROWS], scales[OWN_ROWS];
        // All are asked for before the first is waited for.
#pragma unroll
        for (u32 i = 0; i < OWN_ROWS; i++) words[i] = *(const u32*)(from + i * (ROWS_APART * CODE_ROW_BYTES));
#pragma unroll
        for (u32 i = 0; i < OWN_ROWS; i++) {
            scales[i] = __shfl_sync(ALL_LANES, parts[i], block % ROW_THREADS, ROW_THREADS);
        }
#pragma unroll
        for (u32 i = 0; i < OWN_ROWS; i++) {
            *(uint4*)(to + i * (ROWS_APART * BLOCK_COLUMNS * 2)) = decode_eight<Format>(values, words[i], scales[i]);
        }
    }

    // Multiplies a block, odd or even, and decodes the next one.
    template <u32 ODD> __device__ __forceinline__ void advance(u32 block, float (&sums)[TOKENS / 2]) {
        wait_for_copies<1>();
        show_to_tensor_cores();
        __syncthreads();
        const u8* stage = shared + block % WIDE_STAGES * Own::STAGE_BYTES;
        const u8* tile = Own::IS_BF16 ? stage + Own::TOKEN_BYTES : tiles + ODD * ROW_TILE_BYTES;
        // First of all, so that the tensor cores go on; the copies' stage is that of the block before the last.
        multiply_stage<Format, TOKENS>(stage, tile, sums);
        // Codes are copied four blocks ahead, since they are decoded a block before they are multiplied.
        if (!Own::IS_BF16 && !ODD) copy_codes(hands, block + 4, blocks);
        copy_wide<ODD, Format, TOKENS, Job>(hands, block + 2, blocks);
        wait_for_products<1>();
        if constexpr (!Own::IS_BF16) {
            if (block + 1 < blocks) decode<1 - ODD>(block + 1);
        }
    }

    __device__ __forceinline__ void multiply(float (&sums)[TOKENS / 2]) {
        if constexpr (!Own::IS_BF16) {
            load_scales(0);
            copy_codes(hands, 0, blocks);
            copy_codes(hands, 2, blocks);
        }
        copy_wide<0, Format, TOKENS, Job>(hands, 0, blocks);
        copy_wide<1, Format, TOKENS, Job>(hands, 1, blocks);
        if constexpr (!Own::IS_BF16) {
            wait_for_copies<1>();
            __syncthreads();
            decode<0>(0);
        }
        // Without this the compiler sets a sum to zero between two products, and so makes each wait for the one before.
        pin(sums);
        for (u32 block = 0; block < blocks; block += 2) {
            advance<0>(block, sums);
            if (block + 1 < blocks) advance<1>(block + 1, sums);
        }
        wait_for_products<0>();
        pin(sums);
    }
};

// Where a block keeps what all its pieces use: after the stages of the largest.
template <class Format, u32 MOST> struct WideRoom {
    u8* stages;

    __device__ __forceinline__ u8* codes() const { return stages + WIDE_STAGES * Wide<Format, MOST>::STAGE_BYTES; }
    __device__ __forceinline__ u8* tiles() const { return codes() + CODE_STAGES * CODE_STAGE_BYTES; }
    // The values of nested scales' codes.
    __device__ __forceinline__ float* map() const {
        return (float*)(Wide<Format, MOST>::IS_BF16 ? codes() : tiles() + 2 * ROW_TILE_BYTES);
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
    const u32 line = threadIdx.x / MATMUL_CHUNKS, blocks = columns / BLOCK_COLUMNS;
    WideHands<Format, TOKENS> hands{piece.matrix, columns, piece.row};
    hands.own = near_of(room.stages + chunk_offset<MATMUL_CHUNKS>(line, threadIdx.x % MATMUL_CHUNKS));
    const u32 group = threadIdx.x / GROUP_THREADS, member = threadIdx.x % GROUP_THREADS;
    hands.own_codes = near_of(room.codes() + group * (GROUP_ROWS * CODE_ROW_BYTES) + member * CHUNK_BYTES);
#pragma unroll
    for (u32 i = 0; i < Wide<Format, TOKENS>::COPIES; i++) {
        u32 token = piece.token + line + i * 32;
        // Tokens past the end are read from the last one and never written.
        token = job.activation(piece, token < piece.count ? token : piece.count - 1);
        const u32 column = threadIdx.x % MATMUL_CHUNKS * CHUNK_FACTORS;
        hands.activations[i] = (const u8*)(job.activations + (size_t)token * columns + column);
    }
#pragma unroll
    for (u32 i = 0; i < Wide<Format, TOKENS>::CODE_COPIES; i++) {
        constexpr u32 CHUNKS = CODE_ROW_BYTES / CHUNK_BYTES;
        u32 place = group * GROUP_ROWS + member / CHUNKS + i * (GROUP_THREADS / CHUNKS);
        u32 row = piece.row + row_of_place<Job::NEIGHBOURS>(place);
        hands.codes[i] = matrix_of<Job>(piece.matrix, row % 2).codes +
                         (size_t)own_row<Job>(piece.matrix, row) * blocks * 32 + member % CHUNKS * CHUNK_BYTES;
    }
    const u32 place = group * GROUP_ROWS + member / ROW_THREADS;
    // A thread's rows are apart by a multiple of 16, so those of a pair are of one matrix.
    const Matrix& matrix = matrix_of<Job>(piece.matrix, row_of_place<Job::NEIGHBOURS>(place) % 2);
    hands.sources = ScaleSources{matrix.scales, matrix.nested, matrix.offset};
#pragma unroll
    for (u32 i = 0; i < OWN_ROWS; i++) {
        u32 row = piece.row + row_of_place<Job::NEIGHBOURS>(place + i * (GROUP_ROWS / OWN_ROWS));
        hands.first[i] = own_row<Job>(piece.matrix, row) * blocks;
    }
    float sums[TOKENS / 2] = {};
    WidePiece<Format, TOKENS, Job> work{hands, room.stages, room.codes() + place * CODE_ROW_BYTES + member % ROW_THREADS * 4,
                                        room.tiles(), chunk_offset<MATMUL_CHUNKS>(place, member % ROW_THREADS), room.map(),
                                        blocks, plain_values<Format>()};
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

// Tokens whose results are turned over in shared memory at a time, and the room of each.
constexpr u32 TURNED_TOKENS = 128;
constexpr u32 TURNED_STRIDE = MATMUL_ROWS + 4;

// Writes sums as f32, a token's 128 rows at once: a lane has them of single tokens, so they are turned over in `stage`, which
// no product reads any more.
template <u32 COUNT>
__device__ __forceinline__ void store_wide(const Piece& piece, const u32* slots, const float (&sums)[COUNT], float* out,
                                           u32 stride, u8* stage) {
    constexpr u32 TOKENS = 2 * COUNT, PART = TOKENS < TURNED_TOKENS ? TOKENS : TURNED_TOKENS;
    const Matrix& matrix = *piece.matrix;
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float* turned = (float*)stage;
    const u32 row = piece.row + lane * 4;
    const bool is_whole = row + 3 < matrix.rows && (size_t)(out + row) % 16 == 0 && stride % 4 == 0;
    float biases[4] = {};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        if (matrix.bias != nullptr && row + i < matrix.rows) biases[i] = matrix.bias[row + i];
    }
#pragma unroll
    for (u32 part = 0; part < TOKENS / PART; part++) {
        __syncthreads();
#pragma unroll
        for (u32 tile = 0; tile < PART / 8; tile++) {
            float* to = turned + (tile * 8 + lane % 4 * 2) * TURNED_STRIDE + warp * 16 + lane / 4;
            const u32 from = (part * (PART / 8) + tile) * 4;
            to[0] = sums[from], to[TURNED_STRIDE] = sums[from + 1];
            to[8] = sums[from + 2], to[TURNED_STRIDE + 8] = sums[from + 3];
        }
        __syncthreads();
#pragma unroll 4
        for (u32 token = warp; token < PART; token += WIDE_THREADS / WARP) {
            u32 slot = slots[part * PART + token];
            if (slot == ~0u) break;  // The slots that are wanted come first.
            float4 four = *(const float4*)(turned + token * TURNED_STRIDE + lane * 4);
            four.x += biases[0], four.y += biases[1], four.z += biases[2], four.w += biases[3];
            float* to = out + (size_t)slot * stride + row;
            if (is_whole) {
                *(float4*)to = four;
                continue;
            }
            if (row < matrix.rows) to[0] = four.x;
            if (row + 1 < matrix.rows) to[1] = four.y;
            if (row + 2 < matrix.rows) to[2] = four.z;
            if (row + 3 < matrix.rows) to[3] = four.w;
        }
    }
}
