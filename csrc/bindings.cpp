// Python module jointnas_kernels._C: the only glue between Python and csrc. It holds every JN_EXPORT of the files it is
// linked with (export.h); the GIL is released during their calls.
#include <pybind11/pybind11.h>

#include <deque>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "errors.h"
#include "export.h"

namespace py = pybind11;
using namespace jointnas;

namespace jointnas {
const char* cuda_error_name(int code);  // cuda/error_name.cu
uint64_t lowbit_kernels();              // cuda/fingerprint.cu
}

namespace {

// A third faster than a function that pybind11 defines (0.27 instead of 0.39 us for a small act_quant_mix).
PyObject* call(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  const auto& function = *static_cast<const Export*>(PyCapsule_GetPointer(self, nullptr));
  if (count != function.values)
    return PyErr_Format(PyExc_TypeError, "%s takes %d numbers, got %zd", function.name, function.values, count);
  Value values[kMostValues];
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (PyFloat_Check(arguments[i])) {
      values[i] = {kNone, PyFloat_AS_DOUBLE(arguments[i])};
    } else {
      const int64_t integer = PyLong_AsLongLong(arguments[i]);
      if (integer == -1 && PyErr_Occurred()) return nullptr;
      values[i] = {integer, static_cast<double>(integer)};
    }
  }
  int code = kNoMemory;
  try {
    py::gil_scoped_release release;
    code = function.call(values);
  } catch (const std::bad_alloc&) {
  }
  return PyLong_FromLong(code);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of jointnas_kernels (csrc/).";
  static std::deque<PyMethodDef> methods;
  for (const Export* e = Export::list(); e; e = e->next) {
    const auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call));
    methods.push_back({e->name, function, METH_FASTCALL, nullptr});
    m.attr(e->name) = py::reinterpret_steal<py::object>(PyCFunction_New(&methods.back(), py::capsule(e).ptr()));
  }
  py::dict errors;
  for (const auto& error : kErrors) errors[py::int_(static_cast<int>(error.code))] = error.text;
  m.attr("ERRORS") = errors;
  const auto features = [] {
    py::dict d;
    for (const auto& feature : kFeatures) d[feature.name] = (cpu_features() & feature.bit) != 0;
    return d;
  };
  m.def("cpu_features", features, "Instruction sets this CPU has, of those the kernels can use.");
  m.def("parallel_backend", &parallel_backend, "Where threads come from: openmp or std::thread.");
#ifdef JN_WITH_CUDA
  m.attr("has_cuda") = true;
  m.def("cuda_error_name", &cuda_error_name, "Of a cudaError_t.");
  m.def("lowbit_kernels", &lowbit_kernels, "A hash of the low-bit kernels' sources.");
#else
  m.attr("has_cuda") = false;
#endif
}
