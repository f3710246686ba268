// Products of small tiles: D[16 rows, 8 columns] += A[16, 16] * B[16, 8], 16-bit factors, f32 sums.
//
// From compute capability 8.0 on the factors are bf16. Turing (7.5) multiplies f16 only: there (BULKHEAD_HALF) each
// column's 64 activations are first scaled by a power of two that brings the largest to between 1 and 2, and the
// product is scaled back in f32, so nothing can overflow and the sum keeps f16's eleven bits.
//
// A lane's place in a tile, with group = lane / 4 and member = lane % 4 (PTX ISA, "Matrix fragments for mma.m16n8k16"):
//   A: a0 rows group, k pair member; a1 row group + 8; a2, a3 the same rows, k pair member + 4
//   B: b0 column group, k pair member; b1 k pair member + 4
//   D: d0, d1 row group, columns 2 * member, 2 * member + 1; d2, d3 row group + 8
// The sum does not care which k stands where as long as A and B agree, so each lane takes k from bytes that are
// neighbours in memory.

#pragma once

#include "common.cuh"

#if !defined(BULKHEAD_HALF) && !defined(BULKHEAD_EMULATED) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define BULKHEAD_HALF 1
#endif

#if defined(BULKHEAD_HALF)
// The bits of an f16, rounded to the nearest.
__device__ __forceinline__ u32 half_bits(float value) {
#if defined(BULKHEAD_EMULATED)
    return emulation::half_of_float(value);
#else
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#endif
}
#endif

// Two factors as the tensor cores take them: exact for what bf16 holds, or f16 on Turing.
__device__ __forceinline__ u32 factor_pair(float low, float high) {
#if defined(BULKHEAD_HALF)
    return half_bits(low) | half_bits(high) << 16;
#else
    return narrow_pair(low, high);
#endif
}

__device__ __forceinline__ void multiply_tile(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if defined(BULKHEAD_EMULATED)
    emulation::multiply_tile(d, a0, a1, a2, a3, b0, b1);
#elif defined(BULKHEAD_HALF)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a2), "r"(a3), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

// Brings 16 values of a lane, as bf16 pairs, into the form that multiply_tile takes, and gives the factor by which the
// products of this block have to be scaled back: 1 but on Turing. The four lanes of one group share one exponent.
__device__ __forceinline__ float normalise_pairs(u32 (&pairs)[8]) {
#if defined(BULKHEAD_HALF)
    u32 largest = 0;
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
        u32 low = (pairs[i] << 16) & 0x7f800000u, high = pairs[i] & 0x7f800000u;
        largest = largest > low ? largest : low;
        largest = largest > high ? largest : high;
    }
    u32 other = __shfl_xor_sync(ALL_LANES, largest, 1);
    largest = largest > other ? largest : other;
    other = __shfl_xor_sync(ALL_LANES, largest, 2);
    largest = largest > other ? largest : other;
    // Kept where the power of two and its reciprocal are both normal numbers; infinities stay what they are.
    const u32 least = 1u << 23, most = 253u << 23;
    largest = largest < least ? least : largest > most ? most : largest;
    float down = float_of_bits((254u << 23) - largest);
#pragma unroll
    for (u32 i = 0; i < 8; i++) pairs[i] = factor_pair(widen_low(pairs[i]) * down, widen_high(pairs[i]) * down);
    return float_of_bits(largest);
#else
    (void)pairs;
    return 1.0f;
#endif
}

// Gives the scales of the two columns that a lane's d0 and d1 belong to, from what normalise_pairs gave each group.
__device__ __forceinline__ void column_scales(float scale, float& first, float& second) {
#if defined(BULKHEAD_HALF)
    u32 member = threadIdx.x % 4;
    first = __shfl_sync(ALL_LANES, scale, member * 8);
    second = __shfl_sync(ALL_LANES, scale, member * 8 + 4);
#else
    first = scale;
    second = scale;
#endif
}

#if !defined(BULKHEAD_HALF)
// Four matrices of 8 x 8 elements of 16 bits from shared memory: lane 8 i + r names row r of matrix i, 16 bytes. Of each
// matrix a lane gets row lane / 4, elements 2 (lane % 4) and one more: the factors of multiply_tile.
__device__ __forceinline__ void near_matrices(Near row, u32 (&out)[4]) {
#if defined(BULKHEAD_EMULATED)
    u32 lane = threadIdx.x % WARP;
    for (u32 i = 0; i < 4; i++) out[i] = near_word(__shfl_sync(ALL_LANES, row, i * 8 + lane / 4) + lane % 4 * 4);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(row));
#endif
}

// The same of the matrices' transposes: a lane gets column lane / 4 of rows 2 (lane % 4) and one more.
__device__ __forceinline__ void near_columns(Near row, u32 (&out)[4]) {
#if defined(BULKHEAD_EMULATED)
    u32 lane = threadIdx.x % WARP;
    for (u32 i = 0; i < 4; i++) {
        Near first = __shfl_sync(ALL_LANES, row, i * 8 + lane % 4 * 2);
        Near second = __shfl_sync(ALL_LANES, row, i * 8 + lane % 4 * 2 + 1);
        out[i] = (u32)((const u16*)first)[lane / 4] | (u32)((const u16*)second)[lane / 4] << 16;
    }
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(row));
#endif
}
#endif
