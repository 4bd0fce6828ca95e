// The operators that torch_npu has compiled ("aclop"): copies of internal formats, deformable
// convolution with what op-plugin puts around it (ops/aclops/DeformableConv2dKernelNpu.cpp), and the
// register of overflows (ops/aclops/FloatStatusKernelNpu.cpp).
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <map>

#include "aclnn.h"
#include "graph_operator.h"

namespace npuemu::graph {
namespace {

using Arguments = std::vector<GraphTensor>;
using Operator = std::function<void(const Arguments&, const Arguments&, const GraphAttributes&)>;

int64_t byte_count(const GraphTensor& tensor) {
    int64_t count = c10::elementSize(scalar_type(tensor.dtype));
    for (int64_t size : tensor.sizes) {
        count *= size;
    }
    return count;
}
at::Tensor read(const GraphTensor& tensor) {
    const auto options = at::TensorOptions().dtype(scalar_type(tensor.dtype));
    return at::from_blob(tensor.data, tensor.sizes, options);
}
void write(const GraphTensor& tensor, const at::Tensor& result) {
    auto target = read(tensor);
    TORCH_CHECK(target.sizes() == result.sizes(), "torch_npu expects the shape ", target.sizes(),
                ", the result has ", result.sizes());
    target.copy_(result);
}

std::vector<int64_t> integers(const GraphTensor& tensor) {
    const auto values = read(tensor).to(at::kLong).contiguous();
    return {values.data_ptr<int64_t>(), values.data_ptr<int64_t>() + values.numel()};
}

// A copy to or from an internal format; here all have the plain layout.
void identity(const Arguments& in, const Arguments& out, const GraphAttributes&) {
    std::memmove(out[0].data, in[0].data, std::min(byte_count(in[0]), byte_count(out[0])));
}

void transpose(const Arguments& in, const Arguments& out, const GraphAttributes&) {
    write(out[0], read(in[0]).permute(integers(in[1])));
}

// Strides and dilations are NCHW, pads top, bottom, left, right.
struct Geometry {
    explicit Geometry(const GraphAttributes& attributes)
        : stride{attributes.lists.at("strides")[2], attributes.lists.at("strides")[3]},
          padding{attributes.lists.at("pads")[0], attributes.lists.at("pads")[2]},
          dilation{attributes.lists.at("dilations")[2], attributes.lists.at("dilations")[3]},
          groups(attributes.numbers.at("groups")) {}
    std::vector<int64_t> stride, padding, dilation;
    int64_t groups;
};

void convolution(const Arguments& in, const Arguments& out, const GraphAttributes& attributes) {
    const Geometry geometry(attributes);
    const auto bias = in.size() > 2 ? std::optional<at::Tensor>(read(in[2])) : std::nullopt;
    write(out[0], at::conv2d(read(in[0]), read(in[1]), bias, geometry.stride, geometry.padding,
                             geometry.dilation, geometry.groups));
}
at::Tensor convolution_gradient(const at::Tensor& gradient, const at::Tensor& input,
                                const at::Tensor& weight, const GraphAttributes& attributes,
                                bool of_input) {
    const Geometry geometry(attributes);
    const auto gradients = at::convolution_backward(
        gradient, input, weight, at::OptionalIntArrayRef(), geometry.stride, geometry.padding,
        geometry.dilation, false, {0, 0}, geometry.groups, {of_input, !of_input, false});
    return of_input ? std::get<0>(gradients) : std::get<1>(gradients);
}
// Inputs: sizes of the input, weight, gradient.
void convolution_input_gradient(const Arguments& in, const Arguments& out,
                                const GraphAttributes& attributes) {
    const auto input = at::zeros(out[0].sizes);
    write(out[0], convolution_gradient(read(in[2]), input, read(in[1]), attributes, true));
}
// Inputs: input, sizes of the weight, gradient.
void convolution_weight_gradient(const Arguments& in, const Arguments& out,
                                 const GraphAttributes& attributes) {
    const auto weight = at::zeros(out[0].sizes);
    write(out[0], convolution_gradient(read(in[2]), read(in[0]), weight, attributes, false));
}
// The gradient of the bias.
void reduce_sum(const Arguments& in, const Arguments& out, const GraphAttributes& attributes) {
    write(out[0], read(in[0]).sum(integers(in[1]), attributes.numbers.at("keep_dims") != 0));
}

// Where deformable convolution samples. Tensors are NHWC; the channels of `offsets` hold all x,
// then all y, then all factors, each for the k*k taps of a position row by row. The result has a
// k x k patch of samples for every position, so that a convolution with stride k follows.
class Sampling {
  public:
    Sampling(const at::Tensor& input, const at::Tensor& offsets, const GraphAttributes& attributes)
        : input_(input.permute({0, 3, 1, 2}).contiguous()),
          kernel_(attributes.lists.at("ksize")[0]),
          height_(offsets.size(1)),
          width_(offsets.size(2)) {
        TORCH_CHECK(attributes.numbers.at("deformable_groups") == 1 &&
                        attributes.numbers.at("modulated") == 1,
                    "deformable groups and plain offsets are not emulated");
        const int64_t taps = kernel_ * kernel_;
        const auto part = [&](int64_t n) { return patches(offsets.narrow(3, n * taps, taps)); };
        // "strides" and "dilations" are N, H, W, C here; "pads" top, bottom, left, right.
        const auto& stride = attributes.lists.at("strides");
        const auto& pads = attributes.lists.at("pads");
        const auto& dilation = attributes.lists.at("dilations");
        const auto y = axis(height_, stride[1], pads[0], dilation[1]).unsqueeze(1) + part(1);
        const auto x = axis(width_, stride[2], pads[2], dilation[2]).unsqueeze(0) + part(0);
        // grid_sampler counts from the outer edges of the first and last pixel, -1 and 1.
        scale_x_ = 2.0 / input_.size(3);
        scale_y_ = 2.0 / input_.size(2);
        grid_ = at::stack({(x + 0.5) * scale_x_ - 1, (y + 0.5) * scale_y_ - 1}, 3);
        factor_ = part(2).unsqueeze(1);
    }

    at::Tensor sampled() const {
        return at::grid_sampler_2d(input_, grid_, kBilinear, kZeros, kCorners);
    }
    at::Tensor result() const { return (sampled() * factor_).permute({0, 2, 3, 1}); }

    // Gradients of input and offsets from that of the result.
    std::pair<at::Tensor, at::Tensor> gradients(const at::Tensor& gradient) const {
        const auto outer = gradient.permute({0, 3, 1, 2}).contiguous();
        const auto inner = at::grid_sampler_2d_backward(outer * factor_, input_, grid_, kBilinear,
                                                        kZeros, kCorners, {true, true});
        const auto grid = std::get<1>(inner);
        const auto factor = (outer * sampled()).sum(1);
        const auto offsets = at::cat(
            {taps(grid.select(3, 0) * scale_x_), taps(grid.select(3, 1) * scale_y_), taps(factor)},
            3);
        return {std::get<0>(inner).permute({0, 2, 3, 1}), offsets};
    }

  private:
    static constexpr int64_t kBilinear = 0;
    static constexpr int64_t kZeros = 0;
    static constexpr bool kCorners = false;

    // [N, H, W, k*k] -> [N, H*k, W*k] and back.
    at::Tensor patches(const at::Tensor& channels) const {
        return channels.reshape({-1, height_, width_, kernel_, kernel_})
            .permute({0, 1, 3, 2, 4})
            .reshape({-1, height_ * kernel_, width_ * kernel_});
    }
    at::Tensor taps(const at::Tensor& patches) const {
        return patches.reshape({-1, height_, kernel_, width_, kernel_})
            .permute({0, 1, 3, 2, 4})
            .reshape({-1, height_, width_, kernel_ * kernel_});
    }
    // Where the taps lie along one axis without displacement: [count*k].
    at::Tensor axis(int64_t count, int64_t stride, int64_t padding, int64_t dilation) const {
        const auto first = at::arange(count) * stride - padding;
        const auto tap = at::arange(kernel_) * dilation;
        return (first.unsqueeze(1) + tap.unsqueeze(0)).reshape({-1}).to(at::kFloat);
    }

    at::Tensor input_, grid_, factor_;
    int64_t kernel_, height_, width_;
    double scale_x_, scale_y_;
};

void deformable_offsets(const Arguments& in, const Arguments& out,
                        const GraphAttributes& attributes) {
    write(out[0], Sampling(read(in[0]), read(in[1]), attributes).result());
}
// Inputs: gradient, input, offsets.
void deformable_offsets_gradient(const Arguments& in, const Arguments& out,
                                 const GraphAttributes& attributes) {
    const auto gradients = Sampling(read(in[1]), read(in[2]), attributes).gradients(read(in[0]));
    write(out[0], gradients.first);
    write(out[1], gradients.second);
}

// The register of devices that saturate in half precision, set by their operators and by hand
// (counters.py). Reading writes to the input, which is what torch_npu then returns.
std::atomic<float> overflow_register = 0;

void read_overflow(const Arguments& in, const Arguments&, const GraphAttributes&) {
    read(in[0]).fill_(overflow_register.load());
}
void clear_overflow(const Arguments&, const Arguments&, const GraphAttributes&) {
    overflow_register = 0;
}

const std::map<std::string, Operator>& operators() {
    static const std::map<std::string, Operator> all = {
        {"Identity", identity},
        {"Transpose", transpose},
        {"Conv2D", convolution},
        {"Conv2DBackpropInput", convolution_input_gradient},
        {"Conv2DBackpropFilter", convolution_weight_gradient},
        {"ReduceSum", reduce_sum},
        {"DeformableOffsets", deformable_offsets},
        {"DeformableOffsetsGrad", deformable_offsets_gradient},
        {"NPUGetFloatStatus", read_overflow},
        {"NPUClearFloatStatus", clear_overflow},
    };
    return all;
}

bool execute(const std::string& name, const Arguments& inputs, const Arguments& outputs,
             const GraphAttributes& attributes) {
    const auto found = operators().find(name);
    if (found == operators().end()) {
        return false;
    }
    at::NoGradGuard no_grad;
    c10::impl::ExcludeDispatchKeyGuard no_autograd(c10::autograd_dispatch_keyset);
    try {
        found->second(inputs, outputs, attributes);
    } catch (const std::exception& error) {
        npuemu_error((name + ": " + error.what()).c_str());
        return false;
    }
    return true;
}

struct Registration {
    Registration() { npuemu_set_graph_operators(execute); }
} registration;

}  // namespace

EXPORT void npuemu_set_overflow() { overflow_register = 1; }

}  // namespace npuemu::graph

void npuemu::remember_overflow() { graph::npuemu_set_overflow(); }
