"""Why a card cannot be started: what the numbers and words in its driver's errors mean."""

from __future__ import annotations

from typing import Tuple

from utils.errors import first_line

_TOOLS = {"npu": "npu-smi info", "cuda": "nvidia-smi"}
_VISIBLE = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}

# Signs in the error's text (lower case), the first that fits counts; what it means. The numbers are
# CANN's (rt_error_codes.h), EL0005 is its driver's "Resource_Busy".
_START_PROBLEMS: Tuple[Tuple[Tuple[str, ...], str], ...] = (
    (("el0005", "resource_busy", "resources are busy", "busy or unavailable"),
     "another process or container holds it; {tool} shows which: end it, or choose another card by "
     "--device_id"),
    (("207001", "207018", "el0004", "out of memory"),
     "its memory is full, so another process is using it; {tool} shows which: end it, or choose "
     "another card by --device_id"),
    (("107001", "invalid device ordinal"),
     "the driver knows no card of this number; {tool} and the variable {visible} show which there "
     "are"),
    (("207004", "no cuda-capable device"),
     "the driver finds no card; {tool} has to show one, in a container too"),
    (("207006", "no_permission"),
     "this user may not; it has to be in the group that owns /dev/davinci*"),
    (("507033",),
     "it did not start (CANN's error 507033): another process may hold it, or driver and CANN do "
     "not go together; {tool} and the logs in ~/ascend/log say which"),
    (("507899",),
     "the driver failed (CANN's error 507899): another container may hold it, or this one may not "
     "use /dev/davinci*; {tool} has to work here first"),
)


def start_problem(error: RuntimeError, kind: str) -> str:
    """Why a card of this kind (`npu` or `cuda`) cannot be started, as the end of a sentence."""
    lowered = str(error).lower()
    for signs, meaning in _START_PROBLEMS:
        if any(sign in lowered for sign in signs):
            return meaning.format(tool=_TOOLS[kind], visible=_VISIBLE[kind])
    return f"{first_line(error)} ({_TOOLS[kind]} shows its state)"
