// Attention of single tokens over paged keys and values, with sinks and a sliding window.
//
// Agrees with: LayerAttention::attend (worker/src/model/attention.rs). The context is cut at multiples of 128 positions;
// a block takes one cut of one row for the query heads that share a head of keys, and a second kernel adds the cuts in
// ascending order. Where the cuts lie follows from positions alone, so a token's sums have one order whatever the batch.

#include "kv.cuh"

constexpr u32 CUT_TOKENS = 128;
constexpr u32 DECODE_THREADS = 128;
constexpr u32 DECODE_WARPS = DECODE_THREADS / WARP;
// Query heads that are computed at a time, and the pairs of a head that a lane holds.
constexpr u32 HEADS = 8;
constexpr u32 LANE_PAIRS = 2;

// Scores of a token stand together, for all heads, with a stride that spreads the banks.
constexpr u32 SCORE_STRIDE = HEADS + 4;

struct alignas(16) DecodeShared {
    float scores[CUT_TOKENS][SCORE_STRIDE];
    float sums[DECODE_WARPS][HEADS][2 * LANE_PAIRS * WARP];
    float queries[HEADS][2 * LANE_PAIRS * WARP];
    u32 blocks[CUT_TOKENS / BLOCK_TOKENS];
};

// Scores of the cut's visible tokens: a thread for each token.
template <class Kv>
__device__ __forceinline__ void score_cut(DecodeShared& shared, const Layer& layer, u32 kv_head, u32 start, u32 from, u32 to) {
    for (u32 token = from + threadIdx.x; token < to; token += DECODE_THREADS) {
        const u8* block = layer.head_block(shared.blocks[token / BLOCK_TOKENS], kv_head, Kv::block_bytes(layer.dim));
        float sums[HEADS] = {};
#pragma unroll 2
        for (u32 at = 0; at < layer.dim; at += 8) {
            float key[8];
            Kv::load8(block, 0, (start + token) % BLOCK_TOKENS, layer.dim, at, key);
#pragma unroll
            for (u32 head = 0; head < HEADS; head++) {
#pragma unroll
                for (u32 i = 0; i < 8; i += 4) {
                    float4 query = *(const float4*)&shared.queries[head][at + i];
                    sums[head] = fmaf(key[i], query.x, sums[head]);
                    sums[head] = fmaf(key[i + 1], query.y, sums[head]);
                    sums[head] = fmaf(key[i + 2], query.z, sums[head]);
                    sums[head] = fmaf(key[i + 3], query.w, sums[head]);
                }
            }
        }
#pragma unroll
        for (u32 head = 0; head < HEADS; head += 4) {
            *(float4*)&shared.scores[token][head] = float4{sums[head], sums[head + 1], sums[head + 2], sums[head + 3]};
        }
    }
}

// Turns a head's scores into powers relative to their largest; a warp for each head. Gives largest and sum.
__device__ __forceinline__ void power_cut(DecodeShared& shared, u32 head, u32 from, u32 to, float& largest,
                                          float& sum) {
    u32 lane = threadIdx.x % WARP;
    largest = float_of_bits(0xff800000u);
    for (u32 token = lane; token < CUT_TOKENS; token += WARP) {
        if (token < from || token >= to) continue;
        float score = shared.scores[token][head];
        largest = score > largest || score != score ? score : largest;
    }
    largest = warp_max(largest);
    sum = 0;
    for (u32 token = lane; token < CUT_TOKENS; token += WARP) {
        if (token < from || token >= to) continue;
        float power = expf(shared.scores[token][head] - largest);
        shared.scores[token][head] = power;
        sum += power;
    }
    sum = warp_sum(sum);
}

// Adds up the values of the cut by their powers: warp w takes tokens w, w + 4 and so on of the cut.
template <class Kv>
__device__ __forceinline__ void add_values(DecodeShared& shared, const Layer& layer, u32 kv_head, u32 start, u32 from, u32 to) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float sums[HEADS][2 * LANE_PAIRS] = {};
    u32 begin = from + (warp + DECODE_WARPS - from % DECODE_WARPS) % DECODE_WARPS;
#pragma unroll 4
    for (u32 token = begin; token < to; token += DECODE_WARPS) {
        const u8* block = layer.head_block(shared.blocks[token / BLOCK_TOKENS], kv_head, Kv::block_bytes(layer.dim));
        float weights[HEADS];
#pragma unroll
        for (u32 head = 0; head < HEADS; head += 4) {
            float4 four = *(const float4*)&shared.scores[token][head];
            weights[head] = four.x, weights[head + 1] = four.y, weights[head + 2] = four.z, weights[head + 3] = four.w;
        }
#pragma unroll
        for (u32 i = 0; i < LANE_PAIRS; i++) {
            u32 at = 2 * (lane + i * WARP);
            if (at >= layer.dim) continue;
            float value[2];
            Kv::load2(block, 1, (start + token) % BLOCK_TOKENS, layer.dim, at, value);
#pragma unroll
            for (u32 head = 0; head < HEADS; head++) {
                sums[head][2 * i] = fmaf(weights[head], value[0], sums[head][2 * i]);
                sums[head][2 * i + 1] = fmaf(weights[head], value[1], sums[head][2 * i + 1]);
            }
        }
    }
#pragma unroll
    for (u32 head = 0; head < HEADS; head++) {
#pragma unroll
        for (u32 i = 0; i < LANE_PAIRS; i++) {
            shared.sums[warp][head][2 * (lane + i * WARP)] = sums[head][2 * i];
            shared.sums[warp][head][2 * (lane + i * WARP) + 1] = sums[head][2 * i + 1];
        }
    }
}

// One cut of one row and kv head. partial: [row, query head, cut, dim + 2]: largest score, sum of powers, weighted values.
template <class Kv>
__device__ __forceinline__ void attend_cut(const float* qkv, u32 query_heads, u32 window, const Layer& layer,
                                           const Tables& tables, float* partial) {
    __shared__ DecodeShared shared;
    let_next_start();
    wait_for_previous();
    u32 row = blockIdx.z, kv_head = blockIdx.y, dim = layer.dim, group = query_heads / layer.kv_heads;
    Visible visible(tables.positions[row], window);
    u32 start = (visible.first / CUT_TOKENS + blockIdx.x) * CUT_TOKENS;
    if (start > visible.last) return;
    u32 from = visible.first > start ? visible.first - start : 0;
    u32 to = visible.last + 1 - start < CUT_TOKENS ? visible.last + 1 - start : CUT_TOKENS;
    if (threadIdx.x >= from / BLOCK_TOKENS && threadIdx.x * BLOCK_TOKENS < to) {
        shared.blocks[threadIdx.x] = tables.block(tables.sequences[row], start + threadIdx.x * BLOCK_TOKENS);
    }
    const float* queries = qkv + ((size_t)row * (query_heads + 2 * layer.kv_heads) + kv_head * group) * dim;
    float scale = 1.0f / sqrtf((float)dim);
    for (u32 base = 0; base < group; base += HEADS) {
        for (u32 i = threadIdx.x; i < HEADS * dim; i += DECODE_THREADS) {
            u32 head = i / dim;
            shared.queries[head][i % dim] = base + head < group ? queries[(size_t)base * dim + i] * scale : 0.0f;
        }
        __syncthreads();
        score_cut<Kv>(shared, layer, kv_head, start, from, to);
        __syncthreads();
        for (u32 head = threadIdx.x / WARP; head < HEADS; head += DECODE_WARPS) {
            float largest, sum;
            power_cut(shared, head, from, to, largest, sum);
            if (threadIdx.x % WARP != 0 || base + head >= group) continue;
            size_t at = ((size_t)row * query_heads + kv_head * group + base + head) * gridDim.x + blockIdx.x;
            partial[at * (dim + 2)] = largest;
            partial[at * (dim + 2) + 1] = sum;
        }
        __syncthreads();
        add_values<Kv>(shared, layer, kv_head, start, from, to);
        __syncthreads();
        for (u32 i = threadIdx.x; i < HEADS * dim; i += DECODE_THREADS) {
            u32 head = i / dim, element = i % dim;
            if (base + head >= group) break;
            float total = 0;
#pragma unroll
            for (u32 warp = 0; warp < DECODE_WARPS; warp++) total += shared.sums[warp][head][element];
            size_t at = ((size_t)row * query_heads + kv_head * group + base + head) * gridDim.x + blockIdx.x;
            partial[at * (dim + 2) + 2 + element] = total;
        }
        __syncthreads();
    }
}

#define ATTEND(NAME, KV)                                                                                               \
    ENTRY __launch_bounds__(128) NAME(const float* qkv, u32 query_heads, u32 window, u8* pool, u32 pool_layers,        \
                                      u32 pool_layer, u32 kv_heads, u32 dim, const u32* blocks,                        \
                                      const u32* block_firsts, u32 block_stride, const u32* sequences,                 \
                                      const u32* positions, float* partial) {                                          \
        attend_cut<KV>(qkv, query_heads, window, Layer{pool, pool_layers, pool_layer, kv_heads, dim},                  \
                       Tables{blocks, block_firsts, block_stride, sequences, positions}, partial);                     \
    }

ATTEND(attend_decode_bf16, KvBf16)
ATTEND(attend_decode_int8, KvInt8)

// Adds the cuts of one row and query head, in ascending order, and the sink to the normalisation alone.
ENTRY __launch_bounds__(128) attend_combine(const float* partial, const float* sinks, const u32* positions, u32 window,
                                            u32 cuts_max, u32 dim, bf16* out) {
    let_next_start();
    wait_for_previous();
    u32 row = blockIdx.y, head = blockIdx.x;
    Visible visible(positions[row], window);
    u32 cuts = visible.last / CUT_TOKENS - visible.first / CUT_TOKENS + 1;
    const float* own = partial + ((size_t)row * gridDim.x + head) * cuts_max * (dim + 2);
    float sink = sinks[head], largest = sink;
    for (u32 cut = 0; cut < cuts; cut++) {
        float other = own[(size_t)cut * (dim + 2)];
        largest = other > largest || other != other ? other : largest;
    }
    float sum = expf(sink - largest);
    for (u32 cut = 0; cut < cuts; cut++) {
        const float* at = own + (size_t)cut * (dim + 2);
        sum = fmaf(at[1], expf(at[0] - largest), sum);
    }
    for (u32 element = threadIdx.x; element < dim; element += blockDim.x) {
        float total = 0;
        for (u32 cut = 0; cut < cuts; cut++) {
            const float* at = own + (size_t)cut * (dim + 2);
            total = fmaf(at[2 + element], expf(at[0] - largest), total);
        }
        out[((size_t)row * gridDim.x + head) * dim + element] = narrow(total / sum);
    }
}
