"""Find objects in images, from Python:

from utils.inference import Predictor
predictor = Predictor("weights/last.pth")
result = predictor("cat.jpg")           # boxes, scores, class_names, class_ids, masks
cv2.imwrite("drawn.png", result.draw())
"""

from __future__ import annotations

import itertools
import os
import warnings
from typing import (
    Any,
    Generator,
    Iterable,
    Iterator,
    List,
    Optional,
    Sequence,
    Tuple,
    Union,
    overload,
)

import numpy as np
import torch
from torch import Tensor

from data.classes import ClassList, find_classes
from data.image import image_from_array, image_from_pil, read_image
from utils.device import select_device, synchronize
from utils.inference.detector import (
    Detector,
    ImageObjects,
    Item,
    LoadedModel,
    StageTimes,
    load_model,
    to_network_input,
)
from utils.inference.prediction import Prediction
from utils.progress import ProgressBar

Source = Union[str, os.PathLike, np.ndarray, Any]
"""A file, a PIL image, or an array as `data.image.image_from_array` takes it."""


class Predictor:
    """Finds objects in images. Not to be used by several threads at once.

    Args:
        weights: path of a weights file, of a run folder or of an export, `latest` or `interrupt`
            in `save_folder`, or a network from `load_model`.
        device: `auto`, `npu`, `cuda` or `cpu`, or one that was selected.
        config: recipe, where neither the weights nor their name say it.
        score_threshold: only objects with a higher score; 0 for all that the network finds.
        batch_size: images that pass the network together; on an accelerator always as many: the
            last batch is filled up.
        nms: `fast`, `cross_class` or `traditional`.
        crop: cut masks off outside their boxes.
        max_num_detections: objects per image; None for the recipe's 100.
        save_folder: see `weights`.
        precision: `float32`, `bfloat16`, `float16`, or `auto` for what is fastest here.

    Attributes:
        classes: names and category ids of the network's classes.

    Raises:
        UserError: the weights cannot be loaded, or there is no such device.
    """

    def __init__(self, weights: Union[str, os.PathLike, LoadedModel] = "latest",
                 device: Union[str, torch.device] = "auto", config: Optional[str] = None,
                 score_threshold: float = 0.0, batch_size: int = 1, nms: str = "fast",
                 crop: bool = True, max_num_detections: Optional[int] = None,
                 save_folder: str = "weights/", precision: str = "float32") -> None:
        if not 0 <= score_threshold <= 1:
            raise ValueError(f"score_threshold is {score_threshold}, expected 0 to 1")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        target = select_device(device) if isinstance(device, str) else device
        if isinstance(weights, LoadedModel):
            loaded = weights
        else:
            loaded = load_model(os.fspath(weights), save_folder, config, max_num_detections)
            for sentence in loaded.source.warnings:
                warnings.warn(sentence, stacklevel=2)
        self.batch_size = batch_size
        self.classes: ClassList = find_classes(
            loaded.config.num_classes - 1, loaded.source.class_names, loaded.source.category_ids,
            loaded.config.dataset)
        self._detector = Detector(loaded.on(target, precision), loaded.build_detect(nms), target,
                                  crop, score_threshold)

    @overload
    def __call__(self, source: Union[List[Source], Tuple[Source, ...]],
                 rgb: bool = False) -> List[Prediction]:
        ...

    @overload
    def __call__(self, source: Union[str, os.PathLike, np.ndarray],
                 rgb: bool = False) -> Prediction:
        ...

    def __call__(self, source: Any, rgb: bool = False) -> Union[Prediction, List[Prediction]]:
        """Find the objects in an image, or in each of a list of images.

        Args:
            source: a file, an array, a PIL image, or a list of these. Files and PIL images are
                turned as their EXIF orientation says.
            rgb: arrays are red, green, blue; otherwise blue, green, red, as OpenCV has them.

        Raises:
            UserError: a file cannot be read.
            ValueError: an array has no shape or type of an image.
        """
        if isinstance(source, (list, tuple)):
            return list(self.iterate(source, rgb))
        return next(self.iterate([source], rgb))

    def iterate(self, sources: Iterable[Source], rgb: bool = False) -> Iterator[Prediction]:
        """Yield the prediction for each source as it is ready; at most a batch is in memory."""
        opened = ((os.fspath(source) if isinstance(source, (str, os.PathLike)) else None,
                   self._open(source, rgb)) for source in sources)
        while True:
            batch = list(itertools.islice(opened, self.batch_size))
            if not batch:
                return
            for path, prediction in self.find([batch], StageTimes()):
                prediction.path = path
                yield prediction

    def find(self, batches: Iterable[Sequence[Tuple[Item, np.ndarray]]], times: StageTimes,
             progress: Optional[ProgressBar] = None
             ) -> Generator[Tuple[Item, Prediction], None, None]:
        """Yield what is found in each image of batches of up to B, with what came with the image.

        A batch is finished while the device works on the next one; see `Detector.find`.

        Args:
            batches: of images uint8 `[h, w, 3]` BGR; read while the device works.
            times: is told how long the stages take.
            progress: shown after each batch.
        """
        prepared = ((self._planes([image for _, image in batch]),
                     [((item, image), image.shape[0], image.shape[1]) for item, image in batch])
                    for batch in batches)
        for (item, image), objects in self._detector.find(prepared, times, progress):
            yield item, self._prediction(objects, image)

    def warm_up(self) -> None:
        """Run the network once, so that what is built on first use is there."""
        next(self.iterate([np.zeros((1, 1, 3), np.uint8)]))

    def synchronize(self) -> None:
        """Wait until the device has done its work."""
        synchronize(self._detector.device)

    def _open(self, source: Source, rgb: bool) -> np.ndarray:
        if isinstance(source, (str, os.PathLike)):
            return read_image(os.fspath(source))
        if isinstance(source, np.ndarray):
            return image_from_array(source, rgb)
        if hasattr(source, "convert") and hasattr(source, "mode"):
            return image_from_pil(source)
        raise ValueError(f"image is a {type(source).__name__}, expected a path, an array or a "
                         "PIL image")

    def _planes(self, images: Sequence[np.ndarray]) -> Tensor:
        """Network input of up to B images: uint8 `[B, 3, S, S]`, black where batches are full."""
        side = self._detector.model.input_size
        count = self.batch_size if self._detector.full_batches else len(images)
        planes = np.zeros((count, 3, side, side), np.uint8)
        for n, image in enumerate(images):
            planes[n] = to_network_input(image, side)
        return torch.from_numpy(planes)

    def _prediction(self, objects: ImageObjects, image: np.ndarray) -> Prediction:
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
            all_class_names=self.classes.names, category_ids=self.classes.category_ids)
