"""An exported model in the place of a network; the rest of inference sees no difference."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import torch
from torch import Tensor, nn

from data.config import Config
from layers.detection import Detect, Detections
from utils.errors import UserError
from utils.exported import ExportedModel

DETECTIONS = "detections"
"""Form of a model that has the suppression inside; the other form is `raw`."""


class ExportedNetwork(nn.Module):
    """Gives what `yolact.Yolact` gives in evaluation mode, from an exported folder, or a model in
    it. `config` is that the network was built from, `maskiou_net` re-scores masks (YOLACT++).
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self._exported = ExportedModel(path)
        self.facts = self._exported.facts
        limits = self.facts["thresholds"]
        self.config = Config.from_dict(self.facts["config"]).replace(
            nms_conf_thresh=limits["score"], nms_thresh=limits["iou"], nms_top_k=limits["top_k"],
            max_num_detections=limits["max_detections"])
        self.input_size = self.config.max_size
        self.maskiou_net: Any = self._mask_iou if self.facts["mask_iou"] else None
        self.priors = torch.from_numpy(self._exported.priors())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Predictions for uint8 images `[B,3,S,S]`; with `detections` inside, those by field."""
        return self.predictions(self.exported(images.device.type)(images.cpu().numpy()),
                                images.device)

    def predictions(self, outputs: dict[str, np.ndarray], device: torch.device
                    ) -> dict[str, Tensor]:
        """The model's outputs as `forward` returns them."""
        found = {name: torch.from_numpy(values).to(device) for name, values in outputs.items()}
        if "conf" in found:
            # Probabilities; of their logarithms softmax makes them again.
            found["conf"] = found["conf"].log()
        return dict(found, priors=self.priors.to(device))

    def exported(self, device: str) -> ExportedModel:
        """The model for this kind of device."""
        if self._exported.device != device:
            self._exported = ExportedModel(self.path, device)
        return self._exported

    def detect(self, nms: str, config: Config) -> Callable[[dict[str, Tensor]], Detections]:
        """From predictions to detections, with the suppression that is asked for.

        Raises:
            UserError: the model has another one inside.
        """
        if self.facts["form"] != DETECTIONS:
            return Detect.from_config(config, nms)
        if nms != "fast" or config.max_num_detections != self.config.max_num_detections:
            raise UserError(f"'{self.path}' has its suppression inside (fast, "
                            f"{self.config.max_num_detections} detections); leave the flags out, "
                            "or export with --outputs=raw")
        return lambda found: Detections(found["boxes"], found["scores"], found["classes"].long(),
                                        found["coefficients"], found["count"].long())

    def _mask_iou(self, masks: Tensor) -> Tensor:
        """`layers.heads.MaskIouNet` as it was exported."""
        iou = self.exported(masks.device.type).mask_iou(masks.cpu().numpy())
        return torch.from_numpy(iou).to(masks.device)
