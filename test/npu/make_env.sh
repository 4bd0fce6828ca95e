#!/bin/bash
# Make the environment for tests on an Ascend NPU, and print it as lines for `eval`:
#   environment=$(bash test/npu/make_env.sh) && eval "$environment" && "$PYTHON" -m pytest --device npu
# Where CANN and a card are found, they are used, with the Python of $PYTHON (default python3) if it
# has torch_npu. Elsewhere the emulator of test/npu/emulator is built; needs g++.
# Environment: PYTHON, NPU_VENV (default .venv-npu), NPU_EMULATE=1 (emulate despite a card).

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
venv=${NPU_VENV:-$root/.venv-npu}
requirements=("$root/requirements.txt" "$root/requirements-dev.txt" "$here/requirements.txt")

has_card() {
    [[ ${NPU_EMULATE:-0} != 1 ]] && compgen -G "/dev/davinci[0-9]*" >/dev/null
}

has_torch_npu() {  # INTERPRETER
    "$1" -c "import torch, torch_npu; assert torch_npu.npu.is_available()" >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.11 python3.12 python3.13 \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[1-3]*/bin/python; do
        if "$candidate" -c "import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info)" \
            >/dev/null 2>&1; then
            echo "$candidate"
            return 0
        fi
    done
    echo "error: Python 3.11 or newer was not found; set PYTHON to one" >&2
    return 2
}

install() {
    local stamp python
    stamp=$(cat "${requirements[@]}" | cksum)
    if [[ -f $venv/stamp && $(cat "$venv/stamp") == "$stamp" ]]; then
        return 0
    fi
    python=$(find_python) || return 2
    echo "Installing torch_npu and the tests' requirements into $venv" >&2
    rm -rf "$venv" && "$python" -m venv "$venv" &&
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            "${requirements[@]/#/-r}" >&2 || return 1
    echo "$stamp" > "$venv/stamp"
}

print_variables() {  # NAME=VALUE...
    local pair
    for pair in "$@"; do
        printf 'export %s=%q\n' "${pair%%=*}" "${pair#*=}"
    done
}

main() {
    # The programs import torch_npu where they use it; a CPU test must not depend on it. A CPU
    # fallback raises instead of running slowly and silently. Errors come from the operator that
    # made them.
    print_variables TORCH_DEVICE_BACKEND_AUTOLOAD=0 TORCH_NPU_FALLBACK_CPU_DISABLE=1 \
        "ASCEND_LAUNCH_BLOCKING=${ASCEND_LAUNCH_BLOCKING:-1}"
    if has_card && has_torch_npu "${PYTHON:-python3}"; then
        echo "Using the card and CANN of this host" >&2
        print_variables "PYTHON=${PYTHON:-python3}"
        return 0
    fi
    install || return $?
    print_variables "PYTHON=$venv/bin/python"
    if has_card; then
        echo "Using the card and CANN of this host with torch_npu of $venv" >&2
        return 0
    fi
    echo "No Ascend card: torch_npu runs on the emulator of test/npu/emulator" >&2
    local libraries
    # One thread: the order of a CPU kernel's sums, and so the last bit, follows their number.
    libraries=$("$venv/bin/python" "$here/emulator/build.py") || return $?
    print_variables "LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" \
        TORCH_NPU_WARNING_DISABLE=1 OMP_NUM_THREADS=1 \
        "TEST_PROCESSES=${TEST_PROCESSES:-$(env -u OMP_NUM_THREADS nproc)}"
    # With CANN's own folder named, torch_npu would look for its libraries there.
    echo "unset ASCEND_HOME_PATH ASCEND_OPP_PATH"
}

main
