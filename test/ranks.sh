#!/bin/bash
# What the launchers for several cards change of common.sh; sourced in its place. One process drives
# one card. Environment, beside that of common.sh:
#   NPROC                   cards of this host (default: RANK_SIZE, else 8)
#   NNODES, NODE_RANK       hosts, and the number of this one from 0 (default: one host)
#   MASTER_ADDR             address of host 0, needed with several hosts
#   MASTER_PORT             default: a free port on one host, 29688 on several
#   MAX_RESTARTS            how often a failed training starts again from its last checkpoint
#   CPU_AFFINITY=off        leave all cores to all ranks; else each has its share
#                           (utils/distributed/affinity.py)
# Files of each rank: test/output/$RANK/train_$RANK.log. With --device_id=4 the cards 4, 5, .. are
# used and the folders are numbered from there, so several jobs fit on one host.

NPROC=${NPROC:-${RANK_SIZE:-8}}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MAX_RESTARTS=${MAX_RESTARTS:-0}

# shellcheck source=test/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

check_ranks() {
    check_number NPROC 1
    check_number NNODES 1
    check_number NODE_RANK 0
    check_number MAX_RESTARTS 0
    if [[ $NODE_RANK -ge $NNODES ]]; then
        echo "[Error] NODE_RANK is $NODE_RANK, but $NNODES host(s) count from 0 to $((NNODES - 1))"
        exit 1
    fi
    if [[ $NNODES -gt 1 && -z ${MASTER_ADDR:-} ]]; then
        echo "[Error] NNODES is $NNODES, but MASTER_ADDR, the address of host 0, is not set"
        exit 1
    fi
    RANK_SIZE=$((NPROC * NNODES))
    processes=$NPROC
    if [[ $NODE_RANK -gt 0 ]]; then
        # shellcheck disable=SC2329  # train calls it
        read_performance() { :; }  # host 0 has the log lines that count
    fi
}

claim_outputs() {  # [keep]
    local number
    for number in "${numbers[@]}"; do
        claim_output "$number" "$@"
        rm -f "$test_path/output/$number"/eval_failure_*.json
    done
}

# Like start_case, for the folders of all ranks of this host.
start_case_on_ranks() {  # acc|perf|eval [keep]
    local number
    FIRST_DEVICE=${ASCEND_DEVICE_ID:-$device_id}
    check_ranks
    check_number FIRST_DEVICE 0
    first_number=$((FIRST_DEVICE + NODE_RANK * NPROC))
    numbers=()
    for ((number = first_number; number < first_number + NPROC; number++)); do
        numbers+=("$number")
    done
    ASCEND_DEVICE_ID=$first_number
    start_case "$@"
    export NPROC FIRST_DEVICE
    # Failed ranks restart only from checkpoints that are newer than this.
    export LAUNCH_TIME=$start_time
    launcher_log=$output_path/launcher_$first_number.log
}

# Start PROGRAM in one process per card and follow the log of this host's first.
run_python() {  # LOG PROGRAM FLAG...
    local log=$1 program=$2 name=${2%.py} launcher hosts=$NNODES port status=0
    local elastic_files=$output_path/elastic
    shift 2
    if [[ $program == eval.py ]]; then
        hosts=1
    fi
    if [[ $(torch_has_elastic) == yes ]]; then
        # Its own files go here and not to /tmp, where it would leave a folder after every start.
        launcher=(-m utils.distributed.torch_distributed_run --monitor_interval=1
                  "--log_dir=$elastic_files")
        if [[ $program == train.py ]]; then
            launcher+=("--max_restarts=$MAX_RESTARTS")
        fi
    elif [[ $MAX_RESTARTS -gt 0 ]]; then
        echo "[Error] MAX_RESTARTS needs PyTorch 1.9 or newer; give --resume=latest by hand" >&2
        exit 1
    else
        launcher=(-m torch.distributed.launch --use_env)
    fi
    if [[ $hosts -gt 1 ]]; then
        launcher+=("--nnodes=$hosts" "--node_rank=$NODE_RANK" "--master_addr=$MASTER_ADDR")
        port=${MASTER_PORT:-29688}
    else
        launcher+=(--nnodes=1 --node_rank=0 --master_addr=127.0.0.1)
        port=${MASTER_PORT:-$(free_port)}
    fi
    run_logged "$log" "$PYTHON" "${launcher[@]}" "--nproc_per_node=$NPROC" "--master_port=$port" \
        --no_python "$PYTHON" -m utils.distributed.supervise "$test_path/output" "$name" \
        "$PYTHON" -u "$program" "$@" || status=$?
    rm -rf "$elastic_files"
    return "$status"
}

torch_has_elastic() {
    "$PYTHON" -c '
import importlib.util, os
folder = importlib.util.find_spec("torch").submodule_search_locations[0]
print("yes" if os.path.exists(os.path.join(folder, "distributed", "run.py")) else "no")'
}

free_port() {
    "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

# The ranks' supervisors take signals; torch's launcher would kill its processes at once, or restart
# them.
send_signal() {  # SIGNAL
    local number pid sent=no
    for number in "${numbers[@]}"; do
        pid=$(cat "$test_path/output/$number/supervisor.pid" 2>/dev/null)
        if [[ -n $pid ]] && kill -s "$1" "$pid" 2>/dev/null; then
            sent=yes
        fi
    done
    if [[ $sent == no ]]; then
        kill -s "$1" "$child" 2>/dev/null
    fi
}

# Leave with the status of the rank that failed first, after what happened to each.
fail() {  # STATUS PROGRAM LOG [HINT]
    local status=0
    "$PYTHON" -m utils.distributed.supervise --report "$test_path/output" "${2%.py}" "${numbers[@]}" ||
        status=$?
    [[ -z ${4:-} ]] || echo "${4/_1p.sh/_8p.sh}" >&2
    exit "$((status == 0 ? $1 : status))"
}

# Host 0 has the results; the others have done their part.
leave_if_not_first_host() {
    if [[ $NODE_RANK -gt 0 ]]; then
        echo "Host $NODE_RANK is done; host 0 ($MASTER_ADDR) reports."
        exit 0
    fi
}
