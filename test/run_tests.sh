#!/bin/bash
# Install what the tests need into a virtual environment of its own and run them.
#   bash test/run_tests.sh [--torch 2.13|1.8|1.5] [--device cpu|cuda|npu] [--slow] [pytest arguments]
# On npu, without a card, the real torch_npu runs over an emulator that is built first (test/npu).
# 1.8 and 1.5 need Python 3.7; --if-available makes its absence one line and no failure.
# --venv-only stops after the installation. Environment: PYTHON, PYENV_ROOT, TEST_PROCESSES (tests at
# a time, each with one thread; default the number of cores, 0 on a card: all in one process).

root_path=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
torch=2.13
if_available=false
venv_only=false
device=cpu
arguments=()

usage() {
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

parse_arguments() {
    while [[ $# -gt 0 ]]; do
        case $1 in
            -h | --help) usage && exit 0 ;;
            --torch=*) torch=${1#*=} ;;
            --torch) torch=${2:-} && shift ;;
            --device=*) device=${1#*=} ;;
            --device) device=${2:-} && shift ;;
            --if-available) if_available=true ;;
            --venv-only) venv_only=true ;;
            *) arguments+=("$1") ;;
        esac
        shift
    done
    case $torch in
        2.13) torch_pins=(torch==2.13.0) requirements=requirements.txt ;;
        # The one version whose torchvision installs without CUDA's libraries and loads its kernels.
        1.8) torch_pins=(torch==1.8.1 torchvision==0.9.1) requirements=1.8_requirements.txt ;;
        1.5) torch_pins=(torch==1.5.0) requirements=1.5_requirements.txt ;;
        *) echo "error: --torch is '$torch', expected 2.13, 1.8 or 1.5" >&2 && exit 2 ;;
    esac
}

# Whether INTERPRETER is there and its version fits the chosen torch.
fits() {  # INTERPRETER
    local condition="sys.version_info >= (3, 11)"
    if [[ $torch != 2.13 ]]; then
        condition="sys.version_info[:2] == (3, 7)"
    fi
    "$1" -c "import sys, venv, ensurepip; sys.exit(not ($condition))" >/dev/null 2>&1
}

# Print the first interpreter that fits; look on PATH, then among pyenv's.
find_python() {
    local pyenv=${PYENV_ROOT:-$HOME/.pyenv} candidates=("${PYTHON:-python3}") candidate
    if [[ $torch == 2.13 ]]; then
        candidates+=(python3.11 python3.12 python3.13 "$pyenv"/versions/3.1[1-3]*/bin/python)
    else
        candidates+=(python3.7 "$pyenv"/versions/3.7*/bin/python)
    fi
    for candidate in "${candidates[@]}"; do
        if fits "$candidate"; then
            echo "$candidate"
            return 0
        fi
    done
    return 1
}

# Make the environment, or keep it if it was made from the same requirements.
install() {
    local venv=$1 python stamp
    stamp=$(cd "$root_path" && cat "$requirements" requirements-dev.txt test/run_tests.sh | cksum)
    if [[ -f $venv/stamp && $(cat "$venv/stamp") == "$stamp" ]]; then
        return 0
    fi
    if ! python=$(find_python); then
        if [[ $torch == 2.13 ]]; then
            echo "error: torch $torch needs Python 3.11 or newer; set PYTHON to one" >&2
            exit 2
        fi
        echo "torch $torch is not tested here: it needs Python 3.7, which was not found"
        [[ $if_available == true ]] && exit 0
        exit 2
    fi
    echo "Installing torch $torch and the tests' requirements into $venv"
    local flags=(--quiet --disable-pip-version-check)
    if [[ $torch != 2.13 ]]; then
        flags+=(--no-cache-dir --only-binary=:all:)
    fi
    rm -rf "$venv" && "$python" -m venv "$venv" &&
        "$venv/bin/python" -m pip install "${flags[@]}" "${torch_pins[@]}" \
            -r "$root_path/$requirements" -r "$root_path/requirements-dev.txt" || exit 1
    echo "$stamp" > "$venv/stamp"
}

run_on_npu() {
    local environment
    environment=$(bash "$root_path/test/npu/make_env.sh") || exit 2
    if [[ $venv_only == true ]]; then
        exit 0
    fi
    cd "$root_path" && eval "$environment" || exit 1
    run_pytest
}

# Tests of one file run one after the other: they share what is slow to make.
run_pytest() {
    local processes=0
    if [[ $device == cpu ]]; then
        processes=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 1)  # nproc returns that variable
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    fi
    exec "$PYTHON" -m pytest "--device=$device" -n "${TEST_PROCESSES:-$processes}" --dist=loadfile \
        "${arguments[@]}"
}

main() {
    parse_arguments "$@"
    if [[ $device == npu* ]]; then
        run_on_npu
    fi
    local venv=$root_path/.venv-test-$torch
    install "$venv"
    if [[ $venv_only == true ]]; then
        exit 0
    fi
    cd "$root_path" || exit 1
    export PYTHON=$venv/bin/python PATH=$venv/bin:$PATH
    run_pytest
}

main "$@"
