// libascendcl: device memory is host memory. Counts what is copied and how often the host waits.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "acl/acl.h"
#include "acl/acl_rt.h"
#include "emulator.h"
#include "work.h"

namespace {

constexpr size_t kDeviceBytes = 64ull << 30;
constexpr size_t kDeviceAlignment = 512;
constexpr size_t kHostAlignment = 4096;
// CANN lets kernels read up to this much past the end of an allocation.
constexpr size_t kPadding = 64;

std::mutex allocations_mutex;
std::map<void*, size_t> allocations;
std::atomic<uint64_t> bytes_in_use{0};
std::atomic<uint64_t> copy_calls[4];
std::atomic<uint64_t> copy_bytes[4];
std::atomic<uint64_t> synchronisations{0};

// NPUEMU_TAKEN: MiB of the device that another process holds.
size_t free_bytes() {
    const char* taken = std::getenv("NPUEMU_TAKEN");
    const size_t used = bytes_in_use + (taken ? std::strtoull(taken, nullptr, 10) << 20 : 0);
    return used < kDeviceBytes ? kDeviceBytes - used : 0;
}

aclError allocate(void** pointer, size_t size) {
    if (size > free_bytes() || posix_memalign(pointer, kDeviceAlignment, size + kPadding) != 0) {
        return ACL_ERROR_RT_MEMORY_ALLOCATION;
    }
    const char* poison = std::getenv("NPUEMU_POISON");
    if (poison && *poison != '0') {
        // NaN in every float type, -1 or the largest value in the integers: a read of memory that
        // nobody wrote shows in the results.
        std::memset(*pointer, 0xFF, size);
    }
    std::lock_guard<std::mutex> lock(allocations_mutex);
    allocations[*pointer] = size;
    bytes_in_use += size;
    return ACL_SUCCESS;
}

aclError copy(void* target, const void* source, size_t size, aclrtMemcpyKind kind) {
    const int slot = kind >= 0 && kind <= 3 ? kind : ACL_MEMCPY_DEVICE_TO_DEVICE;
    copy_calls[slot]++;
    copy_bytes[slot] += size;
    std::memmove(target, source, size);
    return ACL_SUCCESS;
}

}  // namespace

void count_synchronisation() { synchronisations++; }

EXPORT void npuemu_read_traffic(Traffic* traffic) {
    for (int kind = 0; kind < 4; kind++) {
        traffic->calls[kind] = copy_calls[kind];
        traffic->bytes[kind] = copy_bytes[kind];
    }
    traffic->synchronisations = synchronisations;
    traffic->launches = count_launches();
    traffic->bytes_in_use = bytes_in_use;
}
EXPORT void npuemu_reset_traffic() {
    for (int kind = 0; kind < 4; kind++) {
        copy_calls[kind] = 0;
        copy_bytes[kind] = 0;
    }
    synchronisations = 0;
    reset_launches();
}

EXPORT aclError aclrtMalloc(void** pointer, size_t size, aclrtMemMallocPolicy) {
    return allocate(pointer, size);
}
EXPORT aclError aclrtMallocAlign32(void** pointer, size_t size, aclrtMemMallocPolicy) {
    return allocate(pointer, size);
}
EXPORT aclError aclrtFree(void* pointer) {
    std::lock_guard<std::mutex> lock(allocations_mutex);
    auto found = allocations.find(pointer);
    if (found != allocations.end()) {
        bytes_in_use -= found->second;
        allocations.erase(found);
    }
    std::free(pointer);
    return ACL_SUCCESS;
}
EXPORT aclError aclrtMallocHost(void** pointer, size_t size) {
    return posix_memalign(pointer, kHostAlignment, size ? size : kPadding)
               ? ACL_ERROR_RT_MEMORY_ALLOCATION
               : ACL_SUCCESS;
}
EXPORT aclError aclrtMallocHostWithCfg(void** pointer, uint64_t size, aclrtMallocConfig*) {
    return aclrtMallocHost(pointer, size);
}
EXPORT aclError aclrtFreeHost(void* pointer) {
    std::free(pointer);
    return ACL_SUCCESS;
}

// The copy without a stream waits for the device; the one on a stream does not.
EXPORT aclError aclrtMemcpy(void* target, size_t, const void* source, size_t size,
                            aclrtMemcpyKind kind) {
    count_synchronisation();
    const aclError refused = refuse_in_capture("aclrtMemcpy");
    return refused ? refused : copy(target, source, size, kind);
}
EXPORT aclError aclrtMemcpyAsync(void* target, size_t, const void* source, size_t size,
                                 aclrtMemcpyKind kind, aclrtStream stream) {
    if (kind != ACL_MEMCPY_DEVICE_TO_DEVICE) {
        const aclError refused = refuse_if_captured(stream, "a copy between host and device",
                                                    ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT);
        return refused ? refused : copy(target, source, size, kind);
    }
    return queue(stream, [=] { return copy(target, source, size, kind); });
}
EXPORT aclError aclrtMemset(void* pointer, size_t, int32_t value, size_t size) {
    const aclError refused = refuse_in_capture("aclrtMemset");
    if (!refused) {
        std::memset(pointer, value, size);
    }
    return refused;
}
EXPORT aclError aclrtMemsetAsync(void* pointer, size_t, int32_t value, size_t size,
                                 aclrtStream stream) {
    return queue(stream, [=] {
        std::memset(pointer, value, size);
        return ACL_SUCCESS;
    });
}
EXPORT aclError aclrtGetMemInfo(aclrtMemAttr, size_t* available, size_t* total) {
    *total = kDeviceBytes;
    *available = free_bytes();
    return ACL_SUCCESS;
}
// Refusing virtual addresses keeps the allocator in its plain mode.
EXPORT aclError aclrtReserveMemAddress(void** pointer, size_t, size_t, void*, uint64_t) {
    *pointer = nullptr;
    return ACL_ERROR_RT_FEATURE_NOT_SUPPORT;
}
