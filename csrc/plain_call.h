// The plain case of an op's call, read straight from Python tensor objects: no torch at link time, only the
// attributes that any Python code would read.
//
// A small layer computes for 1 µs, and checking and unpacking its arguments in Python took 5. Here the usual
// case (dense CPU tensors of the right types and shapes, automatic backend) is recognised in 1; anything else
// returns None, and python/lissom/ops does the full checks, chooses the backend or raises.
#pragma once

#include <pybind11/pybind11.h>

namespace lissom {

// Adds bind_torch(torch), to be called once, and, with the arguments of the ops' schemas up to `packed` and
// then `rotated` (or `validated`), a function each.
void add_plain_calls(pybind11::module_& module);

}  // namespace lissom
