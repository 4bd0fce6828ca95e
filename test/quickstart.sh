#!/bin/bash
# See YOLACT train and find things, starting from nothing but Python 3: makes a virtual environment,
# draws a small dataset of shapes, trains the recipe yolact_shapes, scores it and draws a picture.
#   bash test/quickstart.sh [--seed N] [--max_iter N] [--device auto|npu|cuda|cpu|N] [--venv FOLDER|none]
# A second run uses what is there: the environment, the dataset, and the training with the same
# seed and number of iterations, which goes on where it was interrupted. --venv none takes the python3 on PATH as it is.
# Environment: PYTHON (interpreter, default the newest python3 that fits).

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # sh would not understand the rest
chosen_python=${PYTHON:-}
# shellcheck source=test/common.sh
source "$(dirname "$(realpath "$0" 2>/dev/null || echo "$0")")/common.sh"

config=yolact_shapes
validation=()
quickstart_path=$test_path/quickstart
data_path=$quickstart_path/shapes
venv=$root_path/.venv
seed=0
max_iter=""
cpu_wheels=https://download.pytorch.org/whl/cpu

stop() {  # SENTENCE
    echo "error: $1" >&2
    exit 2
}

parse_quickstart() {
    local name value
    while [[ $# -gt 0 ]]; do
        name=${1%%=*}
        case $name in
            -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit 0 ;;
            --seed | --max_iter | --device | --node_device | --venv) ;;
            *) stop "unknown argument '$1'; see bash test/quickstart.sh --help" ;;
        esac
        if [[ $1 == *=* ]]; then
            value=${1#*=}
        else
            [[ $# -gt 1 ]] || stop "$name needs a value"
            value=$2
            shift
        fi
        shift
        case $name in
            --seed) seed=$value ;;
            --max_iter) max_iter=$value ;;
            --device | --node_device) node_device=$value ;;
            --venv) venv=$value ;;
        esac
    done
    [[ $seed =~ ^[0-9]+$ ]] || stop "--seed is '$seed', expected a whole number from 0"
    [[ -z $max_iter || $max_iter =~ ^[1-9][0-9]*$ ]] ||
        stop "--max_iter is '$max_iter', expected a whole number above 0"
    [[ $venv == none || $venv == /* ]] || venv=$caller_path/$venv
}

headline() {  # TEXT
    echo
    echo "== $1"
}

# Print the Python requirements file and torch version for INTERPRETER, or fail.
requirements_for() {  # INTERPRETER
    "$1" - 2>/dev/null <<'PYTHON'
import sys, venv, ensurepip
if sys.version_info >= (3, 11):
    print("requirements.txt 2.13.0")
elif sys.version_info[:2] == (3, 7):
    print("1.8_requirements.txt 1.8.1")
else:
    sys.exit(1)
PYTHON
}

# Set `interpreter`, `requirements` and `torch_version`.
find_python() {
    local candidates=(python3 python3.13 python3.12 python3.11 python3.7) candidate found
    if [[ -n $chosen_python ]]; then
        candidates=("$chosen_python")
    fi
    for candidate in "${candidates[@]}"; do
        if found=$(requirements_for "$candidate"); then
            interpreter=$candidate
            read -r requirements torch_version <<< "$found"
            return 0
        fi
    done
    stop "no usable Python among: ${candidates[*]}. It has to be version 3.11 or newer (or 3.7) and\
 have the modules venv and ensurepip (Debian, Ubuntu: apt install python3-venv). Set PYTHON to one,\
 or use --venv none with an environment of your own."
}

on_ascend() {
    [[ -d /usr/local/Ascend ]] || command -v npu-smi >/dev/null 2>&1
}

# pip with its own bar on a terminal, else a line for each package.
install() {  # PYTHON ARGUMENT...
    local pip=("$1" -m pip install --disable-pip-version-check "${@:2}")
    if [[ -t 1 ]]; then
        "${pip[@]}"
        return
    fi
    "${pip[@]}" | sed -u -n 's/^Collecting \([^ ;]*\).*/  \1/p; s/^Installing collected packages/  &/p'
    return "${PIPESTATUS[0]}"
}

# The smaller build of torch for the CPU, unless there is an NVIDIA card; torch_npu works with it.
install_torch() {  # PYTHON
    if ! command -v nvidia-smi >/dev/null 2>&1 && [[ $(uname -s) == Linux && $torch_version == 2.* ]] &&
        install "$1" --retries 0 --extra-index-url "$cpu_wheels" "torch==$torch_version" 2>/dev/null
    then
        return 0
    fi
    install "$1" "torch==$torch_version"
}

prepare_python() {
    if [[ $venv == none ]]; then
        PYTHON=${chosen_python:-python3}
        "$PYTHON" -c "import torch, cv2, numpy, pycocotools" ||
            stop "$PYTHON lacks what the line above names; install requirements.txt, or leave out --venv none"
        return
    fi
    find_python
    PYTHON=$venv/bin/python
    local stamp
    stamp=$(cksum < "$root_path/$requirements")
    if [[ -x $PYTHON && $(cat "$venv/quickstart-stamp" 2>/dev/null) == "$stamp" ]]; then
        echo "using $venv"
        return
    fi
    echo "installing PyTorch $torch_version and the rest of $requirements into $venv (a few minutes)"
    "$interpreter" -m venv "$venv" || stop "cannot make a virtual environment in $venv"
    if ! install_torch "$PYTHON" ||
        ! install "$PYTHON" "torch==$torch_version" -r "$root_path/$requirements"; then
        stop "pip could not install $requirements into $venv; its message is above"
    fi
    if on_ascend && [[ $torch_version == 2.* ]]; then
        install "$PYTHON" "torch-npu==$torch_version" pyyaml decorator attrs psutil ||
            stop "this is an Ascend host, but pip could not install torch-npu $torch_version"
    fi
    echo "$stamp" > "$venv/quickstart-stamp"
}

# The lines of a training as a person wants them: on a terminal one that moves, else one in twenty
# seconds. The log has them all.
follow() {  # LOG
    local line total=0 bar next=0
    local steps='^\[ *[0-9]+\] +([0-9]+) \|\|.* T: ([^ ]+) \|\| ETA: (.*) \|\| timer'
    tail -n +1 -f -s 0.2 --pid="$child" "$1" | while IFS= read -r line; do
        if [[ $line =~ ^Schedule\ *:\ ([0-9]+)\ iteration ]]; then
            total=${BASH_REMATCH[1]}
        fi
        if [[ ! $line =~ $steps ]]; then
            [[ ! -t 1 ]] || printf '\r\033[K'
            printf '%s\n' "$line"
        elif [[ -t 1 && $total -gt 0 ]]; then
            printf -v bar '%*s' $((30 * BASH_REMATCH[1] / total)) ''
            printf '\r[%-30s] %d / %d  %s left, loss %s\033[K' "${bar// /=}" "${BASH_REMATCH[1]}" \
                "$total" "${BASH_REMATCH[3]}" "${BASH_REMATCH[2]}"
        elif [[ $SECONDS -ge $next ]]; then
            echo "iteration ${BASH_REMATCH[1]} of $total, ${BASH_REMATCH[3]} left, loss" \
                "${BASH_REMATCH[2]}"
            next=$((SECONDS + 20))
        fi
    done
}

final_weights() {
    sed -n 's/^.*Final weights : //p' "$train_log" 2>/dev/null | tail -n 1
}

# Start over where the recipe or the dataset is no longer the one that a finished run used.
check_recipe() {
    local stamp
    stamp=$(cat "$root_path/data/config.py" "$root_path"/data/shape*.py | cksum)
    if [[ -f $run_path/stamp && $(cat "$run_path/stamp") != "$stamp" ]]; then
        echo "the recipe or the dataset has changed since the last run: starting over"
        rm -rf "$run_path"
    fi
    mkdir -p "$run_path" && echo "$stamp" > "$run_path/stamp"
}

train_shapes() {
    check_recipe
    weights=$(final_weights)
    if [[ -n $weights && -f $weights ]]; then
        echo "already trained: $(short "$weights") (to train again, remove $(short "$run_path"))"
        read_performance
        return
    fi
    echo "everything it prints is also in $(short "$train_log")"
    rm -f "$run_path/duration"
    if compgen -G "$run_path/weights/${config}_*_interrupt.pth" >/dev/null; then
        pth_path=interrupt
    fi
    case_flags=("--config=$config" --backbone_weights=none "--seed=$seed"
        "--save_folder=$run_path/weights/" "--log_folder=$run_path/logs/"
        "--project=$run_path" "--name=${config}_seed_$seed")
    if [[ -n $max_iter ]]; then
        case_flags+=("--max_iter=$max_iter")
    fi
    SECONDS=0
    train
    # Of a resumed training only a part has been timed.
    [[ -n $pth_path ]] || echo ", in $((SECONDS / 60)) min $((SECONDS % 60)) s" > "$run_path/duration"
    weights=$(final_weights)
    [[ -f $weights ]] || fail 1 train.py "$train_log"
}

score() {
    evaluate "$weights" --run_folder=auto --output_coco_json \
        "--bbox_det_file=$run_path/bbox_detections.json" \
        "--mask_det_file=$run_path/mask_detections.json"
}

draw() {
    picture=$run_path/ground_truth_and_prediction.png
    "$PYTHON" "$test_path/quickstart_picture.py" "$data_path" "$run_path/bbox_detections.json" \
        "$run_path/mask_detections.json" "$picture" || exit $?
    echo "drawn: $(short "$picture")"
}

# Show a path as seen from the root of the project, where it lies below it.
short() {  # PATH
    echo "${1#"$root_path"/}"
}

# Where the page is that shows the run; one that was trained by an older version has none.
report_line() {
    local report
    report=$(sed -n 's/^Report : //p' "$eval_log" | tail -n 1)
    if [[ -n $report ]]; then
        echo "$(short "$report") (open it in a browser)"
    else
        echo "none; remove $(short "$run_path") to train again"
    fi
}

closing_card() {
    local iterations=${weights##*_} run_python=python launch=bash place example device
    iterations=${iterations%.pth}
    printf -v place 'cd %q' "$root_path"
    if [[ $venv == none ]]; then
        printf -v run_python %q "$PYTHON"
        launch="PYTHON=$run_python bash"
    else
        printf -v place '%s && source %q/bin/activate' "$place" "$(short "$venv")"
    fi
    example=$(short "$data_path")/val2017/000001000003.png
    device=$(sed -n '/^device /{p;q}' "$train_log")
    cat <<CARD

-------------------------------------------------------------------------------------------------
YOLACT has been trained and scored on this machine.

  $device
  training    $iterations iterations of $config, seed $seed$(cat "$run_path/duration" 2>/dev/null)
  speed       $FPS images/s
  box mAP     $(read_accuracy box | tr -d ' ')   COCO's AP (IoU 0.50 to 0.95), on images held out from training
  mask mAP    $(read_accuracy mask | tr -d ' ')

  dataset     $(short "$data_path") (COCO's format: train2017, val2017, annotations)
  weights     $(short "$weights")
  logs        $(short "$train_log"), $(short "$eval_log")
  report      $(report_line)
  picture     $(short "$picture")
              (ground truth beside prediction)

What to type next, also in another terminal:

  $place

  # find things in an image
  $run_python eval.py --trained_model=$(short "$weights") \\
      --score_threshold=0.5 --image=$example:found.png

  # train a full recipe on COCO, or on any dataset in its format
  $launch test/train_full_1p.sh /data/coco

  # all recipes and flags
  $run_python train.py --help
-------------------------------------------------------------------------------------------------
CARD
}

main() {
    parse_quickstart "$@"
    run_path=$quickstart_path/seed_$seed${max_iter:+_iterations_$max_iter}
    train_log=$run_path/train.log
    eval_log=$run_path/eval.log
    loss_file=$run_path/loss.txt
    cd "$root_path" || exit 1
    trap 'pass_on INT 130' INT
    trap 'pass_on TERM 143' TERM

    headline "1/5 Python"
    prepare_python
    prepare_environment
    headline "2/5 dataset"
    "$PYTHON" -m data.shapes "$data_path" || exit $?
    headline "3/5 training"
    train_shapes
    headline "4/5 scores on images it has not seen"
    score
    headline "5/5 picture"
    draw
    closing_card
}

main "$@"
