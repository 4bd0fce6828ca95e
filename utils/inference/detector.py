"""Batches of images on their way through a network, to the objects of each image."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import Any, Callable, Generator, Iterable, Iterator, NamedTuple, Sequence, TypeVar, cast

import cv2
import numpy as np
import torch
from torch import Tensor

from data.config import Config, get_config
from data.config_file import read_recipe
from layers.deform_conv import convolve_recordably
from layers.detection import Detect, Detections
from layers.masks import Rle, boxes_to_pixels, encode_masks, mask_scores
from utils import checkpoint
from utils.amp import inference_dtype
from utils.device import prefers_channels_last
from utils.device_graph import GraphedCall
from utils.errors import UserError, some
from utils.exported import is_export
from utils.inference.exported_network import ExportedNetwork
from utils.progress import ProgressBar, image_parts
from utils.weights.files import WeightsFile
from utils.weights.loading import LoadReport, load_network
from utils.weights_folder import find_checkpoint, weights_of_run
from yolact import Yolact, build_yolact, for_inference

CPU = torch.device("cpu")

T = TypeVar("T")
Item = TypeVar("Item")


def to_network_input(image_bgr: np.ndarray, side: int) -> np.ndarray:
    """Resize `[h, w, 3]` BGR to planes `[3, side, side]` RGB, uint8; the aspect is not kept."""
    resized = cv2.resize(image_bgr, (side, side), interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(resized[:, :, ::-1].transpose(2, 0, 1))


def to_network_batch(images_bgr: Sequence[np.ndarray], side: int, count: int) -> Tensor:
    """Uint8 `[count, 3, side, side]`, black behind the images."""
    planes = np.zeros((count, 3, side, side), np.uint8)
    for n, image in enumerate(images_bgr):
        planes[n] = to_network_input(image, side)
    return torch.from_numpy(planes)


class StageTimes:
    """Wall time of the stages of a loop, from construction on.

    Args:
        synchronize: called at the end of each stage, so that work queued on the device is counted
            where it was queued; None leaves the device alone and the stages overlap.

    Attributes:
        seconds: by stage, in the order in which they first ended.
        images: finished.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self._synchronize = synchronize
        self.seconds: dict[str, float] = {}
        self.images = 0
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to stage `name`."""
        start = time.perf_counter()
        yield
        if self._synchronize is not None:
            self._synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def watch(self, name: str, source: Iterable[T]) -> Iterator[T]:
        """Iterate `source`, adding the time spent waiting for it to stage `name`."""
        iterator = iter(source)
        while True:
            with self.stage(name):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def images_per_second(self) -> float:
        """Images finished since the start over the time since then."""
        return self.images / max(time.perf_counter() - self._start, 1e-9)

    def sentence(self, stages: bool) -> str:
        """Speed since the start, with `stages` also the time of each stage per image."""
        text = (f"{self.images} images in {time.perf_counter() - self._start:.1f} s: "
                f"{self.images_per_second():.2f} images/s")
        if not stages:
            return text
        return text + "; ms per image: " + ", ".join(
            f"{name} {1000 * seconds / max(self.images, 1):.1f}"
            for name, seconds in self.seconds.items())


class ImageObjects(NamedTuple):
    """The n objects found in one image, best box first."""

    boxes: np.ndarray
    """float32 `[n, 4]`, x1 y1 x2 y2 in pixels."""
    rles: list[Rle]
    """n masks."""
    classes: np.ndarray
    """int64 `[n]`, 0-based class."""
    scores: np.ndarray
    """float32 `[n]`, of the boxes, in [0, 1]."""
    mask_scores: np.ndarray
    """float32 `[n]`, of the masks: those of the boxes unless the network scores masks itself."""


class PendingDetections(NamedTuple):
    """Detections of a batch that a device may still be working on."""

    detections: Detections
    proto: Tensor
    """`[B, h, w, k]`"""
    mask_scores: Tensor
    """`[B, N]`, in the order of the detections."""

    def to(self, device: torch.device) -> PendingDetections:
        """The same on `device`; waits for them where that is the CPU."""
        return PendingDetections(self.detections.to(device), self.proto.to(device),
                                 self.mask_scores.to(device))

    def copied(self) -> PendingDetections:
        """The same in memory of its own."""
        fields = vars(self.detections).values()
        return PendingDetections(Detections(*(values.clone() for values in fields)),
                                 self.proto.clone(), self.mask_scores.clone())


@dataclass
class Detector:
    """Finds objects in batches of images."""

    model: Yolact | ExportedNetwork
    """On `device`; in evaluation mode when it is used."""
    detect: Callable[[dict[str, Tensor]], Detections]
    """From predictions to detections, see `LoadedModel.build_detect`."""
    device: torch.device
    crop: bool = True
    """Cut masks off outside their boxes."""
    score_threshold: float = 0.0
    """Only boxes with a higher score; 0 for all."""
    graphed: GraphedCall[PendingDetections] | None = None
    """Network and detection, recorded on the device; made by `record_on_device`."""

    def record_on_device(self) -> None:
        """Record what the device does with a batch, once for each shape, and replay it from there.

        The device is made ready by `prepare_graphs`.

        Raises:
            UserError: a model or a suppression that works on the host.
        """
        if not isinstance(self.model, Yolact):
            raise UserError("--device_graph records the network on the device, but an export runs "
                            "on its own; leave it out")
        if isinstance(self.detect, Detect) and self.detect.nms == "traditional":
            raise UserError("--device_graph records detection on the device, but --fast_nms=False "
                            "suppresses on the host; leave one of them out")
        if self.device.type == "npu":
            convolve_recordably(self.model)
        self.graphed = GraphedCall(lambda images: self.detections(self.model(images)),
                                   PendingDetections.copied, self.device)

    @property
    def full_batches(self) -> bool:
        """Whether batches have to be filled up: accelerators compile their kernels for a shape,
        and an export may have one alone.
        """
        return self.device.type != "cpu" or isinstance(self.model, ExportedNetwork)

    def find(self, batches: Iterable[tuple[Tensor, Sequence[tuple[Item, int, int]]]],
             times: StageTimes, progress: ProgressBar | None = None
             ) -> Generator[tuple[Item, ImageObjects], None, None]:
        """Yield each image with its objects, in order.

        The host finishes a batch after the next one is launched, so that device and host work
        together.

        Args:
            batches: uint8 images `[B, 3, S, S]`, and for each of them what it is to the caller,
                with height and width of the stored image. There may be fewer than B.
            times: waiting for `batches` is its stage "loading". Counts the images.
            progress: shown after each batch, and finished.
        """
        before: tuple[Sequence[tuple[Item, int, int]], PendingDetections] | None = None
        try:
            for images, items in times.watch("loading", batches):
                launched = self.launch(images, times)
                if before is not None:
                    yield from self._finish(*before, times, progress)
                before = items, launched
            if before is not None:
                yield from self._finish(*before, times, progress)
        finally:
            if progress is not None:
                progress.finish(times.images, image_parts(0, times.images_per_second()))

    @torch.no_grad()
    def launch(self, images: Tensor, times: StageTimes) -> PendingDetections:
        """Queue the work for uint8 images `[B,3,S,S]`; returns without waiting for it."""
        if self.graphed is not None:
            with times.stage("network and detection"):
                return self.graphed(images)
        with times.stage("network"):
            predictions = self.model(images.to(self.device, non_blocking=True))
        with times.stage("detection"):
            return self.detections(predictions)

    @torch.no_grad()
    def detections(self, predictions: dict[str, Tensor]) -> PendingDetections:
        """The detections in a model's predictions, and the scores of their masks."""
        found, proto = self.detect(predictions), predictions["proto"]
        if self.model.maskiou_net is None:
            return PendingDetections(found, proto, found.scores)
        return PendingDetections(found, proto, mask_scores(self.model.maskiou_net, found, proto,
                                                           self.crop))

    def _finish(self, items: Sequence[tuple[Item, int, int]], launched: PendingDetections,
                times: StageTimes, progress: ProgressBar | None
                ) -> Iterator[tuple[Item, ImageObjects]]:
        with times.stage("transfer"):
            fetched = launched.to(CPU)
        for n, (item, height, width) in enumerate(items):
            with times.stage("run lengths"):
                objects = self.objects(fetched, n, height, width)
            yield item, objects
            times.images += 1
        if progress is not None:
            progress.show(times.images, image_parts(progress.total - times.images,
                                                    times.images_per_second()))

    def objects(self, fetched: PendingDetections, n: int, height: int, width: int
                ) -> ImageObjects:
        """The objects of image n of a batch, whose stored image has this size in pixels."""
        found = fetched.detections.of_image(n, self.score_threshold)
        rles = encode_masks(fetched.proto[n], found.coefficients, found.boxes, height, width,
                            self.crop)
        return ImageObjects(boxes_to_pixels(found.boxes, height, width).numpy(), rles,
                            found.classes.numpy(), found.scores.numpy(),
                            fetched.mask_scores[n, :len(rles)].numpy())


class LoadedModel(NamedTuple):
    """A network in evaluation mode, on the CPU, and what is known about it."""

    model: Yolact | ExportedNetwork
    config: Config
    report: LoadReport

    @property
    def source(self) -> WeightsFile:
        """The weights' file, with what is known of their training."""
        return self.report.source

    def on(self, device: torch.device, precision: str = "float32"
           ) -> Yolact | ExportedNetwork:
        """The network, ready for `device`; of one that is no export a copy, folded.

        `precision` is that of `utils.amp.inference_dtype`; what scores masks stays float32, and so
        does what follows the network.

        Raises:
            UserError: `device` cannot compute in that type, or an export is to have another.
        """
        if isinstance(self.model, ExportedNetwork):
            if precision != "float32":
                raise UserError(f"--precision={precision}: '{self.source.path}' has the type it "
                                "was exported with; leave the flag out")
            return self.model.to(device)
        dtype = inference_dtype(precision, device)
        model = for_inference(self.model).to(device)
        for name, part in model.named_children():
            if name != "maskiou_net":
                part.to(dtype)
        if prefers_channels_last(device):
            model.use_channels_last()
            cast(Any, model).to(memory_format=torch.channels_last)
        return model

    def build_detect(self, nms: str) -> Callable[[dict[str, Tensor]], Detections]:
        """From the model's predictions to detections; an export may have found them itself."""
        if isinstance(self.model, ExportedNetwork):
            return self.model.detect(nms, self.config)
        return Detect.from_config(self.config, nms)


def load_model(which: str, save_folder: str = "weights/", config_name: str | None = None,
               max_num_detections: int | None = None) -> LoadedModel:
    """Build the network that a weights file belongs to and load it.

    Args:
        which: path of a weights file, of a run folder, or of what `utils.export` wrote (the folder
            or a model in it), or `latest` or `interrupt` in `save_folder`.
        save_folder: see `which`.
        config_name: recipe, or a file with one; None for that stored with the weights, or of the
            file's name. What is stored wins over the recipe, and a file's changes over both.
        max_num_detections: detections per image; None for the configuration's.

    Raises:
        UserError: there is no such file, it is damaged, or does not fit the recipe.
    """
    if is_export(which):
        return _load_export(which, config_name, max_num_detections)
    wanted = read_recipe(config_name)[0] if config_name else None
    name = wanted.name if wanted else None
    path = find_checkpoint(weights_of_run(which), save_folder, name)
    stored = checkpoint.load_for_inference(path)
    contents, recipe = stored.contents, name or checkpoint.recipe_of(path)
    if stored.config is not None and name in (None, stored.config["name"]):
        config = Config.from_dict(stored.config)
    elif recipe is not None:
        config = get_config(recipe)
    elif contents is None:
        raise UserError(f"'{path}' holds no YOLACT that is known (first tensors: "
                        f"{some(stored.tensors, 3)}); if it is one, give its configuration with "
                        "--config")
    elif not contents.is_network:
        raise UserError(f"'{path}' holds a {contents.backbone} alone, expected weights of a whole "
                        "network")
    else:
        raise UserError(f"'{path}' does not say which configuration it belongs to; give it with "
                        "--config")
    changes = {} if wanted is None else wanted.changes_from(get_config(wanted.name))
    if contents is not None and contents.num_classes is not None:
        changes["num_classes"] = contents.num_classes + 1
    config = _with_detections(config.replace(**changes), max_num_detections)
    model = build_yolact(config)
    return LoadedModel(model.eval(), config, load_network(model, stored))


def _with_detections(config: Config, most: int | None) -> Config:
    if most is None:
        return config
    return config.replace(max_num_detections=most, nms_top_k=max(config.nms_top_k, most))


def _load_export(path: str, config_name: str | None, most: int | None) -> LoadedModel:
    network = ExportedNetwork(path)
    config, facts = network.config, network.facts
    if config_name is not None and read_recipe(config_name)[0].name != config.name:
        raise UserError(f"'{path}' was exported from {config.name}, not {config_name}; leave "
                        "--config out")
    source = WeightsFile(os.path.normpath(path), f"export of {facts['weights']['file']}, "
                         f"{facts['form']}", {}, class_names=facts["class_names"],
                         category_ids=facts["category_ids"])
    return LoadedModel(network.eval(), _with_detections(config, most),
                       LoadReport(source, (), (), ()))
