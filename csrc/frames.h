// From frames uint8 [batch, height, width, channels] to patches, and the flow's loss, on the CPU: every input is read once.
#pragma once

#include <cstdint>
#include <string>

#include "floats.h"

namespace flexlam {

// Patches are squares of `patch` pixels, in rows; a patch's elements are [channel, row, column].
struct FrameShape {
    std::int64_t batch, height, width, channels, patch;

    std::int64_t pixels() const { return height * width * channels; }
};

// What a patch holds: a frame; a frame and `gain` times the change to the next; the flow's x at `tau` and a frame.
enum class Patches : int { frame = 0, tubelets = 1, flow = 2 };

struct PatchArgs {
    FrameShape shape;
    Patches kind;
    const std::uint8_t* now;
    const std::uint8_t* following;  // nullptr for single frames
    const float* noise;             // [batch, channels, height, width], of the flow only
    const float* tau;               // [batch], of the flow only
    void* out;                      // [batch, patches, elements] in `type`
    Float type;
    float gain;
};

// `out` [batch, patches, elements] is what the decoder says; `now` is nullptr where that is the velocity itself, else it
// is the change of the frame. `error` like `out`, or nullptr: what the gradient is 2 / elements of.
struct FlowLossArgs {
    FrameShape shape;
    const void* out;
    const std::uint8_t* now;
    const std::uint8_t* following;
    const float* noise;
    const float* tau;
    void* error;
    Float type;
    float floor;
};

// `variant` is one of variant_names(), or "" for the first; bits depend on neither `threads` nor `variant`.
void make_patches(const PatchArgs& args, int threads, const std::string& variant);

// The sum of the squared errors: fp32 along a row of pixels, fp64 over rows and samples, in one order.
double flow_loss(const FlowLossArgs& args, int threads, const std::string& variant);

// out [count] = `scale` times error [count], both in `type`.
void scale_error(const void* error, void* out, std::int64_t count, float scale, Float type, int threads,
                 const std::string& variant);

}  // namespace flexlam
