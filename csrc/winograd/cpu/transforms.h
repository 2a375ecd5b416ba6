// The transforms of Winograd's convolution F(4 x 4, 3 x 3) in one dimension, on anything that adds and multiplies.
//
// A tile of 6 inputs gives 4 outputs: output = A^T (B^T input * G kernel). The products' points are 0, +-5/8, +-3/2 and
// infinity: the constants are exact, and rounding errors less than half those of the usual 0, +-1, +-2 and infinity.
// doublehead/ops/winograd/reference.py makes the same matrices from the points.
#pragma once

#include "common.h"

namespace doublehead::winograd {

constexpr int kOutputs = 4;
constexpr int kInputs = kOutputs + 2;

constexpr float a = 0.625f, b = 1.5f;

template <typename V>
DOUBLEHEAD_INLINE void forward(const V d[kInputs], V v[kInputs]) {
  const V even_a = d[4] - b * b * d[2], odd_a = a * (d[3] - b * b * d[1]);
  const V even_b = d[4] - a * a * d[2], odd_b = b * (d[3] - a * a * d[1]);
  v[0] = a * a * b * b * d[0] - (a * a + b * b) * d[2] + d[4];
  v[1] = even_a + odd_a;
  v[2] = even_a - odd_a;
  v[3] = even_b + odd_b;
  v[4] = even_b - odd_b;
  v[5] = a * a * b * b * d[1] - (a * a + b * b) * d[3] + d[5];
}

template <typename V>
DOUBLEHEAD_INLINE void backward(const V m[kInputs], V y[kOutputs]) {
  const V sum_a = m[1] + m[2], difference_a = m[1] - m[2];
  const V sum_b = m[3] + m[4], difference_b = m[3] - m[4];
  y[0] = m[0] + (sum_a + sum_b);
  y[1] = a * difference_a + b * difference_b;
  y[2] = a * a * sum_a + b * b * sum_b;
  y[3] = (a * a * a * difference_a + b * b * b * difference_b) + m[5];
}

}  // namespace doublehead::winograd
