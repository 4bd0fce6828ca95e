// Softmax, losses and their gradients.
#include "aclnn.h"

using namespace npuemu;

namespace {

constexpr int64_t kMean = 1;  // at::Reduction::Mean

}  // namespace

// yaml: _log_softmax
ACLNN(LogSoftmax, (In self, int64_t dim, Out out),
      { write(out, at::_log_softmax(read_wide(self), dim, false)); })
// yaml: _log_softmax_backward_data
ACLNN(LogSoftmaxBackward, (In gradient, In result, int64_t dim, Out out), {
    write(out, at::_log_softmax_backward_data(read_wide(gradient), read_wide(result), dim,
                                              read_wide(gradient).scalar_type()));
})
// yaml: _softmax
ACLNN(Softmax, (In self, int64_t dim, Out out),
      { write(out, at::_softmax(read_wide(self), dim, false)); })
// yaml: _softmax_backward_data_out
ACLNN(SoftmaxBackward, (In gradient, In result, int64_t dim, Out out), {
    write(out, at::_softmax_backward_data(read_wide(gradient), read_wide(result), dim,
                                          read_wide(gradient).scalar_type()));
})

// NLLLossKernelNpuOpApi.cpp
ACLNN(NLLLoss,
      (In self, In target, In weight, int64_t reduction, int64_t ignored, Out out,
       Out total_weight),
      {
          const auto result = at::nll_loss_forward(read_wide(self), read(target).to(at::kLong),
                                                   read_optional(weight), reduction, ignored);
          write(out, std::get<0>(result));
          write(total_weight, std::get<1>(result).reshape(total_weight->sizes));
      })
// NLLLossBackwardKernelNpuOpApi.cpp
ACLNN(NLLLossBackward,
      (In gradient, In self, In target, In weight, int64_t reduction, int64_t ignored,
       In total_weight, Out out),
      {
          write(out,
                at::nll_loss_backward(read_wide(gradient), read_wide(self),
                                      read(target).to(at::kLong), read_optional(weight), reduction,
                                      ignored, read_wide(total_weight).reshape({})));
      })

// SmoothL1LossKernelNpuOpApi.cpp
ACLNN(SmoothL1Loss, (In self, In target, int64_t reduction, float beta, Out out),
      { write(out, at::smooth_l1_loss(read_wide(self), read_wide(target), reduction, beta)); })
// SmoothL1LossBackwrdKernelNpuOpApi.cpp
ACLNN(SmoothL1LossBackward,
      (In gradient, In self, In target, int64_t reduction, float beta, Out out), {
          write(out, at::smooth_l1_loss_backward(read_wide(gradient), read_wide(self),
                                                 read_wide(target), reduction, beta));
      })

// yaml: binary_cross_entropy_with_logits
ACLNN(BinaryCrossEntropyWithLogits,
      (In self, In target, In weight, In positive_weight, int64_t reduction, Out out), {
          write(out, at::binary_cross_entropy_with_logits(
                         read_wide(self), read_wide(target), read_optional(weight),
                         read_optional(positive_weight), reduction));
      })
// yaml: npu_binary_cross_entropy_with_logits_backward
ACLNN(BinaryCrossEntropyWithLogitsBackward,
      (In gradient, In self, In target, In weight, In positive_weight, int64_t reduction, Out out),
      {
          const auto probability = at::sigmoid(read_wide(self));
          const auto wanted = read_wide(target);
          auto result = probability - wanted;
          if (positive_weight) {
              const auto positive = read_wide(positive_weight) * wanted;
              result = probability * (positive + 1 - wanted) - positive;
          }
          if (weight) {
              result = result * read_wide(weight);
          }
          result = result * read_wide(gradient);
          write(out, reduction == kMean ? result / result.numel() : result);
      })
