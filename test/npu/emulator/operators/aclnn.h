// The handles that torch_npu gives to the ready-made operators ("aclnn"), and how one is defined.
//
// An operator is two functions: aclnnXGetWorkspaceSize(arguments..., &workspace, &executor), which
// plans it, and aclnnX(workspace, size, executor, stream), which queues it. torch_npu finds both by
// name and calls them with the types its own call site has: nothing checks that they agree with
// the definition here, and a difference corrupts memory. So each definition is marked with its
// source: the file of op_plugin/ops/opapi (op-plugin is the part of torch_npu that holds the call
// sites), or "yaml: f" where the call is generated from the schema of f in
// op_plugin/config/op_plugin_functions.yaml, its arguments in order and then the result.
// operator_sources.py asks torch_npu for them, and test_npu_operators.py compares every operator
// with the CPU.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "emulator.h"

struct aclTensor {
    std::vector<int64_t> sizes;
    std::vector<int64_t> strides;
    int dtype;
    int64_t offset;  // in elements
    void* storage;
};
struct aclScalar {
    at::Scalar value;
};
struct aclIntArray {
    std::vector<int64_t> values;
};
struct aclBoolArray {
    std::vector<bool> values;
};
struct aclTensorList {
    std::vector<const aclTensor*> tensors;
};
struct aclOpExecutor {
    std::function<void()> body;
    const char* name;
};

// Types of the arguments, named by their use. A null pointer is an argument not given.
using In = const aclTensor*;
using Out = const aclTensor*;
using InOut = const aclTensor*;
using Number = const aclScalar*;
using Ints = const aclIntArray*;
using Bools = const aclBoolArray*;
using Tensors = const aclTensorList*;

namespace npuemu {

at::ScalarType scalar_type(int acl_dtype);

// A tensor that shares the memory of `handle`; undefined for null.
at::Tensor read(In handle);
// The same with half precision widened: the matrix units and reductions accumulate in float32.
at::Tensor read_wide(In handle);
std::optional<at::Tensor> read_optional(In handle);
std::vector<at::Tensor> read_list(Tensors handles);
// Dimensions of a reduction; none given means all.
at::OptionalIntArrayRef dimensions(Ints handle);

// Copy a result to where torch_npu wants it, converting the type. The shape has to agree: it comes
// from torch_npu's own shape inference, which is what the emulator is there to test.
void write(Out handle, const at::Tensor& result);
// Write a result whose shape depends on values, and record the shape in the handle.
void write_dynamic(Out handle, const at::Tensor& result);

int plan(const char* name, std::function<void()> body, uint64_t* workspace,
         aclOpExecutor** executor);
int run(aclOpExecutor* executor);

}  // namespace npuemu

#define ACLNN_STRIP(...) __VA_ARGS__
// ACLNN(Name, (Type argument, ...), { body }) defines aclnnName. The body runs when the operator
// is queued; until then torch_npu keeps the handles.
#define ACLNN(Name, Arguments, ...)                                                      \
    EXPORT int aclnn##Name##GetWorkspaceSize(ACLNN_STRIP Arguments, uint64_t* workspace, \
                                             aclOpExecutor** executor) {                 \
        return npuemu::plan(#Name, [=]() __VA_ARGS__, workspace, executor);              \
    }                                                                                    \
    EXPORT int aclnn##Name(void*, uint64_t, aclOpExecutor* executor, void*) {            \
        return npuemu::run(executor);                                                    \
    }
// The same for an operator with a text among its arguments: torch_npu's is gone when the body runs.
#define ACLNN_TEXT(Name, Text, Arguments, ...)                                           \
    EXPORT int aclnn##Name##GetWorkspaceSize(ACLNN_STRIP Arguments, uint64_t* workspace, \
                                             aclOpExecutor** executor) {                 \
        return npuemu::plan(#Name, [=, Text = std::string(Text)]() __VA_ARGS__,          \
                            workspace, executor);                                        \
    }                                                                                    \
    EXPORT int aclnn##Name(void*, uint64_t, aclOpExecutor* executor, void*) {            \
        return npuemu::run(executor);                                                    \
    }
