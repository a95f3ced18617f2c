// Python module jointnas_kernels._C: the only glue between Python and csrc.
// Pointers come as integers (tensor.data_ptr()), streams too; shapes and dtypes were checked in Python. The GIL is
// released during every call. Result: an int, 0 on success (isa.h for CPU, cudaError_t for CUDA functions).
#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>

#include "cpu/cpu_ops.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#ifdef JN_WITH_CUDA
#include "cuda/cuda_ops.h"
#endif

namespace py = pybind11;

namespace {

// How a C++ parameter looks from Python: pointers are integers, everything else is itself.
template <class T>
struct Argument {
  using Python = T;
  static T from(T x) { return x; }
};
template <class T>
struct Argument<T*> {
  using Python = uintptr_t;
  static T* from(uintptr_t x) { return reinterpret_cast<T*>(x); }
};

template <class... A>
void def(py::module_& m, const char* name, int (*function)(A...)) {
  m.def(name, [function](typename Argument<A>::Python... a) {
    py::gil_scoped_release release;
    return function(Argument<A>::from(a)...);
  });
}

// The same for a function that takes its arguments in a struct: Python passes the listed members in order, then the
// stream.
template <class S, class... F>
[[maybe_unused]] void def(py::module_& m, const char* name, int (*function)(const S*, void*), F S::*... members) {
  m.def(name, [=](typename Argument<F>::Python... values, uintptr_t stream) {
    S args{};
    ((args.*members = Argument<F>::from(values)), ...);
    py::gil_scoped_release release;
    return function(&args, reinterpret_cast<void*>(stream));
  });
}

py::dict cpu_features() {
  const uint32_t f = jointnas::cpu_features();
  py::dict d;
  d["avx2"] = (f & jointnas::kHasAvx2) != 0;
  d["avx_vnni"] = (f & jointnas::kHasAvxVnni) != 0;
  d["avx512f"] = (f & jointnas::kHasAvx512) != 0;
  d["avx512_bf16"] = (f & jointnas::kHasBf16) != 0;
  d["avx512_vnni"] = (f & jointnas::kHasVnni) != 0;
  d["avx512_vbmi"] = (f & jointnas::kHasVbmi) != 0;
  d["avx512_vpopcntdq"] = (f & jointnas::kHasVpopcnt) != 0;
  d["amx"] = (f & jointnas::kHasAmx) != 0;
  return d;
}

}  // namespace

// jn_NAME becomes _C.NAME.
#define JN_DEF(name) def(m, #name, jn_##name)

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of jointnas_kernels (csrc/).";
  m.def("cpu_features", &cpu_features, "Instruction sets this CPU has, of those the kernels can use.");
  m.def("parallel_backend", [] { return jointnas::parallel_backend(); }, "Where threads come from: openmp or std::thread.");
  JN_DEF(cpu_huge_pages);
  JN_DEF(cpu_read);
  JN_DEF(cpu_mixed_weight);
  JN_DEF(cpu_mixed_weight_backward);
  JN_DEF(cpu_quant_lora_mix);
  JN_DEF(cpu_quant_lora_mix_backward);
  JN_DEF(cpu_lowbit_pack);
  JN_DEF(cpu_lowbit_matmul);
  JN_DEF(cpu_lowbit_linear);
  JN_DEF(cpu_act_quant_mix);
  JN_DEF(cpu_act_quant_mix_backward);
  JN_DEF(cpu_channel_mask);
  JN_DEF(cpu_gated_residual);
  JN_DEF(cpu_gated_residual_backward);
  JN_DEF(cpu_masked_swiglu);
  JN_DEF(cpu_masked_swiglu_backward);
  JN_DEF(cpu_mixed_rmsnorm);
  JN_DEF(cpu_mixed_rmsnorm_backward);
  JN_DEF(cpu_mixed_rmsnorm_quant);
  JN_DEF(cpu_mixed_rmsnorm_quant_backward);
  JN_DEF(cpu_masked_rope);
  JN_DEF(cpu_masked_rope_backward);
#ifdef JN_WITH_CUDA
  m.attr("has_cuda") = true;
  JN_DEF(act_quant_pack);
  JN_DEF(token_layout);
  JN_DEF(lowbit_dequant);
  using L = JnLowbitArgs;
  for (auto [name, function] : {std::pair{"lowbit_stream", jn_lowbit_stream}, {"lowbit_tile", jn_lowbit_tile}, {"lowbit_wgmma", jn_lowbit_wgmma},
                                {"lowbit_bitplane", jn_lowbit_bitplane}, {"lowbit_int8", jn_lowbit_int8}})
    def(m, name, function, &L::weight, &L::scale, &L::x, &L::act_scale, &L::act_zero, &L::row_sum, &L::y, &L::partial, &L::locks,
        &L::tokens, &L::rows, &L::inputs, &L::w_bits, &L::dtype, &L::token_tiles, &L::warp_rows, &L::splits, &L::early,
        &L::a_bits, &L::cluster);
  using X = JnMixArgs;
  def(m, "quant_lora_mix", jn_quant_lora_mix, &X::weight, &X::lora_a, &X::lora_b, &X::grad, &X::probs, &X::clip, &X::out,
      &X::partial, &X::rows, &X::begin, &X::end, &X::inputs, &X::rank, &X::precisions, &X::group_size, &X::bits,
      &X::dtype, &X::columns, &X::splits, &X::scaling);
#else
  m.attr("has_cuda") = false;
#endif
}
