// What makes a compiled part a Python module. Only Python's stable ABI is used: one build serves every Python from 3.10 on.
// (A free-threaded Python has no stable ABI yet, and needs a build of its own: setup.py does not define Py_LIMITED_API.)
#pragma once

#include <Python.h>

// The module `name` with the function build_info(), which returns `make_info()`: a new dict.
#define DOUBLEHEAD_PYTHON_MODULE(name, doc, make_info)                                                                 \
  static PyObject* name##_build_info(PyObject*, PyObject*) { return make_info(); }                                     \
  static PyMethodDef name##_methods[] = {                                                                              \
      {"build_info", name##_build_info, METH_NOARGS, "How this module was built."}, {nullptr, nullptr, 0, nullptr}};   \
  static PyModuleDef name##_module = {                                                                                 \
      PyModuleDef_HEAD_INIT, #name, doc, 0, name##_methods, nullptr, nullptr, nullptr, nullptr};                       \
  PyMODINIT_FUNC PyInit_##name() { return PyModuleDef_Init(&name##_module); }
