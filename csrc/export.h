// How a function reaches Python: JN_EXPORT(name), behind its definition, puts it on the list of which bindings.cpp makes
// the module. Its parameters are pointers (addresses in Python: tensor.data_ptr(), streams), integers, floats and
// structs of these, whose members Python passes one by one; its result is an error code. Python has checked shapes and
// dtypes and allocates every result.
#pragma once
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>

#include "errors.h"

namespace jointnas {

struct Value {
  int64_t integer;  // kNone if Python passed a float: a bad argument where none is expected
  double number;
};
constexpr int64_t kNone = INT64_MIN;

// Turns into the next value as whatever type is asked for.
struct Next {
  const Value*& at;
  bool& legal;
  template <class T, class = std::enable_if_t<std::is_scalar_v<T>>>
  operator T() const {
    const Value value = *at++;
    if constexpr (std::is_floating_point_v<T>) return static_cast<T>(value.number);
    legal &= value.integer != kNone;
    if constexpr (std::is_pointer_v<T>)
      return reinterpret_cast<T>(value.integer);
    else
      return static_cast<T>(value.integer);
  }
};

// How many values make a T: as many as it has members, 1 if it is no struct.
template <class T, class = void, class... N>
constexpr int kValues = sizeof...(N) - 1;
template <class T, class... N>
constexpr int kValues<T, std::void_t<decltype(T{std::declval<N>()...})>, N...> = kValues<T, void, N..., Next>;

template <class T, size_t... I>
T take(const Next& next, std::index_sequence<I...>) {
  return T{(static_cast<void>(I), next)...};
}

constexpr int kMostValues = 32;  // of one function

struct Export {
  const char* name;
  int values;
  int (*call)(const Value* values);
  const Export* next = list();
  static const Export*& list() {
    static const Export* last = nullptr;
    return last;
  }
};

template <auto F>
struct Exported;
template <class... A, int (*F)(A...)>
struct Exported<F> : Export {
  static_assert((kValues<std::decay_t<A>> + ...) <= kMostValues);
  explicit Exported(const char* name)
      : Export{name, (kValues<std::decay_t<A>> + ...), [](const Value* at) {
                 bool legal = true;
                 const std::tuple<std::decay_t<A>...> arguments{
                     take<std::decay_t<A>>(Next{at, legal}, std::make_index_sequence<kValues<std::decay_t<A>>>{})...};
                 return legal ? std::apply(F, arguments) : int{kBadArgument};
               }} {
    list() = this;
  }
};

}  // namespace jointnas

#define JN_EXPORT(name) static const ::jointnas::Exported<name> exported_##name(#name)
