// libascendcl: capture of a stream's work into a graph ("model runtime instance"), and its replay.
//
// While a stream is captured, what is queued on it runs nowhere: it is kept with its addresses, in
// order, and runs at each replay. Of what else is queued, or asked of the host, that is refused
// which CANN documents as not allowed there (aclmdlRICaptureBegin), and so is any copy between host
// and device, whose host memory would have to outlive the graph.
#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "acl/acl.h"
#include "acl/acl_rt.h"
#include "emulator.h"
#include "work.h"

namespace {

struct Graph {
    uint32_t id;
    aclrtStream origin;
    aclmdlRICaptureStatus status;
    std::vector<Work> work;
    std::map<aclrtStream, bool> joined;  // other streams, and whether the origin waited for them
};

std::mutex graphs_mutex;
std::map<aclrtStream, Graph*> capturing;
std::atomic<uint32_t> next_graph{1};
std::atomic<uint64_t> launches{0};

Graph* graph_of(aclrtStream stream) {
    auto found = capturing.find(stream);
    return found == capturing.end() ? nullptr : found->second;
}

aclError refuse(Graph* graph, const char* what, aclError code) {
    graph->status = ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED;
    npuemu_error((std::string(what) + " is not allowed while a graph is captured").c_str());
    return code;
}

}  // namespace

uint64_t count_launches() { return launches; }
void reset_launches() { launches = 0; }

bool is_captured(aclrtStream stream) {
    std::lock_guard<std::mutex> lock(graphs_mutex);
    return graph_of(stream) != nullptr;
}

aclError queue(aclrtStream stream, Work work) {
    {
        std::lock_guard<std::mutex> lock(graphs_mutex);
        Graph* graph = graph_of(stream);
        if (graph) {
            graph->work.push_back(std::move(work));
            if (stream != graph->origin) {
                graph->joined[stream] = false;
            }
            return ACL_SUCCESS;
        }
    }
    launches++;
    return work();
}

aclError refuse_if_captured(aclrtStream stream, const char* what, aclError code) {
    std::lock_guard<std::mutex> lock(graphs_mutex);
    Graph* graph = graph_of(stream);
    return graph ? refuse(graph, what, code) : ACL_SUCCESS;
}

aclError refuse_in_capture(const char* what) {
    std::lock_guard<std::mutex> lock(graphs_mutex);
    return capturing.empty() ? ACL_SUCCESS
                             : refuse(capturing.begin()->second, what,
                                      ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT);
}

uint32_t captured_id(aclrtStream stream) {
    std::lock_guard<std::mutex> lock(graphs_mutex);
    Graph* graph = graph_of(stream);
    return graph ? graph->id : 0;
}

aclError wait_captured(aclrtStream stream, uint32_t event_graph, aclrtStream event_stream) {
    std::lock_guard<std::mutex> lock(graphs_mutex);
    Graph* graph = graph_of(stream);
    if (event_graph == 0) {
        // What was queued before the capture is done when the graph is replayed.
        return graph ? refuse(graph, "waiting for an event from outside",
                              ACL_ERROR_RT_CAPTURE_DEPENDENCY)
                     : ACL_SUCCESS;
    }
    Graph* source = graph_of(event_stream);
    if (!source || source->id != event_graph) {
        npuemu_error("a stream waits for an event of a capture that has ended");
        return ACL_ERROR_RT_EVENT_CAPTURED;
    }
    if (!graph) {
        capturing[stream] = source;
        source->joined[stream] = false;
    } else if (event_stream != source->origin) {
        source->joined[event_stream] = true;
    }
    return ACL_SUCCESS;
}

EXPORT aclError aclmdlRICaptureBegin(aclrtStream stream, aclmdlRICaptureMode) {
    std::lock_guard<std::mutex> lock(graphs_mutex);
    if (graph_of(stream)) {
        return ACL_ERROR_RT_STREAM_CAPTURED;
    }
    capturing[stream] =
        new Graph{next_graph++, stream, ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE, {}, {}};
    return ACL_SUCCESS;
}
EXPORT aclError aclmdlRICaptureGetInfo(aclrtStream stream, aclmdlRICaptureStatus* status,
                                       aclmdlRI* model) {
    std::lock_guard<std::mutex> lock(graphs_mutex);
    Graph* graph = graph_of(stream);
    *status = graph ? graph->status : ACL_MODEL_RI_CAPTURE_STATUS_NONE;
    *model = graph;
    return ACL_SUCCESS;
}
EXPORT aclError aclmdlRIGetId(aclmdlRI model, uint32_t* id) {
    *id = static_cast<Graph*>(model)->id;
    return ACL_SUCCESS;
}
EXPORT aclError aclmdlRICaptureEnd(aclrtStream stream, aclmdlRI* model) {
    std::lock_guard<std::mutex> lock(graphs_mutex);
    Graph* graph = graph_of(stream);
    *model = nullptr;
    if (!graph) {
        return ACL_ERROR_RT_STREAM_NOT_CAPTURED;
    }
    bool complete = true;
    for (const auto& [other, waited] : graph->joined) {
        complete = complete && waited;
        capturing.erase(other);
    }
    capturing.erase(stream);
    if (graph->status != ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE) {
        return ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED;
    }
    if (!complete) {
        npuemu_error("a stream of a capture was not waited for");
        return ACL_ERROR_RT_STREAM_UNJOINED;
    }
    *model = graph;
    return ACL_SUCCESS;
}
EXPORT aclError aclmdlRIExecuteAsync(aclmdlRI model, aclrtStream stream) {
    const auto* graph = static_cast<const Graph*>(model);
    return queue(stream, [graph] {
        for (const Work& work : graph->work) {
            const aclError code = work();
            if (code != ACL_SUCCESS) {
                return code;
            }
        }
        return static_cast<aclError>(ACL_SUCCESS);
    });
}
EXPORT aclError aclmdlRIDestroy(aclmdlRI model) {
    delete static_cast<Graph*>(model);
    return ACL_SUCCESS;
}
EXPORT aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode*) { return ACL_SUCCESS; }
EXPORT aclError aclrtSetStreamAttribute(aclrtStream, aclrtStreamAttr, aclrtStreamAttrValue*) {
    return ACL_SUCCESS;
}
