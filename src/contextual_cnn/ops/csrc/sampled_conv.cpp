// The sampled convolution on the CPU, forward and backward, without a buffer of sampled taps.
//
//   y(p, c) = sum_k w(k, c) m(k, p) x(p + g(k) + offset(k, p), c)        bilinear, zero outside the map
//
// Channels are innermost everywhere (channels_last): a sampling position is worked out once and serves all channels,
// and the loops over channels are the ones that the compiler vectorises. Threads share no output, so there are no atomics.
//
// Shapes: x (B, H, W, C), w (B, K, C), offset (B, P, K, 2), mask (B, P, K), y (B, P, C); P = Ho Wo positions.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

namespace {

struct Geometry {
  int64_t height, width, channels, out_height, out_width, kernel_height, kernel_width, stride, padding, dilation;
  int64_t positions() const { return out_height * out_width; }
  int64_t taps() const { return kernel_height * kernel_width; }
};

// The four pixels around a sampling point: where they are, how much each counts, and whether it is on the map.
template <typename T>
struct Corners {
  int64_t index[4];  // into the map's pixels; 0 where outside
  T weight[4];       // bilinear, 0 where outside
  T inside[4];
  T down, right;     // fractions
};

template <typename T>
Corners<T> corners_at(const Geometry& g, int64_t position, int64_t tap, const T* offset) {
  const T y = T(position / g.out_width * g.stride - g.padding + tap / g.kernel_width * g.dilation) + (offset ? offset[0] : T(0));
  const T x = T(position % g.out_width * g.stride - g.padding + tap % g.kernel_width * g.dilation) + (offset ? offset[1] : T(0));
  const T top = std::floor(y), left = std::floor(x);
  Corners<T> result;
  result.down = y - top;
  result.right = x - left;
  for (int i = 0; i < 4; ++i) {
    const T row = top + T(i / 2), column = left + T(i % 2);
    // Compared as floating point: a position far outside, or NaN, has no integer
    const bool inside = row >= 0 && row < T(g.height) && column >= 0 && column < T(g.width);
    result.inside[i] = T(inside);
    result.index[i] = inside ? int64_t(row) * g.width + int64_t(column) : 0;
    // Times `inside` instead of a choice: NaN stays NaN and shows in the output
    result.weight[i] = (i / 2 ? result.down : 1 - result.down) * (i % 2 ? result.right : 1 - result.right) * T(inside);
  }
  return result;
}

template <typename T>
void forward(const Geometry& g, int64_t batch, const T* x, const T* w, const T* offset, const T* mask, T* y) {
  const int64_t P = g.positions(), K = g.taps(), C = g.channels;
  at::parallel_for(0, batch * P, std::max<int64_t>(1, 4096 / (K * C)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / P, p = i % P;
      const T* map = x + b * g.height * g.width * C;
      T* out = y + i * C;
      std::fill(out, out + C, T(0));
      for (int64_t k = 0; k < K; ++k) {
        const auto at = corners_at<T>(g, p, k, offset ? offset + (i * K + k) * 2 : nullptr);
        const T amount = mask ? mask[i * K + k] : T(1);
        const T a0 = amount * at.weight[0], a1 = amount * at.weight[1], a2 = amount * at.weight[2], a3 = amount * at.weight[3];
        const T *v0 = map + at.index[0] * C, *v1 = map + at.index[1] * C, *v2 = map + at.index[2] * C, *v3 = map + at.index[3] * C;
        const T* weight = w + (b * K + k) * C;
#pragma GCC ivdep
        for (int64_t c = 0; c < C; ++c) out[c] += weight[c] * (a0 * v0[c] + a1 * v1[c] + a2 * v2[c] + a3 * v3[c]);
      }
    }
  });
}

// One sample and one range of channels: its part of every gradient. The offsets' and the mask's gradients sum over
// channels, so each range writes its own copy of them. A pixel off the map has dot 0: the gradient of a sample with
// respect to its position sees the zeros outside.
template <typename T>
void backward_range(const Geometry& g, int64_t first, int64_t last, const T* gy, const T* x, const T* w, const T* offset,
                    const T* mask, T* gx, T* gw, T* goffset, T* gmask) {
  const int64_t P = g.positions(), K = g.taps(), C = g.channels;
  for (int64_t p = 0; p < P; ++p) {
    const T* out = gy + p * C;
    for (int64_t k = 0; k < K; ++k) {
      const auto at = corners_at<T>(g, p, k, offset ? offset + (p * K + k) * 2 : nullptr);
      const T amount = mask ? mask[p * K + k] : T(1);
      const T a0 = at.weight[0], a1 = at.weight[1], a2 = at.weight[2], a3 = at.weight[3];
      const int64_t i0 = at.index[0] * C, i1 = at.index[1] * C, i2 = at.index[2] * C, i3 = at.index[3] * C;
      const T* weight = w + k * C;
      T* weight_grad = gw + k * C;
      T dot0 = 0, dot1 = 0, dot2 = 0, dot3 = 0;  // of the upstream gradient with each corner's pixel
#pragma omp simd reduction(+ : dot0, dot1, dot2, dot3)
      for (int64_t c = first; c < last; ++c) {
        const T v0 = x[i0 + c], v1 = x[i1 + c], v2 = x[i2 + c], v3 = x[i3 + c];
        const T upstream = out[c] * weight[c];
        dot0 += upstream * v0;
        dot1 += upstream * v1;
        dot2 += upstream * v2;
        dot3 += upstream * v3;
        weight_grad[c] += amount * out[c] * (a0 * v0 + a1 * v1 + a2 * v2 + a3 * v3);
      }
      // One corner at a time: two corners outside the map share pixel 0
      const int64_t index[4] = {i0, i1, i2, i3};
      for (int corner = 0; corner < 4; ++corner) {
        const T a = amount * at.weight[corner];
        if (a == 0) continue;
        T* pixel_grad = gx + index[corner];
#pragma GCC ivdep
        for (int64_t c = first; c < last; ++c) pixel_grad[c] += a * out[c] * weight[c];
      }
      dot0 *= at.inside[0];
      dot1 *= at.inside[1];
      dot2 *= at.inside[2];
      dot3 *= at.inside[3];
      if (goffset) {
        goffset[(p * K + k) * 2] = amount * ((1 - at.right) * (dot2 - dot0) + at.right * (dot3 - dot1));
        goffset[(p * K + k) * 2 + 1] = amount * ((1 - at.down) * (dot1 - dot0) + at.down * (dot3 - dot2));
      }
      if (gmask) {
        const T bilinear[4] = {(1 - at.down) * (1 - at.right), (1 - at.down) * at.right, at.down * (1 - at.right), at.down * at.right};
        gmask[p * K + k] = bilinear[0] * dot0 + bilinear[1] * dot1 + bilinear[2] * dot2 + bilinear[3] * dot3;
      }
    }
  }
}


// Adds up the copies that the ranges of channels wrote.
at::Tensor sum_copies(const at::Tensor& copies) { return copies.size(0) == 1 ? copies[0] : copies.sum(0); }

const void* data_or_null(const std::optional<at::Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

Geometry geometry_of(const at::Tensor& x, int64_t out_height, int64_t out_width, at::IntArrayRef kernel, int64_t stride,
                     int64_t padding, int64_t dilation) {
  return {x.size(1), x.size(2), x.size(3), out_height, out_width, kernel[0], kernel[1], stride, padding, dilation};
}

at::Tensor sampled_conv2d(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& offset,
                          const std::optional<at::Tensor>& mask, int64_t out_height, int64_t out_width,
                          at::IntArrayRef kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const auto g = geometry_of(x, out_height, out_width, kernel, stride, padding, dilation);
  auto y = at::empty({x.size(0), out_height, out_width, g.channels}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "sampled_conv2d", [&] {
    forward<scalar_t>(g, x.size(0), x.const_data_ptr<scalar_t>(), w.const_data_ptr<scalar_t>(),
                      static_cast<const scalar_t*>(data_or_null(offset)), static_cast<const scalar_t*>(data_or_null(mask)),
                      y.mutable_data_ptr<scalar_t>());
  });
  return y;
}

// Gradients of x, w, offset and mask; empty for an offset or a mask that is not there.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> sampled_conv2d_backward(
    const at::Tensor& gy, const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& offset,
    const std::optional<at::Tensor>& mask, at::IntArrayRef kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const auto g = geometry_of(x, gy.size(1), gy.size(2), kernel, stride, padding, dilation);
  const int64_t batch = x.size(0), P = g.positions(), K = g.taps(), C = g.channels, pixels = g.height * g.width;
  // A sample is one piece of work; with fewer samples than threads it is cut into ranges of channels
  const int64_t wanted = batch > 0 ? (at::get_num_threads() + batch - 1) / batch : 1;
  const int64_t ranges = std::max<int64_t>(1, std::min(wanted, C / 32));
  const int64_t width = (C + ranges - 1) / ranges;
  auto gx = at::zeros_like(x), gw = at::zeros_like(w);
  auto goffset = at::empty({offset ? ranges : 0, batch, P, K, 2}, x.options());
  auto gmask = at::empty({mask ? ranges : 0, batch, P, K}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "sampled_conv2d_backward", [&] {
    const auto *gy_ = gy.const_data_ptr<scalar_t>(), *x_ = x.const_data_ptr<scalar_t>(), *w_ = w.const_data_ptr<scalar_t>();
    const auto *offset_ = static_cast<const scalar_t*>(data_or_null(offset)), *mask_ = static_cast<const scalar_t*>(data_or_null(mask));
    auto *gx_ = gx.mutable_data_ptr<scalar_t>(), *gw_ = gw.mutable_data_ptr<scalar_t>();
    auto* goffset_ = offset ? goffset.mutable_data_ptr<scalar_t>() : nullptr;
    auto* gmask_ = mask ? gmask.mutable_data_ptr<scalar_t>() : nullptr;
    at::parallel_for(0, batch * ranges, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / ranges, range = i % ranges, copy = range * batch + b;
        backward_range<scalar_t>(g, range * width, std::min(C, (range + 1) * width), gy_ + b * P * C, x_ + b * pixels * C,
                                 w_ + b * K * C, offset_ ? offset_ + b * P * K * 2 : nullptr, mask_ ? mask_ + b * P * K : nullptr,
                                 gx_ + b * pixels * C, gw_ + b * K * C, goffset_ ? goffset_ + copy * P * K * 2 : nullptr,
                                 gmask_ ? gmask_ + copy * P * K : nullptr);
      }
    });
  });
  return {gx, gw, offset ? sum_copies(goffset) : goffset, mask ? sum_copies(gmask) : gmask};
}

}  // namespace

TORCH_LIBRARY(contextual_cnn_cpu, library) {
  library.def("sampled_conv2d", &sampled_conv2d);
  library.def("sampled_conv2d_backward", &sampled_conv2d_backward);
}
