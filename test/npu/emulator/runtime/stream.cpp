// libascendcl: streams and events. All work is done when the call that queues it returns, so a
// stream is a number and an event a time; a missing wait between streams goes unnoticed.
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>

#include "acl/acl.h"
#include "acl/acl_rt.h"
#include "emulator.h"
#include "work.h"

void count_synchronisation();

namespace {

struct Event {
    std::atomic<uint64_t> nanoseconds{0};
    std::atomic<uint32_t> graph{0};  // recorded in its capture, on this stream
    std::atomic<aclrtStream> stream{nullptr};
};

std::atomic<uint64_t> next_stream{1};
constexpr int kStreamShift = 4;  // streams look like aligned pointers
constexpr useconds_t kReportInterval = 1000;

uint64_t now() {
    const auto time = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
}
Event* event_of(aclrtEvent handle) { return static_cast<Event*>(handle); }
aclError synchronise_device() {
    count_synchronisation();
    return refuse_in_capture("waiting for the device");
}
aclError synchronise_stream(aclrtStream stream) {
    count_synchronisation();
    return refuse_if_captured(stream, "waiting for a stream", ACL_ERROR_RT_STREAM_CAPTURED);
}
aclError ask_event(aclrtEvent handle) {
    if (event_of(handle)->graph == 0) {
        return ACL_SUCCESS;
    }
    npuemu_error("the host asks for an event of a capture");
    return ACL_ERROR_RT_EVENT_CAPTURED;
}

}  // namespace

EXPORT aclError aclrtCreateStream(aclrtStream* stream) {
    *stream = reinterpret_cast<aclrtStream>(next_stream++ << kStreamShift);
    return ACL_SUCCESS;
}
EXPORT aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) {
    return aclrtCreateStream(stream);
}
EXPORT aclError aclrtDestroyStream(aclrtStream) { return ACL_SUCCESS; }
EXPORT aclError aclrtDestroyStreamForce(aclrtStream) { return ACL_SUCCESS; }
EXPORT aclError aclrtSetStreamFailureMode(aclrtStream, uint64_t) { return ACL_SUCCESS; }
EXPORT aclError aclrtSetStreamOverflowSwitch(aclrtStream, uint32_t) { return ACL_SUCCESS; }
EXPORT aclError aclrtGetStreamOverflowSwitch(aclrtStream, uint32_t* flag) {
    *flag = 0;
    return ACL_SUCCESS;
}
EXPORT aclError aclrtStreamGetId(aclrtStream stream, int32_t* id) {
    *id = static_cast<int32_t>(reinterpret_cast<uintptr_t>(stream) >> kStreamShift);
    return ACL_SUCCESS;
}
EXPORT aclError aclrtStreamQuery(aclrtStream, aclrtStreamStatus* status) {
    *status = ACL_STREAM_STATUS_COMPLETE;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtSynchronizeDevice() { return synchronise_device(); }
EXPORT aclError aclrtSynchronizeDeviceWithTimeout(int32_t) { return synchronise_device(); }
EXPORT aclError aclrtSynchronizeStream(aclrtStream stream) { return synchronise_stream(stream); }
EXPORT aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t) {
    return synchronise_stream(stream);
}
EXPORT aclError aclrtSynchronizeEvent(aclrtEvent event) {
    count_synchronisation();
    return ask_event(event);
}

EXPORT aclError aclrtCreateEvent(aclrtEvent* event) {
    *event = new Event;
    return ACL_SUCCESS;
}
EXPORT aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t) {
    return aclrtCreateEvent(event);
}
EXPORT aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t) {
    return aclrtCreateEvent(event);
}
EXPORT aclError aclrtDestroyEvent(aclrtEvent event) {
    delete event_of(event);
    return ACL_SUCCESS;
}
EXPORT aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream) {
    event_of(event)->nanoseconds = now();
    event_of(event)->graph = captured_id(stream);
    event_of(event)->stream = stream;
    return ACL_SUCCESS;
}
EXPORT aclError aclrtResetEvent(aclrtEvent, aclrtStream) { return ACL_SUCCESS; }
EXPORT aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event) {
    return wait_captured(stream, event_of(event)->graph, event_of(event)->stream);
}
EXPORT aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus* status) {
    *status = ACL_EVENT_RECORDED_STATUS_COMPLETE;
    return ask_event(event);
}
EXPORT aclError aclrtQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus* status) {
    *status = ACL_EVENT_WAIT_STATUS_COMPLETE;
    return ask_event(event);
}
EXPORT aclError aclrtEventElapsedTime(float* milliseconds, aclrtEvent start, aclrtEvent end) {
    const uint64_t elapsed = event_of(end)->nanoseconds - event_of(start)->nanoseconds;
    *milliseconds = static_cast<float>(elapsed) / 1e6f;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc function, void* argument) {
    const aclError refused = refuse_if_captured(stream, "a function of the host",
                                                ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT);
    if (!refused) {
        function(argument);
    }
    return refused;
}
EXPORT aclError aclrtLaunchCallback(aclrtCallback function, void* argument, aclrtCallbackBlockType,
                                    aclrtStream stream) {
    return aclrtLaunchHostFunc(stream, function, argument);
}
EXPORT aclError aclrtSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }
EXPORT aclError aclrtUnSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }
EXPORT aclError aclrtProcessReport(int32_t) {
    usleep(kReportInterval);
    return ACL_SUCCESS;
}
