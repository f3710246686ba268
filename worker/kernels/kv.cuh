// Where keys and values of past tokens stand: the layout of worker/src/engine/kv_cache.rs.
//
// A pool holds blocks of 32 tokens: [block][layer of the pool][kv head] and in it, for bf16, keys [32][dim] then values
// [32][dim]; for 8 bit, keys and values as signed bytes, then a scale for each token's key and value, f32 [32] and [32]:
// element = byte * scale, scale = largest magnitude / 127.

#pragma once

#include "common.cuh"

constexpr u32 BLOCK_TOKENS = 32;

// The blocks of a step's sequences in one pool, and which token stands in which row.
struct Tables {
    const u32* blocks;     // [sequences, stride]
    const u32* firsts;     // [sequences]: the index within its sequence of the first block in its row of `blocks`
    u32 stride;
    const u32* sequences;  // [rows]
    const u32* positions;  // [rows]

    __device__ __forceinline__ u32 block(u32 sequence, u32 position) const {
        return blocks[(size_t)sequence * stride + position / BLOCK_TOKENS - firsts[sequence]];
    }
};

// The positions that a row sees, both inclusive. Window 0: all.
struct Visible {
    u32 first;
    u32 last;
    __device__ __forceinline__ Visible(u32 position, u32 window)
        : first(window != 0 && position + 1 > window ? position + 1 - window : 0), last(position) {}
};

// One layer's part of a pool.
struct Layer {
    u8* pool;
    u32 layers;
    u32 layer;
    u32 kv_heads;
    u32 dim;

    __device__ __forceinline__ u8* head_block(u32 block, u32 head, u32 bytes) const {
        return pool + (((size_t)block * layers + layer) * kv_heads + head) * bytes;
    }
};

// A head's key or value of one token as it is stored. `row` points to its elements, `scale` is 1 for bf16.
//
// PIECE is what is copied at once; PADDING keeps rows of a tile in shared memory in different banks.
struct KvBf16 {
    static constexpr u32 PIECE = 16;
    static constexpr u32 PADDING = 16;
    static constexpr bool SCALED = false;
    __device__ static __forceinline__ u32 row_bytes(u32 dim) { return dim * 2; }
    __device__ static __forceinline__ u32 block_bytes(u32 dim) { return 2 * BLOCK_TOKENS * dim * 2; }
    __device__ static __forceinline__ void load8(const u8* row, u32 at, float, float (&out)[8]) {
        uint4 words = *(const uint4*)(row + at * 2);
        out[0] = widen_low(words.x), out[1] = widen_high(words.x), out[2] = widen_low(words.y);
        out[3] = widen_high(words.y), out[4] = widen_low(words.z), out[5] = widen_high(words.z);
        out[6] = widen_low(words.w), out[7] = widen_high(words.w);
    }
    __device__ static __forceinline__ void load2(const u8* row, u32 at, float, float (&out)[2]) {
        u32 word = *(const u32*)(row + at * 2);
        out[0] = widen_low(word), out[1] = widen_high(word);
    }
};

struct KvInt8 {
    static constexpr u32 PIECE = 8;
    static constexpr u32 PADDING = 8;
    static constexpr bool SCALED = true;
    __device__ static __forceinline__ u32 row_bytes(u32 dim) { return dim; }
    __device__ static __forceinline__ u32 block_bytes(u32 dim) { return 2 * BLOCK_TOKENS * (dim + 4); }
    __device__ static __forceinline__ float element(u32 word, u32 byte, float scale) {
        return (float)(signed char)(word >> (8 * byte)) * scale;
    }
    __device__ static __forceinline__ void load8(const u8* row, u32 at, float scale, float (&out)[8]) {
        uint2 words = *(const uint2*)(row + at);
#pragma unroll
        for (u32 i = 0; i < 8; i++) out[i] = element(i < 4 ? words.x : words.y, i % 4, scale);
    }
    __device__ static __forceinline__ void load2(const u8* row, u32 at, float scale, float (&out)[2]) {
        u32 word = *(const u16*)(row + at);
        out[0] = element(word, 0, scale), out[1] = element(word, 1, scale);
    }
};

// Where in a head's block a token's key (or value) stands, and its scale.
template <class Kv> __device__ __forceinline__ u8* stored_row(u8* block, u32 is_value, u32 token, u32 dim) {
    return block + (size_t)(is_value * BLOCK_TOKENS + token) * Kv::row_bytes(dim);
}
__device__ __forceinline__ float* stored_scale(u8* block, u32 is_value, u32 token, u32 dim) {
    return (float*)(block + 2 * BLOCK_TOKENS * dim) + is_value * BLOCK_TOKENS + token;
}
