// The Python module. Importing it registers the ops; it has no functions of its own.
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

namespace {
PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_C",
                          "latentcore's native ops, under torch.ops.latentcore.",
                          -1,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};
}

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() { return PyModule_Create(&definition); }
