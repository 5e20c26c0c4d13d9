// The Python side of the extension. It includes no torch header: one binary serves every torch. Tensors come as
// addresses; flexlam_fast/ops/contracts.py has checked device, dtype, layout and shape before it calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "attention_train.h"
#include "cpu_features.h"
#include "decode.h"
#include "draws.h"
#include "encoder.h"
#include "engine.h"
#include "frames.h"
#include "fsq.h"
#include "parallel.h"
#include "prefill.h"
#include "variants.h"
#ifdef FLEXLAM_CUDA
#include "fsq_cuda.h"
#endif

namespace py = pybind11;

void bind_rows(py::module_& m);  // csrc/bindings_rows.cpp
void bind_sequence_ops(py::module_& m);  // csrc/bindings_sequence.cpp
#ifdef FLEXLAM_CUDA
void bind_cuda_engine(py::module_& m);  // csrc/bindings_cuda.cpp
#endif

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
    const auto kind = static_cast<flexlam::Float>(type);
    flexlam::linear({at<const void>(x), at<const void>(norm), at<const void>(weight), at<const void>(residual),
                     at<void>(out), rows, inner, outs, kind, kind, fp32_out ? flexlam::Float::f32 : kind, gated, eps},
                    threads, variant);
}

void page_write(Address qkv, Address q_norm, Address k_norm, Address positions, Address rows, Address k, Address v,
                Address q, std::int64_t tokens, std::int64_t heads, std::int64_t kv_heads, std::int64_t dim,
                std::int64_t pool, int type, double theta, float eps, int threads, const std::string& variant) {
    const auto kind = static_cast<flexlam::Float>(type);
    flexlam::page_write({at<const void>(qkv), at<const void>(q_norm), at<const void>(k_norm), nullptr, nullptr,
                         at<const std::int64_t>(rows), at<void>(k), at<void>(v), at<void>(q), tokens, heads, kv_heads,
                         dim, pool, kind, kind, kind, eps},
                        at<const std::int64_t>(positions), theta, threads, variant);
}

void page_attend(Address q, Address k, Address v, Address table, Address context, Address start, Address out,
                 std::int64_t batch, std::int64_t tokens, std::int64_t heads, std::int64_t kv_heads, std::int64_t dim,
                 std::int64_t page, std::int64_t entries, std::int64_t pages, int type, int threads,
                 const std::string& variant) {
    const auto kind = static_cast<flexlam::Float>(type);
    const flexlam::AttendArgs args{at<const void>(q), at<const void>(k), at<const void>(v), at<const std::int32_t>(table),
                                   at<const std::int32_t>(context), at<const std::int32_t>(start), at<void>(out), batch,
                                   tokens, heads, kv_heads, dim, page, entries, pages, kind, kind};
    if (variant == "tiles") {
        if (!flexlam::has_tiles() || !flexlam::takes_tiles(args))
            throw std::invalid_argument("variant: expected AMX, bf16, heads of 32s and pages of 16s for 'tiles'");
        return flexlam::tiles_attend(args, threads);
    }
    flexlam::page_attend(args, threads, variant);
}

bool takes_tiles(std::int64_t dim, std::int64_t page, int type) {
    flexlam::AttendArgs args{};
    args.dim = dim, args.page = page, args.in = args.type = static_cast<flexlam::Float>(type);
    return flexlam::has_tiles() && flexlam::takes_tiles(args);
}

void norm_rows(Address x, Address weight, Address out, std::int64_t rows, std::int64_t width, int type, float eps,
               int threads, const std::string& variant) {
    flexlam::norm_rows(at<const void>(x), at<const void>(weight), at<void>(out), rows, width,
                       static_cast<flexlam::Float>(type), eps, threads, variant);
}

void swiglu_rows(Address x, Address out, std::int64_t rows, std::int64_t inner, int type, int threads,
                 const std::string& variant) {
    flexlam::swiglu_rows(at<const void>(x), at<void>(out), rows, inner, static_cast<flexlam::Float>(type), threads,
                         variant);
}

void draw_normal(std::int64_t key, std::int64_t step, Address streams, Address out, std::int64_t rows, std::int64_t count,
                 int threads, const std::string& variant) {
    flexlam::draw_normal({static_cast<std::uint64_t>(key), static_cast<std::uint64_t>(step),
                          at<const std::int64_t>(streams), at<float>(out), rows, count},
                         threads, variant);
}

void draw_words(std::int64_t key, std::int64_t step, Address streams, Address words, std::int64_t rows) {
    flexlam::draw_words(static_cast<std::uint64_t>(key), static_cast<std::uint64_t>(step),
                        at<const std::int64_t>(streams), at<std::int64_t>(words), rows);
}

using FrameSizes = std::array<std::int64_t, 5>;  // csrc/frames.h's FrameShape

flexlam::FrameShape frame_shape(const FrameSizes& s) {
    if (s[4] < 1 || s[4] > 256) throw std::invalid_argument("patch: expected 1..256, got " + std::to_string(s[4]));
    return {s[0], s[1], s[2], s[3], s[4]};
}

void make_patches(const FrameSizes& sizes, int kind, Address now, Address following, Address noise, Address tau, Address out,
                  int type, float gain, int threads, const std::string& variant) {
    flexlam::make_patches({frame_shape(sizes), static_cast<flexlam::Patches>(kind), at<const std::uint8_t>(now),
                           at<const std::uint8_t>(following), at<const float>(noise), at<const float>(tau), at<void>(out),
                           static_cast<flexlam::Float>(type), gain},
                          threads, variant);
}

double flow_loss(const FrameSizes& sizes, Address out, Address now, Address following, Address noise, Address tau,
                 Address error, int type, float floor, int threads, const std::string& variant) {
    return flexlam::flow_loss({frame_shape(sizes), at<const void>(out), at<const std::uint8_t>(now),
                               at<const std::uint8_t>(following), at<const float>(noise), at<const float>(tau),
                               at<void>(error), static_cast<flexlam::Float>(type), floor},
                              threads, variant);
}

void scale_error(Address error, Address out, std::int64_t count, float scale, int type, int threads,
                 const std::string& variant) {
    flexlam::scale_error(at<const void>(error), at<void>(out), count, scale, static_cast<flexlam::Float>(type), threads,
                         variant);
}

std::unique_ptr<flexlam::SequenceEngine> sequence_engine(
    const std::vector<std::array<Address, 8>>& layers, Address embedding, Address place, Address norm, Address head,
    std::int64_t hidden, std::int64_t inner, std::int64_t heads, std::int64_t kv_heads, std::int64_t dim,
    std::int64_t codes, std::int64_t slots, double theta, float eps, int type) {
    flexlam::ModelWeights weights{{}, at<const void>(embedding), at<const void>(place), at<const void>(norm),
                                  at<const void>(head)};
    for (const auto& l : layers)
        weights.layers.push_back({at<const void>(l[0]), at<const void>(l[1]), at<const void>(l[2]), at<const void>(l[3]),
                                  at<const void>(l[4]), at<const void>(l[5]), at<const void>(l[6]),
                                  at<const void>(l[7])});
    const flexlam::ModelShape shape{hidden, inner, heads, kv_heads, dim, codes, slots, theta, eps,
                                    static_cast<flexlam::Float>(type)};
    return std::make_unique<flexlam::SequenceEngine>(shape, std::move(weights));
}

std::unique_ptr<flexlam::EncoderEngine> encoder_engine(const std::vector<std::array<Address, 12>>& layers, Address norm,
                                                       Address norm_bias, std::int64_t width, std::int64_t heads,
                                                       std::int64_t inner, float eps) {
    std::vector<flexlam::EncoderLayer> all;
    for (const auto& l : layers)
        all.push_back({at<const void>(l[0]), at<const void>(l[1]), at<const void>(l[2]), at<const void>(l[3]),
                       at<const void>(l[4]), at<const void>(l[5]), at<const void>(l[6]), at<const void>(l[7]),
                       at<const void>(l[8]), at<const void>(l[9]), at<const void>(l[10]), at<const void>(l[11])});
    return std::make_unique<flexlam::EncoderEngine>(flexlam::EncoderShape{width, heads, inner, eps}, std::move(all),
                                                    at<const void>(norm), at<const void>(norm_bias));
}

void encode(flexlam::EncoderEngine& engine, Address x, Address out, std::int64_t batch, std::int64_t tokens,
            std::int64_t keep, int threads) {
    if (!engine.takes(tokens)) throw std::invalid_argument("encode: expected AMX, tokens of whole 16s, sizes of whole 32s");
    engine.run(at<const void>(x), at<void>(out), batch, tokens, keep, threads);
}

flexlam::AppendArgs append_args(Address x, Address k, Address v, Address table, Address context, Address start,
                                Address rows, Address positions, Address logits, std::int64_t batch, std::int64_t tokens,
                                std::int64_t page, std::int64_t entries, std::int64_t pages, int type) {
    return {at<const void>(x), at<void>(k), at<void>(v), at<const std::int32_t>(table), at<const std::int32_t>(context),
            at<const std::int32_t>(start), at<const std::int64_t>(rows), at<const std::int64_t>(positions),
            at<float>(logits), batch, tokens, page, entries, pages, static_cast<flexlam::Float>(type)};
}

bool takes(const flexlam::SequenceEngine& engine, std::int64_t tokens, std::int64_t page, int type) {
    return engine.takes(append_args(0, 0, 0, 0, 0, 0, 0, 0, 0, 1, tokens, page, 1, 1, type));
}

void append(flexlam::SequenceEngine& engine, Address x, Address k, Address v, Address table, Address context,
            Address start, Address rows, Address positions, Address logits, std::int64_t batch, std::int64_t tokens,
            std::int64_t page, std::int64_t entries, std::int64_t pages, int type, int threads) {
    const auto args = append_args(x, k, v, table, context, start, rows, positions, logits, batch, tokens, page, entries,
                                  pages, type);
    if (!engine.takes(args)) throw std::invalid_argument("append: expected AMX, bf16 and sizes of whole 32s");
    engine.append(args, threads);
}

void generate(flexlam::SequenceEngine& engine, Address k, Address v, Address table, Address context, Address starts,
              Address rows, Address positions, Address first, Address noise, Address given, Address chosen, Address logits,
              std::int64_t batch, std::int64_t budget, std::int64_t page, std::int64_t entries, std::int64_t pages,
              std::int64_t top_k, float inverse, int type, int threads, const std::string& variant) {
    engine.generate({at<void>(k), at<void>(v), at<const std::int32_t>(table), at<const std::int32_t>(context),
                     at<const std::int32_t>(starts), at<const std::int64_t>(rows), at<const std::int64_t>(positions), at<const float>(first),
                     at<const float>(noise), at<const std::int32_t>(given), at<std::int32_t>(chosen), at<float>(logits),
                     batch, budget, page, entries, pages, top_k, inverse, static_cast<flexlam::Float>(type)},
                    threads, variant);
}

using Place = std::array<std::int64_t, 4>;  // address, then elements from a session, a token and a head to the next

flexlam::View view(const Place& p) { return {at<void>(static_cast<Address>(p[0])), p[1], p[2], p[3]}; }

flexlam::SelfArgs self_args(const std::array<Place, 4>& tensors, Address lse, Address mask,
                            const std::array<std::int64_t, 6>& sizes, int type, bool causal, float scale) {
    return {view(tensors[0]), view(tensors[1]), view(tensors[2]), view(tensors[3]), at<float>(lse),
            at<const std::uint8_t>(mask), causal, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5],
            static_cast<flexlam::Float>(type), scale};
}

void self_attention(const std::array<Place, 4>& tensors, Address lse, Address mask,
                    const std::array<std::int64_t, 6>& sizes, int type, bool causal, float scale, int threads,
                    const std::string& variant) {
    const auto args = self_args(tensors, lse, mask, sizes, type, causal, scale);
    py::gil_scoped_release free_gil;
    flexlam::self_attention(args, threads, variant);
}

void self_attention_backward(const std::array<Place, 4>& tensors, const std::array<Place, 4>& grads, Address lse,
                             Address mask, const std::array<std::int64_t, 6>& sizes, int type, bool causal, float scale,
                             int threads, const std::string& variant) {
    const auto args = self_args(tensors, lse, mask, sizes, type, causal, scale);
    py::gil_scoped_release free_gil;
    flexlam::self_attention_backward(args, {view(grads[0]), view(grads[1]), view(grads[2]), view(grads[3])}, threads,
                                     variant);
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
    m.def("takes_tiles", &takes_tiles, py::arg("dim"), py::arg("page"), py::arg("type"),
          "Whether page_attend takes the variant \"tiles\" for such heads and pages here.");
    m.def("norm_rows", &norm_rows, free_gil, py::arg("x"), py::arg("weight"), py::arg("out"), py::arg("rows"),
          py::arg("width"), py::arg("type"), py::arg("eps"), py::arg("threads"), py::arg("variant") = "",
          "Root mean square norm of rows.");
    m.def("swiglu_rows", &swiglu_rows, free_gil, py::arg("x"), py::arg("out"), py::arg("rows"), py::arg("inner"),
          py::arg("type"), py::arg("threads"), py::arg("variant") = "", "silu(x[:, :inner]) * x[:, inner:] of rows.");
    py::class_<flexlam::EncoderEngine>(m, "EncoderEngine", "The encoder's weights in bf16, for its transformer in one call.")
        .def(py::init(&encoder_engine), py::arg("layers"), py::arg("norm"), py::arg("norm_bias"), py::arg("width"),
             py::arg("heads"), py::arg("inner"), py::arg("eps"),
             "Addresses of csrc/encoder.h's EncoderLayer, which must outlive this; EncoderShape.")
        .def("takes", &flexlam::EncoderEngine::takes, py::arg("tokens"), "Whether run() takes so many tokens here.")
        .def("run", &encode, free_gil, py::arg("x"), py::arg("out"), py::arg("batch"), py::arg("tokens"), py::arg("keep"),
             py::arg("threads"), "Embedded tokens through all layers and the final norm.");
    py::class_<flexlam::SequenceEngine>(m, "SequenceEngine", "The sequence model's weights, for whole blocks of codes.")
        .def(py::init(&sequence_engine), py::arg("layers"), py::arg("embedding"), py::arg("place"), py::arg("norm"),
             py::arg("head"), py::arg("hidden"), py::arg("inner"), py::arg("heads"), py::arg("kv_heads"), py::arg("dim"),
             py::arg("codes"), py::arg("slots"), py::arg("theta"), py::arg("eps"), py::arg("type"),
             "Addresses of csrc/engine.h's LayerWeights and ModelWeights, which must outlive this; ModelShape.")
        .def("takes", &takes, py::arg("tokens"), py::arg("page"), py::arg("type"),
             "Whether append() takes so many tokens over such pages here.")
        .def("append", &append, free_gil, py::arg("x"), py::arg("k"), py::arg("v"), py::arg("table"), py::arg("context"),
             py::arg("start"), py::arg("rows"), py::arg("positions"), py::arg("logits"), py::arg("batch"),
             py::arg("tokens"), py::arg("page"), py::arg("entries"), py::arg("pages"), py::arg("type"),
             py::arg("threads"), "Observed tokens through all layers: AppendArgs.")
        .def("generate", &generate, free_gil, py::arg("k"), py::arg("v"), py::arg("table"), py::arg("context"),
             py::arg("starts"), py::arg("rows"), py::arg("positions"), py::arg("first"), py::arg("noise"), py::arg("given"),
             py::arg("chosen"), py::arg("logits"), py::arg("batch"), py::arg("budget"), py::arg("page"),
             py::arg("entries"), py::arg("pages"), py::arg("top_k"), py::arg("inverse"), py::arg("type"),
             py::arg("threads"), py::arg("variant") = "", "Generates `budget` codes of every session: BlockArgs.");
    m.def("draw_normal", &draw_normal, free_gil, py::arg("key"), py::arg("step"), py::arg("streams"), py::arg("out"),
          py::arg("rows"), py::arg("count"), py::arg("threads"), py::arg("variant") = "",
          "Standard normal numbers from Philox4x32-10: DrawArgs.");
    m.def("draw_words", &draw_words, free_gil, "One uniform word a stream: (key, step, streams, words, rows).");
    m.def("make_patches", &make_patches, free_gil, py::arg("sizes"), py::arg("kind"), py::arg("now"), py::arg("following"),
          py::arg("noise"), py::arg("tau"), py::arg("out"), py::arg("type"), py::arg("gain"), py::arg("threads"),
          py::arg("variant") = "", "Frames to patches: PatchArgs; sizes are those of FrameShape.");
    m.def("flow_loss", &flow_loss, free_gil, py::arg("sizes"), py::arg("out"), py::arg("now"), py::arg("following"),
          py::arg("noise"), py::arg("tau"), py::arg("error"), py::arg("type"), py::arg("floor"), py::arg("threads"), py::arg("variant") = "", "The sum of squared errors of the flow's velocity: FlowLossArgs.");
    m.def("scale_error", &scale_error, free_gil, py::arg("error"), py::arg("out"), py::arg("count"), py::arg("scale"),
          py::arg("type"), py::arg("threads"), py::arg("variant") = "", "A number times every element.");
    m.def("self_attention", &self_attention, py::arg("tensors"), py::arg("lse"), py::arg("mask"), py::arg("sizes"),
          py::arg("type"), py::arg("causal"), py::arg("scale"), py::arg("threads"), py::arg("variant") = "",
          "Attention for training: SelfArgs; q, k, v and out as (address, strides of session, token and head).");
    m.def("self_attention_backward", &self_attention_backward, py::arg("tensors"), py::arg("grads"), py::arg("lse"),
          py::arg("mask"), py::arg("sizes"), py::arg("type"), py::arg("causal"), py::arg("scale"), py::arg("threads"),
          py::arg("variant") = "", "Its gradient: SelfArgs and SelfGrads.");
    m.def("sample_prefix", &sample, free_gil, "Retained lengths from Philox4x32-10.");
    bind_rows(m);
    bind_sequence_ops(m);
#ifdef FLEXLAM_CUDA
    py::class_<flexlam::CudaLevels>(m, "CudaLevels", "Constants of one level set, as kernel parameters.")
        .def(py::init(&flexlam::cuda_levels))
        .def("forward", &forward_cuda, free_gil, "As LevelPattern.forward, with device addresses and a stream.")
        .def("backward", &backward_cuda, free_gil, "As LevelPattern.backward; fp32 partial sums of the null's gradient.");
    m.def("cuda_partials", &flexlam::cuda_partials, "Partial sums that CudaLevels.backward writes.");
    bind_cuda_engine(m);
#endif
}
