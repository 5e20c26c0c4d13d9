// The Python side of csrc/engine_cuda.h; csrc/bindings.cpp says how addresses come.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine_cuda.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

flexlam::ModelShape shape_of(std::int64_t hidden, std::int64_t inner, std::int64_t heads, std::int64_t kv_heads,
                             std::int64_t dim, std::int64_t codes, std::int64_t slots, double theta, float eps,
                             int type) {
    return {hidden, inner, heads, kv_heads, dim, codes, slots, theta, eps, static_cast<flexlam::Float>(type)};
}

std::unique_ptr<flexlam::CudaSequenceEngine> engine(
    const std::vector<std::array<Address, 8>>& layers, Address embedding, Address place, Address norm, Address head,
    std::int64_t hidden, std::int64_t inner, std::int64_t heads, std::int64_t kv_heads, std::int64_t dim,
    std::int64_t codes, std::int64_t slots, double theta, float eps, int type, int pages, std::int64_t page,
    std::int64_t entries) {
    flexlam::ModelWeights weights{{}, at<const void>(embedding), at<const void>(place), at<const void>(norm),
                                  at<const void>(head)};
    for (const auto& l : layers)
        weights.layers.push_back({at<const void>(l[0]), at<const void>(l[1]), at<const void>(l[2]),
                                  at<const void>(l[3]), at<const void>(l[4]), at<const void>(l[5]),
                                  at<const void>(l[6]), at<const void>(l[7])});
    return std::make_unique<flexlam::CudaSequenceEngine>(
        shape_of(hidden, inner, heads, kv_heads, dim, codes, slots, theta, eps, type), weights,
        static_cast<flexlam::Float>(pages), page, entries);
}

void generate(flexlam::CudaSequenceEngine& engine, Address k, Address v, Address table, Address context, Address starts,
              Address rows, Address positions, Address first, Address noise, Address given, Address chosen,
              Address logits, std::int64_t batch, std::int64_t budget, std::int64_t page, std::int64_t entries,
              std::int64_t pages, std::int64_t top_k, float inverse, int type, Address room, Address stream) {
    engine.generate({at<void>(k), at<void>(v), at<const std::int32_t>(table), at<const std::int32_t>(context),
                     at<const std::int32_t>(starts), at<const std::int64_t>(rows), at<const std::int64_t>(positions),
                     at<const float>(first), at<const float>(noise), at<const std::int32_t>(given),
                     at<std::int32_t>(chosen), at<float>(logits), batch, budget, page, entries, pages, top_k, inverse,
                     static_cast<flexlam::Float>(type)},
                    at<void>(room), at<void>(stream));
}

std::string refusal(std::int64_t hidden, std::int64_t inner, std::int64_t heads, std::int64_t kv_heads,
                    std::int64_t dim, std::int64_t codes, int type, int pages, std::int64_t page,
                    std::int64_t entries) {
    return flexlam::cuda_engine_refusal(shape_of(hidden, inner, heads, kv_heads, dim, codes, 0, 1.0, 0.0f, type),
                                        static_cast<flexlam::Float>(pages), page, entries);
}

}  // namespace

void bind_cuda_engine(py::module_& m) {
    using flexlam::CudaSequenceEngine;
    const auto free_gil = py::call_guard<py::gil_scoped_release>();
    py::class_<CudaSequenceEngine>(m, "CudaSequenceEngine", "SequenceEngine on a GPU: a block of codes in one launch.")
        .def(py::init(&engine), py::arg("layers"), py::arg("embedding"), py::arg("place"), py::arg("norm"),
             py::arg("head"), py::arg("hidden"), py::arg("inner"), py::arg("heads"), py::arg("kv_heads"),
             py::arg("dim"), py::arg("codes"), py::arg("slots"), py::arg("theta"), py::arg("eps"), py::arg("type"),
             py::arg("pages"), py::arg("page"), py::arg("entries"),
             "As SequenceEngine, with device addresses, for pages of one type, size and number a session.")
        .def("room", &CudaSequenceEngine::room, "Bytes of device memory that `generate` is given to work in.")
        .def("blocks", &CudaSequenceEngine::blocks, "Blocks of the grid: one a multiprocessor.")
        .def("generate", &generate, free_gil, py::arg("k"), py::arg("v"), py::arg("table"), py::arg("context"),
             py::arg("starts"), py::arg("rows"), py::arg("positions"), py::arg("first"), py::arg("noise"),
             py::arg("given"), py::arg("chosen"), py::arg("logits"), py::arg("batch"), py::arg("budget"),
             py::arg("page"), py::arg("entries"), py::arg("pages"), py::arg("top_k"), py::arg("inverse"),
             py::arg("type"), py::arg("room"), py::arg("stream"), "As SequenceEngine.generate, on a stream.")
        .def("check", &CudaSequenceEngine::check, "Raise RuntimeError if a barrier was given up. Waits for nothing.");
    m.def("cuda_engine_refusal", &refusal, py::arg("hidden"), py::arg("inner"), py::arg("heads"), py::arg("kv_heads"),
          py::arg("dim"), py::arg("codes"), py::arg("type"), py::arg("pages"), py::arg("page"), py::arg("entries"),
          "Why CudaSequenceEngine does not take such a model on the current device; \"\" if it does.");
}
