// The Python side of csrc/rotary.h and csrc/loss.h; as in csrc/bindings.cpp, tensors come as addresses, checked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <utility>

#include "loss.h"
#include "rotary.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
// address, heads, strides of batch, token and head, type
using HeadsOf = std::array<std::int64_t, 6>;

template <class T>
T* at(std::int64_t address) {
    return reinterpret_cast<T*>(static_cast<Address>(address));
}

flexlam::Heads heads(const HeadsOf& h) {
    return {at<const void>(h[0]), h[1], h[2], h[3], h[4], static_cast<flexlam::Float>(h[5])};
}

flexlam::RotaryArgs rotary(const HeadsOf& q, const HeadsOf& k, std::int64_t q_weight, std::int64_t k_weight,
                           const std::array<std::int64_t, 5>& angles, const std::array<std::int64_t, 3>& sizes,
                           float eps) {
    return {{heads(q), heads(k)}, {at<const float>(q_weight), at<const float>(k_weight)}, at<const float>(angles[0]),
            at<const float>(angles[1]), angles[2], angles[3], angles[4], sizes[0], sizes[1], sizes[2], eps};
}

void rotary_forward(const HeadsOf& q, const HeadsOf& k, std::int64_t q_weight, std::int64_t k_weight,
                    const std::array<std::int64_t, 5>& angles, const std::array<std::int64_t, 3>& sizes, float eps,
                    std::int64_t q_out, std::int64_t k_out, int type, int threads, const std::string& variant) {
    flexlam::rotary_forward({rotary(q, k, q_weight, k_weight, angles, sizes, eps), {at<void>(q_out), at<void>(k_out)},
                             static_cast<flexlam::Float>(type)},
                            threads, variant);
}

void rotary_backward(const HeadsOf& q, const HeadsOf& k, std::int64_t q_weight, std::int64_t k_weight,
                     const std::array<std::int64_t, 5>& angles, const std::array<std::int64_t, 3>& sizes, float eps,
                     const HeadsOf& grad_q, const HeadsOf& grad_k, std::int64_t q_out, std::int64_t k_out,
                     std::int64_t q_weight_out, std::int64_t k_weight_out, int threads, const std::string& variant) {
    flexlam::rotary_backward({rotary(q, k, q_weight, k_weight, angles, sizes, eps), {heads(grad_q), heads(grad_k)},
                              {at<void>(q_out), at<void>(k_out)}, {at<float>(q_weight_out), at<float>(k_weight_out)}},
                             threads, variant);
}

flexlam::LossArgs loss_args(std::int64_t logits, std::int64_t target, std::int64_t kept, std::int64_t rows,
                            std::int64_t codes, std::int64_t stride, std::int64_t ignored, int type) {
    return {at<const void>(logits), at<const std::int64_t>(target), at<float>(kept), rows, codes, stride, ignored,
            static_cast<flexlam::Float>(type)};
}

std::pair<double, std::int64_t> loss_forward(std::int64_t logits, std::int64_t target, std::int64_t kept,
                                             std::int64_t rows, std::int64_t codes, std::int64_t stride,
                                             std::int64_t ignored, int type, int threads, const std::string& variant) {
    const auto part = flexlam::loss_forward(loss_args(logits, target, kept, rows, codes, stride, ignored, type), threads,
                                            variant);
    return {part.sum, part.count};
}

void loss_backward(std::int64_t logits, std::int64_t target, std::int64_t kept, std::int64_t rows, std::int64_t codes,
                   std::int64_t stride, std::int64_t ignored, int type, float scale, std::int64_t out, int threads,
                   const std::string& variant) {
    flexlam::loss_backward(loss_args(logits, target, kept, rows, codes, stride, ignored, type), scale, at<void>(out),
                           threads, variant);
}

}  // namespace

void bind_sequence_ops(py::module_& m) {
    const auto free_gil = py::call_guard<py::gil_scoped_release>();
    m.def("rotary_forward", &rotary_forward, free_gil, py::arg("q"), py::arg("k"), py::arg("q_weight"),
          py::arg("k_weight"), py::arg("angles"), py::arg("sizes"), py::arg("eps"), py::arg("q_out"), py::arg("k_out"),
          py::arg("type"), py::arg("threads"), py::arg("variant") = "",
          "Norm and rotation of queries and keys; csrc/rotary.h's RotaryForward.");
    m.def("rotary_backward", &rotary_backward, free_gil, py::arg("q"), py::arg("k"), py::arg("q_weight"),
          py::arg("k_weight"), py::arg("angles"), py::arg("sizes"), py::arg("eps"), py::arg("grad_q"),
          py::arg("grad_k"), py::arg("q_out"), py::arg("k_out"), py::arg("q_weight_out"), py::arg("k_weight_out"),
          py::arg("threads"), py::arg("variant") = "", "Its gradients; csrc/rotary.h's RotaryBackward.");
    m.def("loss_forward", &loss_forward, free_gil, py::arg("logits"), py::arg("target"), py::arg("kept"),
          py::arg("rows"), py::arg("codes"), py::arg("stride"), py::arg("ignored"), py::arg("type"), py::arg("threads"),
          py::arg("variant") = "", "Sum of the losses that count, and their number; csrc/loss.h's LossArgs.");
    m.def("loss_backward", &loss_backward, free_gil, py::arg("logits"), py::arg("target"), py::arg("kept"),
          py::arg("rows"), py::arg("codes"), py::arg("stride"), py::arg("ignored"), py::arg("type"), py::arg("scale"),
          py::arg("out"), py::arg("threads"), py::arg("variant") = "", "Gradient of the logits.");
}
