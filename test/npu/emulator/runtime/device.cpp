// libascendcl: devices, contexts, versions and errors. All devices of the emulator are the host.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <sstream>
#include <string>

#include "acl/acl.h"
#include "acl/acl_rt.h"
#include "emulator.h"

namespace {

constexpr const char* kDefaultSoc = "Ascend910B1";
constexpr const char* kCannVersion = "8.5.0";
constexpr int64_t kCores = 24;

thread_local int32_t current_device = -1;
thread_local std::string last_error;

uint32_t device_count() {
    const char* text = std::getenv("NPUEMU_DEVICES");
    return text ? static_cast<uint32_t>(std::atoi(text)) : 8;
}

// What CANN says where somebody else has a card, as in reports from hosts with cards.
constexpr const char* kBusy =
    "[PID: 4242] 2026-01-01-00:00:00.000.000 Resource_Busy(EL0005): The resources are busy.\n"
    "        Possible Cause: 1. The resources have been occupied. 2. The device is being reset. 3. "
    "Software is not ready.\n"
    "        Solution: 1. Close applications not in use. 2. Wait for a while and try again.\n";

const char* busy() {
    const char* text = std::getenv("NPUEMU_BUSY");
    return text ? text : "";
}

// Whether NPUEMU_BUSY, numbers with commas between them, names the card.
bool is_held(int32_t device) {
    std::stringstream numbers(busy());
    std::string number;
    while (std::getline(numbers, number, ',')) {
        if (number == std::to_string(device)) {
            return true;
        }
    }
    return false;
}

}  // namespace

// The line goes to the file NPUEMU_LOG, too, with the test that was running: after the first error
// of a process its results mean nothing, so a run of the tests fails if the file is not empty.
EXPORT void npuemu_error(const char* message) {
    last_error = message;
    std::fprintf(stderr, "[npuemu] %s\n", message);
    const char* path = std::getenv("NPUEMU_LOG");
    std::FILE* log = path ? std::fopen(path, "a") : nullptr;
    if (log) {
        const char* test = std::getenv("PYTEST_CURRENT_TEST");
        std::fprintf(log, "%s (%s)\n", message, test ? test : "outside of a test");
        std::fclose(log);
    }
}

EXPORT int npuemu_not_emulated(const char* what) {
    npuemu_error((std::string(what) + " is not emulated").c_str());
    return ACL_ERROR_API_NOT_SUPPORT;
}

EXPORT aclError aclInit(const char*) {
    return std::strcmp(busy(), "driver") == 0 ? ACL_ERROR_RT_DRV_INTERNAL_ERROR : ACL_SUCCESS;
}
EXPORT aclError aclFinalize() { return ACL_SUCCESS; }
EXPORT const char* aclGetRecentErrMsg() {
    return last_error.empty() ? nullptr : last_error.c_str();
}
EXPORT aclError aclrtGetLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }
EXPORT aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }
EXPORT void aclAppLog(aclLogLevel, const char*, const char*, uint32_t, const char*, ...) {}

EXPORT const char* aclrtGetSocName() {
    const char* name = std::getenv("NPUEMU_SOC");
    return name ? name : kDefaultSoc;
}
EXPORT aclError aclsysGetCANNVersion(aclCANNPackageName, aclCANNPackageVersion* version) {
    std::memset(version, 0, sizeof *version);
    std::strcpy(version->version, kCannVersion);
    return ACL_SUCCESS;
}
EXPORT aclError aclsysGetVersionStr(char*, char* version) {
    std::strcpy(version, kCannVersion);
    return ACL_SUCCESS;
}
EXPORT bool npuemu_saturates() {
    // "Ascend910B" is one of the first generation; the second has 910B1 and on.
    static const std::set<std::string> first = {"Ascend910",     "Ascend910A",    "Ascend910B",
                                                "Ascend910ProA", "Ascend910ProB",
                                                "Ascend910PremiumA"};
    return first.count(aclrtGetSocName()) > 0;
}
EXPORT aclError aclGetCannAttribute(aclCannAttr attribute, int32_t* value) {
    *value = attribute == ACL_CANN_ATTR_JIT_COMPILE || !npuemu_saturates();
    return ACL_SUCCESS;
}
EXPORT aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo, int64_t* value) {
    *value = kCores;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtGetDeviceCount(uint32_t* count) {
    *count = device_count();
    return ACL_SUCCESS;
}
EXPORT aclError aclrtSetDevice(int32_t device) {
    if (device < 0 || device >= static_cast<int32_t>(device_count())) {
        return ACL_ERROR_RT_INVALID_DEVICEID;
    }
    if (is_held(device)) {
        last_error = kBusy;  // no npuemu_error: nothing is wrong with the emulator
        return ACL_ERROR_RT_DEV_SETUP_ERROR;
    }
    current_device = device;
    return ACL_SUCCESS;
}
EXPORT aclError aclrtGetDevice(int32_t* device) {
    if (current_device < 0) {
        return ACL_ERROR_RT_CONTEXT_NULL;
    }
    *device = current_device;
    return ACL_SUCCESS;
}
EXPORT aclError aclrtResetDevice(int32_t) { return ACL_SUCCESS; }

// A context is the number of its device plus one, so that null stays "none".
EXPORT aclError aclrtGetCurrentContext(aclrtContext* context) {
    if (current_device < 0) {
        return ACL_ERROR_RT_CONTEXT_NULL;
    }
    *context = reinterpret_cast<aclrtContext>(static_cast<intptr_t>(current_device + 1));
    return ACL_SUCCESS;
}
EXPORT aclError aclrtSetCurrentContext(aclrtContext context) {
    current_device = static_cast<int32_t>(reinterpret_cast<intptr_t>(context)) - 1;
    return ACL_SUCCESS;
}
EXPORT aclError aclrtGetPrimaryCtxState(int32_t, uint32_t* flags, int32_t* active) {
    if (flags) {
        *flags = 0;
    }
    if (active) {
        *active = 1;
    }
    return ACL_SUCCESS;
}

EXPORT aclError aclrtDeviceCanAccessPeer(int32_t* can, int32_t, int32_t) {
    *can = 1;
    return ACL_SUCCESS;
}
EXPORT aclError aclrtDeviceEnablePeerAccess(int32_t, uint32_t) { return ACL_SUCCESS; }
EXPORT aclError aclrtDeviceGetBareTgid(int32_t* process) {
    *process = getpid();
    return ACL_SUCCESS;
}

EXPORT aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode) { return ACL_SUCCESS; }
EXPORT aclError aclrtSetOpExecuteTimeOut(uint32_t) { return ACL_SUCCESS; }
EXPORT aclError aclrtSetOpWaitTimeout(uint32_t) { return ACL_SUCCESS; }
