// Backward: the tiles of all levels and images, and how they are shared out among blocks. A tile that many boxes touch is
// summed in parts, each by a block of its own; the last of them to end adds the parts' sums in order of the parts.
#pragma once

#include "device.cuh"

namespace doublehead::roi_align::device {

constexpr int32_t kTile = 8;         // rows of a tile, and columns of a channels-last one
constexpr int32_t kPlanarTile = 32;  // columns of a planar tile
constexpr int32_t kLeastPart = 8;    // boxes of a part
constexpr int32_t kMostSlots = 512;  // parts of all tiles, times chunks of channels

// How a tile is summed: `parts` of them, whose numbers are slot, slot + 1, ...; with one there is no slot.
struct alignas(16) TileWork {
  int32_t count, parts, slot, unused;  // count: of the boxes that touch it
};

struct Part {
  int64_t tile;
  int32_t index;
};

struct Tile {
  int32_t level, image, top, left;
  int64_t local;  // its number on its level and image
};

// What a block sums: boxes [first, end) of those that touch a tile. With more than one part, this is number `part` of them,
// and slot that of the first.
struct Share {
  bool any;
  int32_t first, end, part, parts, slot;
  Tile tile;
};

// The coarsest level's tiles come first: there boxes are packed most densely.
struct Tiles {
  int64_t end[kMaxLevels];     // of the tiles of a level, in this order: levels - 1, ..., 0
  int64_t each[kMaxLevels];    // tiles of an image, by level
  int32_t across[kMaxLevels];  // tiles side by side in an image
  int64_t most;                // tiles that an image has on any one level
  int32_t columns;             // of a tile, in pixels
  int32_t chunks;              // of channels: each is a block's
  int32_t slots;               // parts that there may be
  int32_t* used;               // parts that there are
  int32_t* arrived;            // [slots, chunks]: parts that have ended, at a tile's first slot
  Part* parts;                 // [slots]
  TileWork* work;              // [tiles]
  uint32_t* bits;              // a bit for each box of the tile's range: words `most` apart
  void* sums;                  // W[slots, chunks, ...]

  // Ranges of boxes begin anywhere; a word more for each range, and their words do not overlap.
  __device__ int64_t first_word(int32_t begin, int32_t map, const Tile& tile) const {
    return (int64_t(begin) / 32 + map) * most + tile.local;
  }

  // How many tiles a window touches along an axis.
  __device__ int64_t touched(Window window, int32_t side) const {
    return window.first < window.last ? (window.last - 1) / side - window.first / side + 1 : 0;
  }
};

__device__ inline Tile find_tile(const Tiles& tiles, int32_t levels, int64_t number) {
  int32_t level = levels - 1;
  while (number >= tiles.end[level]) --level;
  if (level < levels - 1) number -= tiles.end[level + 1];
  const int64_t image = number / tiles.each[level], local = number % tiles.each[level];
  return {level, int32_t(image), int32_t(local / tiles.across[level]) * kTile,
          int32_t(local % tiles.across[level]) * tiles.columns, local};
}

// Grid: (slots + tiles) * chunks. The blocks of the parts come first: they take longest.
__device__ inline Share find_share(const Tiles& tiles, int32_t levels, int64_t block) {
  Share share = {false, 0, 0, 0, 1, 0, {}};
  int64_t number = block - tiles.slots;
  if (number < 0) {
    if (block >= *tiles.used) return share;
    number = tiles.parts[block].tile;
    share.part = tiles.parts[block].index;
  }
  const TileWork work = tiles.work[number];
  if (block >= tiles.slots && work.parts > 1) return share;
  share.any = true;
  share.parts = work.parts, share.slot = work.slot;
  share.first = int32_t(int64_t(work.count) * share.part / work.parts);
  share.end = int32_t(int64_t(work.count) * (share.part + 1) / work.parts);
  share.tile = find_tile(tiles, levels, number);
  return share;
}

// V numbers as the last block to write them left them: what this multiprocessor's own cache holds may be older.
template <int V, typename W>
__device__ __forceinline__ Vector<W, V> load_shared_by_blocks(const W* from) {
  static_assert(sizeof(Vector<W, V>) == sizeof(uint4));
  const uint4 bits = __ldcg(reinterpret_cast<const uint4*>(from));
  Vector<W, V> loaded;
  __builtin_memcpy(&loaded, &bits, sizeof bits);
  return loaded;
}

// For a tile in parts: leaves the block's sums, N numbers a thread, in its slot. The last block to do so gets the sums of
// all parts, added in their order, and `true`. All threads of the block.
template <int kThreads, int N, typename W>
__device__ __forceinline__ bool join_parts(const Tiles& tiles, const Share& share, int32_t chunk, W (&sums)[N]) {
  constexpr int V = 16 / sizeof(W);
  __shared__ bool last;
  const int32_t thread = threadIdx.y * 32 + threadIdx.x;
  const int64_t size = int64_t(kThreads) * N, step = size * tiles.chunks;  // numbers of a part; to that of the next part
  W* const first = static_cast<W*>(tiles.sums) + share.slot * step + chunk * size + thread * V;
#pragma unroll
  for (int i = 0; i < N; i += V) {
    W some[V];
#pragma unroll
    for (int v = 0; v < V; ++v) some[v] = sums[i + v];
    store<V>(first + share.part * step + int64_t(i) * kThreads, some);
  }
  __threadfence();
  __syncthreads();
  if (thread == 0) {
    int32_t* const arrived = tiles.arrived + int64_t(share.slot) * tiles.chunks + chunk;
    last = atomicAdd(arrived, 1) == share.parts - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return false;
#pragma unroll
  for (int i = 0; i < N; ++i) sums[i] = W(0);
#pragma unroll 1
  for (int32_t part = 0; part < share.parts; ++part) {
#pragma unroll
    for (int i = 0; i < N; i += V) {
      const Vector<W, V> loaded = load_shared_by_blocks<V>(first + part * step + int64_t(i) * kThreads);
#pragma unroll
      for (int v = 0; v < V; ++v) sums[i + v] += loaded.at[v];
    }
  }
  return true;
}

}  // namespace doublehead::roi_align::device
