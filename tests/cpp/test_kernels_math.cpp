// The vectorised activations against float64, through a one-by-one "expert" whose hidden value is the argument.
#include <algorithm>

#include "kernels/activation.h"
#include "kernels/route.h"
#include "kernels_case.h"

using namespace sida;
using namespace sida::test;

namespace {

// activation(x) as the kernels compute it: d_model = d_ff = 1 and weights of one.
std::vector<float> activate(Activation activation, const std::vector<float>& x) {
  const float one = 1.0f;
  const int32_t slot = 0;
  std::vector<int32_t> index(x.size(), 0);
  std::vector<float> gate(x.size(), 1.0f), out(x.size(), 0.0f);
  const MoeFfnArgs args{static_cast<int64_t>(x.size()),
                        1,
                        1,
                        1,
                        1,
                        1,
                        DType::f32,
                        DType::f32,
                        x.data(),
                        1,
                        index.data(),
                        gate.data(),
                        {&one, 1, 1, nullptr, 0},
                        {&one, 1, 1, nullptr, 0},
                        &slot,
                        activation,
                        false,
                        out.data(),
                        nullptr};
  Call::run_wave(args, threads(1));
  return out;
}

std::vector<float> arguments() {
  std::vector<float> x;
  for (int i = -4000; i <= 4000; ++i) x.push_back(0.005f * static_cast<float>(i));
  for (int e = -140; e <= 126; ++e) {
    x.push_back(std::ldexp(1.37f, e));
    x.push_back(std::ldexp(-1.37f, e));
  }
  x.insert(x.end(), {0.0f, -0.0f, 88.7f, -88.7f, 103.0f, -103.0f, 0.4999999f, 0.5f, 20.0f, 20.000002f});
  return x;
}

}  // namespace

SIDA_TEST(activations_are_accurate) {
  const std::vector<float> x = arguments();
  for (int a = 0; a < activation_count; ++a) {
    const auto activation = static_cast<Activation>(a);
    const std::vector<float> found = activate(activation, x);
    double worst = 0.0, worst_at = 0.0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double expected = reference_activation(activation, x[i]);
      if (std::fabs(expected) > 3.4e38) continue;
      // Where the function falls off like exp, what the argument's own rounding (u, or x's last place) moves it by
      // counts too: a condition number, not a slack for the kernel.
      const double step = std::fabs(static_cast<double>(x[i])) * 0x1p-23;
      const double moved = std::fabs(reference_activation(activation, x[i] + step) - expected);
      // Results below 2^-100 may come from denormal intermediates (silu multiplies exp(-103) by 103).
      const double unit = 2.0 * half_unit(DType::f32, std::max(std::fabs(expected), 0x1p-100));
      const double off = std::max(std::fabs(found[i] - expected) - 2.0 * moved, 0.0) / unit;
      if (off > worst) {
        worst = off;
        worst_at = x[i];
      }
    }
    // laplace rounds (x - mu) / sigma before a function that falls like exp(-u^2 / 2).
    if (worst > (activation == Activation::laplace ? 20.0 : 4.0)) {
      std::ostringstream text;
      text << "activation " << a << " is off by " << worst << " units in the last place at " << worst_at;
      report(__FILE__, __LINE__, text.str());
    }
  }
}

SIDA_TEST(activations_of_nan_and_infinity) {
  const float inf = INFINITY;
  const std::vector<float> x{NAN, inf, -inf};
  for (int a = 0; a < activation_count; ++a) {
    const auto activation = static_cast<Activation>(a);
    const std::vector<float> found = activate(activation, x);
    CHECK(std::isnan(found[0]));
    for (int i = 1; i < 3; ++i) {
      const double expected = reference_activation(activation, x[i]);
      const bool same =
          std::isnan(expected) ? std::isnan(found[i]) : std::fabs(found[i] - expected) <= 1e-7 || found[i] == expected;
      if (!same) {
        std::ostringstream text;
        text << "activation " << a << " of " << x[i] << " is " << found[i] << ", expected " << expected;
        report(__FILE__, __LINE__, text.str());
      }
    }
  }
}

SIDA_TEST(names_are_parsed) {
  const auto is = [](std::string_view name, Activation function, bool gated) {
    const std::optional<ActivationName> known = parse_activation(name);
    return known && known->function == function && known->gated == gated;
  };
  CHECK(is("swish", Activation::silu, false));
  CHECK(is("gated-gelu_pytorch_tanh", Activation::gelu_new, true));
  CHECK(is("swiglu_oai", Activation::swiglu_oai, true));
  for (const std::string_view name : {"gated-swiglu_oai", "prelu", "", "gated-", "RELU"}) {
    CHECK(!parse_activation(name).has_value());
  }
  CHECK(activation_names().find("leaky_relu") != std::string::npos);
}

SIDA_TEST(capacity_counts_within_a_sequence_and_an_expert) {
  const std::vector<int64_t> expert{0, 1, 0, 0, 2, 0, /* second sequence */ 0, 0, 2, 2, 2, 1};
  std::vector<int32_t> index(12, 77);
  apply_capacity(expert.data(), 2, 6, 3, 2, index.data());
  const std::vector<int32_t> expected{0, 1, 0, -1, 2, -1, 0, 0, 2, 2, -1, 1};
  CHECK(index == expected);
  apply_capacity(expert.data(), 2, 6, 3, 0, index.data());
  CHECK(std::all_of(index.begin(), index.end(), [](int32_t e) { return e == -1; }));
}

int main(int argc, char** argv) {
  return run_all_on_chosen_set(argc, argv);
}
