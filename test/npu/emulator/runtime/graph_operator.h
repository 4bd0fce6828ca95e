// Operators that torch_npu has the compiler build ("aclop") rather than calling them ready-made.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

struct GraphTensor {
    int dtype;
    std::vector<int64_t> sizes;
    void* data;
};

// The attributes that emulated operators read, by name.
struct GraphAttributes {
    std::map<std::string, int64_t> numbers;
    std::map<std::string, std::vector<int64_t>> lists;
};

// Runs the operator `name`; false where it is not emulated.
using GraphOperatorHandler = bool (*)(const std::string& name,
                                      const std::vector<GraphTensor>& inputs,
                                      const std::vector<GraphTensor>& outputs,
                                      const GraphAttributes& attributes);

extern "C" void npuemu_set_graph_operators(GraphOperatorHandler handler);
