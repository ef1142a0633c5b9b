// The names of the element-wise activations, as transformers spells them.
#pragma once

#include <string>
#include <string_view>

#include "kernels/moe_ffn.h"

namespace sida {

// Understands every element-wise activation of transformers without parameters and "gated-" before any of them, and
// "swiglu_oai", which is gated by its name alone.
// False for a name it does not know, with nothing written.
bool parse_activation(std::string_view name, Activation* activation, bool* gated);

// The names that parse_activation knows, for error messages.
std::string activation_names();

}  // namespace sida
