#!/bin/bash
# Environment for training on Ascend NPUs; to be sourced. Does nothing where CANN is not installed.
# CANN is looked for where its installer noted it, else in /usr/local/Ascend. CANN_INSTALL_PATH, set
# beforehand, overrides both; so does every variable that is set beforehand its value here.

if [[ -z ${CANN_INSTALL_PATH:-} && -f /etc/Ascend/ascend_cann_install.info ]]; then
    CANN_INSTALL_PATH=$(sed -n 's/^.*Install_Path[^=]*=//p' /etc/Ascend/ascend_cann_install.info |
        head -n 1)
fi
: "${CANN_INSTALL_PATH:=/usr/local/Ascend}"

npu_default() {  # NAME VALUE
    if [[ -z ${!1:-} ]]; then
        export "$1=$2"
    fi
}

# What every CANN and torch_npu knows.
npu_common() {
    npu_default ASCEND_SLOG_PRINT_TO_STDOUT 0  # CANN's log goes to its files, not among our lines
    npu_default ASCEND_GLOBAL_LOG_LEVEL 3      # errors only: anything more slows the host down
    npu_default ASCEND_GLOBAL_EVENT_ENABLE 0   # no event log, for the same reason
    npu_default TASK_QUEUE_ENABLE 1            # a thread of its own launches the operators; see below
    npu_default COMBINED_ENABLE 0              # joins two views into one copy; not proven to pay here
    npu_default HCCL_WHITELIST_DISABLE 1       # without a list of allowed hosts HCCL refuses all
    npu_default HCCL_CONNECT_TIMEOUT 1800      # ranks read data for different times before they meet
    npu_default HCCL_IF_IP "$(hostname -I 2>/dev/null | awk '{print $1}')"  # the first network card
}

# PyTorch 1.5 and 1.8, that is CANN before 7; nobody else reads them.
npu_before_2() {
    npu_default PTCOPY_ENABLE 1                # copies between layouts by a kernel, not by the CPU
    npu_default DYNAMIC_OP "ADD#MUL"           # no recompiling of these two for every new shape
}

# CANN's version, from the file its installer leaves; empty if there is none.
npu_cann_version() {  # FOLDER
    local file
    for file in "$1"/latest/*-linux/ascend_*_install.info "$1"/*-linux/ascend_*_install.info; do
        if [[ -f $file ]]; then
            sed -n 's/^version=//p' "$file" | head -n 1
            return
        fi
    done
}

# The log on the cards at error level, for those that are there. Needs root and the driver's tool.
npu_quiet_cards() {
    local node device
    command -v msnpureport >/dev/null 2>&1 || return 0
    for node in "${NPU_DEV:-/dev}"/davinci[0-9]*; do
        device=${node##*davinci}
        if [[ -e $node && $device =~ ^[0-9]+$ ]]; then
            msnpureport -g error -d "$device" >/dev/null 2>&1 || true
        fi
    done
    msnpureport -e disable >/dev/null 2>&1 || true
}

npu_setup() {
    local folder version
    for folder in ascend-toolkit nnae cann; do
        if [[ -f $CANN_INSTALL_PATH/$folder/set_env.sh ]]; then
            # shellcheck disable=SC1090,SC1091
            source "$CANN_INSTALL_PATH/$folder/set_env.sh"
            version=$(npu_cann_version "$CANN_INSTALL_PATH/$folder")
            npu_common
            # TASK_QUEUE_ENABLE=2 moves work space to that thread as well: Ascend recommends it for
            # the 910B and later, but it takes more memory and does nothing for compiled kernels.
            if [[ -z $version || ${version%%.*} -lt 7 ]]; then
                npu_before_2
            fi
            npu_quiet_cards
            ulimit -SHn 512000 2>/dev/null || true  # workers and ranks share much through files
            return 0
        fi
    done
}

npu_setup
unset -f npu_default npu_common npu_before_2 npu_cann_version npu_quiet_cards npu_setup
