// libascendcl: compile options, and the interface of operators built by the compiler.
#include <dlfcn.h>

#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "acl/acl.h"
#include "acl/acl_op_compiler.h"
#include "acl/acl_rt.h"
#include "emulator.h"
#include "graph_operator.h"
#include "work.h"

namespace {

struct Description {
    aclDataType dtype;
    std::vector<int64_t> sizes;
    aclFormat format;
};
struct Buffer {
    void* data;
    size_t size;
};

std::map<int, std::string> compile_options;
GraphOperatorHandler handler = nullptr;
const std::string& compile_option(aclCompileOpt option) {
    static const std::string disabled = "disable";
    static const std::string enabled = "enable";
    auto found = compile_options.find(option);
    if (found != compile_options.end()) {
        return found->second;
    }
    return option == ACL_OP_JIT_COMPILE && npuemu_saturates() ? enabled : disabled;
}
GraphAttributes* attributes_of(aclopAttr* handle) {
    return reinterpret_cast<GraphAttributes*>(handle);
}
const Description* description_of(const aclTensorDesc* handle) {
    return reinterpret_cast<const Description*>(handle);
}

std::vector<GraphTensor> gather(int count, const aclTensorDesc* const* descriptions,
                                const aclDataBuffer* const* buffers) {
    std::vector<GraphTensor> tensors;
    for (int i = 0; i < count; i++) {
        const Description* description = description_of(descriptions[i]);
        void* data = reinterpret_cast<const Buffer*>(buffers[i])->data;
        tensors.push_back({description->dtype, description->sizes, data});
    }
    return tensors;
}

aclError execute(const char* name, int input_count, const aclTensorDesc* const* input_descriptions,
                 const aclDataBuffer* const* inputs, int output_count,
                 const aclTensorDesc* const* output_descriptions,
                 const aclDataBuffer* const* outputs, const aclopAttr* attributes,
                 aclrtStream stream) {
    if (!handler) {
        dlopen("libopapi.so", RTLD_NOW);  // its constructor registers the handler
    }
    const aclError refused = refuse_if_captured(stream, name,
                                                ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT);
    if (refused) {
        return refused;
    }
    const auto in = gather(input_count, input_descriptions, inputs);
    const auto out = gather(output_count, output_descriptions, outputs);
    const GraphAttributes none;
    const auto* given = reinterpret_cast<const GraphAttributes*>(attributes);
    return queue(stream, [&] {
        return handler && handler(name, in, out, given ? *given : none)
                   ? ACL_SUCCESS
                   : npuemu_not_emulated((std::string("aclop ") + name).c_str());
    });
}

}  // namespace

EXPORT void npuemu_set_graph_operators(GraphOperatorHandler new_handler) { handler = new_handler; }

EXPORT aclError aclSetCompileopt(aclCompileOpt option, const char* value) {
    compile_options[option] = value;
    return ACL_SUCCESS;
}
EXPORT aclError aclGetCompileopt(aclCompileOpt option, char* value, size_t size) {
    std::strncpy(value, compile_option(option).c_str(), size);
    return ACL_SUCCESS;
}
EXPORT size_t aclGetCompileoptSize(aclCompileOpt option) {
    return compile_option(option).size() + 1;
}
EXPORT aclError aclrtSetSysParamOpt(aclSysParamOpt, int64_t) { return ACL_SUCCESS; }
EXPORT aclError aclrtCtxSetSysParamOpt(aclSysParamOpt, int64_t) { return ACL_SUCCESS; }
EXPORT aclError aclrtGetSysParamOpt(aclSysParamOpt, int64_t* value) {
    *value = 0;
    return ACL_SUCCESS;
}

EXPORT aclTensorDesc* aclCreateTensorDesc(aclDataType dtype, int count, const int64_t* sizes,
                                          aclFormat format) {
    auto* description = new Description{dtype, std::vector<int64_t>(sizes, sizes + count), format};
    return reinterpret_cast<aclTensorDesc*>(description);
}
EXPORT void aclDestroyTensorDesc(const aclTensorDesc* handle) { delete description_of(handle); }
EXPORT aclError aclGetTensorDescDimV2(const aclTensorDesc* handle, size_t index, int64_t* size) {
    *size = description_of(handle)->sizes[index];
    return ACL_SUCCESS;
}
EXPORT aclFormat aclGetTensorDescFormat(const aclTensorDesc* handle) {
    return description_of(handle)->format;
}
EXPORT size_t aclGetTensorDescNumDims(const aclTensorDesc* handle) {
    return description_of(handle)->sizes.size();
}
EXPORT aclDataType aclGetTensorDescType(const aclTensorDesc* handle) {
    return description_of(handle)->dtype;
}
EXPORT void aclSetTensorDescName(aclTensorDesc*, const char*) {}
EXPORT aclError aclSetTensorFormat(aclTensorDesc*, aclFormat) { return ACL_SUCCESS; }
EXPORT aclError aclSetTensorPlaceMent(aclTensorDesc*, aclMemType) { return ACL_SUCCESS; }
EXPORT aclError aclSetTensorShape(aclTensorDesc*, int, const int64_t*) { return ACL_SUCCESS; }
EXPORT aclDataBuffer* aclCreateDataBuffer(void* data, size_t size) {
    return reinterpret_cast<aclDataBuffer*>(new Buffer{data, size});
}
EXPORT aclError aclDestroyDataBuffer(const aclDataBuffer* buffer) {
    delete reinterpret_cast<const Buffer*>(buffer);
    return ACL_SUCCESS;
}

EXPORT aclopAttr* aclopCreateAttr() { return reinterpret_cast<aclopAttr*>(new GraphAttributes); }
EXPORT void aclopDestroyAttr(const aclopAttr* handle) {
    delete reinterpret_cast<const GraphAttributes*>(handle);
}
EXPORT aclError aclopSetAttrBool(aclopAttr* handle, const char* name, uint8_t value) {
    attributes_of(handle)->numbers[name] = value;
    return ACL_SUCCESS;
}
EXPORT aclError aclopSetAttrInt(aclopAttr* handle, const char* name, int64_t value) {
    attributes_of(handle)->numbers[name] = value;
    return ACL_SUCCESS;
}
EXPORT aclError aclopSetAttrListInt(aclopAttr* handle, const char* name, int count,
                                    const int64_t* values) {
    attributes_of(handle)->lists[name].assign(values, values + count);
    return ACL_SUCCESS;
}
// Attributes that no emulated operator reads.
EXPORT aclError aclopSetAttrFloat(aclopAttr*, const char*, float) { return ACL_SUCCESS; }
EXPORT aclError aclopSetAttrString(aclopAttr*, const char*, const char*) { return ACL_SUCCESS; }
EXPORT aclError aclopSetAttrDataType(aclopAttr*, const char*, aclDataType) { return ACL_SUCCESS; }

EXPORT aclError aclopCompileAndExecute(const char* name, int input_count,
                                       const aclTensorDesc* const input_descriptions[],
                                       const aclDataBuffer* const inputs[], int output_count,
                                       const aclTensorDesc* const output_descriptions[],
                                       aclDataBuffer* const outputs[], const aclopAttr* attributes,
                                       aclopEngineType, aclopCompileType, const char*,
                                       aclrtStream stream) {
    return execute(name, input_count, input_descriptions, inputs, output_count, output_descriptions,
                   outputs, attributes, stream);
}
EXPORT aclError aclopCompileAndExecuteV2(
    const char* name, int input_count, aclTensorDesc* input_descriptions[], aclDataBuffer* inputs[],
    int output_count, aclTensorDesc* output_descriptions[], aclDataBuffer* outputs[],
    aclopAttr* attributes, aclopEngineType, aclopCompileType, const char*, aclrtStream stream) {
    return execute(name, input_count, input_descriptions, inputs, output_count, output_descriptions,
                   outputs, attributes, stream);
}
