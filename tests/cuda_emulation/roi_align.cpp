// RoIAlign's CUDA kernels on the emulator, launched as csrc/roi_align/cuda/roi_align.cu launches them.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "emulation.h"

#include "roi_align/cuda/backward.cuh"
#include "roi_align/cuda/forward_planar.cuh"
#include "roi_align/cuda/launch.h"

using namespace doublehead::roi_align::device;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;

namespace {

struct Numbers {
  int64_t dtype, channels_last, vectors, images, channels, levels, scales, rois, height, width, sampling_ratio, aligned,
      canonical_level, epsilon_added_to;
};

// maps: data, four strides, height and width of each level; reals: canonical size, the level's epsilon, the end offset,
// then spatial scales and box scales.
template <typename W>
Problem<W> make_problem(const Numbers& n, const int64_t* maps, const int64_t* pooled, const void* rois,
                        const double* reals) {
  Problem<W> problem{};
  for (int64_t l = 0; l < n.levels; ++l, maps += 7) {
    problem.maps[l] = {reinterpret_cast<void*>(maps[0]), maps[1], maps[2], maps[3], maps[4], int32_t(maps[5]),
                       int32_t(maps[6]), reals[3 + l]};
  }
  for (int64_t s = 0; s < n.scales; ++s) {
    problem.pooled[s] = reinterpret_cast<void*>(pooled[s]);
    problem.box_scales[s] = W(reals[3 + n.levels + s]);
  }
  problem.rois = static_cast<const W*>(rois);
  problem.count = n.rois;
  problem.sampling_ratio = n.sampling_ratio;
  problem.channels = n.channels;
  problem.images = n.images;
  problem.levels = int32_t(n.levels);
  problem.scales = int32_t(n.scales);
  problem.height = int32_t(n.height);
  problem.width = int32_t(n.width);
  problem.aligned = n.aligned;
  problem.end_offset = W(reals[2]);
  problem.level_rule = {W(reals[0]), W(reals[1]), n.canonical_level, std::lround(-std::log2(reals[3])),
                        n.epsilon_added_to};
  return problem;
}

unsigned chunks(int64_t channels, int64_t each) { return unsigned((channels + each - 1) / each); }

template <typename T, typename W>
void forward(const Numbers& n, const Problem<W>& problem, bool no_room) {
  const Room room = no_room ? Room{0, 0, 0} : make_room(problem);
  const unsigned items = unsigned(n.rois * n.scales);
  constexpr int V = 16 / sizeof(T);
  const int64_t rounds = (n.height + kWarps - 1) / kWarps;
  const dim3 threads(32, unsigned((n.height + rounds - 1) / rounds));
  if (!n.channels_last) {
    if (room_bytes<W, int32_t>(room) % alignof(RowTap<W>) != 0) doublehead::emulation::fail("rows of taps are not aligned");
    emulate(items * chunks(n.channels, kPlanarChannels), kPlanarThreads, planar_bytes<W>(room),
            pool_planar<T, W>, problem, room);
  } else if (n.vectors) {
    emulate(items * chunks(n.channels, 32 * V), threads, room_bytes<W, int64_t>(room), pool_channels_last<T, W, V>, problem,
            room);
  } else {
    emulate(items * chunks(n.channels, 32), threads, room_bytes<W, int64_t>(room), pool_channels_last<T, W, 1>, problem, room);
  }
}

template <typename T, typename W>
void backward(const Numbers& n, const Problem<W>& problem, bool no_room) {
  const Room room = no_room ? Room{0, 0, 0} : make_room(problem);
  const auto gathers = choose_gathers<T>(problem, room, n.channels_last, n.vectors);
  const Tiles sizes = make_tiles(problem, gathers[0].columns, chunks(n.channels, gathers[0].channels));
  const int64_t bytes = lay_out_workspace(problem, sizes, room, gathers[0].sums, nullptr).bytes;
  std::vector<double> memory(bytes / sizeof(double) + 2, std::nan(""));
  const uintptr_t address = (reinterpret_cast<uintptr_t>(memory.data()) + 15) / 16 * 16;
  const auto [boxes, tiles, size] =
      lay_out_workspace(problem, sizes, room, gathers[0].sums, reinterpret_cast<unsigned char*>(address));
  emulate(unsigned(n.images * n.levels), kListThreads, 0, list_boxes<W>, problem, tiles, boxes);
  const unsigned tables = chunks(n.rois * n.scales, kPrepareWarps);
  emulate(tables + chunks(tiles.end[0], kPrepareWarps), 32 * kPrepareWarps, 0, prepare<W>, problem, tiles, boxes,
          tables);
  for (const auto& gather : gathers) {
    emulate(unsigned((tiles.slots + tiles.end[0]) * tiles.chunks), dim3(32, gather.threads / 32), gather.shared,
            gather.kernel, problem, tiles, boxes, gather.batch, gather.when);
  }
}

template <typename Body>
void dispatch(int64_t dtype, const Body& body) {
  switch (dtype) {
    case 0: return body.template operator()<float, float>();
    case 1: return body.template operator()<double, double>();
    case 2: return body.template operator()<Half, float>();
    default: return body.template operator()<BFloat16, float>();
  }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default"))) const char*

EXPORT run_forward(const Numbers* n, const int64_t* maps, const int64_t* pooled, const void* rois, const double* reals,
                   int64_t no_room) {
  return report_errors([&] {
    dispatch(n->dtype, [&]<typename T, typename W>() {
      forward<T>(*n, make_problem<W>(*n, maps, pooled, rois, reals), no_room != 0);
    });
  });
}

EXPORT run_backward(const Numbers* n, const int64_t* maps, const int64_t* pooled, const void* rois, const double* reals,
                    int64_t no_room) {
  return report_errors([&] {
    dispatch(n->dtype, [&]<typename T, typename W>() {
      backward<T>(*n, make_problem<W>(*n, maps, pooled, rois, reals), no_room != 0);
    });
  });
}
