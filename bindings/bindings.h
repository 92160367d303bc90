// What each file of bindings adds to the module, and what they share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

using Address = std::uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Refuse a number that is no instruction set of the row kernels here.
void check_isa(int level);

void bind_divergence(pybind11::module_& m);
void bind_gather_rows(pybind11::module_& m);
void bind_logprobs(pybind11::module_& m);
void bind_sequence_reduce(pybind11::module_& m);
