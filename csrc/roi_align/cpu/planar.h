// The inner kernels for planar (NCHW) features: vectors along a row of pixels, one channel after the other.
//
// A box's window is seldom a whole number of vectors wide, so the vectors cover a strip: the window and some pixels to
// its right, or left at the map's edge, with weight 0. Because 0 * infinity is not 0, what is not finite is left to the
// plain loops, which touch the window's pixels alone.
#pragma once

#include "load.h"
#include "weights.h"

#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")  // fused multiply-adds: no index depends on these sums

namespace doublehead::roi_align {

// The pixels [begin, begin + width) of every row; width is a whole number of vectors, or 0 where the map is too narrow.
struct Strip {
  int64_t begin, width;
};

template <typename W>
Strip make_strip(const AxisWeights<W>& columns, int64_t map_width) {
  const int64_t width = (columns.last - columns.first + kLanes<W> - 1) / kLanes<W> * kLanes<W>;
  if (width > map_width) return {0, 0};
  return {std::min<int64_t>(columns.first, map_width - width), width};
}

// The weights of one box as the planar kernels want them.
template <typename W>
struct PlanarWeights {
  AxisWeights<W> rows, columns;
  int uniform = 0;  // length of the rows' rows, or 0 if it varies
  Strip strip = {0, 0};
};

// As many vectors hold a row of output bins, at most; longer ones are left to the plain loops.
constexpr int64_t kMostVectors = 2;

// Scratch memory that either kernel needs, in elements of W.
template <typename W>
int64_t planar_scratch(int64_t row_bins, int64_t column_bins, int64_t map_width) {
  constexpr int64_t row = kMostVectors * kLanes<W>;
  return (map_width + kLanes<W>) * (row_bins + column_bins + row) + row_bins * column_bins + row;
}

template <typename W>
DOUBLEHEAD_INLINE bool all_zero(const Lanes<W>& lanes) {
  W sum = 0;
  for (int64_t i = 0; i < kLanes<W>; ++i) sum += lanes[i];  // NaN if any is NaN, and they are all 0 or NaN
  return sum == W(0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

// combined: W[bins, width] = row weights times the strip. N: entries in every row of the weights, 0 if that varies.
template <int N, typename T, typename W = compute_t<T>>
DOUBLEHEAD_INLINE void combine_rows(const T* strip, int64_t row_stride, int64_t width, const Sparse<W>& rows,
                                    W* DOUBLEHEAD_RESTRICT combined) {
  for (int64_t ph = 0; ph < rows.rows(); ++ph, combined += width) {
    const Entry<W>* row = rows.row(ph);
    const int64_t count = N ? N : rows.length(ph);
    int64_t x = 0;
    for (; x + 2 * kLanes<W> <= width; x += 2 * kLanes<W>) {
      Lanes<W> sum[2] = {};
      for (int64_t r = 0; r < count; ++r) {
        const T* from = strip + row[r].at * row_stride + x;
        sum[0] += row[r].weight * load(from);
        sum[1] += row[r].weight * load(from + kLanes<W>);
      }
      store(combined + x, sum[0]);
      store(combined + x + kLanes<W>, sum[1]);
    }
    if (x < width) {
      Lanes<W> sum = {};
      for (int64_t r = 0; r < count; ++r) sum += row[r].weight * load(strip + row[r].at * row_stride + x);
      store(combined + x, sum);
    }
  }
}

// P rows of output bins: out = combined times `dense`, W[count, V, kLanes], the column weights of `count` pixels. Whole
// vectors are stored: what they write past a row's last bin, the next row overwrites. `check` becomes NaN if any is.
template <int P, int V, typename T, typename W = compute_t<T>>
DOUBLEHEAD_INLINE void combine_columns(const W* combined, int64_t width, int64_t count, const W* dense, T* out,
                                       int64_t out_stride, Lanes<W>& check) {
  Lanes<W> sum[P][V] = {};
  for (int64_t x = 0; x < count; ++x) {
    Lanes<W> weights[V];
    for (int v = 0; v < V; ++v) weights[v] = load(dense + (x * V + v) * kLanes<W>);
    for (int p = 0; p < P; ++p) {
      for (int v = 0; v < V; ++v) sum[p][v] += combined[p * width + x] * weights[v];
    }
  }
  for (int p = 0; p < P; ++p) {
    for (int v = 0; v < V; ++v) {
      check += sum[p][v] * W(0);
      store(out + p * out_stride + v * kLanes<W>, sum[p][v]);
    }
  }
}

template <int V, typename T, typename W = compute_t<T>>
DOUBLEHEAD_INLINE void pool_plane(const T* plane, int64_t row_stride, const PlanarWeights<W>& weights, const W* dense,
                                  W* combined, T* out, Lanes<W>& check) {
  const Sparse<W>& rows = weights.rows.bins;
  const Strip strip = weights.strip;
  const T* from = plane + strip.begin;
  switch (weights.uniform) {
    case 2: combine_rows<2>(from, row_stride, strip.width, rows, combined); break;
    case 3: combine_rows<3>(from, row_stride, strip.width, rows, combined); break;
    case 4: combine_rows<4>(from, row_stride, strip.width, rows, combined); break;
    default: combine_rows<0>(from, row_stride, strip.width, rows, combined);
  }
  const int64_t bins = weights.columns.bins.rows(), count = weights.columns.last - weights.columns.first;
  const W* window = combined + (weights.columns.first - strip.begin);
  constexpr int kRows = V == 1 ? 7 : 4;  // 7 x 1 or 4 x 2 sums stay in registers
  int64_t ph = 0;
  for (; ph + kRows <= rows.rows(); ph += kRows) {
    combine_columns<kRows, V>(window + ph * strip.width, strip.width, count, dense, out + ph * bins, bins, check);
  }
  for (; ph < rows.rows(); ++ph) {
    combine_columns<1, V>(window + ph * strip.width, strip.width, count, dense, out + ph * bins, bins, check);
  }
}

template <typename T, typename W = compute_t<T>>
DOUBLEHEAD_INLINE void pool_plane_plainly(const T* plane, int64_t row_stride, const Sparse<W>& rows,
                                          const Sparse<W>& columns, T* out) {
  for (int64_t ph = 0; ph < rows.rows(); ++ph) {
    for (int64_t pw = 0; pw < columns.rows(); ++pw) {
      W total = 0;
      for (int64_t r = 0; r < rows.length(ph); ++r) {
        const T* pixels = plane + rows.row(ph)[r].at * row_stride;
        W sum = 0;
        for (int64_t q = 0; q < columns.length(pw); ++q) {
          sum += columns.row(pw)[q].weight * widen(pixels[columns.row(pw)[q].at]);
        }
        total += rows.row(ph)[r].weight * sum;
      }
      *out++ = static_cast<T>(total);
    }
  }
}

// All planes of a box whose rows of bins take V vectors; false if a result is not finite.
template <int V, typename T, typename W = compute_t<T>>
DOUBLEHEAD_INLINE bool pool_planes(const T* planes, int64_t channel_stride, int64_t row_stride, int64_t channels,
                                   const PlanarWeights<W>& weights, W* scratch, T* out) {
  constexpr int64_t kRow = V * kLanes<W>;
  const Sparse<W>&rows = weights.rows.bins, &columns = weights.columns.bins;
  const int64_t first = weights.columns.first, count = weights.columns.last - first;
  const int64_t bins = rows.rows() * columns.rows();
  W* dense = scratch;
  W* combined = dense + count * kRow;
  T* aside = reinterpret_cast<T*>(combined + rows.rows() * weights.strip.width);
  for (int64_t x = 0; x < count * V; ++x) store(dense + x * kLanes<W>, Lanes<W>{});
  for (int64_t pw = 0; pw < columns.rows(); ++pw) {
    const Entry<W>* column = columns.row(pw);
    for (int64_t q = 0; q < columns.length(pw); ++q) dense[(column[q].at - first) * kRow + pw] += column[q].weight;
  }
  Lanes<W> check = {};
  for (int64_t c = 0; c < channels; ++c) {
    // The vectors of the last channels would write past the end of `out`.
    const bool fits = (c + 1) * bins - columns.rows() + kRow <= channels * bins;
    T* to = fits ? out + c * bins : aside;
    pool_plane<V>(planes + c * channel_stride, row_stride, weights, dense, combined, to, check);
    if (!fits) std::copy_n(aside, bins, out + c * bins);
  }
  return all_zero<W>(check);
}

// Forward, one box, some channels. planes: T[channels, rows, columns]; out: T[channels, bins, bins], dense.
template <typename T, typename W = compute_t<T>>
DOUBLEHEAD_MULTIVERSION void pool_planar(const T* planes, int64_t channel_stride, int64_t row_stride, int64_t channels,
                                         const PlanarWeights<W>& weights, W* scratch, T* out) {
  const Sparse<W>&rows = weights.rows.bins, &columns = weights.columns.bins;
  const int64_t bins = rows.rows() * columns.rows();
  const bool has_strip = weights.strip.width || weights.columns.last == weights.columns.first;
  if (has_strip && columns.rows() <= kLanes<W>) {
    if (pool_planes<1>(planes, channel_stride, row_stride, channels, weights, scratch, out)) return;
  } else if (has_strip && columns.rows() <= kMostVectors * kLanes<W>) {
    if (pool_planes<2>(planes, channel_stride, row_stride, channels, weights, scratch, out)) return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    pool_plane_plainly(planes + c * channel_stride, row_stride, rows, columns, out + c * bins);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

// dense: W[bins, width], the column weights. N: entries in every row of the weights, 0 if that varies.
template <int N, typename T, typename W = compute_t<T>>
DOUBLEHEAD_INLINE void spread_plane(const T* grad, const Sparse<W>& rows, int64_t bins, const W* dense, int64_t width,
                                    W* strip, int64_t row_stride) {
  for (int64_t ph = 0; ph < rows.rows(); ++ph, grad += bins) {
    const Entry<W>* row = rows.row(ph);
    const int64_t count = N ? N : rows.length(ph);
    int64_t x = 0;
    for (; x + 2 * kLanes<W> <= width; x += 2 * kLanes<W>) {
      Lanes<W> sum[2] = {};
      for (int64_t pw = 0; pw < bins; ++pw) {
        const W value = widen(grad[pw]);
        sum[0] += value * load(dense + pw * width + x);
        sum[1] += value * load(dense + pw * width + x + kLanes<W>);
      }
      for (int64_t r = 0; r < count; ++r) {
        W* to = strip + row[r].at * row_stride + x;
        store(to, load(to) + row[r].weight * sum[0]);
        store(to + kLanes<W>, load(to + kLanes<W>) + row[r].weight * sum[1]);
      }
    }
    if (x < width) {
      Lanes<W> sum = {};
      for (int64_t pw = 0; pw < bins; ++pw) sum += widen(grad[pw]) * load(dense + pw * width + x);
      for (int64_t r = 0; r < count; ++r) {
        W* to = strip + row[r].at * row_stride + x;
        store(to, load(to) + row[r].weight * sum);
      }
    }
  }
}

template <typename T, typename W = compute_t<T>>
DOUBLEHEAD_INLINE void spread_plane_plainly(const T* grad, const Sparse<W>& rows, const Sparse<W>& columns, W* plane,
                                            int64_t row_stride) {
  for (int64_t ph = 0; ph < rows.rows(); ++ph) {
    for (int64_t pw = 0; pw < columns.rows(); ++pw, ++grad) {
      for (int64_t r = 0; r < rows.length(ph); ++r) {
        const W value = rows.row(ph)[r].weight * widen(*grad);
        W* pixels = plane + rows.row(ph)[r].at * row_stride;
        for (int64_t q = 0; q < columns.length(pw); ++q) {
          pixels[columns.row(pw)[q].at] += columns.row(pw)[q].weight * value;
        }
      }
    }
  }
}

template <typename T, typename W = compute_t<T>>
DOUBLEHEAD_INLINE bool all_finite(const T* values, int64_t count) {
  Lanes<W> check = {};
  int64_t i = 0;
  for (; i + kLanes<W> <= count; i += kLanes<W>) check += load(values + i) * W(0);
  for (; i < count; ++i) check[0] += widen(values[i]) * W(0);
  return all_zero<W>(check);
}

// Backward, one box, some channels: adds to planes, W[channels, rows, columns]. grad: T[channels, bins, bins], dense.
template <typename T, typename W = compute_t<T>>
DOUBLEHEAD_MULTIVERSION void spread_planar(const T* grad, int64_t channels, const PlanarWeights<W>& weights, W* scratch,
                                           W* planes, int64_t channel_stride, int64_t row_stride) {
  const Sparse<W>&rows = weights.rows.bins, &columns = weights.columns.bins;
  const int64_t bins = columns.rows(), area = rows.rows() * bins;
  const Strip strip = weights.strip;
  const bool vectors = strip.width && all_finite(grad, channels * area);
  W* dense = scratch;
  if (vectors) {
    std::fill_n(dense, bins * strip.width, W(0));
    for (int64_t pw = 0; pw < bins; ++pw) {
      const Entry<W>* column = columns.row(pw);
      for (int64_t q = 0; q < columns.length(pw); ++q) dense[pw * strip.width + column[q].at - strip.begin] += column[q].weight;
    }
  }
  for (int64_t c = 0; c < channels; ++c, grad += area, planes += channel_stride) {
    if (!vectors) {
      spread_plane_plainly(grad, rows, columns, planes, row_stride);
      continue;
    }
    W* to = planes + strip.begin;
    switch (weights.uniform) {
      case 2: spread_plane<2>(grad, rows, bins, dense, strip.width, to, row_stride); break;
      case 3: spread_plane<3>(grad, rows, bins, dense, strip.width, to, row_stride); break;
      case 4: spread_plane<4>(grad, rows, bins, dense, strip.width, to, row_stride); break;
      default: spread_plane<0>(grad, rows, bins, dense, strip.width, to, row_stride);
    }
  }
}

}  // namespace doublehead::roi_align

#pragma GCC pop_options
