// Softmax, losses and their gradients.
#include "aclnn.h"

using namespace npuemu;

namespace {

constexpr int64_t kMean = 1;  // at::Reduction::Mean
constexpr int64_t kMostRows = 200000;

// What the documentation of aclnnCrossEntropyLoss demands of rows and labels (the ignored one is not
// excepted), and what this project asks of it.
void check_cross_entropy(const at::Tensor& logits, const at::Tensor& target,
                         const std::string& reduction, double smoothing) {
    TORCH_CHECK(logits.dim() == 2 && logits.size(0) < kMostRows, logits.sizes(), " are the logits");
    TORCH_CHECK(target.scalar_type() == at::kLong, target.scalar_type(), " is the type of labels");
    TORCH_CHECK(target.ge(0).logical_and(target.lt(logits.size(1))).all().item<bool>(),
                "a label is not among ", logits.size(1), " classes");
    TORCH_CHECK(reduction == "none" && smoothing == 0,
                "the loss is reduced, or its labels are smoothed");
}

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

// yaml: npu_cross_entropy_loss
ACLNN(CrossEntropyLoss,
      (In self, In target, In weight, const char* reduction, int64_t ignored, double smoothing,
       double /*z-loss*/, bool /*z-loss*/, Out out, Out log_probability, Out /*z-loss*/,
       Out /*z-loss*/),
      {
          const auto logits = read_wide(self);
          const auto labels = read(target);
          check_cross_entropy(logits, labels, reduction, smoothing);
          const auto result = at::_log_softmax(logits, 1, false);
          write(log_probability, result);
          write(out, at::nll_loss(result, labels, read_optional(weight), at::Reduction::None,
                                  ignored));
      })
// yaml: npu_cross_entropy_loss_backward
ACLNN(CrossEntropyLossGrad,
      (In gradient, In log_probability, In target, In weight, In /*z-loss*/, In /*z-loss*/,
       const char* reduction, int64_t ignored, double smoothing, double /*z-loss*/, Out out),
      {
          const auto result = read_wide(log_probability);
          const auto labels = read(target);
          check_cross_entropy(result, labels, reduction, smoothing);
          const auto picked = at::nll_loss_backward(
              read_wide(gradient), result, labels, read_optional(weight), at::Reduction::None,
              ignored, at::zeros({}));  // the total weight, of a mean
          write(out, at::_log_softmax_backward_data(picked, result, 1, result.scalar_type()));
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
