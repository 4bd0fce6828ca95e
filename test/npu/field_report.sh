#!/bin/bash
# Measure this project on Ascend cards and write one text file to send back.
#   bash test/npu/field_report.sh [--steps=200] [--data=/data/coco] [--output=field_report.txt]
# More: --config=yolact_base --batch_size=8 (per card) --audit_size=SIDE (a smaller input for the
# audit), --tests="test/unit test/parity test/npu" (the suite; "none" leaves it out) --cards=N (at
# most). Without --data it trains on drawn shapes, made for the purpose. Half an hour on a card.
#
# Parts: versions, test suite, speed of one card, the same with each of the plugin's kernels that are
# off by default (where it can be used), speed of all cards (at most 8), audit of a step, losses on
# the NPU against the CPU. A part that fails is recorded and the rest goes on; the exit code
# is then 1 (2: a mistake in the arguments). On a host without a card everything is emulated, and the
# file says so. Environment: as for test/npu/make_env.sh.
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

for argument in "$@"; do
    value=${argument#*=}
    case $argument in
        --steps=*) steps=$value ;;
        --data=* | --data_path=*) data=$value ;;
        --output=*) output=$value ;;
        --config=*) config=$value ;;
        --batch_size=*) batch_size=$value ;;
        --audit_size=*) audit_size=$value ;;
        --cards=*) cards=$value ;;
        --tests=*) tests=$value ;;
        -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
        *) echo "error: unknown argument '$argument'; --help lists the known ones" >&2 && exit 2 ;;
    esac
done
for name in steps batch_size cards; do
    if [[ ! ${!name} =~ ^[1-9][0-9]*$ ]]; then
        echo "error: --$name is '${!name}', expected a whole number of at least 1" >&2
        exit 2
    fi
done
case $output in /*) ;; *) output=$PWD/$output ;; esac
if [[ -n $data && ! -e $data ]]; then
    echo "error: --data is '$data', which does not exist" >&2
    exit 2
elif [[ -n $data ]]; then
    data=$(cd "$(dirname "$data")" && pwd)/$(basename "$data")
fi
if [[ ! -w $(dirname "$output") ]]; then
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
    local expressions=(-e "s|$root|<project>|g" -e "s|$work|<work>|g")
    [[ -z $data ]] || expressions+=(-e "s|$data|<data>|g")
    [[ ${#HOME} -lt 2 ]] || expressions+=(-e "s|$HOME|<home>|g")
    [[ -z $(hostname 2>/dev/null) ]] || expressions+=(-e "s|\\b$(hostname)\\b|<host>|g")
    [[ -z $(id -un 2>/dev/null) || $(id -un) == root ]] ||
        expressions+=(-e "s|\\b$(id -un)\\b|<user>|g")
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
speed_line() { grep -h "^Final Performance\|^TrainingTime\|^ActualLoss\|^error: --fused" "$1"; }
audit_line() { grep -h "emulated\|measured by\|^step 6\|gates" "$1"; }
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
    cat test/output/0/*_perf.log 2>/dev/null
    return "$status"
}

# The same with one of the plugin's kernels. That it refuses this card or recipe is a result, too.
speed_with() {  # FLAG
    local output status=0
    output=$(speed train_performance_1p.sh "$1" 2>&1) || status=$?
    echo "$output"
    if grep -q "^error: $1 is the Ascend plugin's" <<< "$output"; then
        return 0
    fi
    return "$status"
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
if grep -q "npu_emulator" "$work/environment" 2>/dev/null; then
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
part fused_loss speed_line speed_with --fused_loss
found=$(sed -n 's/^cards: //p' "$work/versions.log")
NPROC=$((${found:-1} < cards ? ${found:-1} : cards))
export NPROC
if [[ $NPROC -gt 1 ]]; then
    part "speed_${NPROC}p" speed_line speed train_performance_8p.sh
else
    echo "speed_8p:  left out: one card" | tee -a "$summary"
fi
part audit audit_line audit
part losses last_line losses
write_report
rm -rf "$work"
echo "Written: $output"
[[ $failed -eq 0 ]]
