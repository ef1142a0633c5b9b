// bfloat16 weights through an instruction that adds the products of two bfloat16 pairs to each fp32 lane (VDPBF16PS).
//
// A row of bfloat16 weights is read as a row of half as many 32-bit words, a pair in each, and so are the tokens,
// rounded to bfloat16. Then it is the tile of kernel_tile.h over fp32 "weights" with another multiply-add:
// D::accumulate. Its order of sums is fixed in the same way. Rows of an odd number of columns have no whole last pair,
// and what follows them may not be read: they stay with the base kernels, which are exact.
#pragma once

#include "kernels/cpu/bf16_terms.h"
#include "kernels/cpu/kernel_set.h"

namespace sida::cpu {

// D: a Simd whose `accumulate` multiplies pairs; base: the kernels for everything that is not multiplied in pairs.
template <class D, const Kernels* (*base)() noexcept>
struct DotKernels {
  using Set = KernelSet<D>;
  using F = typename D::F;
  using Cut = typename Set::Tiles;
  static constexpr int64_t columns = 2 * Set::group;  // of a group of words

  static int64_t padded_words(int64_t width) { return (width + columns - 1) / columns * Set::group; }

  static PanelForm panel_form(DType values, DType w_dtype, int64_t width) {
    if (w_dtype != DType::bf16 || width % 2 != 0) return base()->panel_form(values, w_dtype, width);
    return {padded_words(width), 1};
  }

  // Two vectors of a token's columns are half a group of words.
  static auto into_panel(const Panel& panel) {
    return [panel](int64_t first, int64_t n, int64_t t, int64_t k, F low, F high) {
      float* const group = panel.data + first * panel.padded_width + k / columns * Set::group * n + t * Set::group;
      float* const to = group + k % columns / 2;
      store_bf16<D>(to, low);
      store_bf16<D>(to + D::lanes / 2, high);
      // The group's second half, where the row ends before it.
      if (k % columns == 0 && k + Set::group >= panel.width) __builtin_memset(to + D::lanes, 0, D::lanes * 4);
    };
  }

  static void pack(const Pack& args) {
    if (args.panel.terms <= 0) return base()->pack(args);
    Set::gather(args, Cut(args.panel.tokens), into_panel(args.panel));
  }

  static void activate(const Activate& args) {
    if (args.h.terms <= 0) return base()->activate(args);
    Set::activate_into(args, Cut(args.h.tokens), into_panel(args.h));
  }

  static void project(const Project& args) {
    if (args.x.terms <= 0) return base()->project(args);
    Project words = args;
    words.x.width = args.x.width / 2;
    Set::template project_typed<DType::f32>(words);
  }

  static Kernels make() noexcept {
    Kernels table = *base();
    table.panel_form = panel_form;
    table.pack = pack;
    table.project = project;
    table.activate = activate;
    return table;
  }
};

}  // namespace sida::cpu
