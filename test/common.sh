#!/bin/bash
# What the launchers share; they source it. Their output follows the conventions of ModelZoo:
#   test/output/$ASCEND_DEVICE_ID/train_$ASCEND_DEVICE_ID.log   everything the training printed
#   test/output/$ASCEND_DEVICE_ID/eval_$ASCEND_DEVICE_ID.log    everything the evaluation printed
#   test/output/$ASCEND_DEVICE_ID/train_${CaseName}_loss.txt    the loss of every log line
#   test/output/$ASCEND_DEVICE_ID/${CaseName}.log               the results, key = value
# Environment: PYTHON (interpreter, default python3), ASCEND_DEVICE_ID (wins over --device_id),
# etp_running_flag=true (the platform has set up CANN already).

Network="YOLACT"
RANK_SIZE=1
processes=1  # on this host
PYTHON=${PYTHON:-python3}
caller_path=$PWD
test_path=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
needed_commands=(awk cat date dirname flock mkdir rm sed tail)
root_path=$(dirname "$test_path")
shown_log_lines=20

data_path=""
pth_path=""
batch_size=8
device_id=0
node_device=auto
validation=(--validation_epoch=-1)  # the weights are scored at the end
case_flags=()  # defaults of one launcher
flags=()       # what the caller gave, for the Python program

# Leave with a sentence in the wording that ModelZoo's tools look for.
require_argument() {  # NAME VALUE
    if [[ -z $2 ]]; then
        echo "[Error] para \"$1\" must be confing"
        exit 1
    fi
}

# What is missing is said before the training, not after it.
require_commands() {
    local command missing=()
    for command in "${needed_commands[@]}"; do
        command -v "$command" >/dev/null || missing+=("$command")
    done
    if [[ ${#missing[@]} -gt 0 ]]; then
        echo "[Error] the launchers need these commands, which are not on PATH: ${missing[*]}"
        exit 1
    fi
}

# Leave unless variable NAME holds a whole number; 08 becomes 8, which bash would read as octal.
check_number() {  # NAME SMALLEST
    if [[ ! ${!1} =~ ^[0-9]{1,9}$ || $((10#${!1})) -lt $2 ]]; then
        echo "[Error] $1 is '${!1}', expected a whole number from $2 upwards"
        exit 1
    fi
    printf -v "$1" %d "$((10#${!1}))"
}

# Write a path that exists as seen by the caller as an absolute one; leave any other as it is.
from_caller() {  # PATH
    if [[ -n $1 && $1 != /* && -e $caller_path/$1 ]]; then
        echo "$caller_path/$1"
    else
        echo "$1"
    fi
}

# --save-folder is --save_folder, as for the programs.
own_name() {  # NAME
    local words=${1#--}
    [[ $1 != --* ]] || words=--${words//-/_}
    printf '%s\n' "$words"
}

# The programs run in the root folder: give them the paths among their flags as the caller sees
# them. Those of files to read may also be words (latest) or paths below the root.
flags_from_caller() {
    local number name value
    [[ $caller_path != "$root_path" ]] || return 0
    for ((number = 0; number < ${#flags[@]}; number++)); do
        name=$(own_name "${flags[number]%%=*}") value=${flags[number]#*=}
        if [[ ${flags[number]} != *=* ]]; then  # --NAME VALUE
            value=${flags[number + 1]:-}
            [[ -n $value && $value != --* ]] || continue
        fi
        case $name in
            --save_folder | --log_folder | --project | --tensorboard | --bbox_det_file | \
                --mask_det_file | --per_class_file)
                [[ -z $value || $value == /* ]] || value=$caller_path/$value ;;
            --resume | --weights | --rerun | --backbone_weights | --config | --train_images | \
                --train_info | --valid_images | --valid_info | --run_folder)
                value=$(from_caller "$value") ;;
            *) continue ;;
        esac
        if [[ ${flags[number]} != *=* ]]; then
            number=$((number + 1))
            flags[number]=$value
        else
            flags[number]=$name=$value
        fi
    done
}

# As ModelZoo has it.
name_network() {  # RECIPE
    Network=YOLACT
    [[ ${1##*/} != yolact_plus* ]] || Network=YOLACT-plus
}

# Read the launcher's own arguments; what belongs to the Python program is kept in `flags`.
parse_arguments() {  # [DATA] [--NAME=VALUE | --NAME VALUE]...
    local name value words
    if [[ ${1:-} == -h || ${1:-} == --help ]]; then
        sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
        exit 0
    fi
    require_commands
    while [[ $# -gt 0 ]]; do
        name=$(own_name "${1%%=*}") value="" words=1
        if [[ $1 != -* && -z $data_path ]]; then
            name=--data_path value=$1
        elif [[ $1 == *=* ]]; then
            value=${1#*=}
        elif [[ $# -gt 1 && $2 != --* ]]; then
            value=$2 words=2
        fi
        case $name in
            --data_path | --data) data_path=$value ;;
            --device_id) device_id=$value ;;
            --pth_path) pth_path=$value ;;
            --batch_size | --batch) batch_size=$value && flags+=("${@:1:words}") ;;
            --node_device | --eval_device | --device)
                node_device=$value
                if [[ $value =~ ^(([a-z]+):)?([0-9]+)$ ]]; then  # npu:1, or 1
                    node_device=${BASH_REMATCH[2]:-card} device_id=${BASH_REMATCH[3]}
                fi ;;
            --config)
                flags+=("${@:1:words}")
                name_network "$value"
                ;;
            *) flags+=("${@:1:words}") ;;
        esac
        shift "$words"
    done
    require_argument data_path "$data_path"
    data_path=$(from_caller "$data_path")
    pth_path=$(from_caller "$pth_path")
    flags_from_caller
    if [[ $batch_size =~ ^[0-9]+$ ]]; then
        check_number batch_size 1
    fi
}

# The number names a folder that is emptied: it has to be a number.
choose_device() {
    export ASCEND_DEVICE_ID=${ASCEND_DEVICE_ID:-$device_id}
    check_number ASCEND_DEVICE_ID 0
    echo "device id is ${ASCEND_DEVICE_ID}"
}

# Empty the output folder of device NUMBER, or keep it, and hold it until this launcher and all that
# it started have ended: another one would take the log away, and the first report its results.
claim_output() {  # NUMBER [keep]
    local descriptor
    mkdir -p "$test_path/output" || exit 1
    exec {descriptor}> "$test_path/output/$1.lock" || exit 1
    if ! flock -n "$descriptor"; then
        echo "[Error] another launcher, or a training that one left behind, is using" \
            "test/output/$1: wait until it has ended, or choose another device with --device_id"
        exit 1
    fi
    if [[ ${2:-} != keep ]]; then
        rm -rf "${test_path:?}/output/$1"
    fi
    if ! mkdir -p "$test_path/output/$1" || [[ ! -w $test_path/output/$1 ]]; then
        echo "[Error] the folder $test_path/output/$1 cannot be written; the logs go there"
        exit 1
    fi
}

claim_outputs() {  # [keep]
    claim_output "$ASCEND_DEVICE_ID" "$@"
}

prepare_environment() {
    if [[ ${etp_running_flag:-} != true ]]; then
        # shellcheck source=test/env_npu.sh
        source "$test_path/env_npu.sh"
    fi
    export RANK_SIZE
    export RANK_ID=0
    export LAUNCHER_PID=$$  # what is started here ends when this shell does, however that happens
    unset RANK WORLD_SIZE LOCAL_RANK
    # The programs import torch_npu themselves where they use it. Left to PyTorch, a torch_npu that
    # finds no CANN would stop `import torch`, on the CPU too.
    export TORCH_DEVICE_BACKEND_AUTOLOAD=${TORCH_DEVICE_BACKEND_AUTOLOAD:-0}
}

name_case() {  # acc|perf|eval|infer
    CaseName=${Network}_bs${batch_size}_${RANK_SIZE}p_$1
    loss_file=$output_path/train_${CaseName}_loss.txt
    case_file=$output_path/$CaseName.log
}

# Name the case and its files, and empty the output folder unless told to keep it.
start_case() {  # acc|perf|eval|infer [keep]
    choose_device
    output_path=$test_path/output/$ASCEND_DEVICE_ID
    train_log=$output_path/train_$ASCEND_DEVICE_ID.log
    eval_log=$output_path/eval_$ASCEND_DEVICE_ID.log
    name_case "$1"
    claim_outputs "${@:2}"
    cd "$root_path" || exit 1
    prepare_environment
    start_time=$(date +%s)
    trap 'pass_on TERM 129' HUP
    trap 'pass_on INT 130' INT
    trap 'pass_on TERM 138' USR1
    trap 'pass_on TERM 143' TERM
    trap '' PIPE  # nobody reads any more: what is written to files is written all the same
}

child=""
signalled=""

pass_on() {  # SIGNAL EXIT_STATUS
    signalled=$2
    if [[ -z $child ]]; then
        exit "$2"
    fi
    send_signal "$1"
}

send_signal() {  # SIGNAL
    kill -s "$1" "$child" 2>/dev/null
}

# Show what comes into LOG until the program has ended.
follow() {  # LOG
    tail -n +1 -f -s 0.2 --pid="$child" "$1"
}

# Run a command with all its output in LOG and on the screen; return its exit status.
run_logged() {  # LOG COMMAND...
    local log=$1 status=0 last_signal follower
    shift
    : > "$log"
    # Job control, because without it bash starts background processes deaf to SIGINT.
    set -m
    "$@" >> "${launcher_log:-$log}" 2>&1 < /dev/null &
    child=$!
    set +m
    follow "$log" &
    follower=$!
    while true; do  # a signal ends `wait` before the child has ended
        last_signal=$signalled
        signalled=""
        status=0
        wait "$child" || status=$?
        [[ -n $signalled ]] || break
    done
    child=""
    wait "$follower"
    if [[ -n $last_signal ]]; then
        echo "[Error] rank 0 was interrupted by SIG$(kill -l "$last_signal"); its log: $log" >&2
        exit "$last_signal"
    fi
    return "$status"
}

run_python() {  # LOG PROGRAM FLAG...
    local log=$1
    shift
    run_logged "$log" "$PYTHON" -u "$@"
}

# Leave with the status of a program that failed, after the last lines of its log.
fail() {  # STATUS PROGRAM LOG [HINT]
    {
        echo "[Error] $2 ended with exit code $1; the last lines of $3:"
        tail -n "$shown_log_lines" "$3"
        [[ -z ${4:-} ]] || echo "$4"
    } >&2
    exit "$1"
}

count_workers() {
    local cores
    cores=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 1)  # nproc would return that variable
    cores=$((cores / processes))
    echo $((cores < 1 ? 1 : cores < 8 ? cores : 8))
}

# Train with the launchers' defaults, then those of the case, then what the caller gave: of a flag
# given twice, the last one counts.
train() {
    local status=0 resume=()
    if [[ -n $pth_path ]]; then
        resume=("--resume=$pth_path")
    fi
    run_python "$train_log" train.py "--data=$data_path" --seed=1234 \
        "--num_workers=$(count_workers)" "--batch_size=$batch_size" \
        "--node_device=$node_device" "${validation[@]}" "${case_flags[@]}" "${resume[@]}" "${flags[@]}" || status=$?
    if [[ $status -ne 0 ]]; then
        fail "$status" train.py "$train_log"
    fi
    read_performance
}

# Set FPS (images per second over the measured steps) and the losses from the training's log.
read_performance() {
    if [[ $batch_size == auto ]]; then
        batch_size=$(sed -n 's/^Batch size auto : \([0-9]*\) per card.*/\1/p' "$train_log" | tail -n 1)
    fi
    FPS=$(sed -n 's/.*|| avg_fps: *\([0-9.]*\) || GPU: 0$/\1/p' "$train_log" | tail -n 1)
    FPS=${FPS:-0.000}
    if [[ $FPS =~ ^[0.]+$ ]]; then
        echo "No speed was measured: avg_fps counts from step --fps_start_iter on; train longer or" \
            "set it lower."
        TrainingTime=0.00
    else
        TrainingTime=$(awk -v images=$((batch_size * RANK_SIZE)) -v fps="$FPS" \
            'BEGIN { printf "%.2f", images * 1000 / fps }')
    fi
    sed -n 's/.*| T: *\([^ ]*\) || ETA: .*|| GPU: 0$/\1/p' "$train_log" > "$loss_file"
    ActualLoss=$(tail -n 1 "$loss_file")
}

# Score WEIGHTS and set train_accuracy from the rows of the table of average precisions.
evaluate() {  # WEIGHTS [FLAG...]
    local status=0 weights=$1 again
    printf -v again '%q %q --pth_path=%q' "${test_path#"$caller_path/"}/train_eval_1p.sh" \
        "$data_path" "$weights"
    shift
    run_python "$eval_log" eval.py "--trained_model=$weights" \
        "--val_data=$data_path" "--eval_device=$node_device" "$@" || status=$?
    if [[ $status -ne 0 ]]; then
        fail "$status" eval.py "$eval_log" \
            "To evaluate again: bash $again"
    fi
    train_accuracy="box mAP:$(read_accuracy box), mask mAP:$(read_accuracy mask)"
}

read_accuracy() {  # box|mask
    local value
    value=$(awk -F '|' -v row="$1" '{ name = $1; gsub(/ /, "", name) }
        name == row && NF > 2 { value = $2 } END { print value }' "$eval_log")
    echo "${value:- not measured }"
}

# Score the weights that this run's training saved last.
evaluate_final_weights() {
    local weights
    weights=$(sed -n 's/^.*Final weights : //p' "$train_log" | tail -n 1)
    if [[ -z $weights ]]; then
        echo "[Error] $train_log names no final weights" >&2
        exit 1
    fi
    evaluate "$weights" --run_folder=auto
    cat "$eval_log" >> "$train_log"
}

# Print the result and write the case file, with the lines that this run has values for.
report() {
    local e2e_time=$(($(date +%s) - start_time))
    echo "------------------ Final result ------------------"
    [[ -z ${FPS:-} ]] || echo "Final Performance images/sec : $FPS"
    [[ -z ${train_accuracy:-} ]] || echo "Final Train Accuracy : $train_accuracy"
    echo "E2E Training Duration sec : $e2e_time"
    {
        echo "Network = $Network"
        echo "RankSize = $RANK_SIZE"
        echo "BatchSize = $batch_size"
        echo "DeviceType = $(uname -m)"
        echo "CaseName = $CaseName"
        [[ -z ${FPS:-} ]] || echo "ActualFPS = $FPS"
        [[ -z ${FPS:-} ]] || echo "TrainingTime = $TrainingTime"
        [[ -z ${train_accuracy:-} ]] || echo "TrainAccuracy = $train_accuracy"
        [[ -z ${FPS:-} ]] || echo "ActualLoss = $ActualLoss"
        echo "E2ETrainingTime = $e2e_time"
    } > "$case_file"
}
