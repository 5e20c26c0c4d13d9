// The Python side of the extension. It includes no torch header: one binary serves every torch. Tensors come as
// addresses; flexlam_fast/ops/contracts.py has checked device, dtype, layout and shape before it calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "decode.h"
#include "fsq.h"
#include "parallel.h"
#include "variants.h"
#ifdef FLEXLAM_CUDA
#include "fsq_cuda.h"
#endif

namespace py = pybind11;

namespace {

#define FLEXLAM_TEXT_OF(x) #x
#define FLEXLAM_TEXT(x) FLEXLAM_TEXT_OF(x)

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

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
    out["threads"] = flexlam::has_threads();
    out["variants"] = flexlam::variant_names();
#ifdef FLEXLAM_CUDA
    out["cuda"] = FLEXLAM_CUDA;
#else
    out["cuda"] = false;
#endif
    return out;
}

flexlam::Prefix prefix(std::int64_t slots, Address keep, Address null) {
    return {slots, at<const std::int32_t>(keep), at<const float>(null)};
}

void forward(const flexlam::LevelPattern& p, Address z, Address latents, Address codes, std::int64_t tokens, int type,
             std::int64_t slots, Address keep, Address null, int threads, const std::string& variant) {
    flexlam::fsq_forward(p,
                         {at<const void>(z), at<void>(latents), at<std::int32_t>(codes), tokens,
                          static_cast<flexlam::Float>(type), prefix(slots, keep, null)},
                         threads, variant);
}

void backward(const flexlam::LevelPattern& p, Address grad, Address z, Address grad_z, Address grad_null,
              std::int64_t tokens, int type, std::int64_t slots, Address keep, int threads, const std::string& variant) {
    flexlam::fsq_backward(p,
                          {at<const void>(grad), at<const void>(z), at<void>(grad_z), at<double>(grad_null), tokens,
                           static_cast<flexlam::Float>(type), prefix(slots, keep, 0)},
                          threads, variant);
}

void lookup(const flexlam::LevelPattern& p, Address codes, Address latents, std::int64_t tokens, std::int64_t slots,
            Address keep, Address null, int threads) {
    flexlam::codes_to_latents(p, {at<const std::int32_t>(codes), at<float>(latents), tokens, prefix(slots, keep, null)},
                              threads);
}

void sample(std::int64_t seed, std::int64_t offset, Address edges, std::int64_t slots, Address keep, std::int64_t blocks) {
    flexlam::sample_prefix(static_cast<std::uint64_t>(seed), static_cast<std::uint64_t>(offset),
                           at<const std::int64_t>(edges), slots, at<std::int32_t>(keep), blocks);
}

void linear(Address x, Address norm, Address weight, Address residual, Address out, std::int64_t rows,
            std::int64_t inner, std::int64_t outs, int type, bool gated, bool fp32_out, float eps, int threads,
            const std::string& variant) {
    flexlam::linear({at<const void>(x), at<const void>(norm), at<const void>(weight), at<const void>(residual),
                     at<void>(out), rows, inner, outs, static_cast<flexlam::Float>(type), gated, fp32_out, eps},
                    threads, variant);
}

void page_write(Address qkv, Address q_norm, Address k_norm, Address positions, Address rows, Address k, Address v,
                Address q, std::int64_t tokens, std::int64_t heads, std::int64_t kv_heads, std::int64_t dim,
                std::int64_t pool, int type, double theta, float eps, int threads, const std::string& variant) {
    flexlam::page_write({at<const void>(qkv), at<const void>(q_norm), at<const void>(k_norm),
                         at<const std::int64_t>(positions), at<const std::int64_t>(rows), at<void>(k), at<void>(v),
                         at<void>(q), tokens, heads, kv_heads, dim, pool, static_cast<flexlam::Float>(type), theta, eps},
                        threads, variant);
}

void page_attend(Address q, Address k, Address v, Address table, Address context, Address start, Address out,
                 std::int64_t batch, std::int64_t tokens, std::int64_t heads, std::int64_t kv_heads, std::int64_t dim,
                 std::int64_t page, std::int64_t entries, std::int64_t pages, int type, int threads,
                 const std::string& variant) {
    flexlam::page_attend({at<const void>(q), at<const void>(k), at<const void>(v), at<const std::int32_t>(table),
                          at<const std::int32_t>(context), at<const std::int32_t>(start), at<void>(out), batch, tokens,
                          heads, kv_heads, dim, page, entries, pages, static_cast<flexlam::Float>(type)},
                         threads, variant);
}

#ifdef FLEXLAM_CUDA
void forward_cuda(const flexlam::CudaLevels& levels, Address z, Address latents, Address codes, std::int64_t tokens,
                  int type, std::int64_t slots, Address keep, Address null, Address stream) {
    flexlam::fsq_forward_cuda(levels,
                              {at<const void>(z), at<void>(latents), at<std::int32_t>(codes), tokens,
                               static_cast<flexlam::Float>(type), prefix(slots, keep, null)},
                              at<void>(stream));
}

void backward_cuda(const flexlam::CudaLevels& levels, Address grad, Address z, Address grad_z, Address grad_null,
                   std::int64_t tokens, int type, std::int64_t slots, Address keep, Address stream) {
    flexlam::fsq_backward_cuda(levels,
                               {at<const void>(grad), at<const void>(z), at<void>(grad_z), nullptr, tokens,
                                static_cast<flexlam::Float>(type), prefix(slots, keep, 0)},
                               at<float>(grad_null), at<void>(stream));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "FSQ in C++ and CUDA, what the processor can do, and how this extension was built.";
    m.def("cpu_features", &cpu_features,
          "Instruction set -> whether the processor has it and the operating system supports it.");
    m.def("build_info", &build_info,
          "Compiler, flags, C++ standard, pybind11 version, instruction sets, threads, and the CUDA version or False.");

    const auto free_gil = py::call_guard<py::gil_scoped_release>();
    py::class_<flexlam::LevelPattern>(m, "LevelPattern", "Constants of one level set.")
        .def(py::init<std::vector<int>, const std::vector<float>&, const std::vector<float>&, const std::vector<float>&>(),
             "Levels [d], thresholds [max(levels) - 1, d] flattened, half [d], shift [d].")
        .def("forward", &forward, free_gil, py::arg("z"), py::arg("latents"), py::arg("codes"), py::arg("tokens"),
             py::arg("type"), py::arg("slots"), py::arg("keep"), py::arg("null"), py::arg("threads"),
             py::arg("variant") = "", "z to latents and codes; addresses of contiguous CPU memory.")
        .def("backward", &backward, free_gil, py::arg("grad"), py::arg("z"), py::arg("grad_z"), py::arg("grad_null"),
             py::arg("tokens"), py::arg("type"), py::arg("slots"), py::arg("keep"), py::arg("threads"),
             py::arg("variant") = "", "Gradient of z and, in one partial sum a chunk, of the null.")
        .def("codes_to_latents", &lookup, free_gil, "Codes to null-filled fp32 latents.");
    m.def("chunk_tokens", &flexlam::chunk_tokens, "Tokens of one chunk of work: (slots, d).");
    m.def("linear", &linear, free_gil, py::arg("x"), py::arg("norm"), py::arg("weight"), py::arg("residual"),
          py::arg("out"), py::arg("rows"), py::arg("inner"), py::arg("outs"), py::arg("type"), py::arg("gated"),
          py::arg("fp32_out"), py::arg("eps"), py::arg("threads"), py::arg("variant") = "",
          "Norm, product, SwiGLU or residual of few rows; arguments are those of csrc/decode.h's LinearArgs.");
    m.def("page_write", &page_write, free_gil, py::arg("qkv"), py::arg("q_norm"), py::arg("k_norm"),
          py::arg("positions"), py::arg("rows"), py::arg("k"), py::arg("v"), py::arg("q"), py::arg("tokens"),
          py::arg("heads"), py::arg("kv_heads"), py::arg("dim"), py::arg("pool"), py::arg("type"), py::arg("theta"),
          py::arg("eps"), py::arg("threads"), py::arg("variant") = "", "New keys and values into pages: WriteArgs.");
    m.def("page_attend", &page_attend, free_gil, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("table"),
          py::arg("context"), py::arg("start"), py::arg("out"), py::arg("batch"), py::arg("tokens"), py::arg("heads"),
          py::arg("kv_heads"), py::arg("dim"), py::arg("page"), py::arg("entries"), py::arg("pages"), py::arg("type"),
          py::arg("threads"), py::arg("variant") = "", "Attention over pages: AttendArgs.");
    m.def("sample_prefix", &sample, free_gil, "Retained lengths from Philox4x32-10.");
#ifdef FLEXLAM_CUDA
    py::class_<flexlam::CudaLevels>(m, "CudaLevels", "Constants of one level set, as kernel parameters.")
        .def(py::init(&flexlam::cuda_levels))
        .def("forward", &forward_cuda, free_gil, "As LevelPattern.forward, with device addresses and a stream.")
        .def("backward", &backward_cuda, free_gil, "As LevelPattern.backward; fp32 partial sums of the null's gradient.");
    m.def("cuda_partials", &flexlam::cuda_partials, "Partial sums that CudaLevels.backward writes.");
#endif
}
