// Greedy non-maximum suppression on the CPU.
//
// Boxes are ordered by score and split into groups, and in each group the best undecided box is kept and strikes those
// it suppresses (candidates.h does that fast), until all are decided. Groups run in parallel; within one large group,
// striking does.
#include "candidates.h"  // before nms.h: its lanes.h silences a warning about vectors there
#include "../arguments.h"
#include "../nms.h"
#include "common.h"
#include "radix_sort.h"

namespace {

using namespace doublehead;
using namespace doublehead::nms;

constexpr int64_t kLarge = 16384;  // a group of so many boxes is decided in parallel,
constexpr int64_t kRound = 4096;   // so many candidates in a round

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

  void prefetch(int64_t i) const { __builtin_prefetch(data + i * stride); }
};

// The group of each of one image's boxes.
struct Groups {
  const int64_t* data = nullptr;  // null: all boxes are one group
  int64_t stride = 0;
  bool negative_is_padding = false;

  int64_t operator[](int64_t i) const { return data ? data[i * stride] : 0; }
};

// A box and its position in the order: ascending keys, equal keys by ascending index.
template <typename Key>
struct Item {
  Key key;
  uint32_t index;

  bool operator<(const Item& other) const { return key != other.key ? key < other.key : index < other.index; }
};

template <typename Key>
using Items = std::vector<Item<Key>>;

// All boxes but padding, by index.
template <typename T, typename Key = decltype(sort_key(compute_t<T>()))>
Items<Key> collect(const T* scores, int64_t stride, int64_t count, const Groups& groups) {
  Items<Key> items;
  items.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    if (groups.negative_is_padding && groups[i] < 0) continue;
    items.push_back({sort_key(static_cast<compute_t<T>>(scores[i * stride])), static_cast<uint32_t>(i)});
  }
  return items;
}

// The `count` foremost of `items`, by index.
template <typename Key>
Items<Key> foremost(const Items<Key>& items, int64_t count) {
  Items<Key> best = items;
  std::nth_element(best.begin(), best.begin() + count, best.end());
  const Item<Key> first_left_out = best[count];
  best.clear();
  std::copy_if(items.begin(), items.end(), std::back_inserter(best), [&](auto item) { return item < first_left_out; });
  return best;
}

template <typename Key>
void sort(Items<Key>& items, Items<Key>& scratch) {
  radix_sort(items.data(), items.size(), scratch, [](const auto& item) { return item.key; });
  for (auto first = items.begin(); first != items.end();) {  // equal keys by index
    const auto last = std::find_if(first, items.end(), [&](const auto& item) { return item.key != first->key; });
    if (last - first > 1) std::sort(first, last);
    first = last;
  }
}

// Decides on candidates 0 .. count - 1 in turn, stops once `limit` are kept, and moves their items to the front. Returns
// their number.
template <typename C, typename Item>
DOUBLEHEAD_MULTIVERSION int64_t decide(Candidates<C>& candidates, Item* items, int64_t count, int64_t limit) {
  int64_t kept = 0;
  for (int64_t k = 0; k < count && kept < limit; ++k) {
    if (candidates.suppressed(k)) continue;
    candidates.strike(k, 0, candidates.runs());
    items[kept++] = items[k];
  }
  return kept;
}

template <typename C>
DOUBLEHEAD_MULTIVERSION void strike(Candidates<C>& candidates, const std::vector<uint32_t>& kept, int64_t first,
                                    int64_t last) {
  for (uint32_t k : kept) candidates.strike(k, first, last);
}

// The same by rounds: in a round the candidates left are decided on among themselves, and then those kept strike all
// the others in parallel.
template <typename C, typename Key, typename BoxAt>
int64_t decide_in_parallel(Candidates<C>& candidates, const BoxAt& box_at, Item<Key>* items, int64_t count,
                           int64_t limit, double threshold) {
  Candidates<C> round(threshold);
  std::vector<uint32_t> left;
  int64_t kept = 0;
  for (int64_t k = 0; k < count && kept < limit;) {
    for (left.clear(); k < count && static_cast<int64_t>(left.size()) < kRound; ++k) {
      if (!candidates.suppressed(k)) left.push_back(k);
    }
    round.reset(left.size(), [&](int64_t i) { return box_at(left[i]); });
    left.resize(decide(round, left.data(), left.size(), limit - kept));
    parallel_for(0, candidates.runs(), 256, [&](int64_t a, int64_t b) { strike(candidates, left, a, b); });
    for (uint32_t chosen : left) items[kept++] = items[chosen];
  }
  return kept;
}

// Puts the items, which come by index, in the order of their groups. Returns where each group starts, and the end behind
// the last; some may be empty.
template <typename Key>
std::vector<uint32_t> divide(Items<Key>& items, Items<Key>& scratch, const Groups& groups) {
  const int64_t count = items.size();
  if (!groups.data) return {0, static_cast<uint32_t>(count)};
  int64_t least = INT64_MAX, most = INT64_MIN;
  for (const auto& item : items) {
    least = std::min(least, groups[item.index]);
    most = std::max(most, groups[item.index]);
  }
  // Groups are numbered by their distance from the least, or, where this wastes memory, by their rank.
  std::vector<int64_t> ranked;
  const bool dense = static_cast<uint64_t>(most) - static_cast<uint64_t>(least) <= static_cast<uint64_t>(count);
  if (!dense) {
    for (const auto& item : items) ranked.push_back(groups[item.index]);
    std::sort(ranked.begin(), ranked.end());
    ranked.erase(std::unique(ranked.begin(), ranked.end()), ranked.end());
  }
  const auto number = [&](const Item<Key>& item) {
    const int64_t group = groups[item.index];
    return dense ? group - least : std::lower_bound(ranked.begin(), ranked.end(), group) - ranked.begin();
  };
  std::vector<uint32_t> starts((count ? (dense ? most - least + 1 : ranked.size()) : 0) + 1, 0);
  for (const auto& item : items) ++starts[number(item)];
  for (size_t g = 1; g < starts.size(); ++g) starts[g] += starts[g - 1];
  scratch.resize(count);
  for (int64_t i = count; i-- > 0;) scratch[--starts[number(items[i])]] = items[i];
  starts.back() = count;
  items.swap(scratch);
  return starts;
}

// Greedy suppression within the groups of `items`, which come by index. What is left are the kept ones, foremost first,
// of each group at most `limit`.
template <typename T, typename Key>
void suppress(const Boxes<T>& boxes, const Groups& groups, Items<Key>& items, int64_t limit, double threshold) {
  Items<Key> scratch;
  const std::vector<uint32_t> starts = divide(items, scratch, groups);
  const int64_t count = items.size(), group_count = static_cast<int64_t>(starts.size()) - 1;
  std::vector<uint32_t> kept(group_count);
  const bool parallel = group_count == 1 && count >= kLarge && num_threads() > 1;
  const auto run = [&](int64_t first, int64_t last) {
    Candidates<compute_t<T>> candidates(threshold);
    Items<Key> scratch;
    for (int64_t g = first; g < last; ++g) {
      Item<Key>* group = items.data() + starts[g];
      const int64_t size = starts[g + 1] - starts[g];
      radix_sort(group, size, scratch, [](const auto& item) { return item.key; });
      for (int64_t k = 0; k < size; ++k) boxes.prefetch(group[k].index);
      const auto box_at = [&](int64_t k) { return boxes[group[k].index]; };
      candidates.reset(size, box_at);
      kept[g] = parallel ? decide_in_parallel(candidates, box_at, group, size, limit, threshold)
                         : decide(candidates, group, size, limit);
    }
  };
  if (parallel) {
    run(0, 1);
  } else {
    parallel_for(0, group_count, group_count * 512 / (count + 1), run);
  }

  int64_t end = 0;
  for (int64_t g = 0; g < group_count; ++g) {
    std::copy_n(items.begin() + starts[g], kept[g], items.begin() + end);
    end += kept[g];
  }
  items.resize(end);
  if (group_count > 1) sort(items, scratch);
}

// The first `limit` kept boxes of one image, foremost first; `items` are all its boxes, by index.
template <typename T, typename Key>
Items<Key> keep(const Boxes<T>& boxes, const Groups& groups, Items<Key> items, int64_t limit, double threshold) {
  // Whether a box is kept depends on better boxes alone, so if few are wanted, try the best few, then more.
  const int64_t total = items.size();
  limit = std::min(limit, total);
  for (int64_t count = std::max<int64_t>(4 * limit, 4096); count < total; count *= 4) {
    Items<Key> best = foremost(items, count);
    suppress(boxes, groups, best, limit, threshold);
    if (static_cast<int64_t>(best.size()) < limit) continue;
    best.resize(limit);
    return best;
  }
  suppress(boxes, groups, items, limit, threshold);
  if (static_cast<int64_t>(items.size()) > limit) items.resize(limit);
  return items;
}

// ---------------------------------------------------------------------------------------------------------------------
// Operators

// The arguments of one image have `dim` 2, those of a batch 3.
void check_on_cpu(const Tensor& boxes, const Tensor& scores, int64_t dim) {
  check_cpu(boxes, "nms: boxes");
  check_arguments(boxes, scores, dim);
  DOUBLEHEAD_CHECK(boxes.size(dim - 2) < int64_t(1) << 31, "nms: boxes must be fewer than 2^31");
}

// Calls use(items) with the kept boxes of image b. The batch dimension, if there is one, is the first.
template <typename Use>
void keep_image(const Tensor& boxes, const Tensor& scores, const Groups& groups, int64_t b, double threshold,
                int64_t limit, const Use& use) {
  const int64_t n = scores.dim() - 1;  // the dimension of N
  const auto start = [&](const Tensor& tensor) { return n > 0 ? b * tensor.stride(0) : 0; };
  dispatch_floating(scores.scalar_type(), "nms: scores", [&]<typename S>() {
    const S* score = static_cast<const S*>(scores.data_ptr()) + start(scores);
    auto items = collect(score, scores.stride(n), scores.size(n), groups);
    dispatch_floating(boxes.scalar_type(), "nms: boxes", [&]<typename T>() {
      const T* box = static_cast<const T*>(boxes.data_ptr()) + start(boxes);
      use(keep(Boxes<T>{box, boxes.stride(n), boxes.stride(n + 1)}, groups, std::move(items), limit, threshold));
    });
  });
}

template <typename Key>
void write_indices(const Items<Key>& items, int64_t* to) {
  std::transform(items.begin(), items.end(), to, [](const auto& item) { return item.index; });
}

Tensor empty_indices(const Tensor& like, const std::vector<int64_t>& size) {
  return torch::stable::new_empty(like, size, ScalarType::Long);
}

std::tuple<Tensor, Tensor> nms_padded_cpu(const Tensor& boxes, const Tensor& scores, const Tensor& groups,
                                          double threshold, int64_t max_output, int64_t largest_group) {
  check_on_cpu(boxes, scores, 3);
  check_groups(groups, scores);
  check_padded(max_output, largest_group);
  const int64_t batch = boxes.size(0);
  Tensor indices = empty_indices(boxes, {batch, max_output}), counts = empty_indices(boxes, {batch});
  int64_t* out = static_cast<int64_t*>(indices.data_ptr());
  int64_t* out_counts = static_cast<int64_t*>(counts.data_ptr());
  const int64_t* group_data = static_cast<const int64_t*>(groups.data_ptr());
  const auto run = [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const Groups mine{group_data + b * groups.stride(0), groups.stride(1), true};
      keep_image(boxes, scores, mine, b, threshold, max_output, [&](const auto& kept) {
        write_indices(kept, out + b * max_output);
        std::fill(out + b * max_output + kept.size(), out + (b + 1) * max_output, -1);
        out_counts[b] = kept.size();
      });
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
  check_on_cpu(boxes, scores, 2);
  Groups mine;
  if (groups) {
    check_groups(*groups, scores);
    mine = {static_cast<const int64_t*>(groups->data_ptr()), groups->stride(0), false};
  }
  Tensor indices;
  keep_image(boxes, scores, mine, 0, threshold, boxes.size(0), [&](const auto& kept) {
    indices = empty_indices(boxes, {static_cast<int64_t>(kept.size())});
    write_indices(kept, static_cast<int64_t*>(indices.data_ptr()));
  });
  return indices;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(doublehead, CPU, m) {
  m.impl("nms_padded", TORCH_BOX(&nms_padded_cpu));
  m.impl("nms", TORCH_BOX(&nms_cpu));
}
