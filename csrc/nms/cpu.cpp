// Greedy non-maximum suppression on the CPU.
//
// Boxes are ordered by score, split into groups, and each group is resolved by itself: a candidate is kept unless a
// kept box of its group suppresses it (buckets.h finds out fast). Groups run in parallel; where there is one large
// group, its candidates are compared in parallel, round by round, with what earlier rounds kept.
#include <numeric>

#include "buckets.h"
#include "common.h"
#include "nms.h"

namespace {

using namespace doublehead;
using namespace doublehead::nms;

using Indices = std::vector<uint32_t>;

constexpr int64_t kRound = 512;  // candidates of a round

// One image's boxes, as they lie in the caller's tensor.
template <typename T>
struct Boxes {
  const T* data;
  int64_t stride, coordinate_stride;

  DOUBLEHEAD_INLINE auto operator[](int64_t i) const {
    using C = compute_t<T>;
    const T* p = data + i * stride;
    return make_box<C>(static_cast<C>(p[0]), static_cast<C>(p[coordinate_stride]),
                       static_cast<C>(p[2 * coordinate_stride]), static_cast<C>(p[3 * coordinate_stride]));
  }
};

struct Groups {
  const int64_t* data = nullptr;  // null: all boxes are one group
  int64_t stride = 0;
  bool negative_is_padding = false;

  int64_t operator[](int64_t i) const { return data ? data[i * stride] : 0; }
};

// Sorts items by key(item), an unsigned integer, ascending and stable. Digits in which no two keys differ cost nothing.
template <typename Key>
void radix_sort(Indices& items, const Key& key) {
  constexpr int kBits = 11, kDigits = 1 << kBits;
  if (items.size() < 2) return;
  using Unsigned = decltype(key(0));
  Unsigned differ = 0;
  for (uint32_t item : items) differ |= key(item) ^ key(items[0]);
  Indices sorted;
  std::vector<uint32_t> start;
  for (int shift = 0; shift < static_cast<int>(8 * sizeof(Unsigned)); shift += kBits) {
    const auto digit = [&](uint32_t item) { return static_cast<uint32_t>(key(item) >> shift) & (kDigits - 1); };
    if ((static_cast<uint32_t>(differ >> shift) & (kDigits - 1)) == 0) continue;
    start.assign(kDigits + 1, 0);
    sorted.resize(items.size());
    for (uint32_t item : items) ++start[digit(item) + 1];
    std::partial_sum(start.begin(), start.end(), start.begin());
    for (uint32_t item : items) sorted[start[digit(item)]++] = item;
    items.swap(sorted);
  }
}

template <typename T>
Indices by_score(const T* scores, int64_t stride, int64_t count, const Groups& groups) {
  Indices order;
  order.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    if (!(groups.negative_is_padding && groups[i] < 0)) order.push_back(static_cast<uint32_t>(i));
  }
  radix_sort(order, [=](uint32_t i) { return sort_key(static_cast<compute_t<T>>(scores[i * stride])); });
  return order;
}

// suppressed[k] for box_at(first) .. box_at(last - 1), against the boxes inserted in round `since` or later.
template <typename C, typename BoxAt>
DOUBLEHEAD_MULTIVERSION void compare(const Buckets<C>& kept, const BoxAt& box_at, int64_t first, int64_t last,
                                     uint8_t* suppressed) {
  for (int64_t k = first; k < last; ++k) {
    const Box<C> box = box_at(k);
    suppressed[k] = !kept.inert(box) && kept.any_suppresses(box, 0);
  }
}

// Decides on box_at(first) .. box_at(last - 1) in turn; those marked already stay suppressed. Stops after `limit` kept.
template <typename C, typename BoxAt>
DOUBLEHEAD_MULTIVERSION int64_t resolve(Buckets<C>& kept, const BoxAt& box_at, int64_t first, int64_t last,
                                        int32_t since, int64_t limit, uint8_t* suppressed) {
  int64_t count = 0;
  for (int64_t k = first; k < last; ++k) {
    if (count == limit) {
      suppressed[k] = 1;
      continue;
    }
    if (suppressed[k]) continue;
    const Box<C> box = box_at(k);
    if (!kept.inert(box)) {
      suppressed[k] = kept.any_suppresses(box, since);
      if (!suppressed[k]) kept.insert(box, since);
    }
    count += !suppressed[k];
  }
  return count;
}

// Suppression within one group, its boxes given by descending score: at most `limit` of suppressed[0 .. count) stay 0.
template <typename C, typename BoxAt>
void suppress_group(Buckets<C>& kept, const BoxAt& box_at, int64_t count, int64_t limit, bool parallel,
                    uint8_t* suppressed) {
  kept.reset(count, box_at);
  std::fill_n(suppressed, count, 0);
  if (!parallel) {
    resolve(kept, box_at, 0, count, 0, limit, suppressed);
    return;
  }
  for (int64_t first = 0, round = 0; first < count; first += kRound, ++round) {
    const int64_t last = std::min(first + kRound, count);
    if (round > 0 && limit > 0) {
      parallel_for(first, last, 32, [&](int64_t a, int64_t b) { compare(kept, box_at, a, b, suppressed); });
    }
    limit -= resolve(kept, box_at, first, last, static_cast<int32_t>(round), limit, suppressed);
  }
}

// Suppression among the boxes order[0 .. count), which come by descending score.
template <typename T>
std::vector<uint8_t> suppress(const Boxes<T>& boxes, const Groups& groups, const Indices& order, int64_t count,
                              int64_t limit, double threshold) {
  if (count == 0) return {};
  Indices members(count);  // positions in `order`, by group, and by score within a group
  std::iota(members.begin(), members.end(), 0);
  radix_sort(members, [&](uint32_t m) { return static_cast<uint64_t>(groups[order[m]]); });
  Indices starts;
  for (int64_t m = 0; m < count; ++m) {
    if (m == 0 || groups[order[members[m]]] != groups[order[members[m - 1]]]) starts.push_back(m);
  }
  starts.push_back(count);
  const int64_t group_count = static_cast<int64_t>(starts.size()) - 1;

  std::vector<uint8_t> by_member(count);
  const bool parallel = group_count == 1 && count > 2 * kRound && num_threads() > 1;
  const auto run = [&](int64_t first, int64_t last) {
    Buckets<compute_t<T>> kept(threshold);
    for (int64_t g = first; g < last; ++g) {
      const uint32_t* group = members.data() + starts[g];
      const auto box_at = [=](int64_t k) DOUBLEHEAD_INLINE_LAMBDA { return boxes[order[group[k]]]; };
      suppress_group(kept, box_at, starts[g + 1] - starts[g], limit, parallel, by_member.data() + starts[g]);
    }
  };
  if (parallel) {
    run(0, 1);
  } else {
    parallel_for(0, group_count, std::max<int64_t>(1, group_count * 256 / count), run);
  }

  std::vector<uint8_t> suppressed(count);
  for (int64_t m = 0; m < count; ++m) suppressed[members[m]] = by_member[m];
  return suppressed;
}

// The first `limit` kept boxes of one image by descending score.
template <typename T>
Indices keep(const Boxes<T>& boxes, const Groups& groups, Indices order, int64_t limit, double threshold) {
  const int64_t total = order.size();
  // Whether a box is kept depends on better boxes alone, so if few are wanted, try the best few, then more.
  for (int64_t count = std::max<int64_t>(4 * limit, 4096);; count *= 4) {
    count = std::min(count, total);
    const std::vector<uint8_t> suppressed = suppress(boxes, groups, order, count, limit, threshold);
    if (count < total && std::count(suppressed.begin(), suppressed.end(), 0) < limit) continue;
    int64_t kept = 0;
    for (int64_t p = 0; p < count && kept < limit; ++p) {
      if (!suppressed[p]) order[kept++] = order[p];
    }
    order.resize(kept);
    return order;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Operators

void check_arguments(const Tensor& boxes, const Tensor& scores, int64_t dim) {
  check_dim(boxes, dim, "nms: boxes");
  check_size(boxes, dim - 1, 4, "nms: boxes");
  check_dim(scores, dim - 1, "nms: scores");
  for (int64_t d = 0; d < dim - 1; ++d) check_size(scores, d, boxes.size(d), "nms: scores");
  check_cpu(scores, "nms: scores");
  DOUBLEHEAD_CHECK(boxes.size(dim - 2) < int64_t(1) << 31, "nms: boxes must be fewer than 2^31");
}

void check_groups(const Tensor& groups, const Tensor& scores) {
  check_cpu(groups, "nms: groups");
  check_dtype(groups, ScalarType::Long, "nms: groups");
  check_dim(groups, scores.dim(), "nms: groups");
  for (int64_t d = 0; d < scores.dim(); ++d) check_size(groups, d, scores.size(d), "nms: groups");
}

// The kept boxes of image b; tensors have the batch, if any, in front.
Indices keep_image(const Tensor& boxes, const Tensor& scores, Groups groups, int64_t b, double threshold,
                   int64_t limit) {
  const int64_t n = scores.dim() - 1;  // the dimension of N
  const int64_t count = scores.size(n);
  const auto start = [&](const Tensor& tensor) { return n > 0 ? b * tensor.stride(0) : 0; };
  Indices order = dispatch_floating(scores.scalar_type(), "nms: scores", [&]<typename S>() {
    const S* data = static_cast<const S*>(scores.data_ptr()) + start(scores);
    return by_score(data, scores.stride(n), count, groups);
  });
  return dispatch_floating(boxes.scalar_type(), "nms: boxes", [&]<typename T>() {
    const T* data = static_cast<const T*>(boxes.data_ptr()) + start(boxes);
    return keep(Boxes<T>{data, boxes.stride(n), boxes.stride(n + 1)}, groups, std::move(order), limit, threshold);
  });
}

Tensor empty_indices(const Tensor& like, std::vector<int64_t> size) {
  return torch::stable::new_empty(like, size, ScalarType::Long);
}

std::tuple<Tensor, Tensor> nms_padded_cpu(const Tensor& boxes, const Tensor& scores, const Tensor& groups,
                                          double threshold, int64_t max_output) {
  check_arguments(boxes, scores, 3);
  check_groups(groups, scores);
  DOUBLEHEAD_CHECK(max_output >= 0, "nms: max_output must be >= 0, got ", max_output);
  const int64_t batch = boxes.size(0);
  Tensor indices = empty_indices(boxes, {batch, max_output}), counts = empty_indices(boxes, {batch});
  int64_t* out = static_cast<int64_t*>(indices.data_ptr());
  int64_t* out_counts = static_cast<int64_t*>(counts.data_ptr());
  const int64_t* group_data = static_cast<const int64_t*>(groups.data_ptr());
  const auto run = [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const Groups mine{group_data + b * groups.stride(0), groups.stride(1), true};
      const Indices kept = keep_image(boxes, scores, mine, b, threshold, max_output);
      std::copy(kept.begin(), kept.end(), out + b * max_output);
      std::fill(out + b * max_output + kept.size(), out + (b + 1) * max_output, -1);
      out_counts[b] = kept.size();
    }
  };
  if (batch >= num_threads()) {
    parallel_for(0, batch, 1, run);  // an image each; within an image, everything is then serial
  } else {
    run(0, batch);
  }
  return {indices, counts};
}

Tensor nms_cpu(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& groups, double threshold) {
  check_arguments(boxes, scores, 2);
  Groups mine;
  if (groups) {
    check_groups(*groups, scores);
    mine = {static_cast<const int64_t*>(groups->data_ptr()), groups->stride(0), false};
  }
  const Indices kept = keep_image(boxes, scores, mine, 0, threshold, boxes.size(0));
  Tensor indices = empty_indices(boxes, {static_cast<int64_t>(kept.size())});
  std::copy(kept.begin(), kept.end(), static_cast<int64_t*>(indices.data_ptr()));
  return indices;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(doublehead, CPU, m) {
  m.impl("nms_padded", TORCH_BOX(&nms_padded_cpu));
  m.impl("nms", TORCH_BOX(&nms_cpu));
}
