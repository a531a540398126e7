// The sampled convolution on the CPU, forward and backward, without a buffer of sampled taps.
//
//   y(p, c) = sum_k w(k, c) m(k, p) x(p + g(k) + offset(k, p), c)        bilinear, zero outside the map
//
// Channels are innermost everywhere (channels_last): a sampling position is worked out once and serves all channels,
// and the loops over channels are the ones that the compiler vectorises. Threads share no output, so there are no atomics.
//
// Weights come as the model makes them, channels outermost; each thread turns those that it works with, in its cache.
//
// Shapes: x (B, H, W, C), w (B, C, K), offset (B, P, K, 2), mask (B, P, K), y (B, P, C); P = Ho Wo positions.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

namespace {

struct Geometry {
  int64_t height, width, channels, out_height, out_width, kernel_height, kernel_width, stride, padding, dilation;
  int64_t positions() const { return out_height * out_width; }
  int64_t taps() const { return kernel_height * kernel_width; }
};

// Where one tap of one position samples: four pixels, or the row of zeros instead of one that is off the map.
template <typename T>
struct Sample {
  int64_t pixel[4];  // -1 off the map
  T down, right;     // fractions
  T weight[4];       // bilinear

  // Whether the tap gives nothing and gets nothing: a third of a 7 x 7 kernel's taps on a 7 x 7 map.
  bool is_off_the_map() const {
    return pixel[0] < 0 && pixel[1] < 0 && pixel[2] < 0 && pixel[3] < 0 && down == down && right == right;
  }

  // Compared as floating point: a position far outside, or NaN, has no integer. NaN fractions show in the output.
  Sample(const Geometry& g, T y, T x) {
    const T top = std::floor(y), left = std::floor(x);
    down = y - top;
    right = x - left;
    for (int i = 0; i < 4; ++i) {
      const T row = top + T(i / 2), column = left + T(i % 2);
      const bool inside = row >= 0 && row < T(g.height) && column >= 0 && column < T(g.width);
      pixel[i] = inside ? int64_t(row) * g.width + int64_t(column) : -1;
      weight[i] = (i / 2 ? down : 1 - down) * (i % 2 ? right : 1 - right);
    }
  }
};

// Calls what(tap, sample) for every tap of a position.
template <typename T, typename What>
void for_each_tap(const Geometry& g, int64_t position, const T* offset, What what) {
  const T row = T(position / g.out_width * g.stride - g.padding), column = T(position % g.out_width * g.stride - g.padding);
  int64_t tap = 0;
  for (int64_t ky = 0; ky < g.kernel_height; ++ky)
    for (int64_t kx = 0; kx < g.kernel_width; ++kx, ++tap)
      what(tap, Sample<T>(g, row + T(ky * g.dilation) + (offset ? offset[2 * tap] : T(0)),
                          column + T(kx * g.dilation) + (offset ? offset[2 * tap + 1] : T(0))));
}

// (rows, columns) -> (columns, rows)
template <typename T>
void transpose(const T* from, int64_t rows, int64_t columns, T* to) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; ++column) to[column * rows + row] = from[row * columns + column];
}

template <typename T>
void forward(const Geometry& g, int64_t batch, const T* x, const T* w, const T* offset, const T* mask, T* y) {
  const int64_t P = g.positions(), K = g.taps(), C = g.channels;
  at::parallel_for(0, batch * P, 1, [&](int64_t begin, int64_t end) {
    const std::vector<T> zeros(C);
    std::vector<T> weights(K * C);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / P, p = i % P;
      if (i == begin || p == 0) transpose(w + b * C * K, C, K, weights.data());
      const T* map = x + b * g.height * g.width * C;
      T* out = y + i * C;
      std::fill(out, out + C, T(0));
      for_each_tap<T>(g, p, offset ? offset + i * K * 2 : nullptr, [&](int64_t k, const Sample<T>& at) {
        if (at.is_off_the_map()) return;
        const T amount = mask ? mask[i * K + k] : T(1);
        const T a0 = amount * at.weight[0], a1 = amount * at.weight[1], a2 = amount * at.weight[2], a3 = amount * at.weight[3];
        const T* v[4];
        for (int corner = 0; corner < 4; ++corner) v[corner] = at.pixel[corner] < 0 ? zeros.data() : map + at.pixel[corner] * C;
        const T *v0 = v[0], *v1 = v[1], *v2 = v[2], *v3 = v[3], *weight = weights.data() + k * C;
#pragma GCC ivdep
        for (int64_t c = 0; c < C; ++c) out[c] += weight[c] * (a0 * v0[c] + a1 * v1[c] + a2 * v2[c] + a3 * v3[c]);
      });
    }
  });
}

// One sample and one range of channels: its part of every gradient. The offsets' and the mask's gradients sum over
// channels, so each range writes its own copy of them.
template <typename T>
void backward_range(const Geometry& g, int64_t first, int64_t last, const T* gy, const T* x, const T* w, const T* offset,
                    const T* mask, T* gx, T* gw, T* goffset, T* gmask) {
  const int64_t K = g.taps(), C = g.channels, width = last - first;
  std::vector<T> weights(K * width), gweights(K * width);
  transpose(w + first * K, width, K, weights.data());
  for (int64_t pixel = 0; pixel < g.height * g.width; ++pixel) std::fill_n(gx + pixel * C + first, width, T(0));
  // What a pixel off the map is read from and what its gradient is written to. The four gradients of one sample are
  // written in one loop, so no two of them may share memory that matters.
  const std::vector<T> zeros(width);
  std::vector<T> nowhere(width);
  for (int64_t p = 0; p < g.positions(); ++p) {
    const T* out = gy + p * C + first;
    for_each_tap<T>(g, p, offset ? offset + p * K * 2 : nullptr, [&](int64_t k, const Sample<T>& at) {
      if (at.is_off_the_map()) {
        if (goffset) std::fill_n(goffset + (p * K + k) * 2, 2, T(0));
        if (gmask) gmask[p * K + k] = T(0);
        return;
      }
      const T amount = mask ? mask[p * K + k] : T(1);
      const T a0 = amount * at.weight[0], a1 = amount * at.weight[1], a2 = amount * at.weight[2], a3 = amount * at.weight[3];
      const T* v[4];
      T* gv[4];
      for (int corner = 0; corner < 4; ++corner) {
        const int64_t pixel = at.pixel[corner];
        v[corner] = pixel < 0 ? zeros.data() : x + pixel * C + first;
        gv[corner] = pixel < 0 ? nowhere.data() : gx + pixel * C + first;
      }
      const T *v0 = v[0], *v1 = v[1], *v2 = v[2], *v3 = v[3], *weight = weights.data() + k * width;
      T *gv0 = gv[0], *gv1 = gv[1], *gv2 = gv[2], *gv3 = gv[3], *gweight = gweights.data() + k * width;
      T dot0 = 0, dot1 = 0, dot2 = 0, dot3 = 0;  // of the upstream gradient with each corner's pixel
#pragma omp simd reduction(+ : dot0, dot1, dot2, dot3)
      for (int64_t c = 0; c < width; ++c) {
        const T upstream = out[c], weighted = upstream * weight[c];
        dot0 += weighted * v0[c];
        dot1 += weighted * v1[c];
        dot2 += weighted * v2[c];
        dot3 += weighted * v3[c];
        gweight[c] += upstream * (a0 * v0[c] + a1 * v1[c] + a2 * v2[c] + a3 * v3[c]);
        gv0[c] += a0 * weighted;
        gv1[c] += a1 * weighted;
        gv2[c] += a2 * weighted;
        gv3[c] += a3 * weighted;
      }
      if (goffset) {
        goffset[(p * K + k) * 2] = amount * ((1 - at.right) * (dot2 - dot0) + at.right * (dot3 - dot1));
        goffset[(p * K + k) * 2 + 1] = amount * ((1 - at.down) * (dot1 - dot0) + at.down * (dot3 - dot2));
      }
      if (gmask) gmask[p * K + k] = at.weight[0] * dot0 + at.weight[1] * dot1 + at.weight[2] * dot2 + at.weight[3] * dot3;
    });
  }
  transpose(gweights.data(), K, width, gw + first * K);
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
  const int64_t most = std::max<int64_t>(1, std::min(wanted, C / 32));
  const int64_t width = (C + most - 1) / most, ranges = (C + width - 1) / width;
  auto gx = at::empty_like(x), gw = at::empty_like(w);  // each thread fills its own
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
