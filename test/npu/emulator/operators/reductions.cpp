// Sums, extremes and their like, over dimensions or over everything.
#include "aclnn.h"

using namespace npuemu;

// SumKernelNpuOpApi.cpp
ACLNN(ReduceSum, (In self, Ints dims, bool keep, int dtype, Out out),
      { write(out, at::sum(read(self), dimensions(dims), keep, scalar_type(dtype))); })
// MeanKernelNpuOpApi.cpp
ACLNN(Mean, (In self, Ints dims, bool keep, int /*dtype*/, Out out),
      { write(out, at::mean(read_wide(self), dimensions(dims), keep)); })

// MaxKernelNpuOpApi.cpp
ACLNN(Max, (In self, Out out), { write(out, at::max(read(self))); })
// MinKernelNpuOpApi.cpp
ACLNN(Min, (In self, Out out), { write(out, at::min(read(self))); })
// yaml: amax
ACLNN(Amax, (In self, Ints dims, bool keep, Out out),
      { write(out, at::amax(read(self), dims->values, keep)); })
// MaxKernelNpuOpApi.cpp
ACLNN(MaxDim, (In self, int64_t dim, bool keep, Out values, Out indices), {
    const auto result = at::max(read(self), dim, keep);
    write(values, std::get<0>(result));
    write(indices, std::get<1>(result));
})
// ArgmaxKernelNpuOpApi.cpp
ACLNN(ArgMax, (In self, int64_t dim, bool keep, Out out),
      { write(out, at::argmax(read(self), dim, keep).reshape(out->sizes)); })

// AnyKernelNpuOpApi.cpp
ACLNN(Any, (In self, Ints dims, bool keep, Out out), {
    const auto result = at::any(read(self).to(at::kBool), dimensions(dims), keep);
    write(out, result.reshape(out->sizes));
})
// AllKernelNpuOpApi.cpp
ACLNN(All, (In self, Ints dims, bool keep, Out out), {
    const auto result = at::all(read(self).to(at::kBool), dimensions(dims), keep);
    write(out, result.reshape(out->sizes));
})
// EqualKernelNpuOpApi.cpp
ACLNN(Equal, (In self, In other, Out out), {
    const bool equal = at::equal(read(self), read(other));
    write(out, at::scalar_tensor(equal, at::kBool).reshape(out->sizes));
})

// LinalgNormKernelNpuOpApi.cpp
ACLNN(LinalgVectorNorm, (In self, Number order, Ints dims, bool keep, int /*dtype*/, Out out), {
    write(out, at::linalg_vector_norm(read_wide(self), order->value, dimensions(dims), keep));
})
