// Layers: matrix products, convolution, batch normalisation, pooling and resampling.
#include "aclnn.h"

using namespace npuemu;

namespace {

std::optional<double> scale(double factor) {
    return factor > 0 ? std::optional<double>(factor) : std::nullopt;
}
std::array<bool, 3> wanted(Bools mask) {
    return {mask->values[0], mask->values[1], mask->values[2]};
}
// Write those of three gradients that were asked for.
void write_gradients(const std::tuple<at::Tensor, at::Tensor, at::Tensor>& gradients, Bools mask,
                     Out input, Out weight, Out bias) {
    if (mask->values[0]) {
        write(input, std::get<0>(gradients));
    }
    if (mask->values[1]) {
        write(weight, std::get<1>(gradients));
    }
    if (mask->values[2]) {
        write(bias, std::get<2>(gradients));
    }
}

}  // namespace

// The last argument chooses the precision of the matrix unit (HF32 or not).
// MatmulKernelNpuOpApi.cpp
ACLNN(Matmul, (In self, In other, Out out, int8_t /*precision*/),
      { write(out, rounded(at::matmul(read_half(self), read_half(other)))); })
// MmKernelNpuOpApi.cpp
ACLNN(Mm, (In self, In other, Out out, int8_t /*precision*/),
      { write(out, rounded(at::mm(read_half(self), read_half(other)))); })
// BmmKernelNpuOpApi.cpp
ACLNN(BatchMatMul, (In self, In other, Out out, int8_t /*precision*/),
      { write(out, rounded(at::bmm(read_half(self), read_half(other)))); })
// AddmmKernelNpuOpApi.cpp
ACLNN(Addmm,
      (In self, In first, In second, Number beta, Number alpha, Out out, int8_t /*precision*/), {
          write(out, rounded(at::addmm(read_half(self), read_half(first), read_half(second),
                                       beta->value, alpha->value)));
      })

// ConvolutionKernelNpuOpApi.cpp
ACLNN(Convolution,
      (In input, In weight, In bias, Ints stride, Ints padding, Ints dilation, bool transposed,
       Ints output_padding, int64_t groups, Out out, int8_t /*precision*/),
      {
          write(out, rounded(at::convolution(
                         read_half(input), read_half(weight), read_optional(bias), stride->values,
                         padding->values, dilation->values, transposed, output_padding->values,
                         groups)));
      })
// ConvolutionBackwardKernelNpuOpApi.cpp
ACLNN(ConvolutionBackward,
      (In gradient, In input, In weight, Ints bias_sizes, Ints stride, Ints padding, Ints dilation,
       bool transposed, Ints output_padding, int64_t groups, Bools mask, int8_t /*precision*/,
       Out grad_input, Out grad_weight, Out grad_bias),
      {
          const auto sizes =
              bias_sizes ? at::OptionalIntArrayRef(bias_sizes->values) : at::OptionalIntArrayRef();
          auto gradients =
              at::convolution_backward(read_half(gradient), read_half(input), read_half(weight),
                                       sizes, stride->values, padding->values, dilation->values,
                                       transposed, output_padding->values, groups, wanted(mask));
          std::get<0>(gradients) = rounded(std::get<0>(gradients));  // the weight's is float32
          write_gradients(gradients, mask, grad_input, grad_weight, grad_bias);
      })

// yaml: native_batch_norm
ACLNN(BatchNorm,
      (In input, In weight, In bias, In mean, In variance, bool training, double momentum,
       double epsilon, Out out, Out saved_mean, Out saved_inverse),
      {
          std::optional<at::Tensor> running_mean;
          std::optional<at::Tensor> running_variance;
          if (mean) {  // not widened: these are updated in place
              running_mean = read(mean);
              running_variance = read(variance);
          }
          const auto result =
              at::native_batch_norm(read_wide(input), read_optional(weight), read_optional(bias),
                                    running_mean, running_variance, training, momentum, epsilon);
          write(out, std::get<0>(result));
          if (training) {
              write(saved_mean, std::get<1>(result));
              write(saved_inverse, std::get<2>(result));
          }
      })
// BatchNormBackwardKernelNpuOpApi.cpp
ACLNN(BatchNormBackward,
      (In gradient, In input, In weight, In mean, In variance, In saved_mean, In saved_inverse,
       bool training, double epsilon, Bools mask, Out grad_input, Out grad_weight, Out grad_bias),
      {
          const auto gradients = at::native_batch_norm_backward(
              read_wide(gradient), read_wide(input), read_optional(weight), read_optional(mean),
              read_optional(variance), read_optional(saved_mean), read_optional(saved_inverse),
              training, epsilon, wanted(mask));
          write_gradients(gradients, mask, grad_input, grad_weight, grad_bias);
      })

// The "mask" is the kernel's own encoding of where the maxima were; here the gradient looks for
// them again.
// MaxPool2dWithIndicesKernelNpuOpApi.cpp
ACLNN(MaxPool2dWithMask,
      (In self, Ints kernel, Ints stride, Ints padding, Ints dilation, bool ceil, Out out,
       Out /*mask*/),
      {
          const auto result =
              at::max_pool2d_with_indices(read_half(self), kernel->values, stride->values,
                                          padding->values, dilation->values, ceil);
          write(out, std::get<0>(result));
      })
// MaxPool2dWithIndicesBackwardKernelNpuOpApi.cpp
ACLNN(MaxPool2dWithMaskBackward,
      (In gradient, In self, In /*mask*/, Ints kernel, Ints stride, Ints padding, Ints dilation,
       bool ceil, Out out),
      {
          const auto input = read_half(self);
          const auto indices = std::get<1>(at::max_pool2d_with_indices(
              input, kernel->values, stride->values, padding->values, dilation->values, ceil));
          write(out, at::max_pool2d_with_indices_backward(
                         read_half(gradient), input, kernel->values, stride->values,
                         padding->values, dilation->values, ceil, indices));
      })

// UpsampleBilinear2dKernelNpuOpApi.cpp
ACLNN(UpsampleBilinear2d,
      (In self, Ints size, bool align_corners, double height, double width, Out out), {
          write(out, at::upsample_bilinear2d(read_wide(self), size->values, align_corners,
                                             scale(height), scale(width)));
      })
// UpsampleBilinear2dBackwardKernelNpuOpApi.cpp
ACLNN(UpsampleBilinear2dBackwardV2,
      (In gradient, Ints size, Ints input_size, bool align_corners, double height, double width,
       Out out),
      {
          write(out, at::upsample_bilinear2d_backward(read_wide(gradient), size->values,
                                                      input_size->values, align_corners,
                                                      scale(height), scale(width)));
      })
