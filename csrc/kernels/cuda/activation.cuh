// The activation functions, in fp32 with the accurate library functions (no fast-math approximations).
#pragma once

#include "kernels/cuda/ptx.cuh"
#include "kernels/moe_ffn.h"

namespace sida::cuda {

__device__ inline float sigmoid(float value) {
  return 1.0f / (1.0f + expf(-value));
}

__device__ inline float gelu(float value) {
  return 0.5f * value * (1.0f + erff(value * 0.70710678118654752f));
}

// Comparisons that are false for NaN hand it on, as torch's clamps do.
__device__ inline float clamp(float value, float low, float high) {
  return value < low ? low : value > high ? high : value;
}

__device__ inline float softplus(float value) {
  return value > 20.0f ? value : log1pf(expf(value));
}

__device__ inline float activate(float value, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return value > 0.0f || isnan(value) ? value : 0.0f;
    case Activation::gelu:
      return gelu(value);
    case Activation::gelu_new: {
      const float inner = 0.79788456080286536f * (value + 0.044715f * value * value * value);
      return 0.5f * value * (1.0f + tanhf(inner));
    }
    case Activation::silu:
      return value / (1.0f + expf(-value));
    case Activation::gelu_10:
      return clamp(gelu(value), -10.0f, 10.0f);
    case Activation::quick_gelu:
      return value * sigmoid(1.702f * value);
    case Activation::sigmoid:
      return sigmoid(value);
    case Activation::tanh:
      return tanhf(value);
    case Activation::relu2:
      return value > 0.0f || isnan(value) ? value * value : 0.0f;
    case Activation::relu6:
      return clamp(value, 0.0f, 6.0f);
    case Activation::leaky_relu:
      return value < 0.0f ? 0.01f * value : value;
    case Activation::mish:
      return value * tanhf(softplus(value));
    case Activation::hardswish:
      return value * clamp(value + 3.0f, 0.0f, 6.0f) / 6.0f;
    case Activation::laplace:
      return 0.5f * (1.0f + erff((value - 0.707107f) / (0.282095f * 1.41421356237309505f)));
    case Activation::softplus:
      return softplus(value);
    case Activation::sqrtsoftplus:
      return value < -20.0f ? expf(0.5f * value) : sqrtf(softplus(value));
    case Activation::linear:
      return value;
    case Activation::swiglu_oai: {
      const float low = value > 7.0f ? 7.0f : value;
      return low * sigmoid(1.702f * low);
    }
  }
  return value;
}

// What a gated layer multiplies the activation with.
__device__ inline float other_half(float up, Activation activation) {
  return activation == Activation::swiglu_oai ? clamp(up, -7.0f, 7.0f) + 1.0f : up;
}

}  // namespace sida::cuda
