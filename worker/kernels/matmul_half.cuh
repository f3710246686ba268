// Turing's share of matmul.cuh: f16 factors with an exponent for each block of 64 columns, of a token and of a bf16 row.
//
// Included by matmul.cuh alone. The sums of a block stand apart and are scaled in f32, so that nothing can overflow and
// a 4-bit weight's scale is exact. There are no asynchronous copies: one stage, two barriers for each block.

#pragma once

// Brings a row of 64 bf16 to f16 with its largest magnitude between 1 and 2; gives the factor that scales it back.
__device__ __forceinline__ float normalise_row(const bf16* from, u8* to, u32 line) {
    u32 words[BLOCK_COLUMNS / 2], largest = 0;
#pragma unroll
    for (u32 chunk = 0; chunk < MATMUL_CHUNKS; chunk++) {
        uint4 four = *(const uint4*)(from + chunk * CHUNK_FACTORS);
        words[4 * chunk] = four.x, words[4 * chunk + 1] = four.y;
        words[4 * chunk + 2] = four.z, words[4 * chunk + 3] = four.w;
    }
#pragma unroll
    for (u32 i = 0; i < BLOCK_COLUMNS / 2; i++) {
        u32 own = larger_exponent(words[i]);
        largest = largest > own ? largest : own;
    }
    float scale = block_exponent(largest), down = float_of_bits((254u << 23) - __float_as_uint(scale));
#pragma unroll
    for (u32 i = 0; i < BLOCK_COLUMNS / 2; i++) {
        words[i] = factor_pair(widen_low(words[i]) * down, widen_high(words[i]) * down);
    }
#pragma unroll
    for (u32 chunk = 0; chunk < MATMUL_CHUNKS; chunk++) {
        *(uint4*)(to + chunk_offset<MATMUL_CHUNKS>(line, chunk)) =
            make_uint4(words[4 * chunk], words[4 * chunk + 1], words[4 * chunk + 2], words[4 * chunk + 3]);
    }
    return scale;
}

// The scales of a piece's tokens, and of its rows for each group of a block's columns.
struct BlockScales {
    float* tokens;
    float* rows;
};

template <class Format, u32 TOKENS, class Job>
__device__ __forceinline__ void stage_block(const Hands<Format, TOKENS>& hands, u32 block, const float* map, u8* tokens,
                                            u8* rows, const BlockScales& scales) {
    for (u32 token = threadIdx.x; token < TOKENS; token += MATMUL_THREADS) {
        const bf16* from = hands.activations + (size_t)hands.own_token * hands.columns + block * BLOCK_COLUMNS;
        scales.tokens[token] = normalise_row(from, tokens, token);
    }
    size_t index = hands.first + block;
    if (Hands<Format, TOKENS>::IS_BF16) {
        const bf16* from = (const bf16*)hands.matrix->codes + index * BLOCK_COLUMNS;
        scales.rows[threadIdx.x] = normalise_row(from, rows, threadIdx.x);
        return;
    }
    HeldRow held = {};
    Values values;
    scale_values_to<Format>(values, 1.0f);
    Decoder<Format>::load_scale(*hands.matrix, index, held);
#pragma unroll
    for (u32 part = 0; part < 4; part++) {
        Decoder<Format>::load_codes(*hands.matrix, index, part, held);
        *(uint4*)(rows + chunk_offset<MATMUL_CHUNKS>(threadIdx.x, 2 * part)) =
            decode_word<Format::HIGH_FIRST>(values, held.codes[part].x);
        *(uint4*)(rows + chunk_offset<MATMUL_CHUNKS>(threadIdx.x, 2 * part + 1)) =
            decode_word<Format::HIGH_FIRST>(values, held.codes[part].y);
    }
#pragma unroll
    for (u32 group = 0; group < Format::GROUPS; group++) {
        scales.rows[group * MATMUL_ROWS + threadIdx.x] = Decoder<Format>::scale(held, group, map, hands.matrix->offset);
    }
}

template <class Format, u32 TOKENS>
__device__ __forceinline__ void multiply_block(const u8* tokens, const u8* rows, const BlockScales& scales,
                                               TileSums<TOKENS>& sums) {
    using Own = Share<TOKENS>;
    constexpr u32 STEPS = 4 / Format::GROUPS;
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 first_token = warp % Own::TOKEN_WARPS * Own::WARP_TOKENS, first_row = warp / Own::TOKEN_WARPS * Own::WARP_ROWS;
    for (u32 group = 0; group < Format::GROUPS; group++) {
#pragma unroll
        for (u32 i = 0; i < Own::TOKEN_TILES; i++) {
            u32 a[STEPS][4], token = first_token + i * 16;
#pragma unroll
            for (u32 step = 0; step < STEPS; step++) {
                u32 chunk = 2 * (group * STEPS + step) + lane / 16;
                load_matrices(a[step], tokens + chunk_offset<MATMUL_CHUNKS>(token + lane % 16, chunk));
            }
            float upper = scales.tokens[token + lane / 4], lower = scales.tokens[token + lane / 4 + 8];
#pragma unroll
            for (u32 j = 0; j < Own::ROW_TILES; j += 2) {
                u32 row = first_row + j * 8;
                float d[2][4] = {};
#pragma unroll
                for (u32 step = 0; step < STEPS; step++) {
                    u32 b[4], chunk = 2 * (group * STEPS + step) + lane / 8 % 2;
                    load_matrices(b, rows + chunk_offset<MATMUL_CHUNKS>(row + lane / 16 * 8 + lane % 8, chunk));
                    multiply_tile(d[0], a[step][0], a[step][1], a[step][2], a[step][3], b[0], b[1]);
                    multiply_tile(d[1], a[step][0], a[step][1], a[step][2], a[step][3], b[2], b[3]);
                }
#pragma unroll
                for (u32 k = 0; k < 2; k++) {
                    const float* own = scales.rows + group * MATMUL_ROWS + row + k * 8 + lane % 4 * 2;
                    float(&sum)[4] = sums.value[i][j + k];
                    sum[0] = fmaf(d[k][0] * upper, own[0], sum[0]);
                    sum[1] = fmaf(d[k][1] * upper, own[1], sum[1]);
                    sum[2] = fmaf(d[k][2] * lower, own[0], sum[2]);
                    sum[3] = fmaf(d[k][3] * lower, own[1], sum[3]);
                }
            }
        }
    }
}

template <class Format, u32 TOKENS, class Job>
__device__ __forceinline__ void multiply_piece(const Hands<Format, TOKENS>& hands, u8* shared, const float* map,
                                               TileSums<TOKENS>& sums) {
    u8 *tokens = shared, *rows = shared + Share<TOKENS>::TOKEN_BYTES;
    BlockScales scales;
    scales.tokens = (float*)(rows + ROW_TILE_BYTES);
    scales.rows = scales.tokens + TOKENS;
    for (u32 block = 0; block < hands.columns / BLOCK_COLUMNS; block++) {
        stage_block<Format, TOKENS, Job>(hands, block, map, tokens, rows, scales);
        __syncthreads();
        multiply_block<Format, TOKENS>(tokens, rows, scales, sums);
        __syncthreads();
    }
}
