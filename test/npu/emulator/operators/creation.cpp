// Copies, fills, ranges and random numbers.
#include <ATen/CPUGeneratorImpl.h>

#include "aclnn.h"

using namespace npuemu;

namespace {

// The device has a generator of its own; only the distribution and its dependence on the seed are
// emulated.
at::Generator generator(uint64_t seed, uint64_t offset) {
    return at::make_generator<at::CPUGeneratorImpl>(seed * 1000003ull + offset);
}
at::Tensor empty_like(In handle, at::ScalarType type) { return at::empty(handle->sizes, type); }

}  // namespace

// CopyKernelOpApi.cpp
ACLNN(InplaceCopy, (Out self, In source), { read(self).copy_(read(source)); })

// FillKernelNpuOpApi.cpp
ACLNN(InplaceFillScalar, (Out self, Number value), { read(self).fill_(value->value); })
// ZerosLikeKernelNpuOpApi.cpp
ACLNN(InplaceZero, (Out self), { read(self).zero_(); })
// OnesKernelNpuOpApi.cpp
ACLNN(InplaceOne, (Out self), { read(self).fill_(1); })
// MaskedFillKernelNpuOpApi.cpp
ACLNN(InplaceMaskedFillScalar, (InOut self, In mask, Number value),
      { read(self).masked_fill_(read(mask), value->value); })

// ArangeKernelNpuOpApi.cpp
ACLNN(Arange, (Number start, Number end, Number step, Out out), {
    const auto target = read(out);
    if (target.numel() > 0) {
        auto values = at::empty({0}, target.options());
        at::arange_out(values, start->value, end->value, step->value);
        write(out, values);
    }
})

// NormalKernelNpuOpApi.cpp
ACLNN(InplaceNormal, (Out self, float mean, float deviation, int64_t seed, int64_t offset), {
    write(self, empty_like(self, at::kFloat).normal_(mean, deviation, generator(seed, offset)));
})
// UniformKernelNpuOpApi.cpp
ACLNN(InplaceUniform, (Out self, double from, double to, uint64_t seed, uint64_t offset),
      { write(self, empty_like(self, at::kFloat).uniform_(from, to, generator(seed, offset))); })
