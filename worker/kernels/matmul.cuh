// The product of many activations with a 4-bit or bf16 weight, for prompts: the core of the kernels for many tokens.
//
// A block of 128 threads takes 128 rows of a weight and TOKENS activations (128, or 32 where experts have few), all
// columns in ascending order, 64 at a time. A row's 64 weights are decoded once for all the tokens: its sixteen values,
// multiplied by the block's scale in f32 and rounded to bf16 once, stand in registers, and each weight's code picks
// its value's two bytes. Activations and bf16 weights are copied while the tensor cores work; the tile of weights for
// the next 64 columns is decoded between the products of this one.
//
// Every element is one chain of multiply_tile over ascending columns, so neither the tile that a token is in, nor
// TOKENS, nor what stands beside it changes a bit: a prompt's chunks change nothing. The order differs from that of the
// kernels for generated tokens. On Turing a block's products are summed apart and scaled in f32 (see tensor_core.cuh).
//
// How much shared memory that takes says README.md.

#pragma once

#include "prompt_jobs.cuh"
#include "staging.cuh"

constexpr u32 MATMUL_THREADS = 128;
// Activations of a piece: of a prompt, and where an expert has few of them.
#if defined(BULKHEAD_HALF)
constexpr u32 PROMPT_TOKENS = 64;
#else
constexpr u32 PROMPT_TOKENS = 128;
#endif
constexpr u32 FEW_TOKENS = 32;
constexpr u32 MATMUL_CHUNKS = BLOCK_COLUMNS / CHUNK_FACTORS;
constexpr u32 ROW_TILE_BYTES = MATMUL_ROWS * BLOCK_COLUMNS * 2;

// How a block's four warps share a tile.
template <u32 TOKENS> struct Share {
    static constexpr u32 WARP_TOKENS = TOKENS < 64 ? TOKENS : 64;
    static constexpr u32 TOKEN_WARPS = TOKENS / WARP_TOKENS;
    static constexpr u32 WARP_ROWS = MATMUL_ROWS * TOKEN_WARPS / 4;
    static constexpr u32 TOKEN_TILES = WARP_TOKENS / 16;
    static constexpr u32 ROW_TILES = WARP_ROWS / 8;
    static constexpr u32 TOKEN_BYTES = TOKENS * BLOCK_COLUMNS * 2;
};

// A warp's sums: token tile, row tile, and the place in multiply_tile's D. A lane has of each row tile the columns
// 2 * (lane % 4) and the next for tokens lane / 4 and 8 below.
template <u32 TOKENS> struct TileSums {
    float value[Share<TOKENS>::TOKEN_TILES][Share<TOKENS>::ROW_TILES][4];
};

// Which row of its warp's share a slot of the weights' tile holds. Slots are given out so that a lane's sums are of
// rows that are neighbours in the result: pairs of tiles give four, or all tiles give all.
enum class Neighbours { Four, All };

template <u32 WARP_ROWS, Neighbours NEIGHBOURS> __device__ __forceinline__ u32 row_of_slot(u32 slot) {
    u32 base = slot / WARP_ROWS * WARP_ROWS, own = slot % WARP_ROWS;
    u32 tile = own / 8, member = own % 8 / 2, second = own % 2;
    if (NEIGHBOURS == Neighbours::Four) return base + tile / 2 * 16 + member * 4 + tile % 2 * 2 + second;
    return base + member * (WARP_ROWS / 4) + tile * 2 + second;
}

// The 64 weights of a row while they are on their way, 16 to a part, and what their scales need.
struct HeldRow {
    uint2 codes[4];
    u32 scale;
    float nested;
};

template <class Format> struct Decoder {
    static constexpr bool IS_MXFP4 = Format::GROUPS == 2;

    __device__ static __forceinline__ void load_codes(const Matrix& m, size_t index, u32 part, HeldRow& held) {
        held.codes[part] = *(const uint2*)(m.codes + index * 32 + part * 8);
    }
    __device__ static __forceinline__ void load_scale(const Matrix& m, size_t index, HeldRow& held) {
        if (IS_MXFP4) {
            held.scale = ((const u16*)m.scales)[index];
        } else if (Format::NESTED) {
            held.scale = m.scales[index];
            held.nested = m.nested[index / NESTED_GROUP];
        } else {
            held.scale = ((const u32*)m.scales)[index];
        }
    }
    // The scale of a group of the block: MXFP4 has two of 32 columns. At its exponent 0 that is a subnormal.
    __device__ static __forceinline__ float scale(const HeldRow& held, u32 group, const float* map, float offset) {
        if (IS_MXFP4) {
            u32 exponent = (held.scale >> (8 * group)) & 255u;
            return float_of_bits(exponent == 0 ? 1u << 22 : exponent << 23);
        }
        // Rounded twice, as the CPU does.
        if (Format::NESTED) return __fadd_rn(__fmul_rn(map[held.scale], held.nested), offset);
        return float_of_bits(held.scale);
    }
};

// The sixteen values that a code stands for, as factors, their low and high bytes apart.
struct Values {
    u32 low[4];
    u32 high[4];
};

template <class Format> __device__ __forceinline__ void scale_values_to(Values& values, float scale) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        const float* from = Format::values() + 4 * i;
        u32 first = factor_pair(from[0] * scale, from[1] * scale), second = factor_pair(from[2] * scale, from[3] * scale);
        values.low[i] = pick_bytes(first, second, 0x6420u);
        values.high[i] = pick_bytes(first, second, 0x7531u);
    }
}

// The values of eight codes, in the order of their columns.
template <bool HIGH_FIRST> __device__ __forceinline__ uint4 decode_word(const Values& values, u32 word) {
    u32 own = word & 0x77777777u, upper = ((word >> 1) & 0x44444444u) | 0x32103210u, pairs[4];
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        u32 index = own >> (16 * half), side = upper >> (16 * half);
        u32 low = pick_bytes(pick_bytes(values.low[0], values.low[1], index),
                             pick_bytes(values.low[2], values.low[3], index), side);
        u32 high = pick_bytes(pick_bytes(values.high[0], values.high[1], index),
                              pick_bytes(values.high[2], values.high[3], index), side);
        pairs[2 * half] = pick_bytes(low, high, HIGH_FIRST ? 0x4051u : 0x5140u);
        pairs[2 * half + 1] = pick_bytes(low, high, HIGH_FIRST ? 0x6273u : 0x7362u);
    }
    return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// A thread's place in a piece: the row that it decodes, and the activations that it copies a chunk of.
template <class Format, u32 TOKENS> struct Hands {
    static constexpr bool IS_BF16 = Format::TABLE_BYTES == 0;
    static constexpr u32 COPIES = TOKENS * MATMUL_CHUNKS / MATMUL_THREADS;
    static constexpr u32 ROW_COPIES = MATMUL_ROWS * MATMUL_CHUNKS / MATMUL_THREADS;
    const Matrix* matrix;
    const bf16* activations;
    u32 columns;
    size_t first;           // index of the own row's first block
    u32 rows[COPIES];       // which activations
    u32 base;               // the piece's first row
    u32 own_token;          // which activation the thread of that number takes alone
};

#if !defined(BULKHEAD_HALF)

constexpr u32 TOKEN_STAGES = 3;
// Decoded weights are made one block ahead, copied ones two.
template <class Format> constexpr u32 ROW_STAGES = Format::TABLE_BYTES == 0 ? 3 : 2;

template <class Format, u32 TOKENS, class Job>
__device__ __forceinline__ void copy_block(const Hands<Format, TOKENS>& hands, u32 block, u32 blocks, u8* tokens, u8* rows) {
    using Own = Hands<Format, TOKENS>;
    if (block < blocks) {
        u32 chunk = threadIdx.x % MATMUL_CHUNKS, line = threadIdx.x / MATMUL_CHUNKS;
        u32 column = block * BLOCK_COLUMNS + chunk * CHUNK_FACTORS;
        u8* to = tokens + block % TOKEN_STAGES * Share<TOKENS>::TOKEN_BYTES;
#pragma unroll
        for (u32 i = 0; i < Own::COPIES; i++) {
            copy_chunk(to + chunk_offset<MATMUL_CHUNKS>(line + i * 16, chunk),
                       hands.activations + (size_t)hands.rows[i] * hands.columns + column, true);
        }
        if (Own::IS_BF16) {
            u8* to = rows + block % ROW_STAGES<Format> * ROW_TILE_BYTES;
            const u32 last = hands.matrix->rows - 1;
#pragma unroll
            for (u32 i = 0; i < Own::ROW_COPIES; i++) {
                u32 slot = line + i * 16;
                u32 row = hands.base + row_of_slot<Share<TOKENS>::WARP_ROWS, Job::NEIGHBOURS>(slot);
                row = row < last ? row : last;
                copy_chunk(to + chunk_offset<MATMUL_CHUNKS>(slot, chunk),
                           (const bf16*)hands.matrix->codes + (size_t)row * hands.columns + column, true);
            }
        }
    }
    end_copies();
}

// Decodes a part of the own row's next block and fetches the part of the block after that in its place.
template <class Format, u32 TOKENS>
__device__ __forceinline__ void decode_part(const Hands<Format, TOKENS>& hands, u32 part, float scale, size_t following,
                                            bool is_following, HeldRow& held, Values& values, u8* to) {
    if (part % (4 / Format::GROUPS) == 0) scale_values_to<Format>(values, scale);
    *(uint4*)(to + chunk_offset<MATMUL_CHUNKS>(threadIdx.x, 2 * part)) =
        decode_word<Format::HIGH_FIRST>(values, held.codes[part].x);
    *(uint4*)(to + chunk_offset<MATMUL_CHUNKS>(threadIdx.x, 2 * part + 1)) =
        decode_word<Format::HIGH_FIRST>(values, held.codes[part].y);
    if (is_following) Decoder<Format>::load_codes(*hands.matrix, following, part, held);
}

// Multiplies 16 columns of the tiles.
template <u32 TOKENS>
__device__ __forceinline__ void multiply_step(const u8* tokens, const u8* rows, u32 step, TileSums<TOKENS>& sums) {
    using Own = Share<TOKENS>;
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 token = warp % Own::TOKEN_WARPS * Own::WARP_TOKENS, row = warp / Own::TOKEN_WARPS * Own::WARP_ROWS;
    u32 a[Own::TOKEN_TILES][4], b[Own::ROW_TILES / 2][4];
#pragma unroll
    for (u32 i = 0; i < Own::TOKEN_TILES; i++) {
        load_matrices(a[i], tokens + chunk_offset<MATMUL_CHUNKS>(token + i * 16 + lane % 16, 2 * step + lane / 16));
    }
#pragma unroll
    for (u32 i = 0; i < Own::ROW_TILES / 2; i++) {
        load_matrices(b[i], rows + chunk_offset<MATMUL_CHUNKS>(row + i * 16 + lane / 16 * 8 + lane % 8,
                                                               2 * step + lane / 8 % 2));
    }
#pragma unroll
    for (u32 i = 0; i < Own::TOKEN_TILES; i++) {
#pragma unroll
        for (u32 j = 0; j < Own::ROW_TILES; j++) {
            multiply_tile(sums.value[i][j], a[i][0], a[i][1], a[i][2], a[i][3], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
    }
}

template <class Format, u32 TOKENS, class Job>
__device__ __forceinline__ void multiply_piece(const Hands<Format, TOKENS>& hands, u8* shared, const float* map,
                                               TileSums<TOKENS>& sums) {
    using Own = Hands<Format, TOKENS>;
    u8 *tokens = shared, *rows = shared + TOKEN_STAGES * Share<TOKENS>::TOKEN_BYTES;
    const u32 blocks = hands.columns / BLOCK_COLUMNS;
    copy_block<Format, TOKENS, Job>(hands, 0, blocks, tokens, rows);
    copy_block<Format, TOKENS, Job>(hands, 1, blocks, tokens, rows);
    HeldRow held = {};
    Values values = {};
    if (!Own::IS_BF16) {
        Decoder<Format>::load_scale(*hands.matrix, hands.first, held);
#pragma unroll
        for (u32 part = 0; part < 4; part++) Decoder<Format>::load_codes(*hands.matrix, hands.first, part, held);
        HeldRow next = {};
        if (blocks > 1) Decoder<Format>::load_scale(*hands.matrix, hands.first + 1, next);
#pragma unroll
        for (u32 part = 0; part < 4; part++) {
            float scale = Decoder<Format>::scale(held, part / 2, map, hands.matrix->offset);
            decode_part<Format>(hands, part, scale, hands.first + 1, blocks > 1, held, values, rows);
        }
        held.scale = next.scale, held.nested = next.nested;
    }
    for (u32 block = 0; block < blocks; block++) {
        wait_for_copies<1>();
        __syncthreads();
        copy_block<Format, TOKENS, Job>(hands, block + 2, blocks, tokens, rows);
        const u8* own_tokens = tokens + block % TOKEN_STAGES * Share<TOKENS>::TOKEN_BYTES;
        const u8* own_rows = rows + block % ROW_STAGES<Format> * ROW_TILE_BYTES;
        u8* next_rows = rows + (block + 1) % ROW_STAGES<Format> * ROW_TILE_BYTES;
        HeldRow following = {};
        if (!Own::IS_BF16 && block + 2 < blocks) {
            Decoder<Format>::load_scale(*hands.matrix, hands.first + block + 2, following);
        }
#pragma unroll
        for (u32 step = 0; step < 4; step++) {
            multiply_step<TOKENS>(own_tokens, own_rows, step, sums);
            if (!Own::IS_BF16 && block + 1 < blocks) {
                float scale = Decoder<Format>::scale(held, step / 2, map, hands.matrix->offset);
                decode_part<Format>(hands, step, scale, hands.first + block + 2, block + 2 < blocks, held, values,
                                    next_rows);
            }
        }
        held.scale = following.scale, held.nested = following.nested;
    }
}

#else

#include "matmul_half.cuh"

#endif

template <class Format, u32 TOKENS> constexpr u32 MAP_OFFSET =
#if defined(BULKHEAD_HALF)
    Share<TOKENS>::TOKEN_BYTES + ROW_TILE_BYTES + (TOKENS + 2 * MATMUL_ROWS) * 4;
#else
    TOKEN_STAGES * Share<TOKENS>::TOKEN_BYTES + ROW_STAGES<Format> * ROW_TILE_BYTES;
#endif

// Runs a job's pieces in this block. A Job says: `NEIGHBOURS`, `prepare(room)` once, `piece(index)`, `activation(piece,
// token)` the row of `activations` that a token of a group reads, and `store(piece, token, row, sums)`, which takes the
// sums that a lane has of one token: of row tile i, columns 2 i and 2 i + 1, where `row` is the warp's first.
template <class Format, u32 TOKENS, class Job>
__device__ __forceinline__ void run_matmul(Job job, u32 columns, const float* scale_values) {
    using Own = Share<TOKENS>;
    using Place = Hands<Format, TOKENS>;
    SHARED_BYTES(shared);
    float* map = (float*)(shared + MAP_OFFSET<Format, TOKENS>);
    let_next_start();
    if (Format::NESTED) {
        for (u32 i = threadIdx.x; i < 256; i += MATMUL_THREADS) map[i] = scale_values[i];
    }
    wait_for_previous();
    job.prepare((u32*)(map + 256));
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (u32 index = blockIdx.x;; index += gridDim.x) {
        const Piece piece = job.piece(index);
        if (piece.matrix == nullptr) return;
        // The tiles of the piece before are read by other warps until here, and the map is written.
        __syncthreads();
        const u32 last = piece.matrix->rows - 1;
        u32 row = piece.row + row_of_slot<Own::WARP_ROWS, Job::NEIGHBOURS>(threadIdx.x);
        Place hands{piece.matrix, job.activations, columns, (size_t)(row < last ? row : last) * (columns / BLOCK_COLUMNS)};
        hands.base = piece.row;
#pragma unroll
        for (u32 i = 0; i < Place::COPIES; i++) {
            u32 token = piece.token + threadIdx.x / MATMUL_CHUNKS + i * 16;
            // Tokens past the end are read from the last one and never written.
            hands.rows[i] = job.activation(piece, token < piece.count ? token : piece.count - 1);
        }
        u32 own = piece.token + threadIdx.x;
        hands.own_token = job.activation(piece, own < piece.count ? own : piece.count - 1);
        TileSums<TOKENS> sums = {};
        multiply_piece<Format, TOKENS, Job>(hands, shared, map, sums);
        u32 first_token = piece.token + warp % Own::TOKEN_WARPS * Own::WARP_TOKENS + lane / 4;
        u32 first_row = piece.row + warp / Own::TOKEN_WARPS * Own::WARP_ROWS;
#pragma unroll
        for (u32 i = 0; i < Own::TOKEN_TILES * 2; i++) {
            u32 token = first_token + i * 8;
            float own[2 * Own::ROW_TILES];
#pragma unroll
            for (u32 j = 0; j < 2 * Own::ROW_TILES; j++) own[j] = sums.value[i / 2][j / 2][i % 2 * 2 + j % 2];
            if (token < piece.count) job.store(piece, token, first_row, own);
        }
    }
}

// Writes the sums of one token as f32, four neighbours at a time where the place allows it.
template <u32 COUNT>
__device__ __forceinline__ void store_floats(const Matrix& matrix, u32 row, float (&sums)[COUNT], float* out) {
    row += threadIdx.x % 4 * 4;
#pragma unroll
    for (u32 i = 0; i < COUNT; i += 4, row += 16) {
        if (row + 3 < matrix.rows && (size_t)(out + row) % 16 == 0) {
            float4 four = matrix.bias != nullptr ? *(const float4*)(matrix.bias + row) : float4{0, 0, 0, 0};
            *(float4*)(out + row) = float4{sums[i] + four.x, sums[i + 1] + four.y, sums[i + 2] + four.z, sums[i + 3] + four.w};
            continue;
        }
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            if (row + j >= matrix.rows) break;
            out[row + j] = sums[i + j] + (matrix.bias != nullptr ? matrix.bias[row + j] : 0.0f);
        }
    }
}
