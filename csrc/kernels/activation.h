// The names of the element-wise activations, as transformers spells them.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "kernels/moe_ffn.h"

namespace sida {

// What a name means.
struct ActivationName {
  Activation function;
  bool gated;
};

// Understands every element-wise activation of transformers without parameters and "gated-" before any of them, and
// "swiglu_oai", which is gated by its name alone.
[[nodiscard]] std::optional<ActivationName> parse_activation(std::string_view name);

// The names that parse_activation knows, for error messages.
std::string activation_names();

}  // namespace sida
