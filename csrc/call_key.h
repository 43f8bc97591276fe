// What distinguishes the calls of an op on a GPU: see python/lissom/_replay.py.
#pragma once

#include <pybind11/pybind11.h>

namespace lissom {

// Adds call_key(arguments), for a tuple of tensors, None, bool, int, str and dtype: a pair of
//   - bytes that are equal for calls whose arguments are alike in all but the tensors' values and places
//     (dtypes, sizes, strides, device, alignment to 64 bytes; the other arguments themselves; what
//     LISSOM_BACKEND and LISSOM_AUTOTUNE say),
//   - the addresses of the tensors, in their order,
// or None: for tensors that are empty, of another class, not of one GPU, and for arguments of other types.
void add_call_key(pybind11::module_& module);

}  // namespace lissom
