// The Python side of the extension. It includes no torch header: one binary serves every torch.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu_features.h"

namespace py = pybind11;

namespace {

#define FLEXLAM_TEXT_OF(x) #x
#define FLEXLAM_TEXT(x) FLEXLAM_TEXT_OF(x)

py::dict cpu_features() {
    py::dict out;
    for (const auto& [name, present] : flexlam::cpu_features()) out[py::str(name)] = present;
    return out;
}

py::dict build_info() {
    py::dict out;
    out["compiler"] = FLEXLAM_COMPILER;
    out["flags"] = FLEXLAM_FLAGS;
    out["cxx_standard"] = static_cast<long>(__cplusplus);
    out["pybind11"] = FLEXLAM_TEXT(PYBIND11_VERSION_MAJOR) "." FLEXLAM_TEXT(PYBIND11_VERSION_MINOR);
    out["cuda"] = false;
    return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "What the processor can do, and how this extension was built.";
    m.def("cpu_features", &cpu_features,
          "Instruction set -> whether the processor has it and the operating system supports it.");
    m.def("build_info", &build_info, "Compiler, flags, C++ standard, pybind11 version, and whether CUDA was built.");
}
