// Mixture of experts: both products of the chosen experts, for some tokens at a time and for many.
//
// Agrees with: Mixture::run (worker/src/model/moe.rs) from the choice on, for activations rounded to bf16 before each
// product. A slot is one choice of one token: slot = token * used + rank. Results stay apart by slot and are added by rank
// in add_norm, so a token's result does not depend on the others. The groups come from route.cu.

#include "matvec.cuh"

constexpr u32 EXPERTS_MAX = 256;

// How much longer an item takes whose activations come from the second-level cache, for each so many of them: measured.
template <u32 TILES> constexpr u32 UNSTAGED_COST = TILES == 1 ? 3 : 2;
constexpr u32 UNSTAGED_COLUMNS = 16;

// The groups as a block knows them.
struct ExpertLists {
    u32 experts[EXPERTS_MAX];
    u32 firsts[EXPERTS_MAX + 1];
    u32 groups;
};

// The chosen experts' matrices with the slots that each one serves.
struct ExpertJob {
    // Four warps share the columns: an expert's rows are many, and each item costs as much beside its products.
    static constexpr u32 WAYS = 4;
    static constexpr u32 ROWS = ITEM_ROWS<WAYS>;
    const Matrix* matrices;
    u32 groups;
    const u32* experts;
    const u32* firsts;
    const u32* slots;
    const bf16* activations;
    u32 slots_per_row;
    u32 length;
    u32 tiles;

    // What an item of a group costs, in units of one whose activations are in shared memory.
    template <u32 TILES> __device__ __forceinline__ u32 cost(u32 group, u32 room) const {
        u32 count = columns(group);
        return count <= room ? 1 : UNSTAGED_COST<TILES> * ((count + UNSTAGED_COLUMNS - 1) / UNSTAGED_COLUMNS);
    }
    // Blocks share the cost evenly: an expert whose tokens have no room would keep the others waiting.
    template <u32 TILES> __device__ __forceinline__ u32 share(u32 block, u32 room) const {
        u32 total = 0;
        for (u32 group = 0; group < groups; group++) total += cost<TILES>(group, room);
        if (total == groups) return even_share(groups * tiles, block);
        u32 before = even_share(total * tiles, block), first = 0;
        for (u32 group = 0; group < groups; group++) {
            u32 each = cost<TILES>(group, room), all = each * tiles;
            if (before < all) return first + (before + each - 1) / each;
            before -= all;
            first += tiles;
        }
        return first;
    }
    __device__ __forceinline__ Item item(u32 index) const {
        u32 group = index / tiles;
        if (group >= groups) return Item{};
        return Item{matrices + experts[group], (index - group * tiles) * ROWS, group, 0};
    }
    __device__ __forceinline__ u32 rows(const Item&) const { return tiles * ROWS; }
    __device__ __forceinline__ u32 columns(u32 group) const { return firsts[group + 1] - firsts[group]; }
    __device__ __forceinline__ u32 slot(u32 group, u32 column) const { return read_through(slots + firsts[group] + column); }
    __device__ __forceinline__ u32 source(u32 group, u32 column) const { return slot(group, column) / slots_per_row; }
    __device__ __forceinline__ const bf16* x(u32 group, u32 column) const {
        return activations + (size_t)source(group, column) * length;
    }
    __device__ __forceinline__ float bias(const Item& item, u32 row) const {
        row += item.row;
        return row < item.matrix->rows && item.matrix->bias != nullptr ? item.matrix->bias[row] : 0.0f;
    }
};

// Gate and up stand in neighbouring rows; what is not a number passes the clamps.
struct GateUpJob : ExpertJob {
    bf16* out;
    float alpha;
    float limit;

    template <u32 ROW_DISTANCE>
    __device__ __forceinline__ void put(const Item& item, u32 column, u32 row, float value, bool is_real) const {
        row += item.row;
        float up = __shfl_xor_sync(ALL_LANES, value, ROW_DISTANCE), gate = value;
        if (!is_real || row % 2 != 0 || row >= item.matrix->rows) return;
        gate = gate > limit ? limit : gate;
        up = up > limit ? limit : up < -limit ? -limit : up;
        float result = (up + 1.0f) * (gate / (1.0f + expf(-alpha * gate)));
        out[(size_t)slot(item.group, column) * (item.matrix->rows / 2) + row / 2] = narrow(result);
    }
};

struct DownJob : ExpertJob {
    float* out;

    template <u32 ROW_DISTANCE>
    __device__ __forceinline__ void put(const Item& item, u32 column, u32 row, float value, bool is_real) const {
        row += item.row;
        if (!is_real || row >= item.matrix->rows) return;
        out[(size_t)slot(item.group, column) * item.matrix->rows + row] = value;
    }
};

// A job whose groups come through shared memory: one trip for all of them. The down projection's may be read before the
// kernel before is done: that is gate_up, which lets others start only once the groups are complete.
template <class Base, bool IS_KNOWN_BEFORE> struct Listed : Base {
    static constexpr bool KNOWN_BEFORE = IS_KNOWN_BEFORE;
    ExpertLists* lists;
    const u32* group_count;
    u32 expert_count;

    // Brings the descriptors to the first-level cache: which are needed is known late.
    __device__ __forceinline__ void touch() const {
        for (u32 i = threadIdx.x; i < expert_count; i += blockDim.x) {
            keep(this->matrices[i].rows), keep((u32)(size_t)this->matrices[i].codes);
        }
    }
    __device__ __forceinline__ void prepare() {
        for (u32 i = threadIdx.x; i <= expert_count; i += blockDim.x) {
            if (i < expert_count) lists->experts[i] = read_through(this->experts + i);
            lists->firsts[i] = read_through(this->firsts + i);
        }
        if (threadIdx.x == 0) lists->groups = read_through(group_count);
        __syncthreads();
        this->experts = lists->experts;
        this->firsts = lists->firsts;
        this->groups = lists->groups;
    }
};

#define EXPERT_KERNELS(NAME, FORMAT, TILES)                                                                            \
    ENTRY __launch_bounds__(256, (BLOCKS_HELD<FORMAT, TILES>)) moe_gate_up_##NAME(                                     \
        const Matrix* matrices, u32 experts, const u32* group_count, const u32* group_experts,                         \
        const u32* group_firsts, const u32* group_slots, const bf16* x, u32 used, u32 columns, u32 rows, float alpha,  \
        float limit, bf16* inner, const float* scale_values, u32 stage_columns) {                                      \
        __shared__ ExpertLists lists;                                                                                  \
        ExpertJob base{matrices, 0, group_experts, group_firsts, group_slots, x, used, columns,                        \
                       (rows + ExpertJob::ROWS - 1) / ExpertJob::ROWS};                                                        \
        Listed<GateUpJob, false> job{{base, inner, alpha, limit}, &lists, group_count, experts};                       \
        run_matvec<FORMAT, TILES>(job, columns, scale_values, stage_columns);                                          \
    }                                                                                                                  \
    ENTRY __launch_bounds__(256, (BLOCKS_HELD<FORMAT, TILES>)) moe_down_##NAME(                                        \
        const Matrix* matrices, u32 experts, const u32* group_count, const u32* group_experts,                         \
        const u32* group_firsts, const u32* group_slots, const bf16* inner, u32 columns, u32 rows, float* out,         \
        const float* scale_values, u32 stage_columns) {                                                                \
        __shared__ ExpertLists lists;                                                                                  \
        ExpertJob base{matrices, 0, group_experts, group_firsts, group_slots, inner, 1, columns,                       \
                       (rows + ExpertJob::ROWS - 1) / ExpertJob::ROWS};                                                        \
        Listed<DownJob, true> job{{base, out}, &lists, group_count, experts};                                          \
        run_matvec<FORMAT, TILES>(job, columns, scale_values, stage_columns);                                          \
    }

EXPERT_KERNELS(nf4_8, Nf4Plain, 1)
EXPERT_KERNELS(nf4_16, Nf4Plain, 2)
EXPERT_KERNELS(nf4_nested_8, Nf4Nested, 1)
EXPERT_KERNELS(nf4_nested_16, Nf4Nested, 2)
EXPERT_KERNELS(mxfp4_8, Mxfp4, 1)
EXPERT_KERNELS(mxfp4_16, Mxfp4, 2)
EXPERT_KERNELS(bf16_8, Bf16, 1)
EXPERT_KERNELS(bf16_16, Bf16, 2)
