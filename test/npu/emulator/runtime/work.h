// Work on streams: run where it is queued, or kept while the stream is captured (capture.cpp).
#pragma once

#include <cstdint>
#include <functional>

#include "acl/acl_rt.h"
#include "emulator.h"

using Work = std::function<int()>;

#define SHARED __attribute__((visibility("default")))

// Run `work`, or keep it for replays of the graph that `stream` is captured into.
SHARED aclError queue(aclrtStream stream, Work work);
SHARED bool is_captured(aclrtStream stream);
// An error, which ends the capture, if `stream` is captured, or if any is.
SHARED aclError refuse_if_captured(aclrtStream stream, const char* what, aclError code);
aclError refuse_in_capture(const char* what);
// The graph that an event recorded on `stream` belongs to; 0 outside of a capture.
uint32_t captured_id(aclrtStream stream);
// Let `stream` wait for an event; one of a capture draws the stream into it.
aclError wait_captured(aclrtStream stream, uint32_t event_graph, aclrtStream event_stream);
// Times that the host queued something, a whole graph counting as one.
uint64_t count_launches();
void reset_launches();
