// Arithmetic, comparisons, logic and activations, element by element.
#include "aclnn.h"

using namespace npuemu;

namespace {

std::optional<at::Scalar> bound(Number number) {
    return number ? std::optional<at::Scalar>(number->value) : std::nullopt;
}

}  // namespace

// x -> f(x).
#define UNARY(Name, function) \
    ACLNN(Name, (In self, Out out), { write(out, function(read_wide(self))); })
UNARY(Abs, at::abs)                 // yaml: abs
UNARY(BitwiseNot, at::bitwise_not)  // yaml: bitwise_not
UNARY(Ceil, at::ceil)               // yaml: ceil
UNARY(Exp, at::exp)                 // yaml: exp
UNARY(Expm1, at::expm1)             // yaml: expm1
UNARY(Floor, at::floor)             // yaml: floor
UNARY(IsFinite, at::isfinite)       // yaml: isfinite
UNARY(Log, at::log)                 // LogKernelNpuOpApi.cpp
UNARY(Neg, at::neg)                 // yaml: neg
UNARY(Reciprocal, at::reciprocal)   // yaml: reciprocal
UNARY(Relu, at::relu)               // yaml: relu
UNARY(Sigmoid, at::sigmoid)         // yaml: sigmoid
UNARY(Sign, at::sign)               // yaml: sign
UNARY(Tanh, at::tanh)               // TanhKernelNpuOpApi.cpp

#define UNARY_INPLACE(Name, function) \
    ACLNN(Inplace##Name, (InOut self), { write(self, function(read_wide(self))); })
UNARY_INPLACE(Relu, at::relu)  // yaml: relu_
UNARY_INPLACE(Sqrt, at::sqrt)  // yaml: sqrt_

// (x, y) -> f(x, y).
#define BINARY(Name, function) \
    ACLNN(Name, (In self, In other, Out out), { write(out, function(read(self), read(other))); })
BINARY(BitwiseAndTensor, at::bitwise_and)  // BitwiseAndKernelNpuOpApi.cpp
BINARY(BitwiseOrTensor, at::bitwise_or)    // BitwiseOrKernelNpuOpApi.cpp
BINARY(Div, at::div)                       // DivKernelNpuOpApi.cpp
BINARY(GeTensor, at::ge)                   // GeKernelNpuOpApi.cpp
BINARY(LtTensor, at::lt)                   // LtKernelNpuOpApi.cpp
BINARY(Maximum, at::maximum)               // MaxKernelNpuOpApi.cpp
BINARY(Minimum, at::minimum)               // MinKernelNpuOpApi.cpp
BINARY(Mul, at::mul)                       // MulKernelNpuOpApi.cpp
BINARY(NeTensor, at::ne)                   // NeKernelNpuOpApi.cpp

#define BINARY_INPLACE(Name, function)           \
    ACLNN(Inplace##Name, (InOut self, In other), \
          { write(self, function(read(self), read(other))); })
BINARY_INPLACE(Div, at::div)                 // DivKernelNpuOpApi.cpp
BINARY_INPLACE(LogicalAnd, at::logical_and)  // yaml: logical_and_
BINARY_INPLACE(Mul, at::mul)                 // MulKernelNpuOpApi.cpp

// (x, number) -> f(x, number).
#define WITH_NUMBER(Name, function)               \
    ACLNN(Name, (In self, Number other, Out out), \
          { write(out, function(read(self), other->value)); })
WITH_NUMBER(Divs, at::div)             // DivKernelNpuOpApi.cpp
WITH_NUMBER(EqScalar, at::eq)          // EqKernelNpuOpApi.cpp
WITH_NUMBER(GeScalar, at::ge)          // GeKernelNpuOpApi.cpp
WITH_NUMBER(GtScalar, at::gt)          // GtKernelNpuOpApi.cpp
WITH_NUMBER(LeScalar, at::le)          // LeKernelNpuOpApi.cpp
WITH_NUMBER(LtScalar, at::lt)          // LtKernelNpuOpApi.cpp
WITH_NUMBER(Muls, at::mul)             // MulKernelNpuOpApi.cpp
WITH_NUMBER(NeScalar, at::ne)          // NeKernelNpuOpApi.cpp
WITH_NUMBER(PowTensorScalar, at::pow)  // yaml: pow

// MulKernelNpuOpApi.cpp
ACLNN(InplaceMuls, (InOut self, Number other), { write(self, at::mul(read(self), other->value)); })

// x + alpha y and relatives.
#define SCALED(Name, Other, operand, function)                 \
    ACLNN(Name, (In self, Other other, Number alpha, Out out), \
          { write(out, function(read(self), operand, alpha->value)); })
#define SCALED_INPLACE(Name, Other, operand, function)            \
    ACLNN(Inplace##Name, (InOut self, Other other, Number alpha), \
          { write(self, function(read(self), operand, alpha->value)); })
SCALED(Add, In, read(other), at::add)                // AddKernelNpuOpApi.cpp
SCALED(Adds, Number, other->value, at::add)          // AddKernelNpuOpApi.cpp
SCALED(Sub, In, read(other), at::sub)                // SubKernelNpuOpApi.cpp
SCALED(Subs, Number, other->value, at::sub)          // SubKernelNpuOpApi.cpp
SCALED(Rsubs, Number, other->value, at::rsub)        // yaml: rsub
SCALED_INPLACE(Add, In, read(other), at::add)        // AddKernelNpuOpApi.cpp
SCALED_INPLACE(Adds, Number, other->value, at::add)  // AddKernelNpuOpApi.cpp
SCALED_INPLACE(Sub, In, read(other), at::sub)        // SubKernelNpuOpApi.cpp

// self + value * first * second and self + value * first / second.
// AddcmulKernelNpuOpApi.cpp
ACLNN(InplaceAddcmul, (InOut self, In first, In second, Number value),
      { write(self, at::addcmul(read(self), read(first), read(second), value->value)); })
// AddcdivKernelNpuOpApi.cpp
ACLNN(InplaceAddcdiv, (InOut self, In first, In second, Number value),
      { write(self, at::addcdiv(read(self), read(first), read(second), value->value)); })

// yaml: clamp
ACLNN(Clamp, (In self, Number low, Number high, Out out),
      { write(out, at::clamp(read(self), bound(low), bound(high))); })

// WhereKernelNpuOpApi.cpp
ACLNN(SWhere, (In condition, In self, In other, Out out),
      { write(out, at::where(read(condition), read(self), read(other))); })

// Of all gradients of a type at once; `found` becomes 1 where one is not finite.
// AmpForeachNonFiniteCheckAndUnscaleKernelNpuOpApi.cpp
ACLNN(ForeachNonFiniteCheckAndUnscale, (Tensors gradients, InOut found, In inverse_scale), {
    for (InOut gradient : gradients->tensors) {
        if (!at::isfinite(read(gradient)).all().item<bool>()) {
            read(found).fill_(1);
        }
        write(gradient, read(gradient) * read(inverse_scale));
    }
})

// yaml: isclose
ACLNN(IsClose, (In self, In other, double relative, double absolute, bool equal_nan, Out out),
      { write(out, at::isclose(read(self), read(other), relative, absolute, equal_nan)); })

// yaml: leaky_relu
ACLNN(LeakyRelu, (In self, Number slope, Out out),
      { write(out, at::leaky_relu(read_wide(self), slope->value)); })
// yaml: leaky_relu_
ACLNN(InplaceLeakyRelu, (InOut self, Number slope),
      { write(self, at::leaky_relu(read_wide(self), slope->value)); })
// yaml: leaky_relu_backward
ACLNN(LeakyReluBackward, (In gradient, In self, Number slope, bool is_result, Out out), {
    write(out,
          at::leaky_relu_backward(read_wide(gradient), read_wide(self), slope->value, is_result));
})
// yaml: softplus
ACLNN(Softplus, (In self, Number beta, Number threshold, Out out),
      { write(out, at::softplus(read_wide(self), beta->value, threshold->value)); })
// yaml: softplus_backward_out
ACLNN(SoftplusBackward, (In gradient, In self, Number beta, Number threshold, Out out), {
    write(out, at::softplus_backward(read_wide(gradient), read_wide(self), beta->value,
                                     threshold->value));
})

// Gradients of activations.
// yaml: threshold_backward
ACLNN(ThresholdBackward, (In gradient, In self, Number threshold, Out out),
      { write(out, at::threshold_backward(read(gradient), read(self), threshold->value)); })
// yaml: sigmoid_backward
ACLNN(SigmoidBackward, (In gradient, In result, Out out),
      { write(out, at::sigmoid_backward(read_wide(gradient), read_wide(result))); })
// yaml: tanh_backward
ACLNN(TanhBackward, (In gradient, In result, Out out),
      { write(out, at::tanh_backward(read_wide(gradient), read_wide(result))); })
