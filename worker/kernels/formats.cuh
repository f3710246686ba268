// Weights as they are stored, and how a lane takes its share of 64 columns of two rows.
//
// Layouts are the files' own (worker/src/quant/{nf4,mxfp4,dense}.rs): nothing is repacked for the device. Each format
// decodes through tables; the scale of a block multiplies the f32 sum of the block's products, so the only rounding
// beyond the CPU's is that of NF4's sixteen values to bf16 (at most 2^-9, relative).
//
// Bounds: columns are a multiple of 64; NF4 blocks hold 64 weights and nested groups 256 scales; codes lie on 16 bytes.

#pragma once

#include "tensor_core.cuh"

// Columns that are multiplied under one set of scales.
constexpr u32 BLOCK_COLUMNS = 64;
// Scales of NF4 that share one nested scale.
constexpr u32 NESTED_GROUP = 256;

// A weight [rows, columns] in device memory, 48 bytes; its twin on the host is `repr(C)` with the same fields.
struct Matrix {
    const u8* codes;      // NF4, MXFP4: [rows, columns / 2]; bf16: [rows, columns] of 2 bytes
    const u8* scales;     // NF4: f32 [blocks]; nested: u8 [blocks]; MXFP4: u8 [rows, columns / 32]; bf16: null
    const float* nested;  // nested NF4: f32 [ceil(blocks / 256)], else null
    const float* bias;    // f32 [rows] or null
    float offset;         // nested NF4: added to each restored scale
    u32 rows;
    u32 output;           // where in an output row this matrix's first row goes
    u32 reserved;
};

__device__ const float NF4_VALUES[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
__device__ const float FP4_VALUES[16] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f,
                                         -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// A byte's two values, for each lane a copy in its own bank of shared memory: 256 * 32 words.
constexpr u32 PAIR_TABLE_BYTES = 256 * WARP * 4;
// The 256 values of nested scales.
constexpr u32 SCALE_MAP_BYTES = 256 * 4;

// The two values of a byte in the order of their columns.
template <bool HIGH_FIRST> __device__ __forceinline__ u32 byte_pair(const float* values, u32 byte) {
    float high = values[byte >> 4], low = values[byte & 15];
    return HIGH_FIRST ? factor_pair(high, low) : factor_pair(low, high);
}

// Looks a byte of a word up in the lane's copy of the table, `own`.
__device__ __forceinline__ u32 table_pair(Near own, u32 word, u32 byte) {
    return near_word(own + byte_of(word, byte) * (WARP * 4));
}

// Sixteen columns of two rows, as multiply_tile takes them: [row][pair].
struct Factors {
    u32 pair[2][8];
};

// Where nested NF4's scales come from, beyond the codes that are held. A tile's rows share a handful of nested scales,
// which the first-level cache keeps; holding them in registers would cost two blocks of prefetch.
struct ScaleSource {
    const float* map;     // the 256 values of codes, in shared memory
    const float* nested;
    float offset;
};

// Each format says how many blocks a warp holds, how to load, decode and scale them; and for the way through shared
// memory (matvec.cuh) how a lane takes its share of 16 rows' codes of a block, 32 bytes a row, and what it keeps of the
// scale of one block of one row: `load_scale` fetches, `word` restores it once for the warp, `spread` makes it a float.
struct Nf4Plain {
    static constexpr u32 DEPTH = 6;
    static constexpr u32 TABLE_BYTES = PAIR_TABLE_BYTES;
    static constexpr u32 GROUPS = 1;
    static constexpr bool HIGH_FIRST = true;
    static constexpr bool NESTED = false;
    struct Held {
        uint2 codes[2];
        float scale[2];
    };
    __device__ static __forceinline__ u32 column(u32 member, u32 half) { return member * 16 + half * 8; }
    __device__ static __forceinline__ const float* values() { return NF4_VALUES; }
    __device__ static __forceinline__ void load(const Matrix& m, u32 which, u32 row, u32 block, u32 blocks, Held& held) {
        size_t index = (size_t)row * blocks + block;
        held.codes[which] = __ldcs((const uint2*)(m.codes + index * 32 + threadIdx.x % 4 * 8));
        held.scale[which] = __ldcs((const float*)m.scales + index);
    }
    __device__ static __forceinline__ void decode(const Held& held, const u32* table, Factors& out, float (&)[2]) {
        decode_own(held, near_of(table + threadIdx.x % WARP), out);
    }
    __device__ static __forceinline__ void decode_own(const Held& held, Near table, Factors& out) {
#pragma unroll
        for (u32 row = 0; row < 2; row++) {
#pragma unroll
            for (u32 i = 0; i < 8; i++)
                out.pair[row][i] = table_pair(table, i < 4 ? held.codes[row].x : held.codes[row].y, i % 4);
        }
    }
    __device__ static __forceinline__ float scale(const Held& held, u32 which, u32, const ScaleSource&, size_t) {
        return held.scale[which];
    }
    __device__ static __forceinline__ u32 own_codes(u32 lane) { return lane / 4 * 32 + lane % 4 * 8; }
    __device__ static __forceinline__ void take(Near own, Held& held) {
        held.codes[0] = near_pair(own);
        held.codes[1] = near_pair(own + 8 * 32);
    }
    struct Scale {
        float scale;
    };
    static constexpr u32 SCALE_BYTES = 4;
    __device__ static __forceinline__ void load_scale(bool is_wanted, const u8* at, const float*, u32, Scale& held) {
        load_if(is_wanted, (const float*)at, held.scale);
    }
    __device__ static __forceinline__ u32 word(const Scale& held, const float*, float) { return __float_as_uint(held.scale); }
    __device__ static __forceinline__ float spread(u32 word, u32) { return float_of_bits(word); }
};

struct Nf4Nested {
    static constexpr u32 DEPTH = 6;
    static constexpr u32 TABLE_BYTES = PAIR_TABLE_BYTES;
    static constexpr u32 GROUPS = 1;
    static constexpr bool HIGH_FIRST = true;
    static constexpr bool NESTED = true;
    struct Held {
        uint2 codes[2];
        u32 code[2];
    };
    __device__ static __forceinline__ u32 column(u32 member, u32 half) { return member * 16 + half * 8; }
    __device__ static __forceinline__ const float* values() { return NF4_VALUES; }
    __device__ static __forceinline__ void load(const Matrix& m, u32 which, u32 row, u32 block, u32 blocks, Held& held) {
        size_t index = (size_t)row * blocks + block;
        held.codes[which] = __ldcs((const uint2*)(m.codes + index * 32 + threadIdx.x % 4 * 8));
        held.code[which] = m.scales[index];
    }
    __device__ static __forceinline__ void decode(const Held& held, const u32* table, Factors& out, float (&)[2]) {
        decode_own(held, near_of(table + threadIdx.x % WARP), out);
    }
    __device__ static __forceinline__ void decode_own(const Held& held, Near table, Factors& out) {
#pragma unroll
        for (u32 row = 0; row < 2; row++) {
#pragma unroll
            for (u32 i = 0; i < 8; i++)
                out.pair[row][i] = table_pair(table, i < 4 ? held.codes[row].x : held.codes[row].y, i % 4);
        }
    }
    // Rounded twice, as the CPU does.
    __device__ static __forceinline__ float scale(const Held& held, u32 which, u32, const ScaleSource& from, size_t index) {
        return __fadd_rn(__fmul_rn(from.map[held.code[which]], from.nested[index / NESTED_GROUP]), from.offset);
    }
    __device__ static __forceinline__ u32 own_codes(u32 lane) { return lane / 4 * 32 + lane % 4 * 8; }
    __device__ static __forceinline__ void take(Near own, Held& held) {
        held.codes[0] = near_pair(own);
        held.codes[1] = near_pair(own + 8 * 32);
    }
    struct Scale {
        u32 code;
        float nested;
    };
    static constexpr u32 SCALE_BYTES = 1;
    __device__ static __forceinline__ void load_scale(bool is_wanted, const u8* at, const float* nested, u32 index,
                                                      Scale& held) {
        load_if(is_wanted, at, held.code);
        load_if(is_wanted, nested + index / NESTED_GROUP, held.nested);
    }
    __device__ static __forceinline__ u32 word(const Scale& held, const float* map, float offset) {
        return __float_as_uint(__fadd_rn(__fmul_rn(map[held.code], held.nested), offset));
    }
    __device__ static __forceinline__ float spread(u32 word, u32) { return float_of_bits(word); }
};

struct Mxfp4 {
    static constexpr u32 DEPTH = 5;
    static constexpr u32 TABLE_BYTES = PAIR_TABLE_BYTES;
    static constexpr u32 GROUPS = 2;
    static constexpr bool HIGH_FIRST = false;
    static constexpr bool NESTED = false;
    struct Held {
        u32 codes[2][2];
        u32 exponents[2];
    };
    // A lane takes eight columns of each group of 32, so that a group's products add up apart from the other's.
    __device__ static __forceinline__ u32 column(u32 member, u32 half) { return half * 32 + member * 8; }
    __device__ static __forceinline__ const float* values() { return FP4_VALUES; }
    __device__ static __forceinline__ void load(const Matrix& m, u32 which, u32 row, u32 block, u32 blocks, Held& held) {
        size_t index = (size_t)row * blocks + block;
        const u32* codes = (const u32*)(m.codes + index * 32);
        held.codes[which][0] = __ldcs(codes + threadIdx.x % 4);
        held.codes[which][1] = __ldcs(codes + 4 + threadIdx.x % 4);
        held.exponents[which] = __ldcs((const u16*)m.scales + index);
    }
    __device__ static __forceinline__ void decode(const Held& held, const u32* table, Factors& out, float (&)[2]) {
        decode_own(held, near_of(table + threadIdx.x % WARP), out);
    }
    __device__ static __forceinline__ void decode_own(const Held& held, Near table, Factors& out) {
#pragma unroll
        for (u32 row = 0; row < 2; row++) {
#pragma unroll
            for (u32 i = 0; i < 8; i++) out.pair[row][i] = table_pair(table, held.codes[row][i / 4], i % 4);
        }
    }
    // 2^(exponent - 127); at exponent 0 that is a subnormal.
    __device__ static __forceinline__ float spread(u32 word, u32 group) {
        u32 exponent = (word >> (8 * group)) & 255u;
        return float_of_bits(exponent == 0 ? 1u << 22 : exponent << 23);
    }
    __device__ static __forceinline__ float scale(const Held& held, u32 which, u32 group, const ScaleSource&, size_t) {
        return spread(held.exponents[which], group);
    }
    __device__ static __forceinline__ u32 own_codes(u32 lane) { return lane / 4 * 32 + lane % 4 * 4; }
    __device__ static __forceinline__ void take(Near own, Held& held) {
        held.codes[0][0] = near_word(own), held.codes[0][1] = near_word(own + 16);
        held.codes[1][0] = near_word(own + 8 * 32), held.codes[1][1] = near_word(own + 8 * 32 + 16);
    }
    struct Scale {
        u32 exponents;
    };
    static constexpr u32 SCALE_BYTES = 2;
    __device__ static __forceinline__ void load_scale(bool is_wanted, const u8* at, const float*, u32, Scale& held) {
        load_if(is_wanted, (const u16*)at, held.exponents);
    }
    __device__ static __forceinline__ u32 word(const Scale& held, const float*, float) { return held.exponents; }
};

// Floats as they are: scales are 1, but on Turing a row's block has an exponent like an activation's.
struct Bf16 {
    static constexpr u32 DEPTH = 2;
    static constexpr u32 TABLE_BYTES = 0;
    static constexpr u32 GROUPS = 1;
    static constexpr bool HIGH_FIRST = false;
    static constexpr bool NESTED = false;
    struct Held {
        uint4 words[2][2];
    };
    struct Scale {};
    __device__ static __forceinline__ u32 column(u32 member, u32 half) { return member * 16 + half * 8; }
    __device__ static __forceinline__ const float* values() { return nullptr; }
    __device__ static __forceinline__ void load(const Matrix& m, u32 which, u32 row, u32 block, u32 blocks, Held& held) {
        const uint4* words = (const uint4*)(m.codes + ((size_t)row * blocks + block) * 128) + threadIdx.x % 4 * 2;
        held.words[which][0] = __ldcs(words);
        held.words[which][1] = __ldcs(words + 1);
    }
    __device__ static __forceinline__ void decode(const Held& held, const u32*, Factors& out, float (&scales)[2]) {
#pragma unroll
        for (u32 row = 0; row < 2; row++) {
            u32 pairs[8] = {held.words[row][0].x, held.words[row][0].y, held.words[row][0].z, held.words[row][0].w,
                            held.words[row][1].x, held.words[row][1].y, held.words[row][1].z, held.words[row][1].w};
            scales[row] = normalise_pairs(pairs);
#pragma unroll
            for (u32 i = 0; i < 8; i++) out.pair[row][i] = pairs[i];
        }
    }
    __device__ static __forceinline__ float scale(const Held&, u32, u32, const ScaleSource&, size_t) { return 1.0f; }
};
