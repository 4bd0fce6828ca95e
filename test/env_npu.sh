#!/bin/bash
# Environment for training on Ascend NPUs; to be sourced. Does nothing where CANN is not installed.
# CANN is looked for where its installer noted it, else in /usr/local/Ascend. CANN_INSTALL_PATH, set
# beforehand, overrides both.

if [[ -z ${CANN_INSTALL_PATH:-} && -f /etc/Ascend/ascend_cann_install.info ]]; then
    CANN_INSTALL_PATH=$(sed -n 's/^.*Install_Path[^=]*=//p' /etc/Ascend/ascend_cann_install.info |
        head -n 1)
fi
: "${CANN_INSTALL_PATH:=/usr/local/Ascend}"

cann_script=""
for folder in ascend-toolkit nnae cann; do
    if [[ -z $cann_script && -f $CANN_INSTALL_PATH/$folder/set_env.sh ]]; then
        cann_script=$CANN_INSTALL_PATH/$folder/set_env.sh
    fi
done

if [[ -n $cann_script ]]; then
    # shellcheck disable=SC1090
    source "$cann_script"

    export ASCEND_SLOG_PRINT_TO_STDOUT=0    # host log to the screen: 0 off, 1 on
    export ASCEND_GLOBAL_LOG_LEVEL=3        # 0 debug, 1 info, 2 warning, 3 error
    export ASCEND_GLOBAL_EVENT_ENABLE=0     # event log: 0 off, 1 on
    export TASK_QUEUE_ENABLE="${TASK_QUEUE_ENABLE:-1}"  # 1: queue operators; 2: binary kernels only
    export COMBINED_ENABLE="${COMBINED_ENABLE:-0}"      # PyTorch 1.x only
    export PTCOPY_ENABLE=1                  # PyTorch 1.5 only: copies by a kernel
    export DYNAMIC_OP="ADD#MUL"             # PyTorch 1.5 only
    export HCCL_WHITELIST_DISABLE=1
    export HCCL_CONNECT_TIMEOUT="${HCCL_CONNECT_TIMEOUT:-1800}"
    if [[ -z ${HCCL_IF_IP:-} ]]; then
        HCCL_IF_IP=$(hostname -I 2>/dev/null | awk '{print $1}')
        export HCCL_IF_IP
    fi

    # Device logs at error level only, for the eight devices of a host.
    if command -v msnpureport >/dev/null 2>&1; then
        for device in 0 1 2 3 4 5 6 7; do
            msnpureport -g error -d "$device" >/dev/null 2>&1
        done
        msnpureport -e disable >/dev/null 2>&1
    fi
    ulimit -SHn 512000 2>/dev/null || true
fi
unset cann_script folder device
