// What a prompt's products have to do: pieces of weight rows and activations, for dense layers and for experts.

#pragma once

#include "formats.cuh"

// Rows of a weight that a block takes at a time.
constexpr u32 MATMUL_ROWS = 128;

// One piece of work: 128 rows of a matrix with some activations of a group.
struct Piece {
    const Matrix* matrix;  // null past the last piece
    u32 row;
    u32 group;
    u32 token;  // the first one's index in its group
    u32 count;  // activations of the group
};

// Matrices that read the same activations: a layer's q, k and v, or one alone.
struct PromptJob {
    const Matrix* matrices;
    u32 matrix_count;
    const bf16* activations;
    u32 tokens;
    float* out;
    u32 out_stride;
    u32 row_pieces;

    __device__ __forceinline__ void count_rows() {
        row_pieces = 0;
        for (u32 i = 0; i < matrix_count; i++) row_pieces += (matrices[i].rows + MATMUL_ROWS - 1) / MATMUL_ROWS;
    }
    // All rows of the first tokens come first: blocks that run together share the activations.
    template <u32 TOKENS> __device__ __forceinline__ Piece find_piece(u32 index) const {
        u32 token = index / row_pieces * TOKENS;
        return token < tokens ? rows_of(index % row_pieces, token) : Piece{};
    }
    __device__ __forceinline__ Piece rows_of(u32 rest, u32 token) const {
        for (u32 i = 0; i < matrix_count; i++) {
            u32 pieces = (matrices[i].rows + MATMUL_ROWS - 1) / MATMUL_ROWS;
            if (rest < pieces) return Piece{matrices + i, rest * MATMUL_ROWS, 0, token, tokens};
            rest -= pieces;
        }
        return Piece{};
    }
    __device__ __forceinline__ u32 activation(const Piece&, u32 token) const { return token; }
    __device__ __forceinline__ u32 slot(const Piece&, u32 token) const { return token; }
};

// The chosen experts' matrices with the slots that each one serves.
struct GroupedJob {
    const Matrix* matrices;
    u32 groups;
    const u32* experts;
    const u32* firsts;
    const u32* slots;
    const bf16* activations;
    u32 slots_per_row;
    u32 row_pieces;
    u32 token_pieces;
    const u32* piece_firsts;

    // Counts each group's pieces of TOKENS slots, and those of the groups before it. Begins without a barrier: the
    // caller's first use of what is counted comes after the one at the end.
    template <u32 TOKENS> __device__ __forceinline__ void count_pieces(u32* room) {
        for (u32 group = threadIdx.x; group <= groups; group += blockDim.x) {
            u32 before = 0;
            for (u32 i = 0; i < group; i++) before += (firsts[i + 1] - firsts[i] + TOKENS - 1) / TOKENS;
            room[group] = before;
        }
        __syncthreads();
        piece_firsts = room;
        token_pieces = room[groups];
    }
    // The group that a piece belongs to, by the number of pieces before each group.
    __device__ __forceinline__ u32 group_of(const u32* list, u32 piece) const {
        u32 group = 0, after = groups;
        while (after - group > 1) {
            u32 middle = (group + after) / 2;
            if (list[middle] <= piece) group = middle;
            else after = middle;
        }
        return group;
    }
    // All rows of a group's first tokens come first: blocks that run together share activations and weights.
    template <u32 TOKENS> __device__ __forceinline__ Piece find_piece(u32 index) const {
        u32 own = index / row_pieces;
        if (own >= token_pieces) return Piece{};
        u32 group = group_of(piece_firsts, own);
        return Piece{matrices + experts[group], (index - own * row_pieces) * MATMUL_ROWS, group,
                     (own - piece_firsts[group]) * TOKENS, firsts[group + 1] - firsts[group]};
    }
    __device__ __forceinline__ u32 slot(const Piece& piece, u32 token) const { return slots[firsts[piece.group] + token]; }
    __device__ __forceinline__ u32 activation(const Piece& piece, u32 token) const {
        return slot(piece, token) / slots_per_row;
    }
};

// What is not a number passes the clamps.
__device__ __forceinline__ float gated(float gate, float up, float alpha, float limit) {
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : up < -limit ? -limit : up;
    return (up + 1.0f) * (gate / (1.0f + expf(-alpha * gate)));
}

// The group count is a result of the kernel before.
__device__ __forceinline__ u32 groups_of_step(const u32* group_count) {
    wait_for_previous();
    return *group_count;
}
