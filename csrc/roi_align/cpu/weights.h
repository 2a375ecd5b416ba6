// The two weight matrices of a box, sparse, with everything folded in: bilinear weights, clamping at the border,
// samples that do not count, and the division by the number of samples.
#pragma once

#include "../roi_align.h"

#include <algorithm>
#include <vector>

namespace doublehead::roi_align {

template <typename W>
struct Entry {
  int32_t at;
  W weight;
};

// Rows of a sparse matrix, one after the other: row r is entries[begin[r]] .. entries[begin[r + 1]].
template <typename W>
struct Sparse {
  std::vector<int32_t> begin;
  std::vector<Entry<W>> entries;

  int64_t rows() const { return int64_t(begin.size()) - 1; }
  const Entry<W>* row(int64_t r) const { return entries.data() + begin[r]; }
  int64_t length(int64_t r) const { return begin[r + 1] - begin[r]; }
};

// One axis: for every bin the pixels it reads, and the window [first, last) of pixels that any bin reads.
template <typename W>
struct AxisWeights {
  Sparse<W> bins;
  int32_t first = 0, last = 0;
};

// Adds `weight` for pixel `at`, merging it with what the row's last two entries have: samples come in order.
template <typename W>
void add_entry(Sparse<W>& sparse, int32_t at, W weight) {
  auto& entries = sparse.entries;
  const size_t row_begin = sparse.begin.back();
  for (size_t i = entries.size(); i > row_begin && i + 2 > entries.size(); --i) {
    if (entries[i - 1].at == at) {
      entries[i - 1].weight += weight;
      return;
    }
  }
  entries.push_back({at, weight});
}

template <typename W>
void fill_weights(const Axis<W>& axis, int64_t bins, int64_t extent, AxisWeights<W>& weights) {
  Sparse<W>& sparse = weights.bins;
  sparse.entries.clear();
  sparse.begin.assign(1, 0);
  int32_t first = INT32_MAX, last = 0;
  const W share = axis.samples ? W(1) / W(axis.samples) : W(0);
  for (int64_t bin = 0; bin < bins; ++bin) {
    for (int64_t sample = first_sample(axis, bin); sample < axis.samples; ++sample) {
      const W position = sample_position(axis, bin, sample);
      if (axis.bin > W(0) && position > W(extent)) break;  // so are all that follow
      if (!sample_counts(position, extent)) continue;
      const Bilinear<W> between = bilinear(position, extent);
      add_entry(sparse, between.low, between.low_weight * share);
      if (between.high != between.low) add_entry(sparse, between.high, between.high_weight * share);
      first = std::min(first, between.low);
      last = std::max(last, between.high + 1);
    }
    sparse.begin.push_back(int32_t(sparse.entries.size()));
  }
  weights.first = first < last ? first : 0;
  weights.last = first < last ? last : 0;
}

// The same weights the other way round: for every pixel of the window the bins that read it, in order of the bins.
template <typename W>
Sparse<W> by_pixel(const AxisWeights<W>& weights) {
  Sparse<W> pixels;
  pixels.begin.assign(weights.last - weights.first + 1, 0);
  pixels.entries.resize(weights.bins.entries.size());
  for (const Entry<W>& entry : weights.bins.entries) ++pixels.begin[entry.at - weights.first + 1];
  for (size_t i = 1; i < pixels.begin.size(); ++i) pixels.begin[i] += pixels.begin[i - 1];
  std::vector<int32_t> next(pixels.begin.begin(), pixels.begin.end() - 1);
  for (int64_t bin = 0; bin < weights.bins.rows(); ++bin) {
    const Entry<W>* row = weights.bins.row(bin);
    for (int64_t i = 0; i < weights.bins.length(bin); ++i) {
      pixels.entries[next[row[i].at - weights.first]++] = {int32_t(bin), row[i].weight};
    }
  }
  return pixels;
}

// Brings all rows to one length N (2, 3 or 4), so that loops over them unroll and no branch is mispredicted: an entry is
// split into halves, which changes no sum. Returns N; 0, and nothing done, where a row is empty or too long.
template <typename W>
int make_uniform(Sparse<W>& sparse) {
  int64_t longest = 2;
  for (int64_t r = 0; r < sparse.rows(); ++r) {
    if (sparse.length(r) == 0 || sparse.length(r) > 4) return 0;
    longest = std::max(longest, sparse.length(r));
  }
  std::vector<Entry<W>> uniform;
  uniform.reserve(sparse.rows() * longest);
  for (int64_t r = 0; r < sparse.rows(); ++r) {
    uniform.insert(uniform.end(), sparse.row(r), sparse.row(r) + sparse.length(r));
    for (int64_t i = sparse.length(r); i < longest; ++i) {
      uniform.back().weight *= W(0.5);
      uniform.push_back(uniform.back());
    }
  }
  for (int64_t r = 0; r <= sparse.rows(); ++r) sparse.begin[r] = int32_t(r * longest);
  sparse.entries.swap(uniform);
  return int(longest);
}

}  // namespace doublehead::roi_align
