// exp, tanh, the normal distribution and the activations over a vector type, to a few units in the last place of fp32.
//
// NaN goes in and comes out; infinities give what the reference gives (relu(inf) = inf, silu(-inf) = NaN because
// torch computes -inf * 0, ...).
#pragma once

#include "kernels/cpu/simd.h"
#include "kernels/moe_ffn.h"

namespace sida::cpu {

template <class S>
struct Math {
  using F = typename S::F;
  using I = typename S::I;
  using U = typename S::Types::U;

  static F all(float value) { return broadcast<S>(value); }
  static F abs(F x) { return bits_as<F>(bits_as<U>(x) & 0x7fffffffu); }
  static F with_sign(F magnitude, F sign) {
    return bits_as<F>(bits_as<U>(magnitude) | (bits_as<U>(sign) & 0x80000000u));
  }
  // A NaN in x stays.
  static F at_least(F x, float limit) { return x < limit ? all(limit) : x; }
  static F at_most(F x, float limit) { return x > limit ? all(limit) : x; }

  // Horner's rule, coefficients from the highest power down.
  template <class... Rest>
  static F polynomial(F x, float highest, Rest... rest) {
    F value = all(highest);
    ((value = S::fma(value, x, all(rest))), ...);
    return value;
  }

  // exp(x + low) for a small correction `low`. x = n ln 2 + r with |r| <= ln 2 / 2; the leading part of ln 2 has so
  // few bits that n times it is exact without FMA too. Two factors give 2^n, as n can lie outside the exponents.
  static F exp(F x, F low = F{}) {
    x = at_most(at_least(x, -104.0f), 89.0f);
    constexpr float round = 0x1.8p23f;  // adding it leaves no bits for a fraction
    const F n = S::fma(x, all(1.44269504f), all(round)) - round;
    F r = S::fma(n, all(-0.693359375f), x);
    r = S::fma(n, all(2.12194440e-4f), r) + low;
    const F p = polynomial(r, 1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f);
    const F value = S::fma(r * r, p, r) + 1.0f;
    const I power = __builtin_convertvector(n == n ? n : F{}, I);
    const I half = power >> 1;
    return value * bits_as<F>((half + 127) << 23) * bits_as<F>((power - half + 127) << 23);
  }

  static F sigmoid(F x) {
    const F e = exp(-abs(x));
    return (x < 0.0f ? e : all(1.0f)) / (1.0f + e);
  }

  // tanh x / x as a polynomial (the Taylor series to x^17) near 0, where 1 - 2 / (exp(2x) + 1) cancels.
  static F tanh(F x) {
    const F magnitude = abs(x), square = x * x;
    const F far = 1.0f - 2.0f / (exp(2.0f * magnitude) + 1.0f);
    const F near =
        S::fma(magnitude * square,
               polynomial(square, 6404582.0f / 10854718875.0f, -929569.0f / 638512875.0f, 21844.0f / 6081075.0f,
                          -1382.0f / 155925.0f, 62.0f / 2835.0f, -17.0f / 315.0f, 2.0f / 15.0f, -1.0f / 3.0f),
               magnitude);
    return with_sign(magnitude < 0.5f ? near : far, x);
  }

  // P(N(0,1) < -a) for a >= 0, with a small relative error however small it is: exp(-a^2/2) Q(a), where Q(a) (1 + a)
  // is a polynomial in (a - 4) / (a + 4), fitted at Chebyshev nodes over [0, 16] (relative error 2e-9). a^2 is split
  // into an exact leading part and a remainder, as its rounding error would be multiplied by up to 100.
  static F upper_tail(F a) {
    a = at_most(a, 16.0f);
    const F head = bits_as<F>(bits_as<U>(a) & 0xfffff000u);
    const F gauss = exp(-0.5f * (head * head), -0.5f * ((a - head) * (a + head)));
    const F u = (a - 4.0f) / (a + 4.0f);
    const F q =
        polynomial(u, -7.381931936834008e-05f, -6.57509226584807e-05f, 0.0006906928610987961f, -0.00030089428764767945f,
                   -0.0050023216754198074f, 0.017939766868948936f, -0.0321977399289608f, 0.028599994257092476f,
                   0.013999629765748978f, -0.09670346975326538f, 0.472053200006485f);
    return gauss * (q / (1.0f + a));
  }

  // P(N(0,1) < x)
  static F normal(F x) {
    const F tail = upper_tail(abs(x));
    return x > 0.0f ? 1.0f - tail : tail;
  }

  // Beyond 20, ln(1 + e^x) is x in fp32 (and torch says so). Its relative error matters for very negative x only
  // through e^x itself.
  static F softplus(F x) {
    const F e = exp(at_most(x, 20.0f));
    F small = e;
    for (int i = 0; i < S::lanes; ++i) small[i] = __builtin_log1pf(e[i]);
    return x > 20.0f ? x : small;
  }

  static F square_root(F x) {
    for (int i = 0; i < S::lanes; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
  }

  static F relu(F x) { return at_least(x, 0.0f); }

  static F gelu(F x) { return x * normal(x); }

  // GPT-OSS's gate: `gate` through a steeper silu, clamped first, times the clamped other half plus one.
  static F swiglu_oai(F gate, F up) {
    gate = at_most(gate, 7.0f);
    up = at_most(at_least(up, -7.0f), 7.0f);
    return (up + 1.0f) * (gate * Math::sigmoid(1.702f * gate));
  }

  // Of the activations of one argument: all but swiglu_oai.
  template <Activation activation>
  static F apply(F x) {
    using enum Activation;
    if constexpr (activation == relu) return Math::relu(x);
    if constexpr (activation == gelu) return Math::gelu(x);
    // 0.5 (1 + tanh u) = sigmoid(2u), without its cancellation for negative u
    if constexpr (activation == gelu_new) {
      return x * Math::sigmoid(1.5957691216057308f * (x * S::fma(0.044715f * x, x, all(1.0f))));
    }
    if constexpr (activation == silu) return x * Math::sigmoid(x);
    if constexpr (activation == gelu_10) return at_most(at_least(Math::gelu(x), -10.0f), 10.0f);
    if constexpr (activation == quick_gelu) return x * Math::sigmoid(1.702f * x);
    if constexpr (activation == tanh) return Math::tanh(x);
    if constexpr (activation == sigmoid) return Math::sigmoid(x);
    if constexpr (activation == relu2) return Math::relu(x) * Math::relu(x);
    if constexpr (activation == relu6) return at_most(Math::relu(x), 6.0f);
    if constexpr (activation == leaky_relu) return x < 0.0f ? 0.01f * x : x;
    if constexpr (activation == hardswish) return x * (at_most(Math::relu(x + 3.0f), 6.0f) / 6.0f);
    // tanh(softplus(x)) = n / (n + 2) with n = e^x (e^x + 2)
    if constexpr (activation == mish) {
      const F e = exp(at_most(x, 20.0f)), n = e * (e + 2.0f);
      return x * (n / (n + 2.0f));
    }
    if constexpr (activation == laplace) return normal((x - 0.707107f) / 0.282095f);
    if constexpr (activation == softplus) return Math::softplus(x);
    // e^x would vanish long before its root does.
    if constexpr (activation == sqrtsoftplus) return x < -20.0f ? exp(0.5f * x) : square_root(Math::softplus(x));
    if constexpr (activation == linear) return x;
  }
};

}  // namespace sida::cpu
