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

// Runs the operator `name`; false where it is not emulated.
using GraphOperatorHandler = bool (*)(const std::string& name, std::vector<GraphTensor>& inputs,
                                      std::vector<GraphTensor>& outputs);

extern "C" void npuemu_set_graph_operators(GraphOperatorHandler handler);
