// The inner kernels for channels-last features: vectors along the channels, every other dimension one scalar at a time.
#pragma once

#include "load.h"
#include "weights.h"

#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")  // fused multiply-adds: no index depends on these sums

namespace doublehead::roi_align {

// One bin, N vectors of channels: `image` and `out` point to the first of these channels.
template <int N, typename T, typename W = compute_t<T>>
DOUBLEHEAD_INLINE void pool_bin(const T* image, int64_t row_stride, int64_t pixel_stride, const Entry<W>* row,
                                int64_t row_count, const Entry<W>* column, int64_t column_count, T* out) {
  Lanes<W> total[N] = {};
  for (int64_t r = 0; r < row_count; ++r) {
    const T* pixels = image + row[r].at * row_stride;
    Lanes<W> sum[N] = {};
    for (int64_t q = 0; q < column_count; ++q) {
      const T* pixel = pixels + column[q].at * pixel_stride;
      for (int n = 0; n < N; ++n) sum[n] += column[q].weight * load(pixel + n * kLanes<W>);
    }
    for (int n = 0; n < N; ++n) total[n] += row[r].weight * sum[n];
  }
  for (int n = 0; n < N; ++n) store(out + n * kLanes<W>, total[n]);
}

// One bin, one channel.
template <typename T, typename W = compute_t<T>>
DOUBLEHEAD_INLINE T pool_bin_scalar(const T* image, int64_t row_stride, int64_t pixel_stride, const Entry<W>* row,
                                    int64_t row_count, const Entry<W>* column, int64_t column_count) {
  W total = 0;
  for (int64_t r = 0; r < row_count; ++r) {
    W sum = 0;
    for (int64_t q = 0; q < column_count; ++q) {
      sum += column[q].weight * widen(image[row[r].at * row_stride + column[q].at * pixel_stride]);
    }
    total += row[r].weight * sum;
  }
  return static_cast<T>(total);
}

// Forward, one box. image: T[rows, columns, channels] with the strides given; out: T[bins, bins, channels], dense.
template <typename T, typename W = compute_t<T>>
DOUBLEHEAD_MULTIVERSION void pool_channels_last(const T* image, int64_t row_stride, int64_t pixel_stride,
                                                int64_t channels, const Sparse<W>& rows, const Sparse<W>& columns,
                                                T* out) {
  for (int64_t ph = 0; ph < rows.rows(); ++ph) {
    const Entry<W>* row = rows.row(ph);
    const int64_t row_count = rows.length(ph);
    for (int64_t pw = 0; pw < columns.rows(); ++pw, out += channels) {
      const Entry<W>* column = columns.row(pw);
      const int64_t column_count = columns.length(pw);
      int64_t c = 0;
      for (; c + 4 * kLanes<W> <= channels; c += 4 * kLanes<W>) {
        pool_bin<4>(image + c, row_stride, pixel_stride, row, row_count, column, column_count, out + c);
      }
      for (; c + kLanes<W> <= channels; c += kLanes<W>) {
        pool_bin<1>(image + c, row_stride, pixel_stride, row, row_count, column, column_count, out + c);
      }
      for (; c < channels; ++c) {
        out[c] = pool_bin_scalar(image + c, row_stride, pixel_stride, row, row_count, column, column_count);
      }
    }
  }
}

// A part of an image's gradient: its rows, columns and channels, and where it is being summed up.
template <typename W>
struct Tile {
  int64_t top, bottom, left, right, channels;
  W* data;  // of pixel (top, left)
  int64_t row_stride, pixel_stride;
};

// sum = the bins of one row of pixels: row weights times the gradient of the output.
template <typename T, typename W = compute_t<T>>
DOUBLEHEAD_INLINE void combine_bins(const T* grad, int64_t row_stride, const Entry<W>* row, int64_t row_count,
                                    int64_t channels, W* DOUBLEHEAD_RESTRICT sum) {
  int64_t c = 0;
  for (; c + kLanes<W> <= channels; c += kLanes<W>) {
    Lanes<W> lanes = {};
    for (int64_t r = 0; r < row_count; ++r) lanes += row[r].weight * load(grad + row[r].at * row_stride + c);
    store(sum + c, lanes);
  }
  for (; c < channels; ++c) {
    W scalar = 0;
    for (int64_t r = 0; r < row_count; ++r) scalar += row[r].weight * widen(grad[row[r].at * row_stride + c]);
    sum[c] = scalar;
  }
}

// to += weight * from, and a second pair with it where there is one.
template <int N, typename W>
DOUBLEHEAD_INLINE void add_to_pixel(W* DOUBLEHEAD_RESTRICT to, const Entry<W>* column, const W* from,
                                    int64_t channels) {
  const W* first = from + column[0].at * channels;
  const W* second = from + column[N - 1].at * channels;
  int64_t c = 0;
  for (; c + kLanes<W> <= channels; c += kLanes<W>) {
    Lanes<W> sum = load(to + c) + column[0].weight * load(first + c);
    if (N == 2) sum += column[1].weight * load(second + c);
    store(to + c, sum);
  }
  for (; c < channels; ++c) {
    W sum = to[c] + column[0].weight * first[c];
    if (N == 2) sum += column[1].weight * second[c];
    to[c] = sum;
  }
}

// Backward, one box: adds to the tile what the box's window shares with it, each pixel of the tile once.
// grad: T[bins, bins, channels] of the box, `bin_stride` from bin to bin; rows and columns: by pixel, from pixel
// first_row and first_column on; bins: how many a row of the output has; combined: W[bins, tile.channels].
template <typename T, typename W = compute_t<T>>
DOUBLEHEAD_MULTIVERSION void spread_channels_last(const T* grad, int64_t bin_stride, const Sparse<W>& rows,
                                                  int64_t first_row, const Sparse<W>& columns, int64_t first_column,
                                                  int64_t bins, const Tile<W>& tile, W* combined) {
  const int64_t top = std::max(tile.top, first_row), bottom = std::min(tile.bottom, first_row + rows.rows());
  const int64_t left = std::max(tile.left, first_column);
  const int64_t right = std::min(tile.right, first_column + columns.rows());
  if (top >= bottom || left >= right) return;
  int64_t first_bin = bins, last_bin = 0;  // the bins that these columns need
  for (auto* e = columns.row(left - first_column); e != columns.row(right - first_column); ++e) {
    first_bin = std::min<int64_t>(first_bin, e->at);
    last_bin = std::max<int64_t>(last_bin, e->at + 1);
  }
  for (int64_t y = top; y < bottom; ++y) {
    const int64_t row_count = rows.length(y - first_row);
    if (row_count == 0) continue;
    for (int64_t pw = first_bin; pw < last_bin; ++pw) {
      combine_bins(grad + pw * bin_stride, bins * bin_stride, rows.row(y - first_row), row_count, tile.channels,
                   combined + pw * tile.channels);
    }
    W* to = tile.data + (y - tile.top) * tile.row_stride + (left - tile.left) * tile.pixel_stride;
    for (int64_t x = left; x < right; ++x, to += tile.pixel_stride) {
      const Entry<W>* column = columns.row(x - first_column);
      int64_t count = columns.length(x - first_column);
      for (; count >= 2; count -= 2, column += 2) add_to_pixel<2>(to, column, combined, tile.channels);
      if (count == 1) add_to_pixel<1>(to, column, combined, tile.channels);
    }
  }
}

}  // namespace doublehead::roi_align

#pragma GCC pop_options
