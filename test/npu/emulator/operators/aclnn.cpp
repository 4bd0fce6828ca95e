// Handles, execution and bookkeeping of the ready-made operators.
#include "aclnn.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

namespace {

constexpr int kRunFailed = 561000;

std::mutex counts_mutex;
std::map<std::string, long> counts;

// At the end of the process, add the operators that ran to the file NPUEMU_OPERATORS: what no test
// uses does not belong here.
struct OperatorLog {
    ~OperatorLog() {
        const char* path = std::getenv("NPUEMU_OPERATORS");
        std::FILE* log = path ? std::fopen(path, "a") : nullptr;
        if (!log) {
            return;
        }
        for (const auto& name : used) {
            std::fprintf(log, "%s\n", name.c_str());
        }
        std::fclose(log);
    }
    std::set<std::string> used;
} operator_log;

template <typename T>
aclScalar* make_scalar(const void* value) {
    return new aclScalar{at::Scalar(*static_cast<const T*>(value))};
}
template <typename T>
int destroy(const T* handle) {
    delete handle;
    return 0;
}
// What `planned` collects: operators of this thread and their tensors, since they were last read.
thread_local std::string planned;
bool notes_plans = false;

// "float32[4,3]"
std::string describe(const aclTensor* handle) {
    std::string text = c10::toString(npuemu::scalar_type(handle->dtype));
    text += '[';
    for (size_t i = 0; i < handle->sizes.size(); i++) {
        text += (i ? "," : "") + std::to_string(handle->sizes[i]);
    }
    return text + ']';
}

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

}  // namespace

namespace npuemu {

// Values of aclDataType (acl/acl_base.h).
at::ScalarType scalar_type(int acl_dtype) {
    switch (acl_dtype) {
        case 0:
            return at::kFloat;
        case 1:
            return at::kHalf;
        case 2:
            return at::kChar;
        case 3:
            return at::kInt;
        case 4:
            return at::kByte;
        case 6:
            return at::kShort;
        case 9:
            return at::kLong;
        case 11:
            return at::kDouble;
        case 12:
            return at::kBool;
        case 27:
            return at::kBFloat16;
        default:
            TORCH_CHECK(false, "aclDataType ", acl_dtype, " is not emulated");
    }
}

at::Tensor read(In handle) {
    if (!handle) {
        return at::Tensor();
    }
    const auto type = scalar_type(handle->dtype);
    auto* data = static_cast<char*>(handle->storage) + handle->offset * c10::elementSize(type);
    return at::from_blob(data, handle->sizes, handle->strides, at::TensorOptions().dtype(type));
}

// Finite: an infinity is the largest number of its type, NaN is 0, and the register remembers it.
static at::Tensor saturated(const at::Tensor& tensor) {
    if (at::isfinite(tensor).all().item<bool>()) {
        return tensor;
    }
    remember_overflow();
    return at::nan_to_num(tensor);
}

at::Tensor rounded(const at::Tensor& tensor) {
    if (!npuemu_saturates() || !tensor.defined() || tensor.scalar_type() != at::kFloat) {
        return tensor;
    }
    return saturated(tensor.to(at::kHalf)).to(at::kFloat);
}

at::Tensor read_wide(In handle) {
    auto tensor = read(handle);
    const bool narrow = tensor.defined() && (tensor.scalar_type() == at::kHalf ||
                                             tensor.scalar_type() == at::kBFloat16);
    return narrow ? tensor.to(at::kFloat) : tensor;
}

at::Tensor read_half(In handle) { return rounded(read_wide(handle)); }

std::optional<at::Tensor> read_optional(In handle) {
    return handle ? std::optional<at::Tensor>(read_wide(handle)) : std::nullopt;
}

std::vector<at::Tensor> read_list(Tensors handles) {
    std::vector<at::Tensor> tensors;
    for (In handle : handles->tensors) {
        tensors.push_back(read(handle));
    }
    return tensors;
}

at::OptionalIntArrayRef dimensions(Ints handle) {
    return !handle || handle->values.empty() ? at::OptionalIntArrayRef()
                                             : at::OptionalIntArrayRef(handle->values);
}

void write(Out handle, const at::Tensor& result) {
    if (!handle) {
        return;
    }
    auto target = read(handle);
    TORCH_CHECK(target.sizes() == result.sizes(), "torch_npu expects the shape ", target.sizes(),
                ", the result has ", result.sizes());
    const bool saturates = npuemu_saturates() && at::isFloatingType(target.scalar_type());
    target.copy_(saturates ? saturated(result.to(target.scalar_type())) : result);
}

void write_dynamic(Out handle, const at::Tensor& result) {
    auto* mutable_handle = const_cast<aclTensor*>(handle);
    const auto values = result.to(scalar_type(handle->dtype)).contiguous();
    auto* data = static_cast<char*>(handle->storage) + handle->offset * values.element_size();
    std::memcpy(data, values.data_ptr(), values.nbytes());
    mutable_handle->sizes = values.sizes().vec();
    mutable_handle->strides = values.strides().vec();
}

void add_handles(std::vector<const aclTensor*>& handles, In handle) { handles.push_back(handle); }
void add_handles(std::vector<const aclTensor*>& handles, Tensors list) {
    handles.insert(handles.end(), list->tensors.begin(), list->tensors.end());
}

LastingList::LastingList(Tensors handles) {
    for (In handle : handles->tensors) {
        owned.push_back(lasting(handle));
        list.tensors.push_back(owned.back().get());
    }
}

int plan(const char* name, const std::vector<const aclTensor*>& handles, aclOpExecutor operation,
         uint64_t* workspace, aclOpExecutor** executor) {
    // To see what happens without an operator.
    const char* refused = std::getenv("NPUEMU_REFUSE");
    if (refused && std::strcmp(refused, name) == 0) {
        return npuemu_not_emulated((std::string("aclnn") + name).c_str());
    }
    if (notes_plans) {
        planned += name;
        for (In handle : handles) {
            planned += ' ' + (handle ? describe(handle) : "-");
        }
        planned += '\n';
    }
    *workspace = 0;
    *executor = new aclOpExecutor(std::move(operation));
    return 0;
}

int run_body(const char* name, const std::function<void()>& body) {
    {
        std::lock_guard<std::mutex> lock(counts_mutex);
        counts[name]++;
        operator_log.used.insert(name);
    }
    try {
        at::NoGradGuard no_grad;
        c10::impl::ExcludeDispatchKeyGuard no_autograd(c10::autograd_dispatch_keyset);
        c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
        body();
    } catch (const std::exception& error) {
        const auto text = std::string("aclnn") + name + ": " + first_line(error.what());
        npuemu_error(text.c_str());
        return kRunFailed;
    }
    return 0;
}

int run(aclOpExecutor* executor, void* stream) {
    const auto body = is_captured(stream) ? executor->lasting() : executor->body;
    const int code = queue(stream, [name = executor->name, body] { return run_body(name, body); });
    delete executor;
    return code;
}

}  // namespace npuemu

// "<name> <times>" a line, of the operators that ran since the last reset. Valid until the next
// call.
EXPORT const char* npuemu_read_counts() {
    static std::string text;
    std::lock_guard<std::mutex> lock(counts_mutex);
    text.clear();
    for (const auto& [name, times] : counts) {
        text += name + " " + std::to_string(times) + "\n";
    }
    return text.c_str();
}
EXPORT void npuemu_reset_counts() {
    std::lock_guard<std::mutex> lock(counts_mutex);
    counts.clear();
}

// "<name> <type>[<sizes>] ...", with "-" for a tensor not given, for each operator that the calling
// thread has planned since its last call, in order; from the first call on. Valid until the next.
EXPORT const char* npuemu_take_plans() {
    thread_local std::string taken;
    notes_plans = true;
    taken.clear();
    taken.swap(planned);
    return taken.c_str();
}

// Signatures: acl/aclnn_base of CANN as called by op_plugin/utils/op_api_common.h (in the wheel).
EXPORT aclTensor* aclCreateTensor(const int64_t* sizes, uint64_t count, int dtype,
                                  const int64_t* strides, int64_t offset, int /*format*/,
                                  const int64_t* /*storage_sizes*/, uint64_t /*storage_count*/,
                                  void* storage) {
    return new aclTensor{std::vector<int64_t>(sizes, sizes + count),
                         std::vector<int64_t>(strides, strides + count), dtype, offset, storage};
}
EXPORT aclScalar* aclCreateScalar(void* value, int dtype) {
    switch (npuemu::scalar_type(dtype)) {
        case at::kFloat:
            return make_scalar<float>(value);
        case at::kDouble:
            return make_scalar<double>(value);
        case at::kHalf:
            return make_scalar<at::Half>(value);
        case at::kBFloat16:
            return make_scalar<at::BFloat16>(value);
        case at::kLong:
            return make_scalar<int64_t>(value);
        case at::kInt:
            return make_scalar<int32_t>(value);
        case at::kShort:
            return make_scalar<int16_t>(value);
        case at::kChar:
            return make_scalar<int8_t>(value);
        case at::kByte:
            return make_scalar<uint8_t>(value);
        case at::kBool:
            return make_scalar<bool>(value);
        default:
            return nullptr;
    }
}
EXPORT aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t count) {
    return new aclIntArray{std::vector<int64_t>(values, values + count)};
}
EXPORT aclBoolArray* aclCreateBoolArray(const bool* values, uint64_t count) {
    return new aclBoolArray{std::vector<bool>(values, values + count)};
}
EXPORT aclTensorList* aclCreateTensorList(const aclTensor* const* tensors, uint64_t count) {
    return new aclTensorList{std::vector<const aclTensor*>(tensors, tensors + count)};
}
EXPORT int aclDestroyTensor(const aclTensor* handle) { return destroy(handle); }
EXPORT int aclDestroyScalar(const aclScalar* handle) { return destroy(handle); }
EXPORT int aclDestroyIntArray(const aclIntArray* handle) { return destroy(handle); }
EXPORT int aclDestroyBoolArray(const aclBoolArray* handle) { return destroy(handle); }
EXPORT int aclDestroyTensorList(const aclTensorList* list) {
    for (In tensor : list->tensors) {
        destroy(tensor);
    }
    return destroy(list);
}
EXPORT int aclGetViewShape(const aclTensor* tensor, int64_t** sizes, uint64_t* count) {
    *count = tensor->sizes.size();
    *sizes = new int64_t[*count + 1];
    std::memcpy(*sizes, tensor->sizes.data(), *count * sizeof(int64_t));
    return 0;
}
