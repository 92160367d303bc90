// What each file of bindings adds to the module.
#pragma once

#include <pybind11/pybind11.h>

void bind_gather_rows(pybind11::module_& m);
void bind_logprobs(pybind11::module_& m);
void bind_sequence_reduce(pybind11::module_& m);
