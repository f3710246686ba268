// Runs CUDA kernels on a plain C++ compiler, one thread block at a time, to test what they compute without a card.
//
// A thread is a fiber that runs until it meets others: at __syncthreads (the block) or at a shuffle, ballot or tensor
// core product (its warp). Warps run one after the other between barriers, in ascending or descending order, so a
// missing barrier shows as a wrong result in one of the two. The program ends with status 3 and a message when
// lanes of a warp meet at different places, when a thread ends that others wait for, and when a thread never called
// wait_for_previous.
//
// What it is not: a model of speed, of memory ordering between blocks, or a race detector.

#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <vector>

struct dim3 {
    unsigned x, y, z;
};
struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return uint4{x, y, z, w}; }

namespace emulation {

constexpr unsigned LANES = 32;
constexpr size_t STACK_BYTES = 64 << 10;
constexpr size_t SHARED_BYTES_MAX = 227 << 10;

enum class State { Ready, AtBlock, AtWarp, Ended };
enum class Meeting { None, Exchange, Product, Matrices };

// What a lane shows the others of its warp. Two of each, taken in turn: a lane may be one meeting ahead.
struct Shown {
    uint64_t value;
    uint32_t words[6];
};

// A copy that was started and not yet waited for: only then is it made, so that reading too early gives what was there.
struct Copy {
    void* to;
    const void* from;  // null: zeros
    size_t size;
    unsigned group;
};

struct Fiber {
    ucontext_t context;
    jmp_buf resume;
    std::vector<char> stack;
    State state;
    Meeting meeting;
    bool is_started;
    bool has_waited;
    unsigned turn;
    unsigned index;
    Shown shown[2];
    std::vector<Copy> copies;
    unsigned copy_group;
};

inline dim3 grid, block, block_index;
inline std::vector<Fiber> fibers;
inline Fiber* current;
inline jmp_buf scheduler;
inline const std::function<void()>* kernel;
inline bool is_descending;
alignas(16) inline unsigned char shared_memory[SHARED_BYTES_MAX];
inline size_t shared_size;

[[noreturn]] inline void fail(const char* what) {
    fprintf(stderr, "emulation: %s (block %u,%u,%u thread %u)\n", what, block_index.x, block_index.y, block_index.z,
            current != nullptr ? current->index : 0);
    exit(3);
}

inline unsigned char* dynamic_shared() { return shared_memory; }
inline void note_wait() { current->has_waited = true; }

inline void start_copy(void* to, const void* from, size_t size) {
    if ((uintptr_t)to % size != 0 || (uintptr_t)from % size != 0) fail("a copy's ends lie not on its size");
    current->copies.push_back(Copy{to, from, size, current->copy_group});
}
inline void end_copies() { current->copy_group++; }
inline void wait_for_copies(unsigned pending) {
    std::vector<Copy> rest;
    for (const Copy& copy : current->copies) {
        if (copy.group + pending < current->copy_group) {
            if (copy.from == nullptr) memset(copy.to, 0, copy.size);
            else memcpy(copy.to, copy.from, copy.size);
        } else {
            rest.push_back(copy);
        }
    }
    current->copies = rest;
}

inline void leave(State state) {
    current->state = state;
    if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

inline void meet_block() { leave(State::AtBlock); }

inline const Fiber* meet_warp(Meeting meeting, const Shown& shown, unsigned& turn) {
    Fiber* own = current;
    turn = own->turn;
    own->turn = 1 - turn;
    own->shown[turn] = shown;
    own->meeting = meeting;
    leave(State::AtWarp);
    return &fibers[own->index / LANES * LANES];
}

inline void start_fiber() {
    (*kernel)();
    if (!current->has_waited) fail("a thread ended without waiting for the kernels before");
    if (!current->copies.empty()) fail("a thread ended without waiting for its copies");
    current->state = State::Ended;
    _longjmp(scheduler, 1);
}

inline void run_fiber(Fiber& fiber) {
    current = &fiber;
    if (_setjmp(scheduler) != 0) return;
    if (fiber.is_started) _longjmp(fiber.resume, 1);
    fiber.is_started = true;
    setcontext(&fiber.context);
}

// Runs a warp until all its lanes are at a block barrier or have ended.
inline void run_warp(unsigned first, unsigned last) {
    for (;;) {
        for (unsigned i = first; i < last; i++) {
            if (fibers[i].state == State::Ready) run_fiber(fibers[i]);
        }
        unsigned at_warp = 0, at_block = 0;
        for (unsigned i = first; i < last; i++) {
            at_warp += fibers[i].state == State::AtWarp;
            at_block += fibers[i].state == State::AtBlock;
        }
        if (at_warp == 0) {
            if (at_block != 0 && at_block != last - first) fail("some lanes of a warp ended before a barrier");
            return;
        }
        if (at_warp != last - first) fail("lanes of a warp are at different places");
        for (unsigned i = first; i < last; i++) {
            if (fibers[i].meeting != fibers[first].meeting) fail("lanes of a warp are at different exchanges");
            fibers[i].state = State::Ready;
        }
    }
}

inline void run_block() {
    unsigned threads = block.x * block.y * block.z;
    if (threads % LANES != 0) fail("a block is no whole number of warps");
    if (fibers.size() != threads) fibers = std::vector<Fiber>(threads);
    for (unsigned i = 0; i < threads; i++) {
        Fiber& fiber = fibers[i];
        fiber.stack.resize(STACK_BYTES);
        fiber.state = State::Ready;
        fiber.is_started = fiber.has_waited = false;
        fiber.turn = 0;
        fiber.copies.clear();
        fiber.copy_group = 0;
        fiber.index = i;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, start_fiber, 0);
    }
    memset(shared_memory, 0xff, sizeof shared_memory);
    for (;;) {
        for (unsigned n = 0; n < threads / LANES; n++) {
            unsigned warp = is_descending ? threads / LANES - 1 - n : n;
            run_warp(warp * LANES, (warp + 1) * LANES);
        }
        unsigned ended = 0;
        for (Fiber& fiber : fibers) ended += fiber.state == State::Ended;
        if (ended == threads) return;
        if (ended != 0) fail("some threads ended before a barrier");
        for (Fiber& fiber : fibers) fiber.state = State::Ready;
    }
}

inline void launch(dim3 grid_size, dim3 block_size, size_t shared_bytes, const std::function<void()>& body) {
    grid = grid_size, block = block_size, kernel = &body, shared_size = shared_bytes;
    if (shared_bytes > SHARED_BYTES_MAX) fail("more shared memory than any card has");
    unsigned char mark[64];
    memset(mark, 0xff, sizeof mark);
    for (unsigned z = 0; z < grid.z; z++) {
        for (unsigned y = 0; y < grid.y; y++) {
            for (unsigned x = 0; x < grid.x; x++) {
                block_index = dim3{x, y, z};
                run_block();
                size_t rest = SHARED_BYTES_MAX - shared_bytes;
                if (memcmp(shared_memory + shared_bytes, mark, rest < sizeof mark ? rest : sizeof mark) != 0) {
                    fail("shared memory was written past what the launch gave");
                }
            }
        }
    }
}

template <class T> T exchange(T value, unsigned source) {
    static_assert(sizeof(T) <= 8, "a lane shows at most 64 bits");
    Shown shown = {};
    memcpy(&shown.value, &value, sizeof value);
    unsigned turn;
    const Fiber* warp = meet_warp(Meeting::Exchange, shown, turn);
    memcpy(&value, &warp[source].shown[turn].value, sizeof value);
    return value;
}

inline void copy_chunk(unsigned char* to, const void* from, bool is_real) {
    if ((uintptr_t)to % 16 != 0 || (uintptr_t)from % 16 != 0) fail("a chunk does not lie on 16 bytes");
    current->copies.push_back(Copy{to, is_real ? from : nullptr, 16, current->copy_group});
}

// Four matrices of eight rows of eight 16-bit numbers; lane 8 i + r shows where row r of matrix i is.
inline void load_matrices(uint32_t (&words)[4], const unsigned char* row, bool is_turned) {
    unsigned lane = current->index % LANES, turn;
    if ((uintptr_t)row % 16 != 0) fail("a row does not lie on 16 bytes");
    const Fiber* warp = meet_warp(Meeting::Matrices, Shown{(uint64_t)(uintptr_t)row, {}}, turn);
    for (unsigned i = 0; i < 4; i++) {
        uint16_t pair[2];
        for (unsigned k = 0; k < 2; k++) {
            unsigned line = is_turned ? lane % 4 * 2 + k : lane / 4, column = is_turned ? lane / 4 : lane % 4 * 2 + k;
            memcpy(&pair[k], (const unsigned char*)(uintptr_t)warp[i * 8 + line].shown[turn].value + column * 2, 2);
        }
        words[i] = (uint32_t)pair[0] | (uint32_t)pair[1] << 16;
    }
}

inline uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    uint64_t bytes = (uint64_t)high << 32 | low;
    uint32_t picked = 0;
    for (unsigned i = 0; i < 4; i++) {
        unsigned index = selector >> (4 * i) & 15;
        if (index > 7) fail("a byte is picked with its sign");
        picked |= (uint32_t)(bytes >> (8 * index) & 255) << (8 * i);
    }
    return picked;
}

inline float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// f16 from f32, to nearest and even; overflow gives infinity.
inline uint32_t half_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t sign = bits >> 16 & 0x8000;
    float magnitude = fabsf(value);
    if (value != value) return sign | 0x7e00;
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    if (magnitude == 0) return sign;
    int exponent;
    frexpf(magnitude, &exponent);
    int shift = exponent < -13 ? 24 : 11 - exponent;
    uint32_t units = (uint32_t)nearbyint(ldexp((double)magnitude, shift));
    if (exponent < -13) return sign | units;
    return sign | (((uint32_t)(exponent + 14) << 10) + units - 0x400);
}

inline double factor(uint32_t bits) {
    bits &= 0xffff;
#if defined(BULKHEAD_HALF)
    int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    double value = exponent == 31  ? (mantissa != 0 ? NAN : INFINITY)
                   : exponent == 0 ? ldexp(mantissa, -24)
                                   : ldexp(mantissa + 1024, exponent - 25);
    return (bits & 0x8000) != 0 ? -value : value;
#else
    return (double)float_of_bits(bits << 16);
#endif
}

// D += A * B for one 16 x 8 tile; where each lane's words stand is PTX's table for mma.m16n8k16.
inline void multiply_tile(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    unsigned lane = current->index % LANES, turn;
    const Fiber* warp = meet_warp(Meeting::Product, Shown{0, {a0, a1, a2, a3, b0, b1}}, turn);
    for (unsigned i = 0; i < 4; i++) {
        unsigned row = lane / 4, column = lane % 4 * 2 + i % 2;
        double sum = d[i];
        for (unsigned k = 0; k < 16; k++) {
            unsigned member = k % 8 / 2, late = k / 8, low = k % 2 * 16;
            uint32_t a = warp[row * 4 + member].shown[turn].words[late * 2 + i / 2];
            uint32_t b = warp[column * 4 + member].shown[turn].words[4 + late];
            sum += factor(a >> low) * factor(b >> low);
        }
        d[i] = (float)sum;
    }
}

}  // namespace emulation

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define threadIdx (dim3{emulation::current->index, 0, 0})
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block)
#define gridDim (emulation::grid)
#define __syncthreads() emulation::meet_block()
#define __threadfence()

template <class T> T __shfl_xor_sync(unsigned, T value, unsigned distance) {
    return emulation::exchange(value, (emulation::current->index % emulation::LANES) ^ distance);
}
template <class T> T __shfl_sync(unsigned, T value, unsigned source, unsigned width = emulation::LANES) {
    return emulation::exchange(value, emulation::current->index % emulation::LANES / width * width + source % width);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
    unsigned turn, votes = 0;
    const emulation::Fiber* warp = emulation::meet_warp(emulation::Meeting::Exchange, emulation::Shown{vote, {}}, turn);
    for (unsigned i = 0; i < emulation::LANES; i++) votes |= (unsigned)warp[i].shown[turn].value << i;
    return votes;
}
inline void __syncwarp() {
    unsigned turn;
    emulation::meet_warp(emulation::Meeting::Exchange, emulation::Shown{}, turn);
}
template <class T> T __ldcs(const T* from) { return *from; }
template <class T> T __ldcg(const T* from) { return *from; }
inline unsigned atomicAdd(unsigned* to, unsigned value) {
    unsigned before = *to;
    *to += value;
    return before;
}
inline int __popc(unsigned word) { return __builtin_popcount(word); }
inline float __uint_as_float(unsigned bits) { return emulation::float_of_bits(bits); }
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
