// Fills a layer's buffers, runs its waves and judges the result.
#include "layer_case.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <sstream>

#include "harness/half.h"

namespace sida::cuda_test {
namespace {

using harness::global_allocate;

double stored(double value, DType dtype, void* target, int64_t index) {
  switch (dtype) {
    case DType::f32: {
      const auto narrow = static_cast<float>(value);
      static_cast<float*>(target)[index] = narrow;
      return narrow;
    }
    case DType::bf16: {
      const uint16_t bits = harness::float_to_bf16(static_cast<float>(value));
      static_cast<uint16_t*>(target)[index] = bits;
      return harness::bf16_to_float(bits);
    }
    case DType::f16: {
      const uint16_t bits = harness::float_to_f16(static_cast<float>(value));
      static_cast<uint16_t*>(target)[index] = bits;
      return harness::f16_to_float(bits);
    }
    case DType::i8: {
      const auto narrow = static_cast<int8_t>(std::clamp(std::lround(value), -127L, 127L));
      static_cast<int8_t*>(target)[index] = narrow;
      return narrow;
    }
    case DType::int4:  // Matrices writes them by the byte
    case DType::mxfp4:
      break;
  }
  return 0;
}

double loaded(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::f32:
      return static_cast<const float*>(data)[index];
    case DType::bf16:
      return harness::bf16_to_float(static_cast<const uint16_t*>(data)[index]);
    case DType::f16:
      return harness::f16_to_float(static_cast<const uint16_t*>(data)[index]);
    case DType::i8:
      return static_cast<const int8_t*>(data)[index];
    case DType::int4:
    case DType::mxfp4:
      break;
  }
  return 0;
}

// Half the spacing of the type's values, relative to the value.
double roundoff(DType dtype) {
  switch (dtype) {
    case DType::bf16:
      return std::ldexp(1, -8);
    case DType::f16:
      return std::ldexp(1, -11);
    default:
      return std::ldexp(1, -24);
  }
}

double activate(double v, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return std::max(v, 0.0);
    case Activation::gelu:
      return 0.5 * v * (1 + std::erf(v / std::sqrt(2.0)));
    case Activation::gelu_new:
      return 0.5 * v * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
    case Activation::silu:
      return v / (1 + std::exp(-v));
    case Activation::gelu_10:
      return std::clamp(0.5 * v * (1 + std::erf(v / std::sqrt(2.0))), -10.0, 10.0);
    case Activation::quick_gelu:
      return v / (1 + std::exp(-1.702 * v));
    case Activation::sigmoid:
      return 1 / (1 + std::exp(-v));
    case Activation::tanh:
      return std::tanh(v);
    case Activation::relu2:
      return v > 0 ? v * v : 0;
    case Activation::relu6:
      return std::clamp(v, 0.0, 6.0);
    case Activation::leaky_relu:
      return v < 0 ? 0.01 * v : v;
    case Activation::mish:
      return v * std::tanh(std::log1p(std::exp(v)));
    case Activation::hardswish:
      return v * std::clamp(v + 3, 0.0, 6.0) / 6;
    case Activation::laplace:
      return 0.5 * (1 + std::erf((v - 0.707107) / (0.282095 * std::sqrt(2.0))));
    case Activation::softplus:
      return std::log1p(std::exp(v));
    case Activation::sqrtsoftplus:
      return std::sqrt(std::log1p(std::exp(v)));
    case Activation::linear:
      return v;
    case Activation::swiglu_oai: {  // its gate's half; see other_half
      const double low = std::min(v, 7.0);
      return low / (1 + std::exp(-1.702 * low));
    }
  }
  return v;
}

// What a gated layer multiplies the activation with.
double other_half(double up, Activation activation) {
  return activation == Activation::swiglu_oai ? std::clamp(up, -7.0, 7.0) + 1 : up;
}

const ParallelFor one_thread{1, [](int64_t count, void (*body)(void*, int64_t), void* context) {
                               for (int64_t i = 0; i < count; ++i) body(context, i);
                             }};

// A device array made of host values; inputs are read-only for the kernels.
template <class Value>
Value* upload(const std::vector<Value>& values, bool read_only = true) {
  auto* const device = static_cast<Value*>(global_allocate(values.size() * sizeof(Value)));
  harness::global_fill(device, values.data(), values.size() * sizeof(Value));
  if (read_only) harness::global_read_only(device, values.size() * sizeof(Value));
  return device;
}

// What is special about the matrices of a case.
struct Special {
  bool strided = false, biased = false, crooked = false, extreme = false, nan_factor = false;
};

// Matrices of one kind for every slot, in the layout that the kernels see and in float64.
struct Matrices {
  int64_t slots, rows, columns;
  std::vector<double> value;  // [slots, rows, columns], dequantised
  std::vector<float> bias{};  // [slots, rows]
  ExpertMatrix matrix{};

  Matrices(std::mt19937_64& random, int64_t slots_, int64_t rows_, int64_t columns_, DType dtype,
           const Special& special)
      : slots(slots_), rows(rows_), columns(columns_), value(static_cast<size_t>(slots * rows * columns)) {
    if (is_grouped(dtype)) {
      fill_groups(random, dtype, special);
    } else {
      fill(random, dtype, special.strided);
    }
    bias.resize(static_cast<size_t>(slots * rows));
    if (!special.biased) return;
    std::normal_distribution<double> normal;
    for (float& each : bias) each = static_cast<float>(normal(random));
    matrix.bias_slot_stride = rows + (special.strided ? 3 : 0);
    auto* const device = static_cast<float*>(global_allocate(static_cast<size_t>(slots * matrix.bias_slot_stride) * 4));
    for (int64_t s = 0; s < slots; ++s) {
      harness::global_fill(device + s * matrix.bias_slot_stride, &bias[static_cast<size_t>(s * rows)],
                           static_cast<size_t>(rows) * 4);
    }
    harness::global_read_only(device, static_cast<size_t>(slots * matrix.bias_slot_stride) * 4);
    matrix.bias = device;
  }

  const double* row(int64_t slot, int64_t row) const { return value.data() + (slot * rows + row) * columns; }
  double bias_of(int64_t slot, int64_t row) const { return bias[static_cast<size_t>(slot * rows + row)]; }

 private:
  // A group's factor as its bytes and as its value. extreme: zero or subnormal ones among the others.
  double factor(std::mt19937_64& random, DType dtype, const Special& special, bool nan, unsigned char* target) const {
    const double spread = 1 / std::sqrt(static_cast<double>(columns));
    const bool extreme = special.extreme && random() % 3 == 0;
    if (dtype == DType::int4) {
      const uint16_t few[] = {0, 1, 0x03FF, 0x0400, 0x8001};
      const double wanted = spread * (0.15 + 0.2 * (static_cast<double>(random() % 1000) / 1000));
      const uint16_t bits = nan       ? 0x7E00
                            : extreme ? few[random() % std::size(few)]
                                      : harness::float_to_f16(static_cast<float>(wanted));
      std::memcpy(target, &bits, 2);
      return nan ? NAN : harness::f16_to_float(bits);
    }
    const int usual = 127 + static_cast<int>(std::lround(std::log2(spread))) - 2 + static_cast<int>(random() % 3);
    const int e = nan ? 255 : extreme ? static_cast<int>(random() % 3) : usual;
    *target = static_cast<unsigned char>(e);
    return nan ? NAN : std::ldexp(1, e - 127);
  }

  // 4-bit weights: random codes, in the padding of a row too, and factors whose rows begin anywhere.
  void fill_groups(std::mt19937_64& random, DType dtype, const Special& special) {
    const int64_t groups = groups_of(columns), factor_bytes = group_scale_bytes(dtype);
    matrix.row_stride = sida::row_bytes(dtype, columns) + (special.strided ? 16 : 0);
    matrix.slot_stride = rows * matrix.row_stride + (special.strided ? 48 : 0);
    matrix.group_scale_row_stride = groups + (special.strided ? 3 : 0);
    matrix.group_scale_slot_stride = rows * matrix.group_scale_row_stride + (special.strided ? 5 : 0);
    const auto bytes = static_cast<size_t>(slots * matrix.slot_stride);
    const auto factors_bytes = static_cast<size_t>(slots * matrix.group_scale_slot_stride * factor_bytes);
    auto* const device = static_cast<unsigned char*>(global_allocate(bytes, special.crooked ? 1 : 0));
    auto* const factors = static_cast<unsigned char*>(global_allocate(factors_bytes));
    std::vector<unsigned char> pairs(static_cast<size_t>(sida::row_bytes(dtype, columns)));
    std::vector<unsigned char> factors_of_row(static_cast<size_t>(groups * factor_bytes));
    for (int64_t s = 0; s < slots; ++s) {
      for (int64_t r = 0; r < rows; ++r) {
        for (unsigned char& pair : pairs) pair = static_cast<unsigned char>(random());
        for (int64_t g = 0; g < groups; ++g) {
          const bool nan = special.nan_factor && r == rows / 2 && g == groups - 1;
          const double own =
              factor(random, dtype, special, nan, &factors_of_row[static_cast<size_t>(g * factor_bytes)]);
          for (int64_t c = g * group_columns; c < std::min(columns, (g + 1) * group_columns); ++c) {
            const int code = pairs[static_cast<size_t>(c / 2)] >> (c % 2 * 4) & 15;
            value[static_cast<size_t>((s * rows + r) * columns + c)] = of_code(code, dtype) * own;
          }
        }
        harness::global_fill(device + s * matrix.slot_stride + r * matrix.row_stride, pairs.data(), pairs.size());
        harness::global_fill(
            factors + (s * matrix.group_scale_slot_stride + r * matrix.group_scale_row_stride) * factor_bytes,
            factors_of_row.data(), factors_of_row.size());
      }
    }
    harness::global_read_only(device, bytes);
    harness::global_read_only(factors, factors_bytes);
    matrix.data = device;
    matrix.group_scale = factors;
  }

  void fill(std::mt19937_64& random, DType dtype, bool strided) {
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform(0.5, 1.5);
    // Gaps keep the 16-byte alignment that an expert store gives its rows.
    const int64_t gap = strided ? 16 : 0;
    matrix.row_stride = columns + gap;
    matrix.slot_stride = rows * matrix.row_stride + (strided ? 48 : 0);
    const double spread = 1 / std::sqrt(static_cast<double>(columns));
    // The gaps stay uninitialised: a kernel that reads them is stopped.
    const auto bytes = static_cast<size_t>(slots * matrix.slot_stride * element_bytes(dtype));
    void* const device = global_allocate(bytes);
    std::vector<float> scale(static_cast<size_t>(slots * rows));
    for (float& s : scale) s = static_cast<float>(uniform(random) * spread / 40);
    std::vector<unsigned char> row_bytes(static_cast<size_t>(columns * element_bytes(dtype)));
    for (int64_t s = 0; s < slots; ++s) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) {
          const double wanted = normal(random) * (dtype == DType::i8 ? 40 : spread);
          const double got = stored(wanted, dtype, row_bytes.data(), c);
          value[static_cast<size_t>((s * rows + r) * columns + c)] =
              dtype == DType::i8 ? got * scale[static_cast<size_t>(s * rows + r)] : got;
        }
        auto* const target = static_cast<unsigned char*>(device) +
                             (s * matrix.slot_stride + r * matrix.row_stride) * element_bytes(dtype);
        harness::global_fill(target, row_bytes.data(), row_bytes.size());
      }
    }
    harness::global_read_only(device, bytes);
    matrix.data = device;
    if (dtype == DType::i8) {
      matrix.scale = upload(scale);
      matrix.scale_slot_stride = rows;
    }
  }
};

// Random activations, in the layout that the kernels see and in float64.
struct Tokens {
  std::vector<double> value;  // [tokens, columns]
  const void* device;
  int64_t row_stride;

  // nan: one element of token 1.
  Tokens(std::mt19937_64& random, int64_t tokens, int64_t columns, DType dtype, bool strided, bool nan)
      : value(static_cast<size_t>(tokens * columns)), row_stride(columns + (strided ? 24 : 0)) {
    std::normal_distribution<double> normal;
    const auto bytes = static_cast<size_t>(tokens * row_stride * element_bytes(dtype));
    auto* const memory = static_cast<unsigned char*>(global_allocate(bytes));
    std::vector<unsigned char> row(static_cast<size_t>(columns * element_bytes(dtype)));
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t c = 0; c < columns; ++c) {
        value[static_cast<size_t>(t * columns + c)] =
            stored(nan && t == 1 && c == 2 ? NAN : normal(random), dtype, row.data(), c);
      }
      harness::global_fill(memory + t * row_stride * element_bytes(dtype), row.data(), row.size());
    }
    harness::global_read_only(memory, bytes);
    device = memory;
  }
};

}  // namespace

double of_code(int code, DType dtype) {
  if (dtype == DType::int4) return code < 8 ? code : code - 16;
  constexpr double magnitudes[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  return code < 8 ? magnitudes[code] : -magnitudes[code - 8];
}

std::string LayerCase::name() const {
  std::ostringstream text;
  text << "x " << dtype_name(x) << ", w " << dtype_name(w) << ", tokens " << tokens << ", top_k " << top_k
       << ", d_model " << d_model << ", d_ff " << d_ff << ", experts " << experts << ", gated " << gated
       << ", activation " << static_cast<int>(activation) << ", strided " << strided << ", waves " << waves
       << ", absent " << absent << ", twice " << twice << ", skewed " << skewed << ", multiprocessors "
       << multiprocessors << ", biased " << biased << ", crooked " << crooked << ", extreme " << extreme
       << ", nan_factor " << nan_factor << ", seed " << seed;
  return text.str();
}

Outcome run(const LayerCase& layer, uint64_t schedule, const Rearrange& rearrange) {
  harness::global_reset();
  harness::seed(schedule);
  if (rearrange) harness::order_blocks(rearrange);
  std::mt19937_64 random(layer.seed);

  const int64_t rows = layer.tokens * layer.top_k;
  const Tokens tokens(random, layer.tokens, layer.d_model, layer.x, layer.strided, layer.nan);
  const std::vector<double>& x = tokens.value;

  std::vector<int32_t> expert_index(static_cast<size_t>(rows)), slot_of_expert(static_cast<size_t>(layer.experts));
  std::vector<float> gate(static_cast<size_t>(rows));
  for (int64_t i = 0; i < rows; ++i) {
    auto expert = static_cast<int32_t>(random() % static_cast<uint64_t>(layer.experts));
    if (layer.skewed && random() % 4 != 0) expert = static_cast<int32_t>(layer.experts / 2);
    if (layer.absent && random() % 5 == 0) expert = -1;
    if (layer.twice && i / layer.top_k % 2 == 0 && i % layer.top_k != 0) {
      expert = expert_index[static_cast<size_t>(i - i % layer.top_k)];
    }
    expert_index[static_cast<size_t>(i)] = expert;
    gate[static_cast<size_t>(i)] = static_cast<float>(0.2 + 0.8 * (static_cast<double>(random() % 1000) / 1000));
  }
  const int64_t slots = layer.experts + (layer.strided ? 1 : 0);
  for (int64_t e = 0; e < layer.experts; ++e) {
    slot_of_expert[static_cast<size_t>(e)] = static_cast<int32_t>(layer.strided ? layer.experts - e : e);
  }
  if (layer.absent && layer.experts > 1) slot_of_expert[1] = -1;

  const Special special{layer.strided, layer.biased, layer.crooked, layer.extreme, false};
  Special special_wo = special;
  special_wo.nan_factor = layer.nan_factor;
  Matrices wi(random, slots, layer.d_ff * (layer.gated ? 2 : 1), layer.d_model, layer.w, special);
  Matrices wo(random, slots, layer.d_model, layer.d_ff, layer.w, special_wo);

  MoeFfnArgs args{};
  args.tokens = layer.tokens;
  args.top_k = layer.top_k;
  args.d_model = layer.d_model;
  args.d_ff = layer.d_ff;
  args.num_experts = layer.experts;
  args.num_slots = slots;
  args.x_dtype = layer.x;
  args.w_dtype = layer.w;
  args.x = tokens.device;
  args.x_row_stride = tokens.row_stride;
  args.expert_index = upload(expert_index);
  args.gate = upload(gate);
  args.wi = wi.matrix;
  args.wo = wo.matrix;
  args.activation = layer.activation;
  args.gated = layer.gated;
  // Rows without a resident expert must keep what they hold: not zeros here, so that a write of zeros shows.
  std::vector<unsigned char> before(static_cast<size_t>(layer.tokens * layer.d_model * element_bytes(layer.x)));
  for (int64_t i = 0; i < layer.tokens * layer.d_model; ++i) stored(7, layer.x, before.data(), i);
  args.out = upload(before, false);
  if (layer.top_k > 1) args.partials = upload(std::vector<float>(static_cast<size_t>(rows * layer.d_model)), false);

  const cuda::Architecture architecture{80, layer.multiprocessors, 99 * 1024};
  auto* const error_rows = upload(std::vector<int32_t>(2, std::numeric_limits<int32_t>::max()), false);
  std::vector<std::vector<int32_t>> waves{slot_of_expert};
  if (layer.waves) {
    waves.push_back(slot_of_expert);
    for (int64_t e = 0; e < layer.experts; ++e) waves[e % 2 == 0 ? 0 : 1][static_cast<size_t>(e)] = -1;
  }
  harness::launched();
  Outcome outcome;
  outcome.choice = cuda::choose(args, architecture);
  for (const auto& slots_of_wave : waves) {
    args.slot_of_expert = upload(slots_of_wave);
    void* const workspace = global_allocate(static_cast<size_t>(cuda::workspace_bytes(args, architecture)));
    cuda::moe_ffn(args, architecture, workspace, error_rows, nullptr);
  }
  harness::finish();
  outcome.launches = harness::launched();
  outcome.bytes.assign(static_cast<unsigned char*>(args.out), static_cast<unsigned char*>(args.out) + before.size());

  // The CPU backend on the same arrays, with every expert in one wave.
  MoeFfnArgs on_cpu = args;
  on_cpu.slot_of_expert = slot_of_expert.data();
  std::vector<unsigned char> cpu_out(before.size());
  std::vector<float> cpu_partials(layer.top_k > 1 ? static_cast<size_t>(rows * layer.d_model) : 0);
  on_cpu.out = cpu_out.data();
  on_cpu.partials = layer.top_k > 1 ? cpu_partials.data() : nullptr;
  if (layer.tokens > 0) cpu::moe_ffn(on_cpu, one_thread);
  if (layer.tokens > 0 && layer.top_k > 1) cpu::moe_ffn_combine(on_cpu, one_thread);

  const bool tensor_cores = outcome.choice.path == cuda::Path::tensor_core;
  int32_t first_missing = std::numeric_limits<int32_t>::max();
  std::vector<double> hidden(static_cast<size_t>(layer.d_ff)), hidden_error(hidden.size()), cpu_error(hidden.size());
  for (int64_t t = 0; t < layer.tokens && outcome.wrong.empty(); ++t) {
    std::vector<double> expected(static_cast<size_t>(layer.d_model)), bound(expected.size()),
        cpu_bound(expected.size());
    bool computed = false;
    for (int64_t k = 0; k < layer.top_k; ++k) {
      const int32_t expert = expert_index[static_cast<size_t>(t * layer.top_k + k)];
      if (expert < 0) continue;
      const int64_t slot = slot_of_expert[static_cast<size_t>(expert)];
      if (slot < 0) {
        first_missing = std::min(first_missing, static_cast<int32_t>(t * layer.top_k + k));
        continue;
      }
      computed = true;
      const double weight = gate[static_cast<size_t>(t * layer.top_k + k)];
      const double* const own = x.data() + t * layer.d_model;
      for (int64_t f = 0; f < layer.d_ff; ++f) {
        double sum = wi.bias_of(slot, f), spread = std::fabs(sum), up = 1, up_spread = 0;
        for (int64_t c = 0; c < layer.d_model; ++c) {
          sum += wi.row(slot, f)[c] * own[c];
          spread += std::fabs(wi.row(slot, f)[c] * own[c]);
        }
        if (layer.gated) {
          up = wi.bias_of(slot, layer.d_ff + f);
          up_spread = std::fabs(up);
          for (int64_t c = 0; c < layer.d_model; ++c) {
            up += wi.row(slot, layer.d_ff + f)[c] * own[c];
            up_spread += std::fabs(wi.row(slot, layer.d_ff + f)[c] * own[c]);
          }
          up = other_half(up, layer.activation);
        }
        const double act = activate(sum, layer.activation);
        const auto i = static_cast<size_t>(f);
        hidden[i] = act * up;
        // No activation here has a slope above 1.2. Tensor cores round the hidden value once to x's type.
        hidden_error[i] =
            1e-5 * (1.2 * spread * std::fabs(up) + std::fabs(act) * up_spread) + 1e-6 * std::fabs(hidden[i]);
        cpu_error[i] = hidden_error[i];  // its hidden values are fp32
        if (tensor_cores) hidden_error[i] += roundoff(layer.x) * std::fabs(hidden[i]) + std::ldexp(1, -25);
      }
      for (int64_t c = 0; c < layer.d_model; ++c) {
        double sum = wo.bias_of(slot, c), error = 1e-6 * std::fabs(sum), error_on_cpu = error;
        for (int64_t f = 0; f < layer.d_ff; ++f) {
          const double w = wo.row(slot, c)[f];
          const auto i = static_cast<size_t>(f);
          sum += w * hidden[i];
          error += std::fabs(w) * (hidden_error[i] + 1e-5 * std::fabs(hidden[i]));
          error_on_cpu += std::fabs(w) * (cpu_error[i] + 1e-5 * std::fabs(hidden[i]));
        }
        expected[static_cast<size_t>(c)] += weight * sum;
        bound[static_cast<size_t>(c)] += weight * error;
        cpu_bound[static_cast<size_t>(c)] += weight * error_on_cpu;
      }
    }
    for (int64_t c = 0; c < layer.d_model; ++c) {
      const auto i = static_cast<size_t>(c);
      const double actual = loaded(args.out, layer.x, t * layer.d_model + c);
      const double wanted = computed ? expected[i] : 7;
      const double allowed = computed ? bound[i] + 1.01 * roundoff(layer.x) * (std::fabs(wanted) + bound[i]) + 1e-7 : 0;
      if (std::isnan(wanted) ? !std::isnan(actual) : !(std::fabs(actual - wanted) <= allowed)) {
        std::ostringstream text;
        text << "out[" << t << ", " << c << "] is " << actual << ", expected " << wanted << " within " << allowed;
        outcome.wrong = text.str();
        break;
      }
      if (!computed) continue;
      const double cpu_value = loaded(cpu_out.data(), layer.x, t * layer.d_model + c);
      const double apart =
          allowed + cpu_bound[i] + 1.01 * roundoff(layer.x) * (std::fabs(wanted) + cpu_bound[i]) + 1e-7;
      if (std::isnan(cpu_value) ? !std::isnan(actual) : !(std::fabs(actual - cpu_value) <= apart)) {
        std::ostringstream text;
        text << "out[" << t << ", " << c << "] is " << actual << ", the CPU backend's " << cpu_value
             << ", expected within " << apart << " of each other";
        outcome.wrong = text.str();
        break;
      }
    }
  }
  if (outcome.wrong.empty() && !layer.waves &&
      (error_rows[0] != std::numeric_limits<int32_t>::max() || error_rows[1] != first_missing)) {
    outcome.wrong = "error rows are " + std::to_string(error_rows[0]) + " and " + std::to_string(error_rows[1]) +
                    ", expected none and " + std::to_string(first_missing);
  }
  return outcome;
}

std::string LinearCase::name() const {
  std::ostringstream text;
  text << "linear: x " << dtype_name(x) << ", w " << dtype_name(w) << ", tokens " << tokens << ", columns " << columns
       << ", rows " << rows << ", strided " << strided << ", biased " << biased << ", crooked " << crooked
       << ", extreme " << extreme << ", multiprocessors " << multiprocessors << ", seed " << seed;
  return text.str();
}

Outcome run(const LinearCase& linear, uint64_t schedule) {
  harness::global_reset();
  harness::seed(schedule);
  std::mt19937_64 random(linear.seed);
  const Tokens tokens(random, linear.tokens, linear.columns, linear.x, linear.strided, false);
  const Matrices w(random, 1, linear.rows, linear.columns, linear.w,
                   {linear.strided, linear.biased, linear.crooked, linear.extreme, false});
  LinearArgs args{linear.tokens, linear.columns,    linear.rows, linear.x, linear.w,
                  tokens.device, tokens.row_stride, w.matrix,    nullptr};
  const auto bytes = static_cast<size_t>(linear.tokens * linear.rows * element_bytes(linear.x));
  args.out = global_allocate(bytes);

  const cuda::Architecture architecture{80, linear.multiprocessors, 99 * 1024};
  harness::launched();
  Outcome outcome;
  outcome.choice = cuda::choose(args, architecture);
  void* const workspace = global_allocate(static_cast<size_t>(cuda::workspace_bytes(args, architecture)));
  cuda::linear(args, architecture, workspace, nullptr);
  harness::finish();
  outcome.launches = harness::launched();
  outcome.bytes.assign(static_cast<unsigned char*>(args.out), static_cast<unsigned char*>(args.out) + bytes);

  LinearArgs on_cpu = args;
  std::vector<unsigned char> cpu_out(bytes);
  on_cpu.out = cpu_out.data();
  if (linear.tokens > 0) cpu::linear(on_cpu, one_thread);
  for (int64_t t = 0; t < linear.tokens && outcome.wrong.empty(); ++t) {
    for (int64_t r = 0; r < linear.rows; ++r) {
      double wanted = w.bias_of(0, r), spread = std::fabs(wanted);
      for (int64_t c = 0; c < linear.columns; ++c) {
        const double product = w.row(0, r)[c] * tokens.value[static_cast<size_t>(t * linear.columns + c)];
        wanted += product;
        spread += std::fabs(product);
      }
      const double allowed = 1e-5 * spread + 1.01 * roundoff(linear.x) * std::fabs(wanted) + 1e-7;
      const double actual = loaded(args.out, linear.x, t * linear.rows + r);
      const double cpu_value = loaded(cpu_out.data(), linear.x, t * linear.rows + r);
      if (!(std::fabs(actual - wanted) <= allowed && std::fabs(cpu_value - wanted) <= allowed)) {
        std::ostringstream text;
        text << "out[" << t << ", " << r << "] is " << actual << ", the CPU's " << cpu_value << ", expected " << wanted
             << " within " << allowed;
        outcome.wrong = text.str();
        break;
      }
    }
  }
  return outcome;
}

}  // namespace sida::cuda_test
