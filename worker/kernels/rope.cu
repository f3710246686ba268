// Rotates queries and keys by their position, and writes keys and values into the cache.
//
// Agrees with: rotate (worker/src/model/decoder.rs) and KvCache::write (worker/src/engine/kv_cache.rs). Cosines and sines
// come from the host (RopeTable::write), for an angle of 10^5 radians needs more than the device's fast functions.

#include "kv.cuh"

// Half of a head is at most this many lanes' pairs.
constexpr u32 PAIRS_MAX = 4;

struct Turned {
    float first[PAIRS_MAX];
    float second[PAIRS_MAX];
};

// Stores a head as the cache does, in `row`; every lane of a warp calls.
__device__ __forceinline__ void write_head(KvBf16, u8* row, float*, u32 dim, const Turned& turned) {
    bf16* to = (bf16*)row;
    u32 half = dim / 2;
#pragma unroll
    for (u32 i = 0; i < PAIRS_MAX; i++) {
        u32 pair = threadIdx.x % WARP + i * WARP;
        if (pair >= half) break;
        to[pair] = narrow(turned.first[i]);
        to[pair + half] = narrow(turned.second[i]);
    }
}

__device__ __forceinline__ u8 quantise(float value, float inverse) {
    return (u8)(signed char)(int)rintf(value * inverse);
}

__device__ __forceinline__ void write_head(KvInt8, u8* row, float* scale, u32 dim, const Turned& turned) {
    u32 half = dim / 2;
    float largest = 0;
#pragma unroll
    for (u32 i = 0; i < PAIRS_MAX; i++) {
        float first = fabsf(turned.first[i]), second = fabsf(turned.second[i]);
        largest = first > largest || first != first ? first : largest;
        largest = second > largest || second != second ? second : largest;
    }
    largest = warp_max(largest);
    // A head of zeros has scale 0; what is not a number stays none in the scale, and so in every score.
    float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
#pragma unroll
    for (u32 i = 0; i < PAIRS_MAX; i++) {
        u32 pair = threadIdx.x % WARP + i * WARP;
        if (pair >= half) break;
        row[pair] = quantise(turned.first[i], inverse);
        row[pair + half] = quantise(turned.second[i], inverse);
    }
    if (threadIdx.x % WARP == 0) *scale = largest / 127.0f;
}

// A warp's lanes take the pairs of one head; what is no query or key (`is_turned` false) stays as it is.
__device__ __forceinline__ Turned turn_head(const float* own, const float* cosines, const float* sines, u32 half,
                                            bool is_turned) {
    Turned turned = {};
#pragma unroll
    for (u32 i = 0; i < PAIRS_MAX; i++) {
        u32 pair = threadIdx.x % WARP + i * WARP;
        if (pair >= half) break;
        float first = own[pair], second = own[pair + half];
        float cosine = is_turned ? cosines[pair] : 1.0f, sine = is_turned ? sines[pair] : 0.0f;
        turned.first[i] = is_turned ? first * cosine - second * sine : first;
        turned.second[i] = is_turned ? second * cosine + first * sine : second;
    }
    return turned;
}

// A warp for each head of queries, keys and values of one row: queries are rotated in place, the others go to the cache.
template <class Kv>
__device__ __forceinline__ void rope_and_write(float* qkv, const float* cosines, const float* sines, u32 query_heads,
                                               const Layer& layer, const Tables& tables) {
    let_next_start();
    wait_for_previous();
    u32 row = blockIdx.x, head = blockIdx.y * (blockDim.x / WARP) + threadIdx.x / WARP, half = layer.dim / 2;
    if (head >= query_heads + 2 * layer.kv_heads) return;
    float* own = qkv + ((size_t)row * (query_heads + 2 * layer.kv_heads) + head) * layer.dim;
    bool is_value = head >= query_heads + layer.kv_heads;
    Turned turned = turn_head(own, cosines + (size_t)row * half, sines + (size_t)row * half, half, !is_value);
    if (head < query_heads) {
#pragma unroll
        for (u32 i = 0; i < PAIRS_MAX; i++) {
            u32 pair = threadIdx.x % WARP + i * WARP;
            if (pair >= half) break;
            own[pair] = turned.first[i];
            own[pair + half] = turned.second[i];
        }
        return;
    }
    u32 position = tables.positions[row], kv_head = (head - query_heads) % layer.kv_heads, token = position % BLOCK_TOKENS;
    u8* block = layer.head_block(tables.block(tables.sequences[row], position), kv_head, Kv::block_bytes(layer.dim));
    write_head(Kv(), stored_row<Kv>(block, is_value, token, layer.dim), stored_scale(block, is_value, token, layer.dim),
               layer.dim, turned);
}

#define ROPE(NAME, KV)                                                                                                 \
    ENTRY __launch_bounds__(256) NAME(float* qkv, const float* cosines, const float* sines, u32 query_heads, u8* pool, \
                                      u32 pool_layers, u32 pool_layer, u32 kv_heads, u32 dim, const u32* blocks,       \
                                      const u32* block_firsts, u32 block_stride, const u32* sequences,                 \
                                      const u32* positions) {                                                          \
        rope_and_write<KV>(qkv, cosines, sines, query_heads, Layer{pool, pool_layers, pool_layer, kv_heads, dim},      \
                           Tables{blocks, block_firsts, block_stride, sequences, positions});                          \
    }

ROPE(rope_write_bf16, KvBf16)
ROPE(rope_write_int8, KvInt8)
