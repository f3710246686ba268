// Attention of a prompt's tokens over paged keys and values, with sinks and a sliding window.
//
// Agrees with: LayerAttention::attend (worker/src/model/attention.rs), for queries, keys, values and powers rounded to
// bf16. A block takes a tile of consecutive rows of one sequence with all the query heads that share a head of keys:
// together they are the queries, up to 128, that multiply each tile of keys. Keys are taken in ascending order in tiles
// at multiples of KEYS positions; powers are relative to the largest score so far, which begins with the sink, and sums
// are scaled down when it grows. A tile in which a row sees nothing multiplies its sums by one and adds nothing. So a
// row's result follows from its own position alone, whatever tile it is in.
//
// 8-bit keys and values multiply as whole numbers, their scales in f32. On Turing (see tensor_core.cuh) queries, keys,
// values and powers have an exponent for each row, so that nothing can overflow in f16.

#include "kv.cuh"
#include "staging.cuh"

constexpr u32 PREFILL_THREADS = 128;
constexpr u32 QUERIES = 128;
constexpr u32 QUERY_TILES = 2;  // of 16, for each of the four warps
constexpr float LOG2_OF_E = 1.4426950408889634f;

#if defined(BULKHEAD_HALF)
constexpr u32 KEY_STAGES = 1;
constexpr bool IS_HALF = true;
#else
constexpr u32 KEY_STAGES = 2;
constexpr bool IS_HALF = false;
#endif

// For heads of up to DIM elements, 64 or 128; shorter ones are filled up with zeros. Sums of long heads, and Turing's, leave
// registers for fewer keys.
template <u32 DIM> struct Tile {
    static constexpr u32 KEYS = DIM > 64 ? 16 : IS_HALF ? 32 : 64;
    static constexpr u32 CHUNKS = DIM / CHUNK_FACTORS;
    static constexpr u32 QUERY_BYTES = QUERIES * DIM * 2;
    static constexpr u32 KEY_BYTES = KEYS * DIM * 2;
};

// The tile of a block: which rows, and which positions any of them sees.
struct Rows {
    u32 first;
    u32 count;
    u32 sequence;
    u32 position;    // of the first row
    u32 first_seen;  // by the first row
    u32 last_seen;   // by the last row
    u32 kv_head;
    u32 group;       // query heads of the kv head
};

template <u32 DIM> struct PrefillShared {
    u8* queries;
    u8* tiles;            // [stages]: keys, then values
    float* key_scales;    // [stages][KEYS]
    float* value_scales;  // [stages][KEYS]
    float* query_scales;  // [QUERIES]

    __device__ __forceinline__ explicit PrefillShared(u8* shared)
        : queries(shared), tiles(shared + Tile<DIM>::QUERY_BYTES),
          key_scales((float*)(tiles + 2 * KEY_STAGES * Tile<DIM>::KEY_BYTES)),
          value_scales(key_scales + KEY_STAGES * Tile<DIM>::KEYS),
          query_scales(value_scales + KEY_STAGES * Tile<DIM>::KEYS) {}
    __device__ __forceinline__ u8* keys(u32 stage) const { return tiles + 2 * stage * Tile<DIM>::KEY_BYTES; }
    __device__ __forceinline__ u8* values(u32 stage) const { return keys(stage) + Tile<DIM>::KEY_BYTES; }
};

__device__ __forceinline__ float power_of_two(float exponent) {
#if defined(BULKHEAD_EMULATED)
    return exp2f(exponent);
#else
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
    return power;
#endif
}

// Each thread takes one query: scaled so that a score's power of two is the power of e that is meant.
template <u32 DIM>
__device__ __forceinline__ void stage_queries(const PrefillShared<DIM>& shared, const Rows& rows, const float* qkv,
                                              u32 row_heads, u32 dim) {
    u32 query = threadIdx.x, row = query / rows.group;
    bool is_real = row < rows.count;
    const float* from = qkv + ((size_t)(rows.first + (is_real ? row : 0)) * row_heads + rows.kv_head * rows.group +
                               query % rows.group) * dim;
    float factor = LOG2_OF_E / sqrtf((float)dim), down = 1.0f;
    if (IS_HALF) {
        u32 largest = 0;
        for (u32 i = 0; i < dim; i += 4) {
            float4 four = *(const float4*)(from + i);
            u32 first = larger_exponent(narrow_pair(four.x, four.y)), second = larger_exponent(narrow_pair(four.z, four.w));
            largest = largest > first ? largest : first;
            largest = largest > second ? largest : second;
        }
        float scale = block_exponent(largest);
        down = float_of_bits((254u << 23) - __float_as_uint(scale));
        shared.query_scales[query] = scale * factor;
        factor = 1.0f;
    }
#pragma unroll 4
    for (u32 chunk = 0; chunk < Tile<DIM>::CHUNKS; chunk++) {
        float4 first = {0, 0, 0, 0}, second = {0, 0, 0, 0};
        if (is_real && chunk * CHUNK_FACTORS < dim) {
            first = *(const float4*)(from + chunk * CHUNK_FACTORS);
            second = *(const float4*)(from + chunk * CHUNK_FACTORS + 4);
        }
        float by = factor * down;
        *(uint4*)(shared.queries + chunk_offset<Tile<DIM>::CHUNKS>(query, chunk)) =
            make_uint4(factor_pair(first.x * by, first.y * by), factor_pair(first.z * by, first.w * by),
                       factor_pair(second.x * by, second.y * by), factor_pair(second.z * by, second.w * by));
    }
}

// How a cache's tile comes to shared memory: positions that no row sees become zeros, for what stands there may be
// anything, or nothing.
struct PrefillBf16 {
    static constexpr bool IS_SCALED = IS_HALF;

    __device__ static __forceinline__ const u8* block_of(const Layer& layer, const Tables& tables, const Rows& rows, u32 key) {
        return layer.head_block(tables.block(rows.sequence, key), rows.kv_head, KvBf16::block_bytes(layer.dim));
    }
#if defined(BULKHEAD_HALF)
    // A thread brings one key or value to f16 with its largest magnitude between 1 and 2.
    template <u32 DIM>
    __device__ static __forceinline__ void stage(const PrefillShared<DIM>& shared, const Layer& layer, const Tables& tables,
                                                 const Rows& rows, u32 start, u32) {
        constexpr u32 KEYS = Tile<DIM>::KEYS;
        if (threadIdx.x >= 2 * KEYS) return;
        u32 line = threadIdx.x % KEYS, is_value = threadIdx.x / KEYS, key = start + line, largest = 0;
        bool is_real = key >= rows.first_seen && key <= rows.last_seen;
        const u8* from = layer.pool;
        if (is_real) from = block_of(layer, tables, rows, key) + ((size_t)is_value * BLOCK_TOKENS + key % BLOCK_TOKENS) * layer.dim * 2;
        u32 chunks = is_real ? layer.dim / CHUNK_FACTORS : 0;
        for (u32 chunk = 0; chunk < chunks; chunk++) {
            uint4 four = ((const uint4*)from)[chunk];
            u32 words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                u32 own = larger_exponent(words[i]);
                largest = largest > own ? largest : own;
            }
        }
        float scale = block_exponent(largest), down = float_of_bits((254u << 23) - __float_as_uint(scale));
        (is_value ? shared.value_scales : shared.key_scales)[line] = scale;
        u8* to = is_value ? shared.values(0) : shared.keys(0);
        for (u32 chunk = 0; chunk < Tile<DIM>::CHUNKS; chunk++) {
            uint4 four = chunk < chunks ? ((const uint4*)from)[chunk] : make_uint4(0, 0, 0, 0);
            u32 words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                words[i] = factor_pair(widen_low(words[i]) * down, widen_high(words[i]) * down);
            }
            *(uint4*)(to + chunk_offset<Tile<DIM>::CHUNKS>(line, chunk)) = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
#else
    template <u32 DIM>
    __device__ static __forceinline__ void stage(const PrefillShared<DIM>& shared, const Layer& layer, const Tables& tables,
                                                 const Rows& rows, u32 start, u32 stage) {
        constexpr u32 CHUNKS = Tile<DIM>::CHUNKS, LINES = PREFILL_THREADS / CHUNKS;
        u32 chunk = threadIdx.x % CHUNKS;
#pragma unroll 2
        for (u32 i = 0; i < Tile<DIM>::KEYS / LINES; i++) {
            u32 line = i * LINES + threadIdx.x / CHUNKS, key = start + line;
            bool is_real = key >= rows.first_seen && key <= rows.last_seen && chunk * CHUNK_FACTORS < layer.dim;
            const u8 *from = layer.pool, *value = layer.pool;
            if (is_real) {
                from = block_of(layer, tables, rows, key) + ((size_t)(key % BLOCK_TOKENS) * layer.dim + chunk * CHUNK_FACTORS) * 2;
                value = from + (size_t)BLOCK_TOKENS * layer.dim * 2;
            }
            u32 offset = chunk_offset<CHUNKS>(line, chunk);
            copy_chunk(shared.keys(stage) + offset, from, is_real);
            copy_chunk(shared.values(stage) + offset, value, is_real);
        }
    }
#endif
};

struct PrefillInt8 {
    static constexpr bool IS_SCALED = true;

    __device__ static __forceinline__ uint4 widen_bytes(u32 first, u32 second) {
        u32 words[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 word = i < 2 ? first : second, shift = i % 2 * 16;
            words[i] = factor_pair((float)(signed char)(word >> shift), (float)(signed char)(word >> (shift + 8)));
        }
        return make_uint4(words[0], words[1], words[2], words[3]);
    }
    template <u32 DIM>
    __device__ static __forceinline__ void stage(const PrefillShared<DIM>& shared, const Layer& layer, const Tables& tables,
                                                 const Rows& rows, u32 start, u32 stage) {
        constexpr u32 CHUNKS = Tile<DIM>::CHUNKS, PARTS = CHUNKS / 2, LINES = PREFILL_THREADS / PARTS;
        constexpr u32 KEYS = Tile<DIM>::KEYS;
        u32 part = threadIdx.x % PARTS;
#pragma unroll 1
        for (u32 i = 0; i < KEYS / LINES; i++) {
            u32 line = i * LINES + threadIdx.x / PARTS, key = start + line, token = key % BLOCK_TOKENS;
            bool is_seen = key >= rows.first_seen && key <= rows.last_seen, is_real = is_seen && part * 16 < layer.dim;
            uint4 own[2] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
            float scales[2] = {0, 0};
            if (is_seen) {
                u8* block = layer.head_block(tables.block(rows.sequence, key), rows.kv_head, KvInt8::block_bytes(layer.dim));
                scales[0] = *stored_scale(block, 0, token, layer.dim);
                scales[1] = *stored_scale(block, 1, token, layer.dim);
                if (is_real) {
                    own[0] = *(const uint4*)(block + (size_t)token * layer.dim + part * 16);
                    own[1] = *(const uint4*)(block + (size_t)(BLOCK_TOKENS + token) * layer.dim + part * 16);
                }
            }
            u32 first = chunk_offset<CHUNKS>(line, 2 * part), second = chunk_offset<CHUNKS>(line, 2 * part + 1);
            *(uint4*)(shared.keys(stage) + first) = widen_bytes(own[0].x, own[0].y);
            *(uint4*)(shared.keys(stage) + second) = widen_bytes(own[0].z, own[0].w);
            *(uint4*)(shared.values(stage) + first) = widen_bytes(own[1].x, own[1].y);
            *(uint4*)(shared.values(stage) + second) = widen_bytes(own[1].z, own[1].w);
            if (part == 0) {
                shared.key_scales[stage * KEYS + line] = scales[0];
                shared.value_scales[stage * KEYS + line] = scales[1];
            }
        }
    }
};

// What a lane holds of its warp's 32 queries: of query tile t, queries t * 16 + lane / 4 and 8 below, as index 2 t and
// 2 t + 1; `sums` are the weighted values, with the places of multiply_tile's D.
template <u32 DIM> struct Running {
    float sums[QUERY_TILES][DIM / 8][4];
    float largest[2 * QUERY_TILES];
    float total[2 * QUERY_TILES];  // of the lane's own powers
};

template <u32 DIM> struct Scores {
    float value[QUERY_TILES][Tile<DIM>::KEYS / 8][4];
};

template <u32 DIM>
__device__ __forceinline__ void score_tile(const PrefillShared<DIM>& shared, u32 stage, Scores<DIM>& scores) {
    constexpr u32 CHUNKS = Tile<DIM>::CHUNKS;
    u32 lane = threadIdx.x % WARP, query = threadIdx.x / WARP * 32;
#pragma unroll
    for (u32 step = 0; step < DIM / 16; step++) {
        u32 a[QUERY_TILES][4];
#pragma unroll
        for (u32 tile = 0; tile < QUERY_TILES; tile++) {
            load_matrices(a[tile], shared.queries + chunk_offset<CHUNKS>(query + tile * 16 + lane % 16, 2 * step + lane / 16));
        }
#pragma unroll
        for (u32 j = 0; j < Tile<DIM>::KEYS / 16; j++) {
            u32 b[4];
            load_matrices(b, shared.keys(stage) +
                                 chunk_offset<CHUNKS>(j * 16 + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
#pragma unroll
            for (u32 tile = 0; tile < QUERY_TILES; tile++) {
                multiply_tile(scores.value[tile][2 * j], a[tile][0], a[tile][1], a[tile][2], a[tile][3], b[0], b[1]);
                multiply_tile(scores.value[tile][2 * j + 1], a[tile][0], a[tile][1], a[tile][2], a[tile][3], b[2], b[3]);
            }
        }
    }
}

// Multiplies the scores by the scales of their query and key.
template <class Kv, u32 DIM>
__device__ __forceinline__ void scale_scores(const PrefillShared<DIM>& shared, u32 stage, Scores<DIM>& scores) {
    u32 lane = threadIdx.x % WARP, query = threadIdx.x / WARP * 32 + lane / 4;
#pragma unroll
    for (u32 row = 0; row < 2 * QUERY_TILES; row++) {
        float by = IS_HALF ? shared.query_scales[query + row * 8] : 1.0f;
#pragma unroll
        for (u32 i = 0; i < Tile<DIM>::KEYS / 4; i++) {
            u32 line = i / 2 * 8 + lane % 4 * 2 + i % 2;
            scores.value[row / 2][i / 2][row % 2 * 2 + i % 2] *= shared.key_scales[stage * Tile<DIM>::KEYS + line] * by;
        }
    }
}

// Hides what a row does not see. Queries past the end are those of the last row, of zeros, and never written.
template <u32 DIM>
__device__ __forceinline__ void hide_scores(const Rows& rows, u32 window, u32 start, Scores<DIM>& scores) {
    u32 lane = threadIdx.x % WARP, query = threadIdx.x / WARP * 32 + lane / 4;
#pragma unroll
    for (u32 row = 0; row < 2 * QUERY_TILES; row++) {
        u32 own = (query + row * 8) / rows.group;
        Visible seen(rows.position + (own < rows.count ? own : rows.count - 1), window);
#pragma unroll
        for (u32 i = 0; i < Tile<DIM>::KEYS / 4; i++) {
            u32 key = start + i / 2 * 8 + lane % 4 * 2 + i % 2;
            float& score = scores.value[row / 2][i / 2][row % 2 * 2 + i % 2];
            if (key < seen.first || key > seen.last) score = float_of_bits(0xff800000u);
        }
    }
}

// Turns scores into powers and brings the sums so far to the new largest score.
template <u32 DIM> __device__ __forceinline__ void raise(Running<DIM>& running, Scores<DIM>& scores) {
#pragma unroll
    for (u32 row = 0; row < 2 * QUERY_TILES; row++) {
        u32 tile = row / 2, half = row % 2 * 2;
        float largest = running.largest[row];
#pragma unroll
        for (u32 j = 0; j < Tile<DIM>::KEYS / 8; j++) {
            largest = fmaxf(largest, fmaxf(scores.value[tile][j][half], scores.value[tile][j][half + 1]));
        }
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
        // Without a sink a row may have seen nothing yet: then there is nothing to be brought down.
        float base = largest == float_of_bits(0xff800000u) ? 0.0f : largest;
        float down = power_of_two(running.largest[row] - base), total = 0;
#pragma unroll
        for (u32 j = 0; j < Tile<DIM>::KEYS / 8; j++) {
#pragma unroll
            for (u32 i = half; i < half + 2; i++) {
                float power = power_of_two(scores.value[tile][j][i] - base);
                scores.value[tile][j][i] = power;
                total += power;
            }
        }
        running.largest[row] = largest;
        running.total[row] = running.total[row] * down + total;
#pragma unroll
        for (u32 j = 0; j < DIM / 8; j++) {
            running.sums[tile][j][half] *= down;
            running.sums[tile][j][half + 1] *= down;
        }
    }
}

// Multiplies the powers by the values' scales; on Turing also brings each row's largest to between 1 and 2 and gives the
// factors that scale it back.
template <class Kv, u32 DIM>
__device__ __forceinline__ void scale_powers(const PrefillShared<DIM>& shared, u32 stage, Scores<DIM>& powers,
                                             float (&back)[2 * QUERY_TILES]) {
    u32 lane = threadIdx.x % WARP;
#pragma unroll
    for (u32 row = 0; row < 2 * QUERY_TILES; row++) {
        u32 tile = row / 2, half = row % 2 * 2, largest = 0;
#pragma unroll
        for (u32 j = 0; j < Tile<DIM>::KEYS / 8; j++) {
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                float& power = powers.value[tile][j][half + i];
                if (Kv::IS_SCALED) power *= shared.value_scales[stage * Tile<DIM>::KEYS + j * 8 + lane % 4 * 2 + i];
                u32 own = __float_as_uint(power) & 0x7f800000u;
                largest = largest > own ? largest : own;
            }
        }
        back[row] = 1.0f;
        if (!IS_HALF) continue;
        u32 other = __shfl_xor_sync(ALL_LANES, largest, 1);
        largest = largest > other ? largest : other;
        other = __shfl_xor_sync(ALL_LANES, largest, 2);
        back[row] = block_exponent(largest > other ? largest : other);
        float down = float_of_bits((254u << 23) - __float_as_uint(back[row]));
#pragma unroll
        for (u32 j = 0; j < Tile<DIM>::KEYS / 8; j++) {
            powers.value[tile][j][half] *= down;
            powers.value[tile][j][half + 1] *= down;
        }
    }
}

template <u32 DIM>
__device__ __forceinline__ void add_tile(const PrefillShared<DIM>& shared, u32 stage, const Scores<DIM>& powers,
                                         const float (&back)[2 * QUERY_TILES], Running<DIM>& running) {
    constexpr u32 STEPS = Tile<DIM>::KEYS / 16;
    u32 lane = threadIdx.x % WARP, a[QUERY_TILES][STEPS][4];
#pragma unroll
    for (u32 tile = 0; tile < QUERY_TILES; tile++) {
#pragma unroll
        for (u32 step = 0; step < STEPS; step++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const float* pair = &powers.value[tile][2 * step + i / 2][i % 2 * 2];
                a[tile][step][i] = factor_pair(pair[0], pair[1]);
            }
        }
    }
#pragma unroll
    for (u32 j = 0; j < DIM / 16; j++) {
        float d[QUERY_TILES][2][4] = {};
#pragma unroll
        for (u32 step = 0; step < STEPS; step++) {
            u32 b[4];
            load_matrices_turned(b, shared.values(stage) + chunk_offset<Tile<DIM>::CHUNKS>(
                                                               step * 16 + lane % 16, 2 * j + lane / 16));
#pragma unroll
            for (u32 tile = 0; tile < QUERY_TILES; tile++) {
#pragma unroll
                for (u32 k = 0; k < 2; k++) {
                    const u32(&own)[4] = a[tile][step];
                    if (IS_HALF) multiply_tile(d[tile][k], own[0], own[1], own[2], own[3], b[2 * k], b[2 * k + 1]);
                    else multiply_tile(running.sums[tile][2 * j + k], own[0], own[1], own[2], own[3], b[2 * k], b[2 * k + 1]);
                }
            }
        }
#pragma unroll
        for (u32 i = 0; IS_HALF && i < QUERY_TILES * 8; i++) {
            u32 tile = i / 8, k = i / 4 % 2;
            float& sum = running.sums[tile][2 * j + k][i % 4];
            sum = fmaf(d[tile][k][i % 4], back[2 * tile + i % 4 / 2], sum);
        }
    }
}

template <u32 DIM>
__device__ __forceinline__ void begin(const Rows& rows, const float* sinks, Running<DIM>& running) {
    u32 lane = threadIdx.x % WARP;
#pragma unroll
    for (u32 i = 0; i < 2 * QUERY_TILES; i++) {
        u32 query = threadIdx.x / WARP * 32 + i * 8 + lane / 4;
        float sink = sinks[rows.kv_head * rows.group + query % rows.group];
        running.largest[i] = sink * LOG2_OF_E;
        running.total[i] = lane % 4 == 0 && sink != float_of_bits(0xff800000u) ? 1.0f : 0.0f;
    }
}

template <u32 DIM>
__device__ __forceinline__ void store_rows(const Rows& rows, const Running<DIM>& running, u32 query_heads, u32 dim, bf16* out) {
    u32 lane = threadIdx.x % WARP;
#pragma unroll
    for (u32 i = 0; i < 2 * QUERY_TILES; i++) {
        u32 query = threadIdx.x / WARP * 32 + i * 8 + lane / 4, row = query / rows.group;
        float total = running.total[i] + __shfl_xor_sync(ALL_LANES, running.total[i], 1);
        total += __shfl_xor_sync(ALL_LANES, total, 2);
        if (row >= rows.count) continue;
        float inverse = 1.0f / total;
        bf16* to = out + ((size_t)(rows.first + row) * query_heads + rows.kv_head * rows.group + query % rows.group) * dim;
#pragma unroll
        for (u32 j = 0; j < DIM / 8; j++) {
            if (j * 8 >= dim) break;
            const float* pair = &running.sums[i / 2][j][i % 2 * 2];
            *(u32*)(to + j * 8 + lane % 4 * 2) = narrow_pair(pair[0] * inverse, pair[1] * inverse);
        }
    }
}

struct PrefillInputs {
    const float* qkv;
    u32 query_heads;
    u32 window;
    Layer layer;
    Tables tables;
    const float* sinks;
    bf16* out;
};

template <class Kv, u32 DIM> __device__ __forceinline__ void attend_rows(const PrefillInputs& in, const Rows& rows) {
    constexpr u32 KEYS = Tile<DIM>::KEYS;
    SHARED_BYTES(bytes);
    const PrefillShared<DIM> shared(bytes);
    stage_queries<DIM>(shared, rows, in.qkv, in.query_heads + 2 * in.layer.kv_heads, in.layer.dim);
    Running<DIM> running = {};
    begin<DIM>(rows, in.sinks, running);
    const u32 last_row_sees = Visible(rows.last_seen, in.window).first, end = rows.last_seen / KEYS;
    u32 tile = rows.first_seen / KEYS;
    if (KEY_STAGES == 2) {
        Kv::template stage<DIM>(shared, in.layer, in.tables, rows, tile * KEYS, 0);
        end_copies();
    }
    for (u32 stage = 0; tile <= end; tile++) {
        if (KEY_STAGES == 1) {
            __syncthreads();
            Kv::template stage<DIM>(shared, in.layer, in.tables, rows, tile * KEYS, 0);
        }
        wait_for_copies<0>();
        __syncthreads();
        if (KEY_STAGES == 2 && tile < end) {
            Kv::template stage<DIM>(shared, in.layer, in.tables, rows, (tile + 1) * KEYS, 1 - stage);
            end_copies();
        }
        Scores<DIM> scores = {};
        score_tile<DIM>(shared, stage, scores);
        bool is_whole = tile * KEYS >= last_row_sees && (tile + 1) * KEYS - 1 <= rows.position;
        if (Kv::IS_SCALED) scale_scores<Kv, DIM>(shared, stage, scores);
        if (!is_whole) hide_scores<DIM>(rows, in.window, tile * KEYS, scores);
        raise<DIM>(running, scores);
        float back[2 * QUERY_TILES];
        scale_powers<Kv, DIM>(shared, stage, scores, back);
        add_tile<DIM>(shared, stage, scores, back, running);
        if (KEY_STAGES == 2) stage = 1 - stage;
    }
    store_rows<DIM>(rows, running, in.query_heads, in.layer.dim, in.out);
}

// tiles: [tiles] of {first row, rows}. The last tiles, which see most, start first.
template <class Kv>
__device__ __forceinline__ void attend_tile(const PrefillInputs& in, const u32* tiles) {
    let_next_start();
    wait_for_previous();
    u32 index = gridDim.x - 1 - blockIdx.x;
    Rows rows;
    rows.first = tiles[2 * index], rows.count = tiles[2 * index + 1];
    rows.sequence = in.tables.sequences[rows.first];
    rows.position = in.tables.positions[rows.first];
    rows.first_seen = Visible(rows.position, in.window).first;
    rows.last_seen = rows.position + rows.count - 1;
    rows.kv_head = blockIdx.y;
    rows.group = in.query_heads / in.layer.kv_heads;
    if (in.layer.dim <= 64) attend_rows<Kv, 64>(in, rows);
    else attend_rows<Kv, 128>(in, rows);
}

// Macros, because entry points of a driver API need plain names and cannot be templates.
#define ATTEND_PREFILL(NAME, KV)                                                                                       \
    ENTRY __launch_bounds__(128, 2) NAME(const float* qkv, u32 query_heads, u32 window, u8* pool, u32 pool_layers,     \
                                         u32 pool_layer, u32 kv_heads, u32 dim, const u32* blocks,                     \
                                         const u32* block_firsts, u32 block_stride, const u32* sequences,              \
                                         const u32* positions, const float* sinks, const u32* tiles, bf16* out) {      \
        PrefillInputs in{qkv, query_heads, window, Layer{pool, pool_layers, pool_layer, kv_heads, dim},                \
                         Tables{blocks, block_firsts, block_stride, sequences, positions}, sinks, out};                \
        attend_tile<KV>(in, tiles);                                                                                    \
    }

ATTEND_PREFILL(attend_prefill_bf16, PrefillBf16)
ATTEND_PREFILL(attend_prefill_int8, PrefillInt8)
