// What the ops of a model take on this machine at a given shape, measured through the dispatcher without Python's
// torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace sida {

using Times = std::vector<std::vector<double>>;

// For each of `tokens`: seconds of calls of torch.ops.sida.moe_ffn, each on `experts` experts of so many tokens of
// `x_dtype`, for about `seconds`; at least three calls, after one that is not counted. Calls follow one another through
// `walked` bytes of weights, at least those of one call: whether a cache holds them is the caller's to say.
Times measure_moe_ffn(int64_t d_model, int64_t d_ff, const std::string& activation, const std::string& dtype,
                      int64_t experts, const std::vector<int64_t>& tokens, double seconds, const std::string& x_dtype,
                      int64_t walked);

// The same of a matrix of [rows, columns] and rows of `x_dtype`: of torch's own linear where `dtype` is "torch", the
// matrix of `x_dtype` as well, else of torch.ops.sida.linear with weights of `dtype`.
Times measure_linear(int64_t rows, int64_t columns, const std::string& dtype, const std::vector<int64_t>& tokens,
                     double seconds, const std::string& x_dtype, int64_t walked);

}  // namespace sida
