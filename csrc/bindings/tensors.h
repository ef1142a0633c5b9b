// Tensors over torch's stable ABI: what the ops ask of one, and the few operators of torch that they call. Compiled
// once, it serves the torch of TORCH_TARGET_VERSION (CMakeLists.txt) and every later one.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include "base/error.h"

// What the last call that failed had to say: there from torch 2.13 on. Before, torch writes it to stderr.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace sida {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

inline void check_torch(AOTITorchError status, const char* what) {
  if (status == TORCH_SUCCESS) [[likely]]
    return;
  const char* why =
      torch_exception_get_what_without_backtrace != nullptr ? torch_exception_get_what_without_backtrace() : nullptr;
  fail(ErrorKind::internal, what, " failed", why != nullptr ? ": " : "", why != nullptr ? why : "");
}

// Calls an operator of torch through its dispatcher; the operator's results, of which there are at most `results`.
// Arguments are those of the schema, all of them: int64_t for an int, std::nullopt for None.
template <size_t results = 1, class... Arguments>
auto call_torch(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, std::max(results, sizeof...(Arguments))> stack{torch::stable::detail::from(arguments)...};
  check_torch(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION), name);
  return stack;
}

inline Tensor taken(StableIValue value) {
  return torch::stable::detail::to<Tensor>(value);
}

// A str that an op was given. torch's own conversion to std::string leaks one at each call.
inline std::string taken(StringHandle handle) {
  size_t length = 0;
  const char* text = nullptr;
  check_torch(torch_string_length(handle, &length), "torch_string_length");
  check_torch(torch_string_c_str(handle, &text), "torch_string_c_str");
  std::string copied(text, length);
  check_torch(torch_delete_string(handle), "torch_delete_string");
  return copied;
}

// Where a tensor is.
struct Place {
  int32_t type = 0, index = 0;

  explicit Place(const Tensor& tensor) {
    check_torch(aoti_torch_get_device_type(tensor.get(), &type), "aoti_torch_get_device_type");
    check_torch(aoti_torch_get_device_index(tensor.get(), &index), "aoti_torch_get_device_index");
  }
  bool is_cpu() const { return type == aoti_torch_device_type_cpu(); }
  bool operator==(const Place&) const = default;
};

inline std::ostream& operator<<(std::ostream& out, const Place& place) {
  if (place.is_cpu()) return out << "cpu";
  if (place.type == aoti_torch_device_type_meta()) return out << "meta";
  if (place.type == aoti_torch_device_type_cuda()) {
    out << "cuda";
  } else {
    out << "device of type " << place.type;
  }
  return place.index < 0 ? out : out << ':' << place.index;
}

// A tensor's type. One that this version of the ABI has no name for, which no op takes, is Undefined.
inline ScalarType type_of(const Tensor& tensor) {
  try {
    return tensor.scalar_type();
  } catch (const std::runtime_error&) {
    return ScalarType::Undefined;
  }
}

inline bool is_integral(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::Long:
    case ScalarType::UInt16:
    case ScalarType::UInt32:
    case ScalarType::UInt64:
      return true;
    default:
      return false;
  }
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  const Shape sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// A shape as it stands in a message: [2, 3].
struct Text {
  explicit Text(const std::vector<int64_t>& shape) {
    for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  }
  explicit Text(const Tensor& tensor) : Text(shape_of(tensor)) {}
  std::string text;
};

inline std::ostream& operator<<(std::ostream& out, const Text& shape) {
  return out << '[' << shape.text << ']';
}

// Uninitialised and contiguous, on the device of `like`.
inline Tensor empty(const std::vector<int64_t>& shape, ScalarType type, const Tensor& like) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  const Place place(like);
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made = nullptr;
  check_torch(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), code,
                                       place.type, place.index, &made),
              "allocating a tensor");
  return Tensor(made);
}

inline Tensor zeros(const std::vector<int64_t>& shape, ScalarType type, const Tensor& like) {
  Tensor made = empty(shape, type, like);
  check_torch(aoti_torch_zero_(made.get()), "zeroing a tensor");
  return made;
}

inline Tensor contiguous(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  return taken(call_torch("aten::contiguous", "", tensor, torch::headeronly::MemoryFormat::Contiguous)[0]);
}

inline Tensor as_type(const Tensor& tensor, ScalarType type) {
  if (type_of(tensor) == type) return tensor;
  return taken(call_torch("aten::to", "dtype", tensor, type, /*non_blocking=*/false, /*copy=*/false, std::nullopt)[0]);
}

}  // namespace sida
