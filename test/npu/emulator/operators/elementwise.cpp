// Arithmetic, comparisons, logic and activations, element by element.
#include "aclnn.h"

using namespace npuemu;

namespace {

std::optional<at::Scalar> bound(Number number) {
    return number ? std::optional<at::Scalar>(number->value) : std::nullopt;
}

}  // namespace

// x -> f(x). From op_plugin_functions.yaml (gen_opapi).
#define UNARY(Name, function) \
    ACLNN(Name, (In self, Out out), { write(out, function(read_wide(self))); })
UNARY(Abs, at::abs)
UNARY(BitwiseNot, at::bitwise_not)
UNARY(Ceil, at::ceil)
UNARY(Exp, at::exp)
UNARY(Expm1, at::expm1)
UNARY(IsFinite, at::isfinite)
UNARY(Log, at::log)
UNARY(LogicalNot, at::logical_not)
UNARY(Neg, at::neg)
UNARY(Reciprocal, at::reciprocal)
UNARY(Relu, at::relu)
UNARY(Sigmoid, at::sigmoid)
UNARY(Sign, at::sign)
UNARY(Sqrt, at::sqrt)
UNARY(Tanh, at::tanh)

#define UNARY_INPLACE(Name, function) \
    ACLNN(Inplace##Name, (InOut self), { write(self, function(read_wide(self))); })
UNARY_INPLACE(Relu, at::relu)
UNARY_INPLACE(Sqrt, at::sqrt)

// (x, y) -> f(x, y). From <Name>KernelNpuOpApi.cpp of ops/opapi.
#define BINARY(Name, function) \
    ACLNN(Name, (In self, In other, Out out), { write(out, function(read(self), read(other))); })
BINARY(BitwiseAndTensor, at::bitwise_and)
BINARY(BitwiseOrTensor, at::bitwise_or)
BINARY(Div, at::div)
BINARY(EqTensor, at::eq)
BINARY(GeTensor, at::ge)
BINARY(GtTensor, at::gt)
BINARY(LeTensor, at::le)
BINARY(LogicalAnd, at::logical_and)
BINARY(LogicalOr, at::logical_or)
BINARY(LtTensor, at::lt)
BINARY(Maximum, at::maximum)
BINARY(Minimum, at::minimum)
BINARY(Mul, at::mul)
BINARY(NeTensor, at::ne)

#define BINARY_INPLACE(Name, function)           \
    ACLNN(Inplace##Name, (InOut self, In other), \
          { write(self, function(read(self), read(other))); })
BINARY_INPLACE(BitwiseAndTensor, at::bitwise_and)
BINARY_INPLACE(BitwiseOrTensor, at::bitwise_or)
BINARY_INPLACE(Div, at::div)
BINARY_INPLACE(LogicalAnd, at::logical_and)
BINARY_INPLACE(LogicalOr, at::logical_or)
BINARY_INPLACE(Mul, at::mul)

// (x, number) -> f(x, number). From the same files.
#define WITH_NUMBER(Name, function)               \
    ACLNN(Name, (In self, Number other, Out out), \
          { write(out, function(read(self), other->value)); })
WITH_NUMBER(Divs, at::div)
WITH_NUMBER(EqScalar, at::eq)
WITH_NUMBER(GeScalar, at::ge)
WITH_NUMBER(GtScalar, at::gt)
WITH_NUMBER(LeScalar, at::le)
WITH_NUMBER(LtScalar, at::lt)
WITH_NUMBER(Muls, at::mul)
WITH_NUMBER(NeScalar, at::ne)
WITH_NUMBER(PowTensorScalar, at::pow)

#define WITH_NUMBER_INPLACE(Name, function)          \
    ACLNN(Inplace##Name, (InOut self, Number other), \
          { write(self, function(read(self), other->value)); })
WITH_NUMBER_INPLACE(Divs, at::div)
WITH_NUMBER_INPLACE(Muls, at::mul)

// x + alpha y and relatives. From Add-, Sub- and RsubKernelNpuOpApi.cpp.
#define SCALED(Name, Other, operand, function)                 \
    ACLNN(Name, (In self, Other other, Number alpha, Out out), \
          { write(out, function(read(self), operand, alpha->value)); })
#define SCALED_INPLACE(Name, Other, operand, function)            \
    ACLNN(Inplace##Name, (InOut self, Other other, Number alpha), \
          { write(self, function(read(self), operand, alpha->value)); })
SCALED(Add, In, read(other), at::add)
SCALED(Adds, Number, other->value, at::add)
SCALED(Sub, In, read(other), at::sub)
SCALED(Subs, Number, other->value, at::sub)
SCALED(Rsubs, Number, other->value, at::rsub)
SCALED_INPLACE(Add, In, read(other), at::add)
SCALED_INPLACE(Adds, Number, other->value, at::add)
SCALED_INPLACE(Sub, In, read(other), at::sub)
SCALED_INPLACE(Subs, Number, other->value, at::sub)

// self + value * first * second and self + value * first / second. From AddcmulKernelNpuOpApi.cpp,
// AddcdivKernelNpuOpApi.cpp.
ACLNN(InplaceAddcmul, (InOut self, In first, In second, Number value),
      { write(self, at::addcmul(read(self), read(first), read(second), value->value)); })
ACLNN(InplaceAddcdiv, (InOut self, In first, In second, Number value),
      { write(self, at::addcdiv(read(self), read(first), read(second), value->value)); })

// From ClampKernelNpuOpApi.cpp.
ACLNN(Clamp, (In self, Number low, Number high, Out out),
      { write(out, at::clamp(read(self), bound(low), bound(high))); })
ACLNN(ClampMin, (In self, Number low, Out out),
      { write(out, at::clamp_min(read(self), low->value)); })
ACLNN(ClampMax, (In self, Number high, Out out),
      { write(out, at::clamp_max(read(self), high->value)); })

// From WhereKernelNpuOpApi.cpp.
ACLNN(SWhere, (In condition, In self, In other, Out out),
      { write(out, at::where(read(condition), read(self), read(other))); })

// From op_plugin_functions.yaml: isclose.
ACLNN(IsClose, (In self, In other, double relative, double absolute, bool equal_nan, Out out),
      { write(out, at::isclose(read(self), read(other), relative, absolute, equal_nan)); })

// From LeakyReluKernelNpuOpApi.cpp, SoftplusKernelNpuOpApi.cpp.
ACLNN(LeakyRelu, (In self, Number slope, Out out),
      { write(out, at::leaky_relu(read_wide(self), slope->value)); })
ACLNN(InplaceLeakyRelu, (InOut self, Number slope),
      { write(self, at::leaky_relu(read_wide(self), slope->value)); })
ACLNN(LeakyReluBackward, (In gradient, In self, Number slope, bool is_result, Out out), {
    write(out,
          at::leaky_relu_backward(read_wide(gradient), read_wide(self), slope->value, is_result));
})
ACLNN(Softplus, (In self, Number beta, Number threshold, Out out),
      { write(out, at::softplus(read_wide(self), beta->value, threshold->value)); })
ACLNN(SoftplusBackward, (In gradient, In self, Number beta, Number threshold, Out out), {
    write(out, at::softplus_backward(read_wide(gradient), read_wide(self), beta->value,
                                     threshold->value));
})

// Gradients of activations. From ThresholdBackward-, SigmoidBackward- and
// TanhBackwardKernelNpuOpApi.cpp.
ACLNN(ThresholdBackward, (In gradient, In self, Number threshold, Out out),
      { write(out, at::threshold_backward(read(gradient), read(self), threshold->value)); })
ACLNN(SigmoidBackward, (In gradient, In result, Out out),
      { write(out, at::sigmoid_backward(read_wide(gradient), read_wide(result))); })
ACLNN(TanhBackward, (In gradient, In result, Out out),
      { write(out, at::tanh_backward(read_wide(gradient), read_wide(result))); })
