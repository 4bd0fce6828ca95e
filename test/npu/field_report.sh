#!/bin/bash
# Measure this project on Ascend cards and write one text file to send back.
#   bash test/npu/field_report.sh [--steps=200] [--data=/data/coco] [--output=field_report.txt]
# More: --config=yolact_base --batch_size=8 (per card) --audit_size=SIDE (a smaller input for the
# audit and the profile), --tests="test/unit test/parity test/npu" (the suite; "none" leaves it out)
# --cards=N (at most). Without --data it trains on drawn shapes, made for the purpose. An hour on a
# card.
#
# Parts: versions, test suite, speed of one card, the same with one thing changed at a time (device
# graph, O1, O2, the fused loss, batches of 1, 4 and auto, internal formats, compile mode), a profile
# of 20 steps, speed of all cards (at most 8) and of their all-reduce, audit of a step, losses on the
# NPU against the CPU, and a verdict on what to set. A part that fails is recorded and the rest goes
# on; the exit code is then 1 (2: a mistake in the arguments). What a card or recipe refuses is a
# result. On a host without a card everything is emulated, and the file says so. Environment: as for
# test/npu/make_env.sh. It empties test/output, as the launchers do.
#
# The file names versions, the models of card and processor, and numbers. The names of this host and
# of the user, home and this folder are replaced; nothing is read from the data but its images' number.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
steps=200
data=""
output=field_report.txt
config=yolact_base
batch_size=8
audit_size=""
cards=8
tests="test/unit test/parity test/npu"

while [[ $# -gt 0 ]]; do
    argument=$1 name=${1%%=*} value=${1#*=}
    if [[ $1 == --*=* ]]; then
        shift
    elif [[ $1 == -h || $1 == --help ]]; then
        sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0
    elif [[ $1 == --* && $# -gt 1 ]]; then  # --NAME VALUE
        value=$2
        shift 2
    else
        name=""
    fi
    case $name in
        --steps) steps=$value ;;
        --data | --data_path) data=$value ;;
        --output) output=$value ;;
        --config) config=$value ;;
        --batch_size) batch_size=$value ;;
        --audit_size) audit_size=$value ;;
        --cards) cards=$value ;;
        --tests) tests=$value ;;
        *) echo "error: unknown argument '$argument'; --help lists the known ones" >&2 && exit 2 ;;
    esac
done
for name in steps batch_size cards; do
    if [[ ! ${!name} =~ ^[1-9][0-9]*$ ]]; then
        echo "error: --$name is '${!name}', expected a whole number of at least 1" >&2
        exit 2
    fi
done
if [[ -n $audit_size && ! $audit_size =~ ^[1-9][0-9]*$ ]]; then
    echo "error: --audit_size is '$audit_size', expected a whole number of at least 1" >&2
    exit 2
fi
case $output in /*) ;; *) output=$PWD/$output ;; esac
if [[ -n $data && ! -e $data ]]; then
    echo "error: --data is '$data', which does not exist" >&2
    exit 2
elif [[ -n $data ]]; then
    data=$(cd "$(dirname "$data")" && pwd)/$(basename "$data")
fi
if [[ -d $output ]]; then
    echo "error: --output is '$output', which is a folder; name a file" >&2
    exit 2
elif [[ ! -w $(dirname "$output") ]]; then
    echo "error: --output is '$output', whose folder does not exist or is not writable" >&2
    exit 2
fi

work=$(mktemp -d) || exit 1
summary=$work/summary
parts=()
failed=0
started=$SECONDS

# Replace what is about the user and not about the card.
anonymous() {
    local expressions=()
    hide() {  # TEXT WORD [BORDER]
        local literal
        literal=$(printf '%s' "$1" | sed 's/[][\\.*^$|]/\\&/g')
        expressions+=(-e "s|${3:-}$literal${3:-}|$2|g")
    }
    [[ -z $data ]] || hide "$data" "<data>"  # the longer ones first
    hide "$work" "<work>"
    hide "$root" "<project>"
    [[ ${#HOME} -lt 2 ]] || hide "$HOME" "<home>"
    [[ -z $(hostname 2>/dev/null) ]] || hide "$(hostname)" "<host>" '\b'
    [[ -z $(id -un 2>/dev/null) || $(id -un) == root ]] || hide "$(id -un)" "<user>" '\b'
    sed "${expressions[@]}"
}

write_report() {
    {
        echo "Field report of YOLACT on Ascend"
        echo "Send this file back as it is. It holds versions and numbers; names of the host and the"
        echo "user and their folders are replaced by <host>, <user>, <home>, <project>, <data>."
        echo
        cat "$summary"
        echo "parts failed: $failed; $((SECONDS - started)) s in all"
        for part in "${parts[@]}"; do
            printf '\n======== %s\n' "$part"
            cat "$work/$part.log"
        done
    } | anonymous > "$output.tmp" && mv "$output.tmp" "$output"
}

stop() {
    echo "stopped before the end" >> "$summary"
    failed=$((failed + 1))
    write_report
    rm -rf "$work"
    exit 130
}
trap stop INT TERM

# Run a part; keep its output; note in the summary how it ended, with the line that RESULT prints.
part() {  # NAME RESULT COMMAND...
    local name=$1 result=$2 status=0 start=$SECONDS line
    shift 2
    echo "== $name"
    parts+=("$name")
    : > "$work/$name.log"
    "$@" > "$work/$name.log" 2>&1 < /dev/null || status=$?
    line=$("$result" "$work/$name.log" 2>/dev/null | tr '\n' ' ')
    if [[ $status -ne 0 ]]; then
        failed=$((failed + 1))
        line="FAILED with exit code $status; $line"
    fi
    printf '%-10s %s(%s s)\n' "$name:" "$line" "$((SECONDS - start))" | tee -a "$summary"
}

last_line() { tail -n 1 "$1"; }
speed_line() { grep -h "^Final Performance\|^TrainingTime\|^ActualLoss\|^error: --" "$1"; }
audit_line() { grep -h "emulated\|measured by\|^step 6\|gates" "$1"; }
advice_line() { grep -h "^Set: \|^error: " "$1"; }
versions_line() { grep -h "^device " "$1"; }

versions() {
    eval "$environment"
    local status=0
    "$PYTHON" - <<'PYTHON' || status=$?
from utils.device import cards_of_host, describe, select_device
print(describe(select_device("npu")))
print("cards:", cards_of_host("npu"))
PYTHON
    "$PYTHON" -m pip list 2>/dev/null | grep -i "^torch\|^numpy\|^opencv\|^apex\|^pycocotools"
    uname -srm
    grep -m 1 "model name" /proc/cpuinfo
    echo "cores: $(env -u OMP_NUM_THREADS nproc)"  # nproc would return that variable
    grep "MemTotal" /proc/meminfo
    if command -v npu-smi > /dev/null; then
        npu-smi info | sed '/Process id/,$d'  # not what else is running there
    else
        echo "npu-smi: not found"
    fi
    env | grep "^ASCEND_\|^HCCL_\|^NPU\|^PYTORCH_NPU\|^TASK_QUEUE\|^CPU_AFF\|^COMBINED" |
        grep -v "_IP=" | sort
    return "$status"
}

suite() {
    eval "$environment"
    # shellcheck disable=SC2086
    "$PYTHON" -m pytest -q -p no:cacheprovider --device npu $tests
}

# Steps at the recipe's learning rate from random weights: only their speed counts.
speed() {  # LAUNCHER [FLAG]
    eval "$environment"
    export ASCEND_LAUNCH_BLOCKING=0
    bash "test/$1" "--data_path=$shapes" "--config=$config" "--batch_size=$batch_size" \
        --no_autoscale "--max_iter=$steps" "--fps_start_iter=$((steps / 10))" --node_device=npu \
        --backbone_weights=none "--save_folder=$work/weights" --no_log --no_run_folder --train_performance \
        "${@:2}"
    local status=$?
    cat "test/output/${ASCEND_DEVICE_ID:-0}"/*_perf.log 2>/dev/null
    return "$status"
}

# The same with one thing changed. That this card or recipe refuses it is a result, too.
speed_with() {  # FLAG
    local output status=0
    output=$(speed train_performance_1p.sh "$1" 2>&1) || status=$?
    echo "$output"
    if grep -q "^error: ${1%%=*}\b" <<< "$output"; then
        return 0
    fi
    return "$status"
}

profile() {
    eval "$environment"
    "$PYTHON" test/npu/profile_step.py --config "$config" --batch_size "$batch_size" \
        ${audit_size:+--max_size "$audit_size"}
}

bandwidth() {
    eval "$environment"
    "$PYTHON" -m torch.distributed.launch --use_env "--nproc_per_node=$NPROC" \
        "--master_port=$(free_port)" test/npu/hccl_bandwidth.py
}

free_port() {
    "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

# All speeds of one card but that of the settings as they are.
variants() {
    local name flag
    while read -r name flag; do
        part "$name" speed_line speed_with "$flag"
    done <<< "graph --device_graph
fused_loss --fused_loss
O1 --opt_level=O1
O2 --opt_level=O2
batch_1 --batch_size=1
batch_4 --batch_size=4
batch_auto --batch_size=auto
internal_format --internal_format"
    if [[ $emulated == yes ]]; then
        leave_out jit_compile "the emulator knows no compiled operators"
        leave_out profile "the emulator has no profiler"
    else
        part jit_compile speed_line speed_with --jit_compile
        part profile last_line profile
    fi
}

leave_out() {  # NAME REASON
    printf '%-10s left out: %s\n' "$1:" "$2" | tee -a "$summary"
}

verdict() {
    eval "$environment"
    "$PYTHON" test/npu/verdict.py "$summary"
}

audit() {
    eval "$environment"
    "$PYTHON" test/npu/audit.py --config "$config" --batch_size 4 --device npu \
        ${audit_size:+--max_size "$audit_size"}
}

losses() {
    eval "$environment"
    "$PYTHON" test/npu/loss_difference.py
}

write_shapes() {
    eval "$environment"
    "$PYTHON" -m data.shapes "$shapes" --train $((batch_size * cards * 4)) --val 4
}

prepare() {
    bash test/npu/make_env.sh > "$work/environment" && cat "$work/environment"
}

export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
cd "$root" || exit 1
: > "$summary"
date -u "+date: %Y-%m-%d" >> "$summary"
echo "version of the project: $(git rev-parse --short HEAD 2>/dev/null || echo unknown)" >> "$summary"
part prepare last_line prepare
environment=$(cat "$work/environment" 2>/dev/null)
emulated=no
if grep -q "npu_emulator" "$work/environment" 2>/dev/null; then
    emulated=yes
    echo "EMULATED: no card here. No number of this report was measured on Ascend." | tee -a "$summary"
fi
part versions versions_line versions
if [[ $tests != none ]]; then
    part suite last_line suite
fi
shapes=$data
if [[ -z $shapes ]]; then
    shapes=$work/shapes
    part data last_line write_shapes
fi
part speed_1p speed_line speed train_performance_1p.sh
variants
found=$(sed -n 's/^cards: //p' "$work/versions.log")
NPROC=$((${found:-1} < cards ? ${found:-1} : cards))
export NPROC
if [[ $NPROC -gt 1 ]]; then
    part "speed_${NPROC}p" speed_line speed train_performance_8p.sh
    part all_reduce last_line bandwidth
else
    leave_out speed_8p "one card"
    leave_out all_reduce "one card"
fi
part audit audit_line audit
part losses last_line losses
part verdict advice_line verdict
write_report
rm -rf "$work"
echo "Written: $output"
[[ $failed -eq 0 ]]
