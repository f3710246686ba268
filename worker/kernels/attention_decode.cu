// Attention of single tokens over paged keys and values, with sinks and a sliding window.
//
// Agrees with: rotate (worker/src/model/decoder.rs), KvCache::write (worker/src/engine/kv_cache.rs) and
// LayerAttention::attend (worker/src/model/attention.rs). The positions that a row sees are cut, from the first of them on,
// into at most 64 pieces; a block takes one piece of one row for the query heads that share a head of keys, a tile at a
// time. The block that comes last adds the pieces in ascending order. Where pieces and tiles lie follows from a row's
// position alone, so a token's sums have one order whatever the batch.
//
// Unless rope_write has been there (`is_written`), the kernel rotates queries and key, and the block that has a row's own
// position writes key and value to the cache. Then what the cache held before this step may be read before the kernels
// before this one are done, so no two rows may be of one sequence.

#include "attention_tile.cuh"

// Pieces of a row, and the least length of one.
constexpr u32 CUTS_MAX = 64;
constexpr u32 CUT_TOKENS = 128;

struct AttendShared {
    TileShared tile;
    u32 is_last;
};

// One row's share of a launch: what it sees and this block's piece of it.
struct Piece {
    u32 row;
    u32 kv_head;
    u32 sequence;
    u32 position;
    u32 first;   // of the piece
    u32 end;
    u32 cuts;
    u32 tile;    // tokens of a tile

    __device__ __forceinline__ Piece(const Tables& tables, u32 window, u32 dim)
        : row(blockIdx.z), kv_head(blockIdx.y), sequence(tables.sequences[blockIdx.z]),
          position(tables.positions[blockIdx.z]), tile(dim <= 64 ? TILE_MAX : TILE_MAX / 2) {
        Visible visible(position, window);
        u32 seen = visible.last + 1 - visible.first, length = CUT_TOKENS;
        while (length * CUTS_MAX < seen) length *= 2;
        cuts = (seen + length - 1) / length;
        first = visible.first + blockIdx.x * length;
        end = first + length < visible.last + 1 ? first + length : visible.last + 1;
    }
};

// The kernel's arguments beside the cache.
struct Attend {
    const float* qkv;
    const float* cosines;
    const float* sines;
    u32 query_heads;
    u32 window;
    u32 is_written;
    const float* sinks;
    float* partial;
    u32* counters;
    bf16* out;
};

// Starts to copy a tile's keys or values, but for the row's own token unless it is written; ends a group.
template <class Kv>
__device__ __forceinline__ void fetch_tile(const Piece& piece, const Layer& layer, const Tables& tables, u32 start,
                                           u32 is_value, bool is_written, u8* rows, float* scales) {
    u32 bytes = Kv::row_bytes(layer.dim), pieces = bytes / Kv::PIECE, count = piece.end > start ? piece.end - start : 0;
    count = count < piece.tile ? count : piece.tile;
    for (u32 i = threadIdx.x; i < count * pieces; i += ATTEND_THREADS) {
        u32 token = i / pieces, at = i % pieces * Kv::PIECE, position = start + token;
        if (position == piece.position && !is_written) continue;
        u8* block = layer.head_block(tables.block(piece.sequence, position), piece.kv_head, Kv::block_bytes(layer.dim));
        start_copy<Kv::PIECE>(near_of(rows + token * (bytes + Kv::PADDING) + at),
                              stored_row<Kv>(block, is_value, position % BLOCK_TOKENS, layer.dim) + at);
        if (Kv::SCALED && at == 0) {
            start_copy<4>(near_of(scales + token), stored_scale(block, is_value, position % BLOCK_TOKENS, layer.dim));
        }
    }
    end_copies();
}

// Brings up to eight queries to shared memory, rotated and scaled; those past the end are 0.
__device__ __forceinline__ void bring_queries(const Attend& attend, const Piece& piece, u32 dim, u32 group, u32 base,
                                              u32 kv_heads, TileShared& shared) {
    u32 half = dim / 2, row_heads = attend.query_heads + 2 * kv_heads;
    const float* own = attend.qkv + ((size_t)piece.row * row_heads + piece.kv_head * group + base) * dim;
    const float* cosines = attend.cosines + (size_t)piece.row * half;
    const float* sines = attend.sines + (size_t)piece.row * half;
    float scale = 1.0f / sqrtf((float)dim);
    for (u32 i = threadIdx.x; i < HEADS * half; i += ATTEND_THREADS) {
        u32 head = i / half, pair = i % half;
        float first = 0, second = 0;
        if (base + head < group) {
            float low = own[head * dim + pair], high = own[head * dim + pair + half];
            float cosine = attend.is_written ? 1.0f : cosines[pair], sine = attend.is_written ? 0.0f : sines[pair];
            first = attend.is_written ? low : low * cosine - high * sine;
            second = attend.is_written ? high : high * cosine + low * sine;
        }
        put_query(shared, head, pair, first * scale);
        put_query(shared, head, pair + half, second * scale);
    }
}

// The row's own key and value, a warp for each: to the tile and to the cache.
template <class Kv>
__device__ __forceinline__ void write_own(const Attend& attend, const Piece& piece, const Layer& layer,
                                          const Tables& tables, const Turned& turned, u32 start, u8* keys, u8* values,
                                          TileShared& shared) {
    u32 warp = threadIdx.x / WARP, token = piece.position - start;
    if (warp >= 2) return;
    u32 bytes = Kv::row_bytes(layer.dim) + Kv::PADDING, at = piece.position % BLOCK_TOKENS;
    write_head(Kv(), (warp == 0 ? keys : values) + token * bytes, &shared.scales[warp][token], layer.dim, turned);
    u8* block = layer.head_block(tables.block(piece.sequence, piece.position), piece.kv_head, Kv::block_bytes(layer.dim));
    write_head(Kv(), stored_row<Kv>(block, warp, at, layer.dim), stored_scale(block, warp, at, layer.dim), layer.dim, turned);
}

// What write_own writes, of the first two warps: asked for together with the queries.
__device__ __forceinline__ Turned take_own(const Attend& attend, const Piece& piece, const Layer& layer) {
    u32 warp = threadIdx.x / WARP, half = layer.dim / 2;
    if (warp >= 2) return Turned{};
    u32 head = attend.query_heads + warp * layer.kv_heads + piece.kv_head;
    const float* own = attend.qkv + ((size_t)piece.row * (attend.query_heads + 2 * layer.kv_heads) + head) * layer.dim;
    return turn_head(own, attend.cosines + (size_t)piece.row * half, attend.sines + (size_t)piece.row * half, half, warp == 0);
}

// Gives a piece's values on: as the result where there is one piece, else to `partial`.
__device__ __forceinline__ void give_piece(const Attend& attend, const Piece& piece, const TileShared& shared, u8* room,
                                           u32 dim, u32 group, u32 base, const Values& values) {
    give_values(values, dim, room, [&](u32 head, u32 element, float first, float second) {
        if (base + head >= group) return;
        u32 query_head = piece.kv_head * group + base + head;
        size_t place = (size_t)piece.row * attend.query_heads + query_head;
        Powers powers = shared.powers[head];
        if (piece.cuts == 1) {
            float sink = attend.sinks[query_head];
            float most = powers.largest > sink || powers.largest != powers.largest ? powers.largest : sink;
            float share = expf(powers.largest - most), all = fmaf(powers.sum, share, expf(sink - most));
            *(u32*)(attend.out + place * dim + element) = narrow_pair(first * share / all, second * share / all);
        } else {
            float* to = attend.partial + (place * gridDim.x + blockIdx.x) * (dim + 2);
            if (element == 0) *(float2*)to = float2{powers.largest, powers.sum};
            *(float2*)(to + 2 + element) = float2{first, second};
        }
    });
}

// Adds the pieces of one row and head of keys, in ascending order, and the sink to the normalisation alone. A warp for
// each query head, a lane for each two pieces and then for the elements.
__device__ __forceinline__ void combine(const Attend& attend, const Piece& piece, u32 dim, u32 group, float* room) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float* shares = room + warp * CUTS_MAX;
    for (u32 own = warp; own < group; own += ATTEND_WARPS) {
        u32 head = piece.kv_head * group + own;
        size_t place = (size_t)piece.row * attend.query_heads + head;
        const float* from = attend.partial + place * gridDim.x * (dim + 2);
        float sink = attend.sinks[head], largest = sink, sum = 0;
        float cut_largest[CUTS_MAX / WARP], cut_sum[CUTS_MAX / WARP];
#pragma unroll
        for (u32 i = 0; i < CUTS_MAX / WARP; i++) {
            u32 cut = lane + i * WARP;
            bool is_real = cut < piece.cuts;
            cut_largest[i] = is_real ? read_through(from + (size_t)cut * (dim + 2)) : float_of_bits(0xff800000u);
            cut_sum[i] = is_real ? read_through(from + (size_t)cut * (dim + 2) + 1) : 0.0f;
            largest = cut_largest[i] > largest || cut_largest[i] != cut_largest[i] ? cut_largest[i] : largest;
        }
        largest = warp_max(largest);
#pragma unroll
        for (u32 i = 0; i < CUTS_MAX / WARP; i++) {
            float share = expf(cut_largest[i] - largest);
            shares[lane + i * WARP] = share;
            sum = fmaf(cut_sum[i], share, sum);
        }
        sum = warp_sum(sum) + expf(sink - largest);
        __syncwarp();
        for (u32 element = lane; element < dim; element += WARP) {
            float total = 0;
#pragma unroll 8
            for (u32 cut = 0; cut < piece.cuts; cut++) {
                total = fmaf(read_through(from + (size_t)cut * (dim + 2) + 2 + element), shares[cut], total);
            }
            attend.out[place * dim + element] = narrow(total / sum);
        }
        __syncwarp();
    }
}

// One piece of one row and kv head. partial: [row, query head, cut, dim + 2]: largest score, sum of powers, weighted values.
template <class Kv>
__device__ __forceinline__ void attend_piece(const Attend& attend, const Layer& layer, const Tables& tables) {
    __shared__ AttendShared shared;
    SHARED_BYTES(room);
    TileShared& own = shared.tile;
    let_next_start();
    u32 dim = layer.dim, group = attend.query_heads / layer.kv_heads;
    Piece piece(tables, attend.window, dim);
    if (piece.first >= piece.end) return wait_for_previous();
    u8* keys = room;
    u8* rows = room + piece.tile * (Kv::row_bytes(dim) + Kv::PADDING);
    bool is_last_piece = !attend.is_written && piece.end > piece.position;
    if (attend.is_written) wait_for_previous();
    for (u32 base = 0; base < group; base += HEADS) {
        Powers powers{float_of_bits(0xff800000u), 0};
        Values values = {};
        fetch_tile<Kv>(piece, layer, tables, piece.first, 0, attend.is_written, keys, own.scales[0]);
        fetch_tile<Kv>(piece, layer, tables, piece.first, 1, attend.is_written, rows, own.scales[1]);
        if (base == 0 && !attend.is_written) wait_for_previous();
        Turned turned = is_last_piece ? take_own(attend, piece, layer) : Turned{};
        bring_queries(attend, piece, dim, group, base, layer.kv_heads, own);
        for (u32 start = piece.first; start < piece.end; start += piece.tile) {
            u32 count = piece.end - start < piece.tile ? piece.end - start : piece.tile;
            if (is_last_piece && start + count > piece.position) {
                write_own<Kv>(attend, piece, layer, tables, turned, start, keys, rows, own);
            }
            wait_for_copies<1>();
            __syncthreads();
            score_tile<Kv>(own, keys, piece.tile, count, dim);
            wait_for_copies<0>();
            __syncthreads();
            fetch_tile<Kv>(piece, layer, tables, start + piece.tile, 0, attend.is_written, keys, own.scales[0]);
            power_tile<Kv>(own, count, powers);
            __syncthreads();
            add_values<Kv>(own, rows, count, dim, values);
            __syncthreads();
            fetch_tile<Kv>(piece, layer, tables, start + piece.tile, 1, attend.is_written, rows, own.scales[1]);
        }
        give_piece(attend, piece, own, room, dim, group, base, values);
        __syncthreads();
    }
    if (piece.cuts == 1) return;
    u32* counter = attend.counters + (size_t)piece.row * layer.kv_heads + piece.kv_head;
    if (is_last_block(counter, piece.cuts, &shared.is_last)) combine(attend, piece, dim, group, (float*)room);
}

#define ATTEND(NAME, KV)                                                                                               \
    ENTRY __launch_bounds__(256, 2)                                                                                    \
        NAME(const float* qkv, const float* cosines, const float* sines, u32 query_heads, u32 window, u32 is_written,  \
             u8* pool, u32 pool_layers, u32 pool_layer, u32 kv_heads, u32 dim, const u32* blocks,                      \
             const u32* block_firsts, u32 block_stride, const u32* sequences, const u32* positions,                    \
             const float* sinks, float* partial, u32* counters, bf16* out) {                                           \
        Attend attend{qkv, cosines, sines, query_heads, window, is_written, sinks, partial, counters, out};            \
        attend_piece<KV>(attend, Layer{pool, pool_layers, pool_layer, kv_heads, dim},                                  \
                         Tables{blocks, block_firsts, block_stride, sequences, positions});                            \
    }

ATTEND(attend_decode_bf16, KvBf16)
ATTEND(attend_decode_int8, KvInt8)
