"""Find objects in pictures, from Python:

    from utils.predictor import Predictor
    predictor = Predictor("weights/last.pth")
    result = predictor("cat.jpg")           # boxes, scores, class_names, class_ids, masks
    cv2.imwrite("drawn.png", result.draw())

The public face of the project for programs, and what eval.py runs on: the one module of `utils`
that knows the network.
"""

from __future__ import annotations

import os
from typing import (
    Any,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
    overload,
)

import numpy as np
import torch
from torch import Tensor

from data import image as images
from data.classes import ClassList, find_classes
from data.config import Config, get_config
from layers.detection import Detect
from utils import checkpoint
from utils.device import select_device, synchronize
from utils.errors import UserError
from utils.inference.detector import Detector, PendingDetections
from utils.inference.pipeline import StageTimes, to_network_input
from utils.inference.prediction import Prediction
from utils.weights.loading import LoadReport, load_network
from yolact import Yolact, build_yolact

Source = Union[str, os.PathLike, np.ndarray, Any]
"""A file, a PIL image, or an array as `data.image.image_from_array` takes it."""

class LoadedModel(NamedTuple):
    """A network in evaluation mode, on the CPU, and what is known about it."""

    model: Yolact
    config: Config
    class_names: Optional[List[str]]
    """Of the foreground classes as stored with the weights; None if unknown."""
    category_ids: Optional[List[int]]
    """What the training data called these classes; None if unknown."""
    report: LoadReport
    origin: Optional[checkpoint.Origin]
    """Iteration and run folder; None if unknown."""


def load_model(which: str, save_folder: str = "weights/", config_name: Optional[str] = None,
               max_num_detections: Optional[int] = None) -> LoadedModel:
    """Build the network that a weights file belongs to and load it.

    Args:
        which: path of a weights file, or `latest` or `interrupt` in `save_folder`.
        save_folder: see `which`.
        config_name: recipe; None for that stored with the weights, or of the file's name.
        max_num_detections: detections per image; None for the configuration's.

    Raises:
        UserError: there is no such file, it is damaged, or does not fit the recipe.
    """
    wanted = get_config(config_name) if config_name else None
    name = wanted.name if wanted else None
    path = checkpoint.find_checkpoint(which, save_folder, name)
    stored = checkpoint.load_for_inference(path, name)
    if stored.config is not None and name in (None, stored.config["name"]):
        config = Config.from_dict(stored.config)
    elif stored.config_name is not None:
        config = get_config(stored.config_name)
    else:
        raise UserError(f"'{path}' does not say which configuration it belongs to; give it with "
                        "--config")
    contents = stored.weights.contents
    changes = {} if contents is None or contents.num_classes is None else {
        "num_classes": contents.num_classes + 1}
    if max_num_detections is not None:
        changes["max_num_detections"] = max_num_detections
        changes["nms_top_k"] = max(config.nms_top_k, max_num_detections)
    config = config.replace(**changes)
    model = build_yolact(config)
    report = load_network(model, stored.weights)
    return LoadedModel(model.eval(), config, stored.class_names, stored.category_ids, report,
                       stored.origin)


class Predictor:
    """Finds objects in pictures. Not to be used by several threads at once.

    Args:
        weights: path of a weights file, or `latest` or `interrupt` in `save_folder`.
        device: `auto`, `npu`, `cuda` or `cpu`.
        config: recipe, where neither the weights nor their name say it.
        score_threshold: only objects with a higher score; 0 for all that the network finds.
        batch_size: pictures that pass the network together, always as many: the last batch is
            filled up.
        nms: `fast`, `cross_class` or `traditional`.
        crop: cut masks off outside their boxes.
        max_num_detections: objects per picture; None for the recipe's 100.
        save_folder: see `weights`.

    Attributes:
        classes: names and category ids of the network's classes.

    Raises:
        UserError: the weights cannot be loaded, or there is no such device.
    """

    suffixes = images.SUFFIXES
    """Endings of files that are taken for pictures."""

    def __init__(self, weights: Union[str, os.PathLike] = "latest", device: str = "auto",
                 config: Optional[str] = None, score_threshold: float = 0.0, batch_size: int = 1,
                 nms: str = "fast", crop: bool = True, max_num_detections: Optional[int] = None,
                 save_folder: str = "weights/") -> None:
        if not 0 <= score_threshold <= 1:
            raise ValueError(f"score_threshold is {score_threshold}, expected 0 to 1")
        target = select_device(device)
        loaded = load_model(os.fspath(weights), save_folder, config, max_num_detections)
        self._set(Detector(loaded.model.to(target), Detect.from_config(loaded.config, nms), target,
                         crop, score_threshold), loaded, batch_size)

    @classmethod
    def from_loaded(cls, detector: Detector, loaded: LoadedModel, batch_size: int = 1) -> Predictor:
        """A predictor around a network that is there already."""
        predictor = cls.__new__(cls)
        predictor._set(detector, loaded, batch_size)
        return predictor

    def _set(self, detector: Detector, loaded: LoadedModel, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        self.batch_size = batch_size
        self.classes: ClassList = find_classes(loaded.config.num_classes - 1, loaded.class_names,
                                               loaded.category_ids, loaded.config.dataset)
        self._detector = detector

    @overload
    def __call__(self, source: Union[List[Source], Tuple[Source, ...]],
                 rgb: bool = False) -> List[Prediction]:
        ...

    @overload
    def __call__(self, source: Union[str, os.PathLike, np.ndarray],
                 rgb: bool = False) -> Prediction:
        ...

    def __call__(self, source: Any, rgb: bool = False) -> Union[Prediction, List[Prediction]]:
        """Find the objects in a picture, or in each of a list of pictures.

        Args:
            source: a file, an array, a PIL image, or a list of these. Files and PIL images are
                turned as their EXIF orientation says.
            rgb: arrays are red, green, blue; otherwise blue, green, red, as OpenCV has them.

        Raises:
            UserError: a file cannot be read.
            ValueError: an array has no shape or type of a picture.
        """
        if isinstance(source, (list, tuple)):
            return list(self.iterate(source, rgb))
        return next(self.iterate([source], rgb))

    def iterate(self, sources: Iterable[Source], rgb: bool = False) -> Iterator[Prediction]:
        """Yield the prediction for each source as it is ready; at most a batch is in memory."""
        waiting: List[Tuple[np.ndarray, Optional[str]]] = []
        for source in sources:
            path = os.fspath(source) if isinstance(source, (str, os.PathLike)) else None
            waiting.append((self._open(source, rgb), path))
            if len(waiting) == self.batch_size:
                yield from self._find(waiting)
                waiting = []
        yield from self._find(waiting)

    def read(self, path: str) -> np.ndarray:
        """Decode a file as predictions need it; see `data.image.read_image`."""
        return images.read_image(path)

    def planes(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Network input of up to B pictures `[h, w, 3]` BGR: uint8 `[B, 3, S, S]`, else black."""
        side = self._detector.model.input_size
        planes = np.zeros((self.batch_size, 3, side, side), np.uint8)
        for n, image in enumerate(pictures):
            planes[n] = to_network_input(image, side)
        return torch.from_numpy(planes)

    def launch(self, planes: Tensor, times: StageTimes) -> PendingDetections:
        """Queue the work for `planes`; returns without waiting for it."""
        return self._detector.launch(planes, times)

    def collect(self, pending: PendingDetections, pictures: Sequence[np.ndarray],
                times: StageTimes,
                paths: Optional[Sequence[Optional[str]]] = None) -> List[Prediction]:
        """Fetch what was launched for `pictures`, which came from `paths`."""
        with times.stage("transfer"):
            fetched = pending.fetch()
        with times.stage("run lengths"):
            return [self._prediction(fetched, n, image, None if paths is None else paths[n])
                    for n, image in enumerate(pictures)]

    def warm_up(self) -> None:
        """Run the network once, so that what is built on first use is there."""
        self.launch(self.planes([]), StageTimes()).fetch()

    def synchronize(self) -> None:
        """Wait until the device has done its work."""
        synchronize(self._detector.device)

    def _open(self, source: Source, rgb: bool) -> np.ndarray:
        if isinstance(source, (str, os.PathLike)):
            return self.read(os.fspath(source))
        if isinstance(source, np.ndarray):
            return images.image_from_array(source, rgb)
        if hasattr(source, "convert") and hasattr(source, "mode"):
            return images.image_from_pil(source)
        raise ValueError(f"picture is a {type(source).__name__}, expected a path, an array or a "
                         "PIL image")

    def _find(self, waiting: Sequence[Tuple[np.ndarray, Optional[str]]]) -> List[Prediction]:
        if not waiting:
            return []
        pictures = [image for image, _ in waiting]
        times = StageTimes()
        return self.collect(self.launch(self.planes(pictures), times), pictures, times,
                            [path for _, path in waiting])

    def _prediction(self, fetched: PendingDetections, n: int, image: np.ndarray,
                    path: Optional[str]) -> Prediction:
        objects = self._detector.objects(fetched, n, *image.shape[:2])
        # YOLACT++ ranks by the masks' scores; otherwise this changes nothing.
        scores = objects.mask_scores
        order = np.argsort(-scores, kind="stable")
        if self._detector.score_threshold > 0:
            order = order[scores[order] > self._detector.score_threshold]
        class_ids = objects.classes[order]
        return Prediction(
            image=image, boxes=objects.boxes[order], scores=scores[order], class_ids=class_ids,
            class_names=[self.classes.names[index] for index in class_ids],
            rles=[objects.rles[index] for index in order],
            all_class_names=self.classes.names, category_ids=self.classes.category_ids, path=path)
