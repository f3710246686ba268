// Moves tiles from memory to shared memory and on to the tensor cores' registers.
//
// A tile stands in shared memory as rows of 16-bit factors in chunks of 16 bytes; the chunks of a row are exchanged by
// the row's number (swizzled), so that eight rows' chunks of one column lie in different banks. From compute capability
// 8.0 on copies run while the block goes on (cp.async); before, they are plain.

#pragma once

#include "tensor_core.cuh"

// Bytes of a chunk and the factors in it.
constexpr u32 CHUNK_BYTES = 16;
constexpr u32 CHUNK_FACTORS = 8;

// Starts the copy of a chunk, or of zeros where there is nothing to be read.
__device__ __forceinline__ void copy_chunk(u8* to, const void* from, bool is_real) {
#if defined(BULKHEAD_EMULATED)
    emulation::copy_chunk(to, from, is_real);
#elif __CUDA_ARCH__ >= 800
    u32 address = (u32)__cvta_generic_to_shared(to), size = is_real ? CHUNK_BYTES : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(size) : "memory");
#else
    *(uint4*)to = is_real ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
#endif
}

// Loads four matrices of 8 rows of 8 factors: lane 8 i + r gives the address of row r of matrix i, and gets of every
// matrix the pair lane % 4 of row lane / 4.
__device__ __forceinline__ void load_matrices(u32 (&words)[4], const u8* row) {
#if defined(BULKHEAD_EMULATED)
    emulation::load_matrices(words, row, false);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"((u32)__cvta_generic_to_shared(row))
                 : "memory");
#endif
}

// The same of the matrices turned over: a lane gets rows 2 * (lane % 4) and the next of column lane / 4.
__device__ __forceinline__ void load_matrices_turned(u32 (&words)[4], const u8* row) {
#if defined(BULKHEAD_EMULATED)
    emulation::load_matrices(words, row, true);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"((u32)__cvta_generic_to_shared(row))
                 : "memory");
#endif
}

// Where a chunk stands in a tile whose rows have CHUNKS chunks, a multiple of 8.
template <u32 CHUNKS> __device__ __forceinline__ u32 chunk_offset(u32 row, u32 chunk) {
    return (row * CHUNKS + (chunk ^ (row & 7u))) * CHUNK_BYTES;
}

// Picks bytes: byte i of the result is byte `selector >> 4 i & 7` of the eight of `high` and `low`, for the lower four nibbles
// of the selector, none of them above 7. By the instruction itself: CUDA's own function clears the nibbles' upper bits first.
__device__ __forceinline__ u32 pick_bytes(u32 low, u32 high, u32 selector) {
#if defined(BULKHEAD_EMULATED)
    return emulation::pick_bytes(low, high, selector);
#else
    u32 picked;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(picked) : "r"(low), "r"(high), "r"(selector));
    return picked;
#endif
}

// The exponent bits of the larger magnitude of two bf16.
__device__ __forceinline__ u32 larger_exponent(u32 pair) {
    u32 low = (pair << 16) & 0x7f800000u, high = pair & 0x7f800000u;
    return low > high ? low : high;
}

// The power of two that a block is divided by, from its largest exponent bits: kept where it and its reciprocal are both
// normal numbers. Infinities stay what they are.
__device__ __forceinline__ float block_exponent(u32 largest) {
    const u32 least = 1u << 23, most = 253u << 23;
    return float_of_bits(largest < least ? least : largest > most ? most : largest);
}
