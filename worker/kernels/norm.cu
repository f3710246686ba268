// What happens to a token between the products: embedding, adding a layer's change, RMSNorm, the gate of a dense layer.
//
// Agrees with: rms_norm (worker/src/model/norm.rs), the sum at the end of Mixture::run (moe.rs), Decoder::forward's embedding
// and additions (decoder.rs), and silu(gate) * up of DenseMlp::run (mlp.rs), rounded to bf16.

#include "common.cuh"

// Gathers rows of the embedding. A token outside the vocabulary gives not-a-number, which ends the worker when it
// reaches the logits; the engine checks tokens before.
ENTRY __launch_bounds__(256) embed(const bf16* table, const u32* tokens, u32 vocabulary, u32 hidden, float* x) {
    let_next_start();
    wait_for_previous();
    u32 token = tokens[blockIdx.x];
    for (u32 i = threadIdx.x; i < hidden; i += blockDim.x) {
        float value = token < vocabulary ? widen(table[(size_t)token * hidden + i]) : float_of_bits(0x7fc00000u);
        x[(size_t)blockIdx.x * hidden + i] = value;
    }
}

// Columns that a thread has at a time, and how many times: rows are to 16384 long for 1024 threads.
constexpr u32 OWN = 4;
constexpr u32 ROUNDS = 4;
// Times whose weights are fetched before the wait: for more there are no registers in a block of 1024 threads.
constexpr u32 EARLY_ROUNDS = 2;

// Adds `part_count` parts to a row of x, by weight and in their order, then normalises the row.
//
// Output row i is made of row `rows[i]` of x and parts, or of row i where `rows` is null; weights may be null (all 1).
// With part_count 0 nothing is added. Either output may be null.
ENTRY __launch_bounds__(768) add_norm(float* x, const float* parts, u32 part_count, const float* part_weights,
                                       const u32* rows, const float* norm_weight, float epsilon, u32 hidden,
                                       bf16* out_bf16, float* out_f32) {
    __shared__ float slots[WARP];
    let_next_start();
    float4 gains[EARLY_ROUNDS], values[ROUNDS];
#pragma unroll
    for (u32 round = 0; round < EARLY_ROUNDS; round++) {
        u32 at = (round * blockDim.x + threadIdx.x) * OWN;
        if (at < hidden) gains[round] = *(const float4*)(norm_weight + at);
    }
    wait_for_previous();
    size_t row = rows != nullptr ? rows[blockIdx.x] : blockIdx.x;
    float* own = x + row * hidden;
    float squares = 0;
#pragma unroll
    for (u32 round = 0; round < ROUNDS; round++) {
        u32 at = (round * blockDim.x + threadIdx.x) * OWN;
        if (at >= hidden) break;
        float4 value = *(const float4*)(own + at), change = {0, 0, 0, 0};
#pragma unroll 4
        for (u32 part = 0; part < part_count; part++) {
            float weight = part_weights != nullptr ? part_weights[row * part_count + part] : 1.0f;
            float4 more = *(const float4*)(parts + (row * part_count + part) * hidden + at);
            change.x = fmaf(weight, more.x, change.x), change.y = fmaf(weight, more.y, change.y);
            change.z = fmaf(weight, more.z, change.z), change.w = fmaf(weight, more.w, change.w);
        }
        value.x += change.x, value.y += change.y, value.z += change.z, value.w += change.w;
        if (part_count > 0) *(float4*)(own + at) = value;
        squares = fmaf(value.x, value.x, squares), squares = fmaf(value.y, value.y, squares);
        squares = fmaf(value.z, value.z, squares), squares = fmaf(value.w, value.w, squares);
        values[round] = value;
    }
    float scale = 1.0f / sqrtf(block_sum(squares, slots) / (float)hidden + epsilon);
#pragma unroll
    for (u32 round = 0; round < ROUNDS; round++) {
        u32 at = (round * blockDim.x + threadIdx.x) * OWN;
        if (at >= hidden) break;
        float4 value = values[round], gain = round < EARLY_ROUNDS ? gains[round] : *(const float4*)(norm_weight + at);
        value.x *= scale * gain.x, value.y *= scale * gain.y, value.z *= scale * gain.z, value.w *= scale * gain.w;
        size_t place = (size_t)blockIdx.x * hidden + at;
        if (out_bf16 != nullptr) {
            *(uint2*)(out_bf16 + place) = uint2{narrow_pair(value.x, value.y), narrow_pair(value.z, value.w)};
        }
        if (out_f32 != nullptr) *(float4*)(out_f32 + place) = value;
    }
}

// Gates a dense layer: out = silu(gate) * up, each thread four of them. A row holds `inner` gates, then their ups.
ENTRY __launch_bounds__(256) silu_gate(const float* gate_up, u32 inner, bf16* out) {
    let_next_start();
    wait_for_previous();
    u32 at = (blockIdx.x * blockDim.x + threadIdx.x) * OWN;
    if (at >= inner) return;
    const float* row = gate_up + (size_t)blockIdx.y * 2 * inner;
    float4 gate = *(const float4*)(row + at), up = *(const float4*)(row + inner + at);
    gate.x *= up.x / (1.0f + expf(-gate.x)), gate.y *= up.y / (1.0f + expf(-gate.y));
    gate.z *= up.z / (1.0f + expf(-gate.z)), gate.w *= up.w / (1.0f + expf(-gate.w));
    *(uint2*)(out + (size_t)blockIdx.y * inner + at) = uint2{narrow_pair(gate.x, gate.y), narrow_pair(gate.z, gate.w)};
}
