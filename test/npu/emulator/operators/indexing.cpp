// Joining, sorting, gathering and scattering.
#include "aclnn.h"

using namespace npuemu;

namespace {

// aclnn has the same empty handle for "this dimension is not indexed" and for an empty index;
// torch_npu calls neither for empty results.
c10::List<std::optional<at::Tensor>> read_indices(Tensors handles) {
    c10::List<std::optional<at::Tensor>> indices;
    for (In handle : handles->tensors) {
        const bool absent =
            !handle || (handle->sizes.size() == 1 && handle->sizes[0] == 0 && !handle->storage);
        if (absent) {
            indices.push_back(std::nullopt);
        } else {
            const auto index = read(handle);
            indices.push_back(index.scalar_type() == at::kInt ? index.to(at::kLong) : index);
        }
    }
    return indices;
}
bool any_index(const c10::List<std::optional<at::Tensor>>& indices) {
    for (const std::optional<at::Tensor>& index : indices) {
        if (index && index->defined()) {
            return true;
        }
    }
    return false;
}
at::Tensor read_index(In handle) { return read(handle).to(at::kLong); }

at::Tensor scattered(In self, int64_t dim, In index, In source, int64_t reduction) {
    if (reduction == 0) {
        return at::scatter(read(self), dim, read_index(index), read(source));
    }
    const char* name = reduction == 1 ? "add" : "multiply";
    return at::scatter(read(self), dim, read_index(index), read(source), name);
}

}  // namespace

// CatKernelNpuOpApi.cpp
ACLNN(Cat, (Tensors tensors, int64_t dim, Out out),
      { write(out, at::cat(read_list(tensors), dim)); })
// yaml: stack
ACLNN(Stack, (Tensors tensors, int64_t dim, Out out),
      { write(out, at::stack(read_list(tensors), dim)); })
// yaml: flip
ACLNN(Flip, (In self, Ints dims, Out out), { write(out, at::flip(read(self), dims->values)); })
// ConstantPadNdKernelNpuOpApi.cpp
ACLNN(ConstantPadNd, (In self, Ints pad, Number value, Out out),
      { write(out, at::constant_pad_nd(read(self), pad->values, value->value)); })

// yaml: triu_
ACLNN(InplaceTriu, (InOut self, int64_t diagonal), { write(self, at::triu(read(self), diagonal)); })

// SortKernelNpuOpApi.cpp
ACLNN(Sort, (In self, bool stable, int64_t dim, bool descending, Out values, Out indices), {
    const auto result = at::sort(read_half(self), stable, dim, descending);
    write(values, std::get<0>(result));
    write(indices, std::get<1>(result));
})
// TopKKernelNpuOpApi.cpp
ACLNN(Topk, (In self, int64_t k, int64_t dim, bool largest, bool sorted, Out values, Out indices), {
    const auto result = at::topk(read_half(self), k, dim, largest, sorted);
    write(values, std::get<0>(result));
    write(indices, std::get<1>(result));
})

// GatherKernelNpuOpApi.cpp
ACLNN(Gather, (In self, int64_t dim, In index, Out out),
      { write(out, at::gather(read(self), dim, read_index(index))); })
// ScatterAddKernelNpuOpApi.cpp
ACLNN(ScatterAdd, (In self, int64_t dim, In index, In source, Out out),
      { write(out, at::scatter_add(read(self), dim, read_index(index), read(source))); })
// ScatterKernelNpuOpApi.cpp
ACLNN(InplaceScatter, (InOut self, int64_t dim, In index, In source, int64_t reduction),
      { write(self, scattered(self, dim, index, source, reduction)); })

// IndexSelectKernelNpuOpApi.cpp
ACLNN(IndexSelect, (In self, int64_t dim, In index, Out out),
      { write(out, at::index_select(read(self), dim, read(index))); })
// IndexAddKernelNpuOpApi.cpp
ACLNN(IndexAdd, (In self, int64_t dim, In index, In source, Number alpha, Out out),
      { write(out, at::index_add(read(self), dim, read(index), read(source), alpha->value)); })
// IndexKernelNpuOpApi.cpp
ACLNN(Index, (In self, Tensors handles, Out out), {
    const auto indices = read_indices(handles);
    if (read(out).numel() == 0) {
        return;
    }
    write(out,
          any_index(indices) ? at::index(read(self), indices) : read(self).reshape(out->sizes));
})
// IndexPutKernelNpuOpApi.cpp
ACLNN(IndexPutImpl, (InOut self, Tensors handles, In values, bool accumulate, bool /*unsafe*/), {
    const auto indices = read_indices(handles);
    if (any_index(indices)) {
        auto target = read(self);
        at::index_put_(target, indices, read(values), accumulate);
    }
})

// Shapes that depend on values: the device waits for the host here. Only tests use them.
// NonzeroKernelNpuOpApi.cpp
ACLNN(Nonzero, (In self, Out out), { write_dynamic(out, at::nonzero(read(self))); })
// AdvancedIndex.cpp
ACLNN(NonzeroV2, (In self, Out out), { write_dynamic(out, at::nonzero(read(self)).t()); })
// MaskedSelectKernelNpuOpApi.cpp
ACLNN(MaskedSelect, (In self, In mask, Out out),
      { write_dynamic(out, at::masked_select(read(self), read(mask))); })
