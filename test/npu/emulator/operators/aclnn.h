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
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "emulator.h"
#include "work.h"

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
    std::function<std::function<void()>()> lasting;  // the body with handles of its own
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
// On the first generation float32 that went through half precision, saturated; else the same. Its
// matrix units take and give nothing else, nor do its kernels that sort, choose or pool.
at::Tensor rounded(const at::Tensor& tensor);
at::Tensor read_half(In handle);
std::vector<at::Tensor> read_list(Tensors handles);
// Dimensions of a reduction; none given means all.
at::OptionalIntArrayRef dimensions(Ints handle);

// Copy a result to where torch_npu wants it, converting the type. The shape has to agree: it comes
// from torch_npu's own shape inference, which is what the emulator is there to test.
// A card that saturates writes its largest number for an infinity, 0 for NaN, and remembers that.
void write(Out handle, const at::Tensor& result);
// Sets the register of overflows.
void remember_overflow();
// Write a result whose shape depends on values, and record the shape in the handle.
void write_dynamic(Out handle, const at::Tensor& result);

// The handles among an operator's arguments, in their order.
void add_handles(std::vector<const aclTensor*>& handles, In handle);
void add_handles(std::vector<const aclTensor*>& handles, Tensors list);
template <typename T>
void add_handles(std::vector<const aclTensor*>&, const T&) {}

// What the body gets in place of an argument; of a text, torch_npu's is gone when the body runs.
template <typename T>
T kept(T argument) {
    return argument;
}
inline std::string kept(const char* text) { return text; }
template <typename T>
const T& given(const T& held) {
    return held;
}
inline const char* given(const std::string& held) { return held.c_str(); }

// What a body keeps that outlives torch_npu's handles: one in a graph, which runs again and again.
template <typename T>
T lasting(const T& argument) {
    return argument;
}
template <typename T>
std::shared_ptr<const T> lasting(const T* handle) {
    return handle ? std::make_shared<const T>(*handle) : nullptr;
}
struct LastingList {
    explicit LastingList(Tensors handles);
    std::vector<std::shared_ptr<const aclTensor>> owned;
    aclTensorList list;
};
inline std::shared_ptr<const LastingList> lasting(Tensors handles) {
    return handles ? std::make_shared<const LastingList>(handles) : nullptr;
}
template <typename T>
const T* given(const std::shared_ptr<const T>& held) {
    return held.get();
}
inline Tensors given(const std::shared_ptr<const LastingList>& held) {
    return held ? &held->list : nullptr;
}

int plan(const char* name, const std::vector<const aclTensor*>& handles, aclOpExecutor planned,
         uint64_t* workspace, aclOpExecutor** executor);
int run(aclOpExecutor* executor, void* stream);

// aclnnXGetWorkspaceSize of an operator with this name and body.
template <const char* name, auto body>
struct Operator;
template <const char* name, typename... Arguments, void (*body)(Arguments...)>
struct Operator<name, body> {
    static int plan(Arguments... arguments, uint64_t* workspace, aclOpExecutor** executor) {
        std::vector<const aclTensor*> handles;
        (add_handles(handles, arguments), ...);
        const auto run = [... held = kept(arguments)]() { body(given(held)...); };
        const auto keep = [... held = kept(arguments)]() -> std::function<void()> {
            return [... own = lasting(held)]() { body(given(own)...); };
        };
        return npuemu::plan(name, handles, {run, keep, name}, workspace, executor);
    }
};

}  // namespace npuemu

#define ACLNN_STRIP(...) __VA_ARGS__
// ACLNN(Name, (Type argument, ...), { body }) defines aclnnName. The body runs when the operator
// is queued; until then torch_npu keeps the handles. (A resolver, since what the linker sees has to
// be a plain function, and what notes the arguments of any operator is a template.)
#define ACLNN(Name, Arguments, ...)                                                      \
    static void body_##Name(ACLNN_STRIP Arguments) __VA_ARGS__                           \
    static constexpr char name_##Name[] = #Name;                                         \
    extern "C" {                                                                         \
    static auto resolve_##Name() {                                                       \
        return &npuemu::Operator<name_##Name, body_##Name>::plan;                         \
    }                                                                                    \
    }                                                                                    \
    EXPORT int aclnn##Name##GetWorkspaceSize(ACLNN_STRIP Arguments, uint64_t* workspace, \
                                             aclOpExecutor** executor)                   \
        __attribute__((ifunc("resolve_" #Name)));                                        \
    EXPORT int aclnn##Name(void*, uint64_t, aclOpExecutor* executor, void* stream) {     \
        return npuemu::run(executor, stream);                                            \
    }
