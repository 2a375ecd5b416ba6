// RoIAlign on CUDA: the operators. Their work is in forward.cuh, forward_planar.cuh and backward.cuh.
//
// A box whose batch index is out of range pools zeros here, as no error can be raised without waiting for the device;
// it is never read from.
#include "cuda_common.h"  // the kernels, which name no torch, use its macro
#include "../arguments.h"
#include "backward.cuh"
#include "forward_planar.cuh"
#include "launch.h"

namespace doublehead::roi_align {
namespace {

using namespace device;

// Channels that a thread loads at once, 16 bytes of them.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

Map make_map(const Tensor& map, double scale) {
  DOUBLEHEAD_CHECK(map.size(2) < INT32_MAX && map.size(3) < INT32_MAX, "roi_align: features may have up to 2^31 - 2 ",
                   "rows and columns, got shape ", shape(map));
  return {map.data_ptr(), map.stride(0), map.stride(1), map.stride(2), map.stride(3), int32_t(map.size(2)),
          int32_t(map.size(3)), scale};
}

// maps: features, or the gradients to write; pooled: outputs to write, or their gradients.
template <typename W>
Problem<W> make_problem(const std::vector<Tensor>& maps, const std::vector<Tensor>& pooled, const Tensor& rois,
                        const Pooling& pooling) {
  Problem<W> problem{};
  for (size_t l = 0; l < maps.size(); ++l) problem.maps[l] = make_map(maps[l], pooling.spatial_scales[l]);
  for (size_t s = 0; s < pooled.size(); ++s) {
    problem.pooled[s] = pooled[s].data_ptr();
    problem.box_scales[s] = W(pooling.box_scales[s]);
  }
  problem.rois = static_cast<const W*>(rois.data_ptr());
  problem.count = rois.size(0);
  problem.sampling_ratio = pooling.sampling_ratio;
  problem.images = maps[0].size(0);
  problem.channels = maps[0].size(1);
  problem.levels = int32_t(maps.size());
  problem.scales = int32_t(pooled.size());
  problem.height = int32_t(pooling.height);
  problem.width = int32_t(pooling.width);
  problem.aligned = pooling.aligned;
  problem.end_offset = W(pooling.end_offset);
  problem.level_rule = level_rule<W>(pooling);
  return problem;
}

// What the tables that kernels get by value, and their 32-bit numbers, have room for.
void check_sizes(const Pooling& pooling, int64_t rois, int64_t channels) {
  DOUBLEHEAD_CHECK(pooling.spatial_scales.size() <= kMaxLevels, "roi_align: on CUDA there may be up to ", kMaxLevels,
                   " levels, got ", pooling.spatial_scales.size());
  DOUBLEHEAD_CHECK(pooling.box_scales.size() <= kMaxScales, "roi_align: on CUDA there may be up to ", kMaxScales,
                   " box_scales, got ", pooling.box_scales.size());
  DOUBLEHEAD_CHECK(pooling.height < (1 << 15) && pooling.width < (1 << 15), "roi_align: on CUDA output_size must be ",
                   "under 32768, got (", pooling.height, ", ", pooling.width, ")");
  DOUBLEHEAD_CHECK(channels < INT32_MAX - 512, "roi_align: on CUDA there may be up to 2^31 - 513 channels, got ", channels);
  DOUBLEHEAD_CHECK(rois * int64_t(pooling.box_scales.size()) < INT32_MAX, "roi_align: on CUDA rois times box_scales ",
                   "must be under 2^31 - 1, got ", rois, " * ", pooling.box_scales.size());
}

unsigned check_grid(int64_t blocks) {
  DOUBLEHEAD_CHECK(blocks <= INT32_MAX, "roi_align: too large for one launch, ", blocks, " blocks");
  return unsigned(blocks);
}

// Whether V channels can be loaded and stored at once, everywhere.
template <typename T, typename W>
bool vectors_fit(const Problem<W>& problem, int64_t v) {
  bool fit = problem.channels % v == 0;
  for (int32_t l = 0; l < problem.levels; ++l) {
    const Map& map = problem.maps[l];
    fit = fit && uintptr_t(map.data) % (v * sizeof(T)) == 0 && map.image_stride % v == 0 && map.row_stride % v == 0 &&
          map.pixel_stride % v == 0;
  }
  for (int32_t s = 0; s < problem.scales; ++s) fit = fit && uintptr_t(problem.pooled[s]) % (v * sizeof(T)) == 0;
  return fit;
}

// ---------------------------------------------------------------------------------------------
// Forward

// Rows of bins are dealt out evenly: 7 to 7 warps, 14 to 7 warps in two rounds.
int32_t warps_for(int32_t height) {
  const int32_t rounds = (height + kWarps - 1) / kWarps;
  return (height + rounds - 1) / rounds;
}

template <typename T, typename W>
void launch_forward(const Problem<W>& problem, bool channels_last, const OnDevice& on) {
  const Room room = make_room(problem);
  const int64_t items = problem.count * problem.scales;
  const auto chunks = [&](int64_t each) { return (problem.channels + each - 1) / each; };
  if (!channels_last) {
    const unsigned blocks = check_grid(items * chunks(kPlanarChannels));
    pool_planar<T, W><<<blocks, kPlanarThreads, planar_bytes<W>(room), on.stream()>>>(problem, room);
  } else {
    constexpr int V = kVector<T>;
    const dim3 threads(32, warps_for(problem.height));
    if (vectors_fit<T>(problem, V)) {
      const unsigned blocks = check_grid(items * chunks(32 * V));
      pool_channels_last<T, W, V><<<blocks, threads, room_bytes<W, int64_t>(room), on.stream()>>>(problem, room);
    } else {
      const unsigned blocks = check_grid(items * chunks(32));
      pool_channels_last<T, W, 1><<<blocks, threads, room_bytes<W, int64_t>(room), on.stream()>>>(problem, room);
    }
  }
  on.check_launch("roi_align");
}

std::vector<Tensor> forward_cuda(std::vector<Tensor> features, Tensor rois, const Pooling& pooling) {
  check_pooling(pooling, features.size());
  check_dim(features[0], 4, "roi_align: features");
  check_cuda_device(features[0], "roi_align: features");
  const OnDevice on(features[0]);
  const bool channels_last = is_channels_last(features[0]);
  features = check_features(features, channels_last);
  rois = check_rois(rois, features[0]);
  check_sizes(pooling, rois.size(0), features[0].size(1));
  const std::vector<Tensor> results = empty_outputs(features, rois, pooling, channels_last);
  if (results[0].numel() == 0) return results;
  dispatch_floating(features[0].scalar_type(), "roi_align: features", [&]<typename T>() {
    using W = compute_t<T>;
    launch_forward<T>(make_problem<W>(features, results, rois, pooling), channels_last, on);
  });
  return results;
}

// ---------------------------------------------------------------------------------------------
// Backward

// Everything before the sums.
template <typename W>
void prepare_tiles(const Problem<W>& problem, const Workspace<W>& work, const OnDevice& on) {
  const auto blocks = [](int64_t warps) { return (warps + kPrepareWarps - 1) / kPrepareWarps; };
  const unsigned lists = check_grid(problem.images * problem.levels);
  list_boxes<W><<<lists, kListThreads, 0, on.stream()>>>(problem, work.tiles, work.boxes);
  on.check_launch("roi_align_backward");
  const int64_t tables = blocks(problem.count * problem.scales);
  const unsigned all = check_grid(tables + blocks(work.tiles.end[0]));
  prepare<W><<<all, 32 * kPrepareWarps, 0, on.stream()>>>(problem, work.tiles, work.boxes, unsigned(tables));
  on.check_launch("roi_align_backward");
}

template <typename T, typename W>
void launch_backward(const Problem<W>& problem, bool channels_last, const Tensor& like, const OnDevice& on) {
  const Room room = make_room(problem);
  const std::vector<Gather<W>> gathers =
      choose_gathers<T>(problem, room, channels_last, vectors_fit<T>(problem, kVector<T>));
  const Gather<W>& first = gathers[0];
  const Tiles tiles = make_tiles(problem, first.columns, (problem.channels + first.channels - 1) / first.channels);
  const int64_t bytes = lay_out_workspace(problem, tiles, room, first.sums, nullptr).bytes;
  const Tensor memory = empty_on(like, {bytes}, ScalarType::Byte);
  const Workspace<W> work =
      lay_out_workspace(problem, tiles, room, first.sums, static_cast<unsigned char*>(memory.data_ptr()));
  prepare_tiles(problem, work, on);
  const unsigned blocks = check_grid((work.tiles.slots + work.tiles.end[0]) * work.tiles.chunks);
  for (const Gather<W>& gather : gathers) {
    const dim3 threads(32, unsigned(gather.threads / 32));
    gather.kernel<<<blocks, threads, gather.shared, on.stream()>>>(problem, work.tiles, work.boxes, gather.batch,
                                                                   gather.when);
    on.check_launch("roi_align_backward");
  }
}

std::vector<Tensor> backward_cuda(std::vector<Tensor> grads, Tensor rois, const std::vector<int64_t>& feature_sizes,
                                  bool channels_last, const Pooling& pooling) {
  check_backward(pooling, grads, feature_sizes);
  check_cuda_device(grads[0], "roi_align: grads");
  const OnDevice on(grads[0]);
  rois = check_rois(rois, grads[0]);
  check_sizes(pooling, rois.size(0), feature_sizes[1]);
  grads = check_grads(grads, rois, feature_sizes[1], pooling, channels_last);
  const std::vector<Tensor> results = empty_feature_grads(grads[0], feature_sizes, channels_last);
  int64_t elements = 0;
  for (const Tensor& result : results) elements += result.numel();
  if (elements == 0) return results;
  dispatch_floating(grads[0].scalar_type(), "roi_align: grads", [&]<typename T>() {
    using W = compute_t<T>;
    const Problem<W> problem = make_problem<W>(results, grads, rois, pooling);
    launch_backward<T>(problem, channels_last, rois, on);
  });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(doublehead, CUDA, m) {
  m.impl("pyramid_roi_align", TORCH_BOX(&forward_of_schema<&forward_cuda>));
  m.impl("pyramid_roi_align_backward", TORCH_BOX(&backward_of_schema<&backward_cuda>));
}

}  // namespace doublehead::roi_align
