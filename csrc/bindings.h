// What each file of bindings adds to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace megatron_dwm {

void bind_permutation(pybind11::module_& module);
void bind_counts(pybind11::module_& module);
void bind_visit(pybind11::module_& module);
void bind_pack(pybind11::module_& module);

}  // namespace megatron_dwm
