// The table of activation names.
#include "kernels/activation.h"

#include <array>

namespace sida {
namespace {

struct Name {
  std::string_view name;
  Activation activation;
};

// transformers has several names for one function: implementations that differ there in speed or rounding only.
constexpr std::array<Name, 25> names{{
    {"relu", Activation::relu},
    {"gelu", Activation::gelu},
    {"gelu_python", Activation::gelu},
    {"gelu_new", Activation::gelu_new},
    {"gelu_fast", Activation::gelu_new},
    {"gelu_accurate", Activation::gelu_new},
    {"gelu_pytorch_tanh", Activation::gelu_new},
    {"gelu_python_tanh", Activation::gelu_new},
    {"gelu_10", Activation::gelu_10},
    {"quick_gelu", Activation::quick_gelu},
    {"silu", Activation::silu},
    {"swish", Activation::silu},
    {"tanh", Activation::tanh},
    {"sigmoid", Activation::sigmoid},
    {"relu2", Activation::relu2},
    {"relu6", Activation::relu6},
    {"leaky_relu", Activation::leaky_relu},
    {"hardswish", Activation::hardswish},
    {"mish", Activation::mish},
    {"laplace", Activation::laplace},
    {"softplus", Activation::softplus},
    {"sqrtsoftplus", Activation::sqrtsoftplus},
    {"linear", Activation::linear},
    {"identity", Activation::linear},
    {"swiglu_oai", Activation::swiglu_oai},
}};

}  // namespace

std::optional<ActivationName> parse_activation(std::string_view name) {
  constexpr std::string_view prefix = "gated-";
  const bool has_prefix = name.starts_with(prefix);
  if (has_prefix) name.remove_prefix(prefix.size());
  for (const Name& known : names) {
    if (known.name != name) continue;
    const bool only_gated = known.activation == Activation::swiglu_oai;
    if (only_gated && has_prefix) return std::nullopt;
    return ActivationName{.function = known.activation, .gated = has_prefix || only_gated};
  }
  return std::nullopt;
}

std::string activation_names() {
  std::string text;
  for (const Name& known : names) text.append(known.name).append(", ");
  return text + "each but swiglu_oai, which is gated as it is, also as gated-...";
}

}  // namespace sida
