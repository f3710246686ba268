// What happens to a token's residual stream between the products: embedding, adding a layer's change, RMSNorm.
//
// Agrees with: rms_norm (worker/src/model/norm.rs), the sum at the end of Mixture::run (moe.rs), and Decoder::forward's
// embedding and additions (decoder.rs).

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

// Adds `part_count` parts to a row of x, by weight and in their order, then normalises the row.
//
// Output row i is made of row `rows[i]` of x and parts, or of row i where `rows` is null; weights may be null (all 1).
// With part_count 0 nothing is added. Either output may be null.
ENTRY __launch_bounds__(1024) add_norm(float* x, const float* parts, u32 part_count, const float* part_weights,
                                       const u32* rows, const float* norm_weight, float epsilon, u32 hidden,
                                       bf16* out_bf16, float* out_f32) {
    __shared__ float slots[WARP];
    let_next_start();
    wait_for_previous();
    size_t row = rows != nullptr ? rows[blockIdx.x] : blockIdx.x;
    float* own = x + row * hidden;
    float squares = 0;
    for (u32 i = threadIdx.x; i < hidden; i += blockDim.x) {
        float value = own[i];
        if (part_count > 0) {
            float change = 0;
            for (u32 part = 0; part < part_count; part++) {
                size_t at = row * part_count + part;
                float weight = part_weights != nullptr ? part_weights[at] : 1.0f;
                change = fmaf(weight, parts[at * hidden + i], change);
            }
            value += change;
            own[i] = value;
        }
        squares = fmaf(value, value, squares);
    }
    float scale = 1.0f / sqrtf(block_sum(squares, slots) / (float)hidden + epsilon);
    for (u32 i = threadIdx.x; i < hidden; i += blockDim.x) {
        float value = own[i] * scale * norm_weight[i];
        size_t at = (size_t)blockIdx.x * hidden + i;
        if (out_bf16 != nullptr) out_bf16[at] = narrow(value);
        if (out_f32 != nullptr) out_f32[at] = value;
    }
}
