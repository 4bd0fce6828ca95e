"""Run a network that `python -m utils.export` wrote: by ONNX Runtime, or by Ascend's ais_bench.

Needs NumPy and such a runtime, no PyTorch: this file becomes part of every folder's `run.py`.

Letters: B batch, S input side.
"""

from __future__ import annotations

import importlib
import os
from typing import Any, Callable, List

import numpy as np

from utils.errors import UserError, first_line
from utils.files import digest
from utils.parsing import LARGEST, Form, is_number, misfit, parse_json, whole_number

OUTPUTS = {"raw": {"mask": 3, "conf": 3, "loc": 3, "proto": 4},
           "detections": {"boxes": 3, "scores": 2, "classes": 2, "coefficients": 3, "count": 1,
                          "proto": 4}}
"""Dimensions of what the models of an export give, in its order, by its form."""
FORMS = tuple(OUTPUTS)
INPUT_TYPES = ("float32", "uint8")
"""Of their images."""

DESCRIPTION = "model.yaml"
DESCRIPTION_FORMAT = 1
MODEL_ENDINGS = (".onnx", ".om")
PROVIDERS = {"npu": "CANNExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""ONNX Runtime's name of what runs a model on a device; the CPU needs none."""
INSTALL = {"onnx": "pip install onnx",
           "onnxruntime": "pip install onnxruntime (onnxruntime-gpu for CUDA)",
           "cuda": "pip install onnxruntime-gpu", "npu": "pip install onnxruntime-cann",
           "ais_bench": "pip install the aclruntime and ais_bench wheels of Ascend's tools"}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 < value <= LARGEST


def _are_three(value: Any, lowest: float = -1e30) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(
        is_number(number) and number > lowest for number in value)


def _is_input(value: Any) -> bool:
    own: Form = {"layout": lambda layout: layout in ("NCHW", "NHWC"),
                 "type": lambda kind: kind in INPUT_TYPES}
    return not misfit(value, own) and (value["type"] == "uint8" or not misfit(value, {
        "mean": _are_three, "std": lambda std: _are_three(std, 0)}))


_FILE: dict[str, Any] = {
    "file": lambda value: isinstance(value, str) and os.path.basename(value) == value,
    "sha256": (str, type(None))}
_DESCRIPTION: Form = {
    "format": lambda value: value == DESCRIPTION_FORMAT, "form": lambda value: value in FORMS,
    "config": dict, "class_names": [str], "category_ids": [int], "image": {"size": _is_count},
    "weights": {"file": str}, "priors": _FILE["file"], "outputs": [{"name": str, "shape": list}],
    "thresholds": {"score": is_number, "iou": is_number, "top_k": _is_count,
                   "max_detections": _is_count},
    "mask_iou": lambda value: value is None or not misfit(value, _FILE),
    "models": [{**_FILE, "batch": lambda value: value is None or _is_count(value),
                "input": _is_input}]}
"""What `model.yaml` holds."""

Session = Callable[[np.ndarray], List[np.ndarray]]


def is_export(path: str) -> bool:
    """Whether `path` is an exported folder or a model of one, by its name and contents."""
    return path.endswith(MODEL_ENDINGS) or os.path.isfile(os.path.join(path, DESCRIPTION))


def read_description(folder: str) -> dict[str, Any]:
    """What `model.yaml` says: YAML in JSON's subset, behind lines of comment.

    Raises:
        UserError: there is none, it is damaged, or a newer version of this project wrote it.
    """
    path = os.path.join(folder, DESCRIPTION)
    try:
        with open(path, encoding="utf-8") as stream:
            facts = parse_json("".join(line for line in stream if not line.startswith("#")), path)
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"'{path}' cannot be read ({first_line(error)}); a model needs the folder "
                        "that it was exported into, export it again") from None
    version = facts.get("format") if isinstance(facts, dict) else None
    if isinstance(version, int) and version != DESCRIPTION_FORMAT:
        raise UserError(f"'{path}' has format {version}, this version reads "
                        f"{DESCRIPTION_FORMAT}; export the weights again")
    problem = misfit(facts, _DESCRIPTION) or _contradiction(facts)
    if problem:
        raise UserError(f"'{path}' is damaged: {problem}; export the weights again")
    found: dict[str, Any] = facts
    return found


def _contradiction(facts: dict[str, Any]) -> str:
    """Where the parts of a description do not fit each other; an empty string if they do."""
    outputs = {output["name"]: len(output["shape"]) for output in facts["outputs"]}
    if list(outputs.items()) != list(OUTPUTS[facts["form"]].items()):
        return f"its outputs are not those of form {facts['form']}"
    side, classes = facts["config"].get("max_size"), facts["config"].get("num_classes")
    if facts["image"]["size"] != side:
        return f"image.size is {facts['image']['size']}, config.max_size {side}"
    for name in ("class_names", "category_ids"):
        if len(facts[name]) + 1 != classes:
            return (f"there are {len(facts[name])} {name}, config.num_classes is {classes} (one "
                    "of them the background)")
    return ""


class ExportedModel:
    """A network as it was exported: images in, arrays by name out.

    Args:
        path: the folder, or one of the models in it.
        device: `cpu`, `cuda`, `npu`, or `auto`: whatever the installed runtimes offer.

    Attributes:
        facts: what `model.yaml` says.
        folder: that everything lies in.
        models: the entries of `facts` that are used, largest batch first.

    Raises:
        UserError: the folder is not whole, a runtime is missing or cannot run the model.
    """

    def __init__(self, path: str, device: str = "auto") -> None:
        if not os.path.exists(path):
            raise UserError(f"no exported model '{path}'; give the folder that utils.export wrote, "
                            "or a model in it")
        name = None if os.path.isdir(path) else os.path.basename(path)
        self.folder = path if name is None else os.path.dirname(os.path.abspath(path))
        self.facts = read_description(self.folder)
        self.device = device
        # Models that atc.sh has not made yet are described, too.
        entries = [entry for entry in self.facts["models"] if entry["sha256"] is not None
                   or os.path.exists(os.path.join(self.folder, entry["file"]))]
        known = [entry["file"] for entry in entries]
        if name is not None and name not in known:
            raise UserError(f"'{path}' is not described by the {DESCRIPTION} beside it, which "
                            f"names {', '.join(known)}; export it again")
        ending = ".om" if device in ("auto", "npu") and any(
            file.endswith(".om") for file in known) and _has_ais_bench() else ".onnx"
        chosen = [entry for entry in entries if entry["file"].endswith(ending)]
        if name is not None:
            chosen = [entry for entry in entries if entry["file"] == name]
        self.models = sorted(chosen, key=lambda entry: -(entry["batch"] or 0))
        self._sessions: dict[str, Session] = {}

    def __call__(self, planes: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs by name for uint8 images `[B, 3, S, S]` RGB; any B, whatever the models take."""
        if not self.models:
            raise UserError(f"'{self.folder}' has no model that runs on {self.device}; export the "
                            "weights again")
        names = [output["name"] for output in self.facts["outputs"]]
        shapes = [output["shape"][1:] for output in self.facts["outputs"]]
        parts: list[list[np.ndarray]] = []
        start = 0
        while start < len(planes):
            entry = next((entry for entry in self.models
                          if entry["batch"] is None or entry["batch"] <= len(planes) - start),
                         self.models[-1])
            size = entry["batch"] or len(planes)
            images = planes[start:start + size]
            count = len(images)
            if count < size:
                images = np.concatenate((images, np.zeros((size - count,) + images.shape[1:],
                                                          images.dtype)))
            outputs = self._run(entry["file"], prepare(images, entry["input"]))
            if [list(output.shape[1:]) for output in outputs] != shapes:
                raise UserError(f"'{entry['file']}' gives other outputs than {DESCRIPTION} beside "
                                "it describes; export the weights again")
            parts.append([output[:count] for output in outputs])
            start += size
        return dict(zip(names, (np.concatenate(arrays) for arrays in zip(*parts))))

    def priors(self) -> np.ndarray:
        """float32 `[P, 4]`, cxcywh relative to the image."""
        path = os.path.join(self.folder, self.facts["priors"])
        try:
            # Mapped, for a header may promise more than there is in the file.
            priors = np.array(np.load(path, mmap_mode="r"))
        except Exception as error:  # NumPy's reader of headers is Python's own, with all it raises
            raise UserError(f"'{path}' cannot be read ({first_line(error)}); export the weights "
                            "again") from None
        count = next((output["shape"][1] for output in self.facts["outputs"]
                      if output["name"] == "loc"), len(priors) if priors.ndim else 0)
        if priors.shape != (count, 4) or priors.dtype != np.float32:
            raise UserError(f"'{path}' is {priors.dtype} {list(priors.shape)}, expected float32 "
                            f"[{count}, 4]; export the weights again")
        return priors

    def mask_iou(self, masks: np.ndarray) -> np.ndarray:
        """Predicted IoU of soft masks float32 `[n, 1, h, w]` for every class (YOLACT++)."""
        return self._run(self.facts["mask_iou"]["file"], masks)[0]

    def _run(self, file: str, values: np.ndarray) -> list[np.ndarray]:
        session = self.session(file)
        try:
            return [np.asarray(output) for output in session(values)]
        except Exception as error:  # the runtimes' own types
            raise UserError(f"'{os.path.join(self.folder, file)}' does not run with {values.dtype} "
                            f"{list(values.shape)} ({first_line(error)[:300]}); export the weights "
                            "again") from None

    def session(self, file: str) -> Session:
        """What runs a file of the folder; opened when it is first asked for."""
        if file not in self._sessions:
            path = os.path.join(self.folder, file)
            described = {entry["file"]: entry["sha256"] for entry in self.facts["models"]
                         + [self.facts["mask_iou"] or self.facts["models"][0]]}
            expected = described[file]
            if not os.path.isfile(path) or expected not in (None, digest(path)):
                raise UserError(f"'{path}' is missing or not the file that {DESCRIPTION} "
                                "describes; export the weights again")
            # What scores masks is small, and no OM.
            device = "cpu" if self.models[0]["file"].endswith(".om") else self.device
            self._sessions[file] = (_open_om(path) if file.endswith(".om")
                                    else open_onnx(path, device)[0])
        return self._sessions[file]


def prepare(planes: np.ndarray, described: dict[str, Any]) -> np.ndarray:
    """Bring uint8 RGB images `[B, 3, S, S]` into the form of a model's input."""
    if described["layout"] == "NHWC":
        planes = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
    if described["type"] == "uint8":
        return planes
    mean, std = (np.array(described[key], np.float32).reshape(1, 3, 1, 1)
                 for key in ("mean", "std"))
    return (planes.astype(np.float32) - mean) / std


def refuse_other_names(path: str) -> None:
    """A `UserError` for a name of other bytes than UTF-8's, which no library of ONNX takes."""
    try:
        path.encode("utf-8")
    except UnicodeError:
        raise UserError(f"'{path}' is a name that is not in UTF-8, and ONNX opens no such file; "
                        "rename the folder, or choose another") from None


def open_onnx(path: str, device: str = "cpu", options: Any | None = None) -> tuple[Session, str]:
    """What runs an ONNX file, and ONNX Runtime's version and device in words."""
    refuse_other_names(path)
    runtime = require("onnxruntime")
    available = runtime.get_available_providers()
    wanted = list(PROVIDERS) if device == "auto" else [device]
    providers = [PROVIDERS[name] for name in wanted if PROVIDERS.get(name) in available]
    if device in PROVIDERS and not providers:
        raise UserError(f"{device} was asked for, but onnxruntime {runtime.__version__} has no "
                        f"{PROVIDERS[device]} here (it has {', '.join(available)}); "
                        f"{INSTALL[device]}, or choose the CPU")
    options = options or runtime.SessionOptions()
    # Threads that wait by spinning would take the cores of what reads images and makes masks.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads = whole_number(os.environ.get("OMP_NUM_THREADS", "")) or 0
    try:
        session = runtime.InferenceSession(path, options,
                                           providers=providers + ["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own types, which differ between versions
        raise UserError(f"onnxruntime {runtime.__version__} cannot run '{path}' "
                        f"({first_line(error)[:300]}); install a newer one, or export again with "
                        "another --opset") from None
    if device in PROVIDERS and session.get_providers()[0] != PROVIDERS[device]:
        raise UserError(f"onnxruntime {runtime.__version__} cannot start its {PROVIDERS[device]}; "
                        "what it printed above says why; choose the CPU, or mend that")
    name = session.get_inputs()[0].name
    return (lambda values: session.run(None, {name: values}),
            f"onnxruntime {runtime.__version__}, {session.get_providers()[0]}")


def _open_om(path: str) -> Session:
    """What runs an Ascend model, on card `ASCEND_DEVICE_ID` (0)."""
    interface = require("ais_bench.infer.interface")
    text = os.environ.get("ASCEND_DEVICE_ID", "0")
    card = whole_number(text)
    if card is None:
        raise UserError(f"ASCEND_DEVICE_ID is '{text}', expected the number of a card")
    session = interface.InferSession(card, path)
    return lambda values: session.infer([values])


def _has_ais_bench() -> bool:
    try:
        importlib.import_module("ais_bench.infer.interface")
    except ImportError:
        return False
    return True


def require(name: str) -> Any:
    """A module of a library; a `UserError` where it is not installed.

    ONNX Runtime reports its use, and keeps an id for that in the user's cache, unless told not to.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise UserError(f"{package} is needed for exported models and cannot be imported "
                        f"({first_line(error)}); {INSTALL[package]}") from None
