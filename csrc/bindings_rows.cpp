// The Python side of csrc/rows.h. Tensors come as addresses and strides, checked by flexlam_fast/ops.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "linear_train.h"
#include "rows.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Place = std::tuple<Address, int, std::int64_t, std::int64_t>;  // the fields of Rows
using Size = std::tuple<std::int64_t, std::int64_t, std::int64_t>;   // those of Extent

flexlam::Rows rows(const Place& p) {
    const auto& [address, type, group, row] = p;
    return {reinterpret_cast<void*>(address), static_cast<flexlam::Float>(type), group, row};
}

flexlam::Extent extent(const Size& s) { return {std::get<0>(s), std::get<1>(s), std::get<2>(s)}; }

template <class T = void>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

void row_norm(const Place& x, const Place& scale, const Place& shift, const Place& out, Address stats, const Size& size,
              float eps, bool center, bool one, int threads, const std::string& variant) {
    flexlam::row_norm(
        {rows(x), rows(scale), rows(shift), rows(out), at<float>(stats), extent(size), eps, center, one}, threads, variant);
}

void row_norm_backward(const Place& grad, const Place& x, const Place& scale, Address stats, const Place& dx,
                       const Place& dscale, const Place& dshift, const Size& size, bool center, bool one, int threads,
                       const std::string& variant) {
    flexlam::row_norm_backward({rows(grad), rows(x), rows(scale), at<const float>(stats), rows(dx), rows(dscale),
                                rows(dshift), extent(size), center, one},
                               threads, variant);
}

void gate_add(const Place& x, const Place& y, const Place& gate, const Place& out, const Size& size, int threads,
              const std::string& variant) {
    flexlam::gate_add({rows(x), rows(y), rows(gate), rows(out), extent(size)}, threads, variant);
}

void gate_add_backward(const Place& grad, const Place& y, const Place& gate, const Place& dy, const Place& dgate,
                       const Size& size, int threads, const std::string& variant) {
    flexlam::gate_add_backward({rows(grad), rows(y), rows(gate), rows(dy), rows(dgate), extent(size)}, threads, variant);
}

void gelu(Address grad, Address x, Address out, std::int64_t rows, std::int64_t width, std::int64_t last, int type,
          int threads, const std::string& variant) {
    flexlam::gelu({at(grad), at(x), nullptr, at(out), nullptr, rows, width, last, width, 0,
                   static_cast<flexlam::Float>(type)},
                  threads, variant);
}

void swiglu(Address grad, Address gate, Address up, Address out, Address other, std::int64_t rows, std::int64_t width,
            std::int64_t last, std::int64_t gate_row, std::int64_t up_row, int type, int threads,
            const std::string& variant) {
    flexlam::swiglu({at(grad), at(gate), at(up), at(out), at(other), rows, width, last, gate_row, up_row,
                     static_cast<flexlam::Float>(type)},
                    threads, variant);
}

void linear_gradients(Address grad, Address x, std::int64_t grad_row, std::int64_t x_row, Address weight, Address bias,
                      std::int64_t rows, std::int64_t outer, std::int64_t inner, int threads) {
    if (!flexlam::takes_linear(outer, inner)) throw std::invalid_argument("outer, inner: expected whole 32s, and AMX");
    flexlam::linear_gradients(
        {at(grad), at(x), grad_row, x_row, at<float>(weight), at<float>(bias), rows, outer, inner}, threads);
}

}  // namespace

void bind_rows(py::module_& m) {
    const auto free_gil = py::call_guard<py::gil_scoped_release>();
    m.def("row_norm", &row_norm, free_gil, py::arg("x"), py::arg("scale"), py::arg("shift"), py::arg("out"),
          py::arg("stats"), py::arg("size"), py::arg("eps"), py::arg("center"), py::arg("one"), py::arg("threads"),
          py::arg("variant") = "", "A norm of rows, scaled and shifted: csrc/rows.h's NormArgs.");
    m.def("row_norm_backward", &row_norm_backward, free_gil, py::arg("grad"), py::arg("x"), py::arg("scale"),
          py::arg("stats"), py::arg("dx"), py::arg("dscale"), py::arg("dshift"), py::arg("size"), py::arg("center"),
          py::arg("one"), py::arg("threads"), py::arg("variant") = "", "Its gradients: NormGradArgs.");
    m.def("gate_add", &gate_add, free_gil, py::arg("x"), py::arg("y"), py::arg("gate"), py::arg("out"), py::arg("size"),
          py::arg("threads"), py::arg("variant") = "", "x + gate * y: GateArgs.");
    m.def("gate_add_backward", &gate_add_backward, free_gil, py::arg("grad"), py::arg("y"), py::arg("gate"),
          py::arg("dy"), py::arg("dgate"), py::arg("size"), py::arg("threads"), py::arg("variant") = "",
          "Its gradients: GateGradArgs.");
    m.def("gelu", &gelu, free_gil, py::arg("grad"), py::arg("x"), py::arg("out"), py::arg("rows"), py::arg("width"),
          py::arg("last"), py::arg("type"), py::arg("threads"), py::arg("variant") = "",
          "GELU by tanh's approximation, or with `grad` its gradient: MapArgs.");
    m.def("swiglu", &swiglu, free_gil, py::arg("grad"), py::arg("gate"), py::arg("up"), py::arg("out"), py::arg("other"),
          py::arg("rows"), py::arg("width"), py::arg("last"), py::arg("gate_row"), py::arg("up_row"), py::arg("type"),
          py::arg("threads"), py::arg("variant") = "", "silu(gate) * up, or with `grad` its gradients: MapArgs.");
    m.def("takes_linear", &flexlam::takes_linear, py::arg("outer"), py::arg("inner"),
          "Whether linear_gradients takes such widths here.");
    m.def("linear_gradients", &linear_gradients, free_gil, py::arg("grad"), py::arg("x"), py::arg("grad_row"),
          py::arg("x_row"), py::arg("weight"), py::arg("bias"), py::arg("rows"), py::arg("outer"), py::arg("inner"),
          py::arg("threads"), "Gradients of a linear layer's weight and bias: LinearGrads.");
}
