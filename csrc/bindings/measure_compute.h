// What the ops of a model take on this machine at a given shape, measured through the dispatcher without Python's
// torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace sida {

// Seconds of calls of torch.ops.sida.moe_ffn, each on `experts` experts of `tokens` tokens, for about `seconds`; at
// least three calls, after one that is not counted. Experts follow one another through more memory than a cache holds.
std::vector<double> measure_moe_ffn(int64_t d_model, int64_t d_ff, const std::string& activation,
                                    const std::string& dtype, int64_t experts, int64_t tokens, double seconds);

// The same of torch's own linear: `tokens` rows of `columns` by a matrix of [rows, columns], both of `dtype`.
std::vector<double> measure_linear(int64_t rows, int64_t columns, const std::string& dtype, int64_t tokens,
                                   double seconds);

}  // namespace sida
