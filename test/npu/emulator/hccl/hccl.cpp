// libhccl: collectives among processes of one host, over POSIX shared memory.
//
// Each communicator is one shared segment: a barrier, and a slot of kSlot bytes per rank. A
// collective goes through its buffer slot by slot: every rank publishes its part, all wait, every
// rank reads what it needs, all wait. Everything is done when the call returns.
#include "hccl/hccl.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <string>

#include "emulator.h"
#include "work.h"

namespace {

constexpr size_t kSlot = 1 << 20;
constexpr size_t kPage = 4096;
constexpr uint32_t kMostRanks = 16;
constexpr time_t kTimeoutSeconds = 300;
constexpr unsigned kSpins = 1000;  // yields before sleeping
constexpr useconds_t kSleepMicroseconds = 50;
constexpr unsigned kChecksPerClock = 1024;

struct Header {
    std::atomic<uint32_t> joined;
    std::atomic<uint32_t> arrived;
    std::atomic<uint32_t> generation;
};
struct Communicator {
    Header* header;
    char* slots;
    uint32_t size;
    uint32_t rank;
    std::string name;
    size_t bytes;
};

Communicator* communicator_of(HcclComm handle) { return static_cast<Communicator*>(handle); }
char* slot(const Communicator& group, uint32_t rank) { return group.slots + rank * kSlot; }

template <typename Condition>
bool wait_for(Condition condition) {
    const time_t start = std::time(nullptr);
    for (unsigned tries = 0; !condition(); tries++) {
        if (tries > kSpins) {
            usleep(kSleepMicroseconds);
        } else {
            sched_yield();
        }
        if (tries % kChecksPerClock == 0 && std::time(nullptr) - start > kTimeoutSeconds) {
            std::fprintf(stderr, "[npuemu] hccl: another rank did not come within %ld s\n",
                         static_cast<long>(kTimeoutSeconds));
            return false;
        }
    }
    return true;
}

bool barrier(const Communicator& group) {
    Header& header = *group.header;
    const uint32_t generation = header.generation;
    if (header.arrived.fetch_add(1) + 1 == group.size) {
        header.arrived = 0;
        header.generation++;
        return true;
    }
    return wait_for([&] { return header.generation != generation; });
}

size_t element_size(HcclDataType type) {
    switch (type) {
        case HCCL_DATA_TYPE_INT8:
        case HCCL_DATA_TYPE_UINT8:
            return 1;
        case HCCL_DATA_TYPE_FP16:
        case HCCL_DATA_TYPE_BFP16:
            return 2;
        case HCCL_DATA_TYPE_INT32:
        case HCCL_DATA_TYPE_FP32:
            return 4;
        case HCCL_DATA_TYPE_INT64:
        case HCCL_DATA_TYPE_FP64:
            return 8;
        default:
            return 0;
    }
}

// bfloat16: the upper half of a float, rounded to the nearest even one. NaN stays NaN.
class Bfloat16 {
   public:
    explicit Bfloat16(float value) {
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        const bool is_nan = value != value;
        upper_ = static_cast<uint16_t>(
            is_nan ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
    explicit operator float() const {
        const uint32_t bits = static_cast<uint32_t>(upper_) << 16;
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }

   private:
    uint16_t upper_;
};

// target[i] = target[i] (operation) source[i], computed as Wide.
template <typename T, typename Wide>
void combine(void* target, const void* source, size_t count, HcclReduceOp operation) {
    T* result = static_cast<T*>(target);
    const T* other = static_cast<const T*>(source);
    for (size_t i = 0; i < count; i++) {
        const Wide a = static_cast<Wide>(result[i]);
        const Wide b = static_cast<Wide>(other[i]);
        Wide value = a + b;
        if (operation == HCCL_REDUCE_PROD) {
            value = a * b;
        } else if (operation == HCCL_REDUCE_MAX) {
            value = std::max(a, b);
        } else if (operation == HCCL_REDUCE_MIN) {
            value = std::min(a, b);
        }
        result[i] = static_cast<T>(value);
    }
}
void combine(void* target, const void* source, size_t count, HcclDataType type,
             HcclReduceOp operation) {
    switch (type) {
        case HCCL_DATA_TYPE_INT8:
            return combine<int8_t, int>(target, source, count, operation);
        case HCCL_DATA_TYPE_UINT8:
            return combine<uint8_t, int>(target, source, count, operation);
        case HCCL_DATA_TYPE_INT32:
            return combine<int32_t, int32_t>(target, source, count, operation);
        case HCCL_DATA_TYPE_INT64:
            return combine<int64_t, int64_t>(target, source, count, operation);
        case HCCL_DATA_TYPE_FP16:
            return combine<_Float16, float>(target, source, count, operation);
        case HCCL_DATA_TYPE_BFP16:
            return combine<Bfloat16, float>(target, source, count, operation);
        case HCCL_DATA_TYPE_FP64:
            return combine<double, double>(target, source, count, operation);
        default:
            return combine<float, float>(target, source, count, operation);
    }
}

// Publish `bytes` of `source` (null: nothing) slot by slot, and call use(offset, size) while the
// slots of all ranks hold the part of that size from that offset on.
template <typename Use>
HcclResult exchange(const Communicator& group, aclrtStream stream, const void* source, size_t bytes,
                    Use use) {
    return static_cast<HcclResult>(queue(stream, [=, &group] {
        for (size_t offset = 0; offset < bytes; offset += kSlot) {
            const size_t size = std::min(kSlot, bytes - offset);
            if (source) {
                const char* part = static_cast<const char*>(source) + offset;
                std::memcpy(slot(group, group.rank), part, size);
            }
            if (!barrier(group)) {
                return HCCL_E_TIMEOUT;
            }
            use(offset, size);
            if (!barrier(group)) {
                return HCCL_E_TIMEOUT;
            }
        }
        return HCCL_SUCCESS;
    }));
}

HcclResult refuse_type(HcclDataType type) {
    const std::string what = "HcclDataType " + std::to_string(static_cast<int>(type));
    npuemu_not_emulated(what.c_str());
    return HCCL_E_NOT_SUPPORT;
}

// The root's information is the name of the segment; the first rank to come creates it.
HcclResult join(uint32_t size, const HcclRootInfo* root, uint32_t rank, HcclComm* handle) {
    if (size > kMostRanks) {
        return HCCL_E_NOT_SUPPORT;
    }
    const size_t header_bytes = (sizeof(Header) + kPage - 1) / kPage * kPage;
    const size_t bytes = header_bytes + size * kSlot;
    const char* name = reinterpret_cast<const char*>(root);
    const int file = shm_open(name, O_CREAT | O_RDWR, 0600);
    if (file < 0 || ftruncate(file, static_cast<off_t>(bytes)) != 0) {
        return HCCL_E_SYSCALL;
    }
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory == MAP_FAILED) {
        return HCCL_E_MEMORY;
    }
    char* base = static_cast<char*>(memory);
    auto* group = new Communicator{
        static_cast<Header*>(memory), base + header_bytes, size, rank, name, bytes};
    group->header->joined++;
    const bool complete = wait_for([&] { return group->header->joined >= size; });
    if (!complete || !barrier(*group)) {
        return HCCL_E_TIMEOUT;
    }
    if (rank == 0) {
        shm_unlink(name);
    }
    *handle = group;
    return HCCL_SUCCESS;
}

}  // namespace

EXPORT HcclResult HcclGetRootInfo(HcclRootInfo* root) {
    static std::atomic<int> groups{0};
    std::memset(root, 0, sizeof *root);
    std::snprintf(reinterpret_cast<char*>(root), NAME_MAX, "/npuemu_%d_%d_%ld", getpid(), groups++,
                  static_cast<long>(std::time(nullptr)));
    return HCCL_SUCCESS;
}
EXPORT HcclResult HcclCommInitRootInfo(uint32_t size, const HcclRootInfo* root, uint32_t rank,
                                       HcclComm* handle) {
    return join(size, root, rank, handle);
}
EXPORT HcclResult HcclCommInitRootInfoConfig(uint32_t size, const HcclRootInfo* root, uint32_t rank,
                                             const HcclCommConfig*, HcclComm* handle) {
    return join(size, root, rank, handle);
}
EXPORT HcclResult HcclCommDestroy(HcclComm handle) {
    Communicator* group = communicator_of(handle);
    munmap(group->header, group->bytes);
    delete group;
    return HCCL_SUCCESS;
}
EXPORT HcclResult HcclGetCommAsyncError(HcclComm, HcclResult* error) {
    *error = HCCL_SUCCESS;
    return HCCL_SUCCESS;
}
EXPORT HcclResult HcclGetCommName(HcclComm handle, char* name) {
    std::strcpy(name, communicator_of(handle)->name.c_str());
    return HCCL_SUCCESS;
}
EXPORT const char* HcclGetErrorString(HcclResult code) {
    static thread_local char text[32];
    std::snprintf(text, sizeof text, "hccl error %d", static_cast<int>(code));
    return text;
}
EXPORT HcclResult HcclGetRankSize(HcclComm handle, uint32_t* size) {
    *size = communicator_of(handle)->size;
    return HCCL_SUCCESS;
}
EXPORT HcclResult HcclGetRankId(HcclComm handle, uint32_t* rank) {
    *rank = communicator_of(handle)->rank;
    return HCCL_SUCCESS;
}
EXPORT uint32_t HcclGetCommConfigCapability() { return 0; }
EXPORT HcclResult HcclSetConfig(HcclConfig, HcclConfigValue) { return HCCL_SUCCESS; }
EXPORT HcclResult HcclGroupStart() { return HCCL_SUCCESS; }
EXPORT HcclResult HcclGroupEnd() { return HCCL_SUCCESS; }

EXPORT HcclResult HcclBarrier(HcclComm handle, aclrtStream stream) {
    return exchange(*communicator_of(handle), stream, nullptr, 1, [](size_t, size_t) {});
}
EXPORT HcclResult HcclAllReduce(void* source, void* target, uint64_t count, HcclDataType type,
                                HcclReduceOp operation, HcclComm handle, aclrtStream stream) {
    const Communicator& group = *communicator_of(handle);
    const size_t element = element_size(type);
    if (element == 0) {
        return refuse_type(type);
    }
    return exchange(group, stream, source, count * element, [=, &group](size_t offset, size_t size) {
        char* part = static_cast<char*>(target) + offset;
        std::memcpy(part, slot(group, 0), size);
        for (uint32_t rank = 1; rank < group.size; rank++) {
            combine(part, slot(group, rank), size / element, type, operation);
        }
    });
}
EXPORT HcclResult HcclBroadcast(void* buffer, uint64_t count, HcclDataType type, uint32_t root,
                                HcclComm handle, aclrtStream stream) {
    const Communicator& group = *communicator_of(handle);
    const size_t element = element_size(type);
    if (element == 0) {
        return refuse_type(type);
    }
    const void* source = group.rank == root ? buffer : nullptr;
    return exchange(group, stream, source, count * element, [=, &group](size_t offset, size_t size) {
        if (group.rank != root) {
            std::memcpy(static_cast<char*>(buffer) + offset, slot(group, root), size);
        }
    });
}
EXPORT HcclResult HcclAllGather(void* source, void* target, uint64_t count, HcclDataType type,
                                HcclComm handle, aclrtStream stream) {
    const Communicator& group = *communicator_of(handle);
    const size_t bytes = count * element_size(type);
    if (bytes == 0 && count > 0) {
        return refuse_type(type);
    }
    return exchange(group, stream, source, bytes, [=, &group](size_t offset, size_t size) {
        for (uint32_t rank = 0; rank < group.size; rank++) {
            std::memcpy(static_cast<char*>(target) + rank * bytes + offset, slot(group, rank),
                        size);
        }
    });
}
