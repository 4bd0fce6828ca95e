"""The one module that knows how Ascend NPU, CUDA and CPU differ.

Everything else holds a `torch.device` and asks here. `torch_npu` is imported only when an NPU is
asked for, or when `auto` finds the package installed.
"""

from __future__ import annotations

import glob
import importlib
import importlib.util
import logging
import os
import platform
import random
from typing import Any, NamedTuple

import numpy as np
import torch

from utils import ascend_versions
from utils.cli import CARD, split_device
from utils.errors import UserError, first_line, nearest

_LOG = logging.getLogger(__name__)

PLUGIN = "torch_npu"
"""What makes an NPU known to PyTorch; the PyTorch 1.5 for Ascend has it built in."""

_TITLES = {"npu": "Ascend NPU", "cuda": "CUDA", "cpu": "CPU"}
"""The kinds of devices, in the order in which `auto` tries them, and their names in sentences."""
_BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}
"""Their collective libraries for `torch.distributed`."""
_ALIASES = {"gpu": "cuda", "": "auto"}
_AUTO = "auto"

DEVICE_NAMES: tuple[str, ...] = (_AUTO, *_TITLES, "gpu", CARD)
"""What `select_device` accepts, and with a number behind them or alone: `npu:1`, `0`."""

_CARDS = "/dev/davinci*"
"""Those of cards end in a number; a container without one may have that of the driver."""

_TOOLS = {"npu": "npu-smi info", "cuda": "nvidia-smi"}
_VISIBLE = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}
_END_IT = "{tool} shows which: end it, or choose another card by --device_id"
# Signs in the error's text (lower case), the first that fits counts; what it means. The numbers are
# CANN's (rt_error_codes.h), EL0005 is its driver's "Resource_Busy".
_START_PROBLEMS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("el0005", "resource_busy", "resources are busy", "busy or unavailable"),
     "another process or container holds it; " + _END_IT),
    (("207001", "207018", "el0004", "out of memory"),
     "its memory is full, so another process is using it; " + _END_IT),
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


def _runtime(kind: str) -> Any:
    """`torch.npu` or `torch.cuda`; None for the CPU, and as long as no plugin has put it there."""
    return None if kind == "cpu" else getattr(torch, kind, None)


def _npu_installed() -> bool:
    return _runtime("npu") is not None or importlib.util.find_spec(PLUGIN) is not None


def _plugin_version() -> str | None:
    """Of torch_npu, which need not be imported for it; None where it is built into PyTorch."""
    spec = importlib.util.find_spec(PLUGIN)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    return ascend_versions.read_plugin(folders[0]) if folders else None


def _npu_versions() -> ascend_versions.Versions:
    return ascend_versions.Versions(
        torch.__version__, _plugin_version(), ascend_versions.read_cann(os.environ),
        ascend_versions.read_driver())


def _npu_problem() -> str:
    if not _npu_installed():
        return "torch_npu is not installed for this Python"
    plugin = _plugin_version()
    mixed = ascend_versions.mixed(torch.__version__, plugin) if plugin else ""
    if mixed:  # asked before the import, which would end in an undefined symbol
        return mixed
    try:
        if _runtime("npu") is None:
            importlib.import_module(PLUGIN)
        found = _runtime("npu").device_count()
    except Exception as error:  # the plugin raises whatever its libraries raise
        return (f"torch_npu is installed but unusable ({first_line(error)}); install CANN and "
                "source its set_env.sh")
    if found < 1:
        return "torch_npu is installed but finds no device; npu-smi info shows what the driver sees"
    return ""


def _problem(kind: str) -> str:
    """Why no device of a kind can be used here, as the end of a sentence; empty if one can."""
    if kind == "npu":
        return _npu_problem()
    if kind == "cpu" or torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) is built without CUDA"
    return "PyTorch finds no CUDA device; nvidia-smi shows what the driver sees"


def _ascend_sign() -> str:
    """What shows that this host is meant for an NPU, a card or CANN; empty if nothing does."""
    files = sorted(glob.glob(_CARDS))
    if files:
        return f"{'a card' if files[0][-1].isdigit() else 'the driver of a card'} ({files[0]})"
    home = os.environ.get("ASCEND_HOME_PATH")
    return f"CANN (ASCEND_HOME_PATH={home})" if home else ""


def _find_kind(name: str, warn: bool = True) -> str:
    """Return the usable kind called `name`: `auto` is the first usable of npu, cuda, cpu, but never
    the CPU of a host that has a card or CANN: it would train for weeks; `card` the first of npu and
    cuda.
    """
    key = split_device(name)[0]
    key = _ALIASES.get(key, key)
    if key in (_AUTO, CARD):
        problems = {kind: _problem(kind) for kind in _TITLES}
        found = next(kind for kind in problems if not problems[kind])
        sign = _ascend_sign() if found == "cpu" else ""
        if key == CARD and found == "cpu":
            raise UserError(f"device '{name}' is a card, but there is none: {problems['npu']}; "
                            f"{problems['cuda']}. --device=cpu does without")
        if sign:
            raise UserError(f"device 'auto' is not the CPU where there is {sign}, but the Ascend "
                            f"NPU cannot be used: {problems['npu']}; to run on the CPU all the "
                            "same, ask for cpu")
        if warn and problems["npu"] and _npu_installed():
            _LOG.warning("no Ascend NPU is used: %s", problems["npu"])
        return found
    if key not in _TITLES:
        if "," in key:
            raise UserError(f"device '{name}' is a list, but one process drives one card: "
                            "NPROC=2 bash test/train_full_8p.sh DATA starts two")
        raise UserError(f"unknown device '{name}'{nearest(key, DEVICE_NAMES) or '.'} Known: "
                        f"{', '.join(DEVICE_NAMES)}, and cards such as npu:1 or 0.")
    problem = _problem(key)
    if problem:
        others = ", ".join(other for other in _TITLES if other != key)
        raise UserError(f"device '{name}' was asked for, but {problem}; other choices: auto, "
                        f"{others}")
    return key


def device_runtime(device: torch.device) -> Any:
    """What has the interface of `torch.cuda`, or the part that the plugin knows; None: the CPU."""
    return _runtime(device.type)


def cards_of_host(name: str) -> int | None:
    """Number of cards of the kind `name` on this host; None for the CPU, which all ranks share."""
    kind = _find_kind(name, warn=False)  # `select_device` follows
    return None if kind == "cpu" else int(_runtime(kind).device_count())


def _start_problem(error: RuntimeError, kind: str) -> str:
    """Why a card of this kind (`npu` or `cuda`) cannot be started, as the end of a sentence."""
    lowered = str(error).lower()
    for signs, meaning in _START_PROBLEMS:
        if any(sign in lowered for sign in signs):
            return meaning.format(tool=_TOOLS[kind], visible=_VISIBLE[kind])
    return f"{first_line(error)} ({_TOOLS[kind]} shows its state)"


class NpuModes(NamedTuple):
    """How an NPU runs operators. The defaults are those of the tests, the same on every card."""

    jit_compile: bool = False
    """Compile a kernel for each shape, as a 910A does by default: others than the 910B's."""
    internal_format: bool = False
    """Let convolutions leave results in their own layout, as a 910A does by default. Off, each pays
    for a change of layout there; on, a view does.
    """


_TESTED_MODES = NpuModes()


def select_device(name: str, index: int = 0, modes: NpuModes = _TESTED_MODES) -> torch.device:
    """Return a device that works, made the current one and prepared.

    `name` is `auto`, `npu`, `cuda` (or `gpu`), `cpu` or `card`; `index`, unless the name has one
    (`npu:1`, `0`), counts within the host and means nothing to the CPU. There is no silent change
    of device.

    Raises:
        UserError: what is not there, or does not start, or `modes` of another device than an NPU.
    """
    kind, named = _find_kind(name), split_device(name)[1]
    if kind != "npu" and modes != _TESTED_MODES:
        flag = "--jit_compile" if modes.jit_compile else "--internal_format"
        raise UserError(f"{flag} is a mode of Ascend NPUs, but this device is {kind}; leave it out")
    if kind == "cpu":
        return torch.device("cpu")
    index = index if named is None else named
    title, runtime = _TITLES[kind], _runtime(kind)
    found = runtime.device_count()
    if not 0 <= index < found:
        raise UserError(f"{title} device {index} was asked for, but this host has {found} "
                        f"(numbered 0 to {found - 1})")
    device = torch.device(kind, index)
    try:
        runtime.set_device(device)
        runtime.synchronize(device)  # the first use: only now CUDA asks the driver for the card
    except RuntimeError as error:
        raise UserError(f"{title} device {index} cannot be used: "
                        f"{_start_problem(error, kind)}") from error
    prepare(device, modes)
    return device


def prepare(device: torch.device, modes: NpuModes = _TESTED_MODES) -> None:
    """Set the process-wide switches this project relies on. Called by `select_device`.

    Raises:
        UserError: this card or this plugin has no such mode.
    """
    if device.type != "npu":
        return
    npu = _runtime("npu")  # early plugins have neither switch
    for flag, asked, known in (("jit_compile", modes.jit_compile, hasattr(npu, "set_compile_mode")),
                               ("internal_format", modes.internal_format, hasattr(npu, "config"))):
        if asked and not known:
            raise UserError(f"--{flag}: this torch_npu has no such switch; leave it out")
    try:
        if hasattr(npu, "set_compile_mode"):
            npu.set_compile_mode(jit_compile=modes.jit_compile)
        if hasattr(npu, "config"):  # before the first tensor, or it would already have a layout
            npu.config.allow_internal_format = modes.internal_format
    except RuntimeError as error:  # newer cards know one mode alone
        raise UserError(f"{_model(device)} has no such mode ({first_line(error)}); leave out "
                        "--jit_compile and --internal_format") from error
    if modes != _TESTED_MODES:
        _LOG.warning("warning: --jit_compile and --internal_format are not tested on any card")
    doubt = ascend_versions.doubt(_npu_versions())
    if doubt:
        _LOG.warning("warning: %s", doubt)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy, PyTorch and the devices in use, all with `seed`."""
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)  # lazy: starts nothing where CUDA is not in use
    if _runtime("npu") is not None:
        _runtime("npu").manual_seed_all(seed)


def synchronize(device: torch.device) -> None:
    """Wait until all work queued on `device` is done."""
    if device.type != "cpu":
        device_runtime(device).synchronize(device)


def distributed_backend(device: torch.device) -> str:
    """`hccl`, `nccl` or `gloo`."""
    return _BACKENDS[device.type]


def memory_reserved(device: torch.device) -> int:
    """Bytes that PyTorch's allocator holds on `device`; 0 for the CPU."""
    read = getattr(device_runtime(device), "memory_reserved", None)
    return int(read(device)) if read is not None else 0


def _model(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    return str(device_runtime(device).get_device_name(device.index or 0))


def describe(device: torch.device) -> str:
    """Device, its model and the versions below it, in one line."""
    versions = [f"torch {torch.__version__}"]
    if device.type == "npu":
        versions = [_npu_versions().sentence()]
    if device.type == "cuda":
        versions.append(f"CUDA {torch.version.cuda}")
    versions.append(f"Python {platform.python_version()}")
    return f"device {device} ({_model(device)}), {', '.join(versions)}"


def pin_memory_supported(device: torch.device) -> bool:
    """Whether host tensors can be pinned for asynchronous copies to `device`; tries it."""
    if device.type == "cpu":
        return False
    try:
        torch.empty(1).pin_memory()
    except (RuntimeError, AssertionError):  # early plugins pin through CUDA only
        return False
    return True


_SATURATING = ("Ascend910", "Ascend910A", "Ascend910B", "Ascend910ProA", "Ascend910ProB",
               "Ascend910PremiumA")


def has_autocast() -> bool:
    """Whether this PyTorch casts by itself (`torch.autocast`, from 1.10); before, apex does."""
    return hasattr(torch, "autocast")


def prefers_channels_last(device: torch.device) -> bool:
    """Whether convolutions are faster here with the channels last in memory.

    PyTorch before 1.10 is not, and an Ascend card wants the plain layout.
    """
    return device.type != "npu" and has_autocast()


def half_type_problem(device: torch.device, dtype: torch.dtype) -> str:
    """Why `device` cannot compute in `dtype` (float16 or bfloat16); empty if it can."""
    name = str(dtype).split(".")[-1]
    if device.type == "cpu":
        try:
            probe = torch.zeros(1, 1, 3, 3, dtype=dtype)
            torch.nn.functional.conv2d(probe, probe).relu_()
        except RuntimeError:
            return f"PyTorch {torch.__version__} has no {name} on the CPU"
        return ""
    if dtype == torch.bfloat16:
        known = getattr(device_runtime(device), "is_bf16_supported", None)
        if known is None or not known():
            return f"{_model(device)} has no bfloat16"
    return ""


def casting_library(device: torch.device) -> Any:
    """The module `apex.amp`, which casts for PyTorch before 1.10.

    Raises:
        UserError: what has to be installed, or that this device is not for it.
    """
    if device.type == "cpu":
        raise UserError(f"PyTorch {torch.__version__} has no half precision on the CPU; leave out "
                        "--opt_level, or use PyTorch 2")
    wanted = ("Ascend's (gitcode.com/Ascend/apex, built for this PyTorch)"
              if device.type == "npu" else "NVIDIA's (github.com/NVIDIA/apex)")
    found = importlib.util.find_spec("apex") is not None
    try:
        amp = importlib.import_module("apex.amp")
        if not hasattr(amp, "initialize"):
            raise ImportError("it has no amp.initialize")
    except Exception as error:  # the other package of that name fails in its own imports
        if not found:
            raise UserError("--opt_level O1 and O2 need the package apex on PyTorch "
                            f"{torch.__version__}; install {wanted}") from error
        raise UserError("the package apex that is installed has no usable amp "
                        f"({first_line(error)}); that on PyPI is something else by the same name: "
                        f"remove it and install {wanted}") from error
    return amp


def saturates(device: torch.device) -> bool:
    """Whether half precision stops at its largest number here, so that overflow is not seen in it.

    True on the first Ascend 910 (Ascend910B alone names one of them, 910B1 and on do not), and
    where the plugin's other mode is chosen. There a register of the device remembers overflows.
    """
    if device.type != "npu":
        return False
    if _model(device) in _SATURATING:
        return True
    known = getattr(getattr(_runtime("npu"), "utils", None), "is_support_inf_nan", None)
    return known is None or not known()


def clear_overflow(device: torch.device) -> None:
    """Queue that the register of overflows is emptied."""
    _npu_operators().npu_clear_float_status(torch.zeros(8, device=device))


def overflow_since_clear(device: torch.device) -> torch.Tensor:
    """What the register holds, above 0 after an overflow, as a 0-d tensor on the device."""
    return _npu_operators().npu_get_float_status(torch.zeros(8, device=device))[0].float()


def _npu_operators() -> Any:
    return importlib.import_module(PLUGIN) if importlib.util.find_spec(PLUGIN) else torch
