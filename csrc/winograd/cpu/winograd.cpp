// 3x3 convolution of stride 1 and padding 1 by Winograd's method, on the CPU in float32.
//
// Maps are cut into tiles of 4 x 4 outputs. A strip of tiles is transformed, multiplied by the transformed weights in
// 36 matrix products, and transformed back, for a group of output channels at a time, so that everything but the
// weights stays in the cache. Strips share nothing: each thread takes its own, and which strip a tile is in changes nothing.
#include "transforms.h"
#include "common.h"

#include <cstring>
#include <memory>
#include <new>
#include <optional>

#pragma GCC diagnostic ignored "-Wpsabi"  // lanes only pass through inlined functions

namespace doublehead::winograd {
namespace {

typedef float Lanes8 __attribute__((vector_size(32)));

constexpr int64_t kPlanes = kInputs * kInputs;
constexpr int64_t kLane = 8;    // channels in a register,
constexpr int64_t kPanel = 16;  // output channels whose weights lie together,
constexpr int64_t kGroup = 64;  // output channels between two transforms,
constexpr int64_t kRows = 6;    // tiles whose sums are in registers,
constexpr int64_t kDepth = 32;  // input channels that are summed before the sum is added: a long sum rounds more,
constexpr int64_t kStrip = 48;  // tiles in the cache, about

DOUBLEHEAD_INLINE Lanes8 load(const float* from) {
  Lanes8 lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}

DOUBLEHEAD_INLINE void store(float* to, const Lanes8& lanes) { std::memcpy(to, &lanes, sizeof(lanes)); }

DOUBLEHEAD_INLINE Lanes8 load_part(const float* from, int64_t count) {
  Lanes8 lanes = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return lanes;
}

constexpr int64_t round_up(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }

struct Convolution {
  const float *x, *weight, *bias, *residual;  // bias and residual may be null
  float* y;
  int64_t images, height, width, channels, outputs;
  bool relu;

  int64_t across() const { return (width + kOutputs - 1) / kOutputs; }  // tiles
  int64_t down() const { return (height + kOutputs - 1) / kOutputs; }
  int64_t padded_channels() const { return round_up(channels, kLane); }
  int64_t padded_outputs() const { return round_up(outputs, kPanel); }
};

// Where a tile is.
struct Tile {
  int64_t image, top, left;  // of its outputs

  DOUBLEHEAD_INLINE Tile(const Convolution& conv, int64_t index) {
    left = index % conv.across() * kOutputs;
    top = index / conv.across() % conv.down() * kOutputs;
    image = index / (conv.across() * conv.down());
  }
};

// What a thread works in. Planes are a little further apart than they are large, or all would fall on the same sets of
// the cache.
struct Scratch {
  float *inputs, *products, *zeros;
  int64_t input_plane, product_plane;

  Scratch(const Convolution& conv, int64_t rows) {
    input_plane = rows * conv.padded_channels() + 16;
    product_plane = rows * kGroup + 16;
    storage.reset(static_cast<float*>(::operator new(
        sizeof(float) * (kPlanes * (input_plane + product_plane) + conv.padded_channels()), std::align_val_t(64))));
    inputs = storage.get();
    products = inputs + kPlanes * input_plane;
    zeros = products + kPlanes * product_plane;
    std::fill(zeros, zeros + conv.padded_channels(), 0.0f);
  }

 private:
  struct Free {
    void operator()(float* pointer) const { ::operator delete(pointer, std::align_val_t(64)); }
  };
  std::unique_ptr<float, Free> storage;
};

DOUBLEHEAD_INLINE void transform_input(const Convolution& conv, const Scratch& scratch, int64_t row, int64_t index) {
  const Tile tile(conv, index);
  const float* from[kInputs * kInputs];
  for (int i = 0; i < kInputs; ++i) {
    for (int j = 0; j < kInputs; ++j) {
      const int64_t y = tile.top + i - 1, x = tile.left + j - 1;
      const bool inside = y >= 0 && y < conv.height && x >= 0 && x < conv.width;
      from[i * kInputs + j] =
          inside ? conv.x + ((tile.image * conv.height + y) * conv.width + x) * conv.channels : scratch.zeros;
    }
  }
  float* to = scratch.inputs + row * conv.padded_channels();
  for (int64_t c = 0; c < conv.channels; c += kLane) {
    const int64_t left = conv.channels - c;
    Lanes8 half[kInputs][kInputs];
    for (int j = 0; j < kInputs; ++j) {
      Lanes8 d[kInputs], v[kInputs];
      for (int i = 0; i < kInputs; ++i) {
        const float* p = from[i * kInputs + j] + c;
        d[i] = left >= kLane ? load(p) : load_part(p, left);
      }
      forward(d, v);
      for (int i = 0; i < kInputs; ++i) half[i][j] = v[i];
    }
    for (int i = 0; i < kInputs; ++i) {
      Lanes8 v[kInputs];
      forward(half[i], v);
      for (int j = 0; j < kInputs; ++j) store(to + (i * kInputs + j) * scratch.input_plane + c, v[j]);
    }
  }
}

// Rows [R, depth] times a panel [depth, 16], added to `to` unless it is the first part of the sum.
template <int R>
DOUBLEHEAD_INLINE void multiply_rows(const float* rows, int64_t stride, const float* panel, int64_t depth, float* to,
                                     bool first) {
  Lanes8 sum[R][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Lanes8 w0 = load(panel + k * kPanel), w1 = load(panel + k * kPanel + kLane);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const float value = rows[r * stride + k];
      sum[r][0] += value * w0;
      sum[r][1] += value * w1;
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    store(to + r * kGroup, first ? sum[r][0] : load(to + r * kGroup) + sum[r][0]);
    store(to + r * kGroup + kLane, first ? sum[r][1] : load(to + r * kGroup + kLane) + sum[r][1]);
  }
}

DOUBLEHEAD_INLINE void multiply(const float* rows, int64_t count, int64_t stride, const float* panel, int64_t depth,
                                float* to, bool first) {
  int64_t row = 0;
  for (; row + kRows <= count; row += kRows) {
    multiply_rows<kRows>(rows + row * stride, stride, panel, depth, to + row * kGroup, first);
  }
  rows += row * stride;
  to += row * kGroup;
  switch (count - row) {
    case 5: return multiply_rows<5>(rows, stride, panel, depth, to, first);
    case 4: return multiply_rows<4>(rows, stride, panel, depth, to, first);
    case 3: return multiply_rows<3>(rows, stride, panel, depth, to, first);
    case 2: return multiply_rows<2>(rows, stride, panel, depth, to, first);
    case 1: return multiply_rows<1>(rows, stride, panel, depth, to, first);
  }
}

// All products of the output channels [begin, end), whole panels.
DOUBLEHEAD_INLINE void multiply_group(const Convolution& conv, const Scratch& scratch, int64_t rows, int64_t begin,
                                      int64_t end) {
  for (int64_t plane = 0; plane < kPlanes; ++plane) {
    for (int64_t o = begin; o < end; o += kPanel) {
      const float* panel = conv.weight + (plane * conv.padded_outputs() + o) * conv.channels;
      float* to = scratch.products + plane * scratch.product_plane + o - begin;
      for (int64_t k = 0; k < conv.channels; k += kDepth) {
        multiply(scratch.inputs + plane * scratch.input_plane + k, rows, conv.padded_channels(), panel + k * kPanel,
                 std::min(kDepth, conv.channels - k), to, k == 0);
      }
    }
  }
}

DOUBLEHEAD_INLINE void transform_output(const Convolution& conv, const Scratch& scratch, int64_t row, int64_t index,
                                        int64_t begin, int64_t end) {
  const Tile tile(conv, index);
  const int64_t high = std::min<int64_t>(kOutputs, conv.height - tile.top);
  const int64_t wide = std::min<int64_t>(kOutputs, conv.width - tile.left);
  const int64_t corner = ((tile.image * conv.height + tile.top) * conv.width + tile.left) * conv.outputs;
  const float* from = scratch.products + row * kGroup;
  for (int64_t o = begin; o < std::min(end, conv.outputs); o += kLane) {
    const int64_t count = std::min(kLane, conv.outputs - o);
    const Lanes8 bias = !conv.bias ? Lanes8{} : count == kLane ? load(conv.bias + o) : load_part(conv.bias + o, count);
    Lanes8 half[kOutputs][kInputs];
    for (int j = 0; j < kInputs; ++j) {
      Lanes8 m[kInputs], y[kOutputs];
      for (int i = 0; i < kInputs; ++i) m[i] = load(from + (i * kInputs + j) * scratch.product_plane + o - begin);
      backward(m, y);
      for (int i = 0; i < kOutputs; ++i) half[i][j] = y[i];
    }
    for (int i = 0; i < kOutputs; ++i) {
      if (i >= high) break;
      Lanes8 y[kOutputs];
      backward(half[i], y);
      for (int j = 0; j < kOutputs; ++j) {
        if (j >= wide) break;
        const int64_t place = corner + (i * conv.width + j) * conv.outputs + o;
        Lanes8 value = y[j] + bias;
        if (conv.residual) {
          value += count == kLane ? load(conv.residual + place) : load_part(conv.residual + place, count);
        }
        if (conv.relu) value = value < 0.0f ? Lanes8{} : value;  // keeps NaN
        if (count == kLane) {
          store(conv.y + place, value);
        } else {
          for (int64_t k = 0; k < count; ++k) conv.y[place + k] = value[k];
        }
      }
    }
  }
}

// The tiles [first, last).
DOUBLEHEAD_MULTIVERSION void convolve_strip(const Convolution& conv, const Scratch& scratch, int64_t first,
                                            int64_t last) {
  for (int64_t tile = first; tile < last; ++tile) transform_input(conv, scratch, tile - first, tile);
  for (int64_t begin = 0; begin < conv.padded_outputs(); begin += kGroup) {
    const int64_t end = std::min(begin + kGroup, conv.padded_outputs());
    multiply_group(conv, scratch, last - first, begin, end);
    for (int64_t tile = first; tile < last; ++tile) {
      transform_output(conv, scratch, tile - first, tile, begin, end);
    }
  }
}

void convolve(const Convolution& conv) {
  const int64_t tiles = conv.images * conv.down() * conv.across();
  if (tiles == 0) return;
  // Strips of equal sizes that fit the cache, as many for each thread.
  const int64_t strips = round_up(std::max<int64_t>((tiles + kStrip / 2) / kStrip, 1), num_threads());
  const int64_t rows = round_up((tiles + strips - 1) / strips, kRows);
  parallel_for(0, (tiles + rows - 1) / rows, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(conv, rows);
    for (int64_t strip = begin; strip < end; ++strip) {
      convolve_strip(conv, scratch, strip * rows, std::min((strip + 1) * rows, tiles));
    }
  });
}

const float* data(const Tensor& tensor, const char* what) {
  check_cpu(tensor, what);
  check_dtype(tensor, ScalarType::Float, what);
  check_contiguous(tensor, what);
  return tensor.const_data_ptr<float>();
}

Tensor winograd_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& residual, int64_t outputs, bool relu) {
  check_dim(x, 4, "winograd: x");
  check_dim(weight, 4, "winograd: weight");
  DOUBLEHEAD_CHECK(outputs > 0, "winograd: outputs must be positive, got ", outputs);
  DOUBLEHEAD_CHECK(x.size(3) > 0, "winograd: x must have channels, got shape ", shape(x));
  check_size(weight, 0, kPlanes, "winograd: weight");
  check_size(weight, 1, (outputs + kPanel - 1) / kPanel, "winograd: weight");
  check_size(weight, 2, x.size(3), "winograd: weight");
  check_size(weight, 3, kPanel, "winograd: weight");
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), outputs});
  Convolution conv{data(x, "winograd: x"), data(weight, "winograd: weight"), nullptr, nullptr,
                   y.mutable_data_ptr<float>(), x.size(0), x.size(1), x.size(2), x.size(3), outputs, relu};
  if (bias) {
    check_dim(*bias, 1, "winograd: bias");
    check_size(*bias, 0, outputs, "winograd: bias");
    conv.bias = data(*bias, "winograd: bias");
  }
  if (residual) {
    check_dim(*residual, 4, "winograd: residual");
    for (int64_t d = 0; d < 4; ++d) check_size(*residual, d, y.size(d), "winograd: residual");
    conv.residual = data(*residual, "winograd: residual");
  }
  convolve(conv);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(doublehead, CPU, m) { m.impl("winograd", TORCH_BOX(&winograd_cpu)); }

}  // namespace doublehead::winograd
