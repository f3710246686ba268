// What every kernel shares: types, rounding to bf16, fixed-order reductions, programmatic dependent launch.
//
// No header of CUDA's library is needed, so that nvcc, NVRTC and the tests' emulation (BULKHEAD_EMULATED, a plain C++
// compiler) all build the same text.
//
// Invariants of every kernel here:
// - Arithmetic is bf16 or 8 bit times f32 with f32 sums, never f16 without a block exponent (see tensor_core.cuh).
// - The order of every sum follows from the shapes and from a token's own position, never from the grid, the other
//   tokens of the batch or the order in which blocks happen to run: there are no floating-point atomics.
// - Every thread calls wait_for_previous() before it reads or writes what another kernel of the step touches. Weights
//   may be read before that.

#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// The bits of a bfloat16.
typedef u16 bf16;

#define ENTRY extern "C" __global__ void

#if defined(BULKHEAD_EMULATED)
#define SHARED_BYTES(name) u8* name = emulation::dynamic_shared()
#else
#define SHARED_BYTES(name) extern __shared__ __align__(16) u8 name[]
#endif

constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

// Waits until the kernels before this one in the stream are complete and their writes are visible.
__device__ __forceinline__ void wait_for_previous() {
#if defined(BULKHEAD_EMULATED)
    emulation::note_wait();
#elif __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream start its preparations.
__device__ __forceinline__ void let_next_start() {
#if !defined(BULKHEAD_EMULATED) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// An address in shared memory as a number of 32 bits, hidden from the compiler so that it is held and not made anew each
// time; what is loaded through it stays behind the waits and barriers before it.
#if defined(BULKHEAD_EMULATED)
typedef u8* Near;
__device__ __forceinline__ Near near_of(const void* shared) { return (u8*)shared; }
__device__ __forceinline__ u32 near_word(Near at) { return *(const u32*)at; }
__device__ __forceinline__ uint2 near_pair(Near at) { return *(const uint2*)at; }
#else
typedef u32 Near;
__device__ __forceinline__ Near near_of(const void* shared) {
    u32 at = (u32)__cvta_generic_to_shared(shared);
    asm volatile("" : "+r"(at));
    return at;
}
__device__ __forceinline__ u32 near_word(Near at) {
    u32 word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(at));
    return word;
}
__device__ __forceinline__ uint2 near_pair(Near at) {
    uint2 pair;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(pair.x), "=r"(pair.y) : "r"(at));
    return pair;
}
#endif

// Starts a copy of 4, 8 or 16 bytes from global to shared memory; both lie on that many bytes. It is done for this thread
// after wait_for_copies, and for the others after a barrier too. Before 8.0 the copy is made at once.
template <u32 BYTES> __device__ __forceinline__ void start_copy(Near at, const void* from) {
#if defined(BULKHEAD_EMULATED)
    emulation::start_copy(at, from, BYTES);
#elif __CUDA_ARCH__ >= 800
    if (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(BYTES) : "memory");
    }
#else
    for (u32 i = 0; i < BYTES / 4; i++) {
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(at + 4 * i), "r"(((const u32*)from)[i]) : "memory");
    }
#endif
}

// Ends a group of copies: what was started since the last call.
__device__ __forceinline__ void end_copies() {
#if defined(BULKHEAD_EMULATED)
    emulation::end_copies();
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the last PENDING groups of this thread's copies are on their way.
template <u32 PENDING> __device__ __forceinline__ void wait_for_copies() {
#if defined(BULKHEAD_EMULATED)
    emulation::wait_for_copies(PENDING);
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// Says in every thread whether this block is the last of `blocks` to come here; then it sees what the others wrote
// before. The counter is 0 before the first and after the last. `flag` is shared room for a word.
__device__ __forceinline__ bool is_last_block(u32* counter, u32 blocks, u32* flag) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        *flag = atomicAdd(counter, 1u) + 1 == blocks;
        if (*flag) *counter = 0;
        __threadfence();
    }
    __syncthreads();
    return *flag != 0;
}

// Reads what another block of this launch, or a kernel that this one has not waited for, wrote: past the first-level cache.
template <class T> __device__ __forceinline__ T read_through(const T* from) { return __ldcg(from); }

// Loads to a register, which keeps what it holds unless something is wanted. Written as a condition around a load, the compiler
// loads elsewhere and moves the result at once, which waits for it.
#if defined(BULKHEAD_EMULATED)
template <class From, class To> void load_if(bool is_wanted, const From* from, To& to) {
    if (is_wanted) to = *from;
}
#else
#define LOAD_IF(FROM, TO, KIND, PLACE)                                                                                 \
    __device__ __forceinline__ void load_if(bool is_wanted, const FROM* from, TO& to) {                                \
        asm volatile("{.reg .pred wanted; setp.ne.u32 wanted, %2, 0; @wanted ld.global." KIND " %0, [%1];}"            \
                     : PLACE(to) : "l"(from), "r"((u32)is_wanted));                                                    \
    }
LOAD_IF(u8, u32, "u8", "+r")
LOAD_IF(u16, u32, "u16", "+r")
LOAD_IF(float, float, "f32", "+f")
#endif

// Makes the compiler load a word although nobody looks at it.
__device__ __forceinline__ void keep(u32 word) {
#if defined(BULKHEAD_EMULATED)
    (void)word;
#else
    asm volatile("" ::"r"(word));
#endif
}

// A byte of a word.
__device__ __forceinline__ u32 byte_of(u32 word, u32 byte) {
#if defined(BULKHEAD_EMULATED)
    return (word >> (8 * byte)) & 255u;
#else
    return __byte_perm(word, 0, 0x4440 + byte);
#endif
}

__device__ __forceinline__ float float_of_bits(u32 bits) { return __uint_as_float(bits); }

__device__ __forceinline__ float widen(bf16 value) { return float_of_bits((u32)value << 16); }

// The two halves of a word that holds two bf16, the first one low.
__device__ __forceinline__ float widen_low(u32 pair) { return float_of_bits(pair << 16); }
__device__ __forceinline__ float widen_high(u32 pair) { return float_of_bits(pair & 0xffff0000u); }

// Rounds to the nearest bf16, to even on a tie; what is not a number stays none.
__device__ __forceinline__ bf16 narrow(float value) {
    u32 bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (bf16)((bits >> 16) | 0x40u);
    return (bf16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

__device__ __forceinline__ u32 narrow_pair(float low, float high) {
#if !defined(BULKHEAD_EMULATED) && __CUDA_ARCH__ >= 800
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return (u32)narrow(low) | (u32)narrow(high) << 16;
#endif
}

// Sums over a warp by halving: every lane gets the same bits.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (u32 distance = WARP / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(ALL_LANES, value, distance);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (u32 distance = WARP / 2; distance > 0; distance /= 2) {
        float other = __shfl_xor_sync(ALL_LANES, value, distance);
        // Written so that a value that is not a number wins and is seen later.
        value = (value > other || value != value) ? value : other;
    }
    return value;
}

// Sums over a block of `blockDim.x` threads, a multiple of 32 up to 1024. `slots` is shared room for 32 floats; the
// call begins and ends with a barrier's guarantee for it, so it can be used again at once.
__device__ __forceinline__ float block_sum(float value, float* slots) {
    value = warp_sum(value);
    if (threadIdx.x % WARP == 0) slots[threadIdx.x / WARP] = value;
    __syncthreads();
    float total = 0;
    for (u32 warp = 0; warp < blockDim.x / WARP; warp++) total += slots[warp];
    __syncthreads();
    return total;
}
