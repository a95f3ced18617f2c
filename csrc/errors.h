// What every function that Python calls returns: 0, one of these, which are negative, or a cudaError_t: positive.
#pragma once

namespace jointnas {

enum Error : int { kOk = 0, kBadArgument = -1, kIsaMissing = -2, kNoMemory = -3, kMisaligned = -4 };

// _C.ERRORS
constexpr struct {
  Error code;
  const char* text;
} kErrors[] = {
    {kBadArgument, "an argument it does not support"},
    {kIsaMissing, "this processor lacks the instructions"},
    {kNoMemory, "out of memory"},
    {kMisaligned, "a tensor whose address is no multiple of 16 bytes (a view into another one: give it a clone)"},
};

}  // namespace jointnas
