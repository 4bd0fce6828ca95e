"""Ask torch_npu where it calls each operator of the emulator, and print one a line.

    python test/npu/operator_sources.py        # with the environment of make_env.sh

Every operator is refused once (NPUEMU_REFUSE) while the comparison of test_npu_operators.py that
uses it runs; the error that torch_npu raises names its function and its source file. Files with
"Struct" in their name are generated from op_plugin/config/op_plugin_functions.yaml: "yaml".
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from pathlib import Path
from typing import Optional

TEST = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TEST), str(TEST.parent)]
os.environ["ASCEND_LAUNCH_BLOCKING"] = "1"
os.environ.pop("NPUEMU_LOG", None)

import torch  # noqa: E402

from npu import counters, test_npu_operators  # noqa: E402
from utils.device import select_device  # noqa: E402

PLACE = re.compile(r"(\w+|operator\(\)):\S*/(\w+)\.cpp:\d+ NPU function error: call aclnn(\w+)")


def source_of(name: str, device: torch.device) -> Optional[str]:
    """File of op-plugin (or torch_npu) that calls the operator, or "yaml: function"."""
    libc = ctypes.CDLL(None)
    libc.setenv(b"NPUEMU_REFUSE", name.encode(), 1)
    first = [name] if name in test_npu_operators.NAMES else []
    runs = [lambda n=n: test_npu_operators.run_all(device, n)
            for n in first + test_npu_operators.NAMES]
    runs.append(lambda: test_npu_operators.test_random_numbers_have_their_distribution(device))
    try:
        for run in runs:
            try:
                run()
            except RuntimeError as error:
                found = PLACE.search(str(error))
                if found and found.group(3) == name:
                    function, file = found.group(1), found.group(2)
                    return "yaml: " + function if file.startswith("Struct") else file + ".cpp"
    finally:
        libc.unsetenv(b"NPUEMU_REFUSE")
    return None


def main() -> int:
    """Print the table."""
    device = select_device("npu")
    torch.ones(1, device=device) + 1  # loads the operators
    for name in sorted(counters.emulated()):
        print("{} {}".format(name, source_of(name, device) or "not found"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
