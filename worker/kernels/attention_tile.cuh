// One tile of keys and values for eight query heads: scores, powers, and the sums of values.
//
// From 8.0 on by the tensor cores: queries and powers are split in two bf16, the second what the first leaves over, so a
// product is as good as one of f32. Turing, whose tensor cores know no bf16, adds in f32. Both take tokens and elements in
// an order that nothing but the tile's place changes.
//
// Used by attend_decode in this order, with a barrier of the block after each: put_query; score_tile; power_tile;
// add_values; and in the end give_values.

#pragma once

#include "kv.cuh"
#include "tensor_core.cuh"

constexpr u32 ATTEND_THREADS = 256;
constexpr u32 ATTEND_WARPS = ATTEND_THREADS / WARP;
// Query heads that are computed at a time, a warp's each.
constexpr u32 HEADS = ATTEND_WARPS;
constexpr u32 DIM_MAX = 128;
constexpr u32 TILE_MAX = 128;

// What a warp keeps of its head from tile to tile.
struct Powers {
    float largest;
    float sum;
};

// Turns a head's scores, a lane's being of tokens lane, lane + 32 and so on, into powers relative to the largest so far.
// Gives the factor by which older sums count less.
__device__ __forceinline__ float raise(float (&scores)[TILE_MAX / WARP], u32 count, Powers& powers) {
    u32 lane = threadIdx.x % WARP;
    float before = powers.largest, own = 0;
#pragma unroll
    for (u32 i = 0; i < TILE_MAX / WARP; i++) {
        if (lane + i * WARP >= count) scores[i] = float_of_bits(0xff800000u);
        powers.largest = scores[i] > powers.largest || scores[i] != scores[i] ? scores[i] : powers.largest;
    }
    powers.largest = warp_max(powers.largest);
    float factor = expf(before - powers.largest);
#pragma unroll
    for (u32 i = 0; i < TILE_MAX / WARP; i++) {
        scores[i] = lane + i * WARP < count ? expf(scores[i] - powers.largest) : 0.0f;
        own += scores[i];
    }
    powers.sum = fmaf(powers.sum, factor, warp_sum(own));
    return factor;
}

#if defined(BULKHEAD_HALF)

// The pairs of a head that a lane holds, and a token's scores, for all heads, with a stride that spreads the banks.
constexpr u32 LANE_PAIRS = DIM_MAX / 2 / WARP;
constexpr u32 SCORE_STRIDE = HEADS + 4;

struct alignas(16) TileShared {
    float scores[TILE_MAX][SCORE_STRIDE];
    float queries[HEADS][DIM_MAX];
    float scales[2][TILE_MAX];  // of keys and values, for the 8-bit cache
    float factors[HEADS];
    Powers powers[HEADS];
};

__device__ __forceinline__ void put_query(TileShared& shared, u32 head, u32 element, float value) {
    shared.queries[head][element] = value;
}

// Scores of a tile's tokens: a thread for each token and four heads.
template <class Kv>
__device__ __forceinline__ void score_tile(TileShared& shared, const u8* keys, u32 tile, u32 count, u32 dim) {
    for (u32 i = threadIdx.x; i < 2 * tile; i += ATTEND_THREADS) {
        u32 token = i % tile, head = i / tile * 4;
        if (token >= count) continue;
        const u8* row = keys + token * (Kv::row_bytes(dim) + Kv::PADDING);
        float sums[4] = {}, scale = Kv::SCALED ? shared.scales[0][token] : 1.0f;
#pragma unroll 4
        for (u32 at = 0; at < dim; at += 8) {
            float key[8];
            Kv::load8(row, at, scale, key);
#pragma unroll
            for (u32 own = 0; own < 4; own++) {
#pragma unroll
                for (u32 part = 0; part < 8; part += 4) {
                    float4 query = *(const float4*)&shared.queries[head + own][at + part];
                    sums[own] = fmaf(key[part], query.x, sums[own]);
                    sums[own] = fmaf(key[part + 1], query.y, sums[own]);
                    sums[own] = fmaf(key[part + 2], query.z, sums[own]);
                    sums[own] = fmaf(key[part + 3], query.w, sums[own]);
                }
            }
        }
        *(float4*)&shared.scores[token][head] = float4{sums[0], sums[1], sums[2], sums[3]};
    }
}

// A warp for each head.
template <class Kv> __device__ __forceinline__ void power_tile(TileShared& shared, u32 count, Powers& powers) {
    u32 lane = threadIdx.x % WARP, head = threadIdx.x / WARP;
    float scores[TILE_MAX / WARP];
#pragma unroll
    for (u32 i = 0; i < TILE_MAX / WARP; i++) scores[i] = shared.scores[lane + i * WARP][head];
    float factor = raise(scores, count, powers);
#pragma unroll
    for (u32 i = 0; i < TILE_MAX / WARP; i++) shared.scores[lane + i * WARP][head] = scores[i];
    if (lane == 0) shared.factors[head] = factor, shared.powers[head] = powers;
}

// Values that a lane has added up by their powers: its pairs of each head.
struct Values {
    float sums[HEADS][2 * LANE_PAIRS];
};

// Adds a tile's values: warp w takes tokens w, w + 8 and so on of the tile.
template <class Kv>
__device__ __forceinline__ void add_values(TileShared& shared, const u8* rows, u32 count, u32 dim, Values& values) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (u32 head = 0; head < HEADS; head++) {
        float factor = shared.factors[head];
#pragma unroll
        for (u32 i = 0; i < 2 * LANE_PAIRS; i++) values.sums[head][i] *= factor;
    }
#pragma unroll 4
    for (u32 token = warp; token < count; token += ATTEND_WARPS) {
        const u8* row = rows + token * (Kv::row_bytes(dim) + Kv::PADDING);
        float weights[HEADS], scale = Kv::SCALED ? shared.scales[1][token] : 1.0f;
#pragma unroll
        for (u32 head = 0; head < HEADS; head += 4) {
            float4 four = *(const float4*)&shared.scores[token][head];
            weights[head] = four.x, weights[head + 1] = four.y, weights[head + 2] = four.z, weights[head + 3] = four.w;
        }
#pragma unroll
        for (u32 i = 0; i < LANE_PAIRS; i++) {
            u32 at = 2 * (lane + i * WARP);
            if (at >= dim) continue;
            float value[2];
            Kv::load2(row, at, scale, value);
#pragma unroll
            for (u32 head = 0; head < HEADS; head++) {
                values.sums[head][2 * i] = fmaf(weights[head], value[0], values.sums[head][2 * i]);
                values.sums[head][2 * i + 1] = fmaf(weights[head], value[1], values.sums[head][2 * i + 1]);
            }
        }
    }
}

// Hands each head's values to `give(head, element, first, second)`, two neighbours at a time; `room` is the tiles'.
template <class Give>
__device__ __forceinline__ void give_values(const Values& values, u32 dim, u8* room, Give give) {
    float* sums = (float*)room;
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (u32 head = 0; head < HEADS; head++) {
#pragma unroll
        for (u32 i = 0; i < LANE_PAIRS; i++) {
            u32 at = 2 * (lane + i * WARP);
            if (at >= dim) continue;
            *(float2*)(sums + (warp * HEADS + head) * dim + at) =
                float2{values.sums[head][2 * i], values.sums[head][2 * i + 1]};
        }
    }
    __syncthreads();
    for (u32 i = 2 * threadIdx.x; i < HEADS * dim; i += 2 * ATTEND_THREADS) {
        float first = 0, second = 0;
#pragma unroll
        for (u32 from = 0; from < ATTEND_WARPS; from++) {
            float2 pair = *(const float2*)(sums + from * HEADS * dim + i);
            first += pair.x, second += pair.y;
        }
        give(i / dim, i % dim, first, second);
    }
}

#else

// Strides that spread the banks: of a head's scores, and of bf16 rows.
constexpr u32 SCORE_STRIDE = TILE_MAX + 4;
constexpr u32 SPLIT_STRIDE = 128 + 8;

struct alignas(16) TileShared {
    float scores[HEADS][SCORE_STRIDE];
    // Each value's bf16, and the bf16 of what that leaves over.
    bf16 queries[2][HEADS][SPLIT_STRIDE];
    bf16 powers_split[2][HEADS][SPLIT_STRIDE];
    float scales[2][TILE_MAX];  // of keys and values, for the 8-bit cache
    float factors[HEADS];
    Powers powers[HEADS];
};

__device__ __forceinline__ void split(float value, bf16& high, bf16& low) {
    high = narrow(value);
    low = narrow(value - widen(high));
}

__device__ __forceinline__ void put_query(TileShared& shared, u32 head, u32 element, float value) {
    split(value, shared.queries[0][head][element], shared.queries[1][head][element]);
}

// The row of split values that a lane names for near_matrices: of head lane % 8, eight elements of one part.
__device__ __forceinline__ Near split_row(const bf16 (&rows)[2][HEADS][SPLIT_STRIDE], u32 first, u32 part, u32 half) {
    return near_of(&rows[part][threadIdx.x % 8][first + half * 8]);
}

// A tile's 16 keys from `first` on as the left factor of elements `at` to `at` + 15; those past the end are 0.
__device__ __forceinline__ void take_keys(KvBf16, const u8* rows, u32 first, u32 at, u32 dim, u32 (&a)[4]) {
    u32 lane = threadIdx.x % WARP, token = first + lane % 16;
    u32 element = at + lane / 16 * 8 < dim ? at + lane / 16 * 8 : at;
    near_matrices(near_of(rows + token * (dim * 2 + KvBf16::PADDING) + element * 2), a);
    if (at + 8 >= dim) a[2] = a[3] = 0;
}

__device__ __forceinline__ u32 widened_codes(u32 low, u32 high) {
    return narrow_pair((float)(signed char)low, (float)(signed char)high);
}

__device__ __forceinline__ void take_keys(KvInt8, const u8* rows, u32 first, u32 at, u32 dim, u32 (&a)[4]) {
    u32 lane = threadIdx.x % WARP;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        u32 element = at + lane % 4 * 2 + i / 2 * 8;
        const u8* row = rows + (first + lane / 4 + i % 2 * 8) * (dim + KvInt8::PADDING);
        u32 codes = element < dim ? *(const u16*)(row + element) : 0;
        a[i] = widened_codes(codes, codes >> 8);
    }
}

// Scores of a tile's tokens: a warp for each 16.
template <class Kv>
__device__ __forceinline__ void score_tile(TileShared& shared, const u8* keys, u32 tile, u32 count, u32 dim) {
    u32 lane = threadIdx.x % WARP, first = threadIdx.x / WARP * 16;
    if (first >= count) return;
    float high[4] = {}, low[4] = {};
#pragma unroll 4
    for (u32 at = 0; at < dim; at += 16) {
        u32 a[4], b[4];
        take_keys(Kv(), keys, first, at, dim, a);
        near_matrices(split_row(shared.queries, at, lane / 16, lane / 8 % 2), b);
        if (at + 8 >= dim) b[1] = b[3] = 0;
        multiply_tile(high, a[0], a[1], a[2], a[3], b[0], b[1]);
        multiply_tile(low, a[0], a[1], a[2], a[3], b[2], b[3]);
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        u32 token = first + lane / 4 + i / 2 * 8;
        float score = high[i] + low[i];
        shared.scores[lane % 4 * 2 + i % 2][token] = Kv::SCALED ? score * shared.scales[0][token] : score;
    }
}

// A warp for each head. What the 8-bit cache's values are scaled by goes into the powers that they are weighed with.
template <class Kv> __device__ __forceinline__ void power_tile(TileShared& shared, u32 count, Powers& powers) {
    u32 lane = threadIdx.x % WARP, head = threadIdx.x / WARP;
    float scores[TILE_MAX / WARP];
#pragma unroll
    for (u32 i = 0; i < TILE_MAX / WARP; i++) scores[i] = shared.scores[head][lane + i * WARP];
    float factor = raise(scores, count, powers);
#pragma unroll
    for (u32 i = 0; i < TILE_MAX / WARP; i++) {
        u32 token = lane + i * WARP;
        float power = Kv::SCALED && token < count ? scores[i] * shared.scales[1][token] : scores[i];
        split(power, shared.powers_split[0][head][token], shared.powers_split[1][head][token]);
    }
    if (lane == 0) shared.factors[head] = factor, shared.powers[head] = powers;
}

// Values that a lane has added up by their powers: of head lane / 4, elements 2 (lane % 4) and one more of each eight that
// the warp has, for both parts of the powers.
constexpr u32 EIGHTS = DIM_MAX / 8 / ATTEND_WARPS;
struct Values {
    float sums[EIGHTS][4];
};

// Right factors of 32 tokens' elements `at` to `at` + 7.
__device__ __forceinline__ void take_values(KvBf16, const u8* rows, u32 first, u32 at, u32 dim, u32 (&b)[4]) {
    near_columns(near_of(rows + (first + threadIdx.x % WARP) * (dim * 2 + KvBf16::PADDING) + at * 2), b);
}

__device__ __forceinline__ void take_values(KvInt8, const u8* rows, u32 first, u32 at, u32 dim, u32 (&b)[4]) {
    u32 lane = threadIdx.x % WARP;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        const u8* row = rows + (first + i * 8 + lane % 4 * 2) * (dim + KvInt8::PADDING) + at + lane / 4;
        b[i] = widened_codes(row[0], row[dim + KvInt8::PADDING]);
    }
}

// Adds a tile's values: a warp takes eight elements of all tokens, then the next eight that are its own.
template <class Kv>
__device__ __forceinline__ void add_values(TileShared& shared, const u8* rows, u32 count, u32 dim, Values& values) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float factor = shared.factors[lane / 4];
#pragma unroll
    for (u32 eight = 0; eight < EIGHTS; eight++) {
        u32 at = (eight * ATTEND_WARPS + warp) * 8;
        if (at >= dim) break;
        float(&sum)[4] = values.sums[eight];
#pragma unroll
        for (u32 i = 0; i < 4; i++) sum[i] *= factor;
#pragma unroll 4
        for (u32 first = 0; first < count; first += 32) {
            u32 a[4], b[4];
            take_values(Kv(), rows, first, at, dim, b);
            // Rows past the end were never written: their powers are 0, but what stands there may be no number.
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                u32 token = first + i * 8 + lane % 4 * 2;
                b[i] = token >= count ? 0 : token + 1 >= count ? b[i] & 0xffffu : b[i];
            }
            near_matrices(split_row(shared.powers_split, first, lane / 8 % 2, lane / 16), a);
            multiply_tile(sum, a[0], a[1], a[2], a[3], b[0], b[1]);
            near_matrices(split_row(shared.powers_split, first + 16, lane / 8 % 2, lane / 16), a);
            multiply_tile(sum, a[0], a[1], a[2], a[3], b[2], b[3]);
        }
    }
}

// Hands each head's values to `give(head, element, first, second)`, two neighbours at a time.
template <class Give> __device__ __forceinline__ void give_values(const Values& values, u32 dim, u8*, Give give) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (u32 eight = 0; eight < EIGHTS; eight++) {
        u32 at = (eight * ATTEND_WARPS + warp) * 8;
        if (at >= dim) break;
        const float(&sum)[4] = values.sums[eight];
        give(lane / 4, at + lane % 4 * 2, sum[0] + sum[2], sum[1] + sum[3]);
    }
}

#endif
