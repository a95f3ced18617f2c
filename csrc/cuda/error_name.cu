// The name of a cudaError_t, for messages.
#include "cuda/ptx.cuh"

namespace jointnas {
const char* cuda_error_name(int code) { return cudaGetErrorName(static_cast<cudaError_t>(code)); }
}  // namespace jointnas
