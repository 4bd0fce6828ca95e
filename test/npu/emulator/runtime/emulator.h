// What the libraries of the emulator share: visibility, counters, reporting.
#pragma once

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

// Counters of what crosses the border of host and device, read by counters.py.
struct Traffic {
    uint64_t calls[4];  // indexed by aclrtMemcpyKind: host to host, h2d, d2h, d2d
    uint64_t bytes[4];
    uint64_t synchronisations;  // times that the host waited for the device
    uint64_t bytes_in_use;      // device memory allocated now
    uint64_t launches;          // times that work was queued, less copies; a graph is one
};

// Whether the emulated card is of the first generation (910A), which convolves in half precision
// alone and saturates where others make infinities and NaN. Defined in libascendcl.
EXPORT bool npuemu_saturates();

// Print "[npuemu] <what> is not emulated" to stderr, keep it as the runtime's last error and
// return a code that torch_npu raises on. Defined in libascendcl.
EXPORT int npuemu_not_emulated(const char* what);
// Keep `message` for aclGetRecentErrMsg and print it.
EXPORT void npuemu_error(const char* message);
