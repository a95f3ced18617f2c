// What every function that Python calls returns: 0, one of these, which are negative, or a cudaError_t: positive.
#pragma once

namespace jointnas {

enum Error : int { kOk = 0, kBadArgument = -1, kIsaMissing = -2, kNoMemory = -3 };

// _C.ERRORS
constexpr struct {
  Error code;
  const char* text;
} kErrors[] = {
    {kBadArgument, "an argument it does not support"},
    {kIsaMissing, "this processor lacks the instructions"},
    {kNoMemory, "out of memory"},
};

}  // namespace jointnas
