"""Every released recipe, as a few lines over the base recipe.

A `Config` is frozen. Only the `build_*` / `from_config` functions read one; the modules they build
take plain arguments. Recipes that belong to the original keep its names and its numbers
(dbolya/yolact, data/config.py); `yolact_shapes` and `yolact_small`, for own small images, are ours
and train from scratch on a CPU.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, Mapping, NamedTuple, Tuple, Union, get_type_hints

from data.config_fields import fraction, freeze, option, value_problem
from utils.errors import UserError, nearest

IMAGENET_MEAN = (123.68, 116.78, 103.94)
IMAGENET_STD = (58.40, 57.12, 57.38)

NOT_FROZEN, WHOLE_BACKBONE = "none", "backbone"
"""Words for `Config.freeze`, beside a number of stages."""
BALANCED = "balanced"
"""Word for `Config.class_weights`, beside weights by name."""
SMALLEST_SIDE = 64
"""Pixels that an input side has at least: two positions of a ResNet's last stage."""
SMALLEST_MASKIOU_INPUT = 63
"""Prototype pixels a side from which `layers.heads.MaskIouNet` has an output."""
MOST_DETECTIONS = 10000
"""Each is compared with all others of its class."""
_FIRST_NEW_FIELD = "ema_decay"


class BackboneFacts(NamedTuple):
    """What a recipe has to know of a backbone of `backbone.py`; a test holds the two equal."""

    strides: tuple[int, ...]
    """Of each stage's feature map; powers of two."""
    weights: str
    """File under the weights folder with its ImageNet weights; "none": nobody publishes any."""
    deformable: bool = False
    """Whether its blocks can be deformable (YOLACT++)."""


BACKBONES: dict[str, BackboneFacts] = {
    "resnet101": BackboneFacts((4, 8, 16, 32), "resnet101_reducedfc.pth", deformable=True),
    "resnet50": BackboneFacts((4, 8, 16, 32), "resnet50-19c8e357.pth", deformable=True),
    "resnet_mini": BackboneFacts((4, 8, 16, 32), "none"),
    "darknet53": BackboneFacts((2, 4, 8, 16, 32), "darknet53.pth"),
}


@dataclass(frozen=True)
class Config:
    """One recipe: what is built, how it is trained, how its detections are read.

    Sizes named in pixels refer to the network's input, a square of `max_size`.
    """

    name: str = option("yolact_base", "recipe; the first part of its checkpoints' file names")
    dataset: str = option(
        "coco2017", "layout below --data: that of COCO 2017, COCO 2014, test-dev or Pascal SBD",
        choices=("coco2017", "coco2014", "coco2017_testdev", "pascal_sbd"), flags=("--dataset",))
    num_classes: int = option(
        81, "classes with background; training and evaluation set it from the annotation file",
        at_least=2)

    # Network
    backbone: str = option("resnet101", "name of the backbone", choices=tuple(BACKBONES))
    backbone_weights: str = option(
        BACKBONES["resnet101"].weights, "ImageNet weights, a path or a file in --save_folder; none "
        "trains from scratch", flags=("--backbone_weights",), metavar="FILE")
    selected_layers: Tuple[int, ...] = option(
        (1, 2, 3), "backbone stages (from 0) that feed the pyramid, finest first")
    dcn_layers: Tuple[int, int, int, int] = option(
        (0, 0, 0, 0), "blocks at the end of each ResNet stage that may be deformable (YOLACT++)")
    dcn_interval: int = option(1, "of these, one block in so many is deformable", at_least=1)
    max_size: int = option(
        550, "side of the square network input in pixels; anchors (pred_scales) keep theirs",
        above=0, flags=("--max_size", "--imgsz"), metavar="PIXELS")
    pixel_mean: Tuple[float, float, float] = option(
        IMAGENET_MEAN, "subtracted from the image, RGB, in 0..255")
    pixel_std: Tuple[float, float, float] = option(
        IMAGENET_STD, "divides the image after the mean, RGB, in 0..255")
    fpn_features: int = option(256, "channels of the feature pyramid", above=0)
    fpn_num_downsample: int = option(
        2, "pyramid levels above the last backbone stage, by stride-2 convolutions", at_least=0)
    head_features: int = option(256, "channels of the prediction head", above=0)
    proto_features: int = option(256, "channels of the prototype branch", above=0)
    num_prototypes: int = option(
        32, "prototype masks of an image and coefficients of a prior", above=0)
    pred_scales: Tuple[Tuple[float, ...], ...] = option(
        ((24,), (48,), (96,), (192,), (384,)),
        "anchor sides in pixels for each pyramid level, finest first, several of a level joined "
        "by +; python -m data.check suggests them", flags=("--pred_scales",), metavar="A,B+C,..",
        example="24,48,96 or 20+30,42+60")
    pred_aspect_ratios: Tuple[float, ...] = option(
        (1, 1 / 2, 2), "width over height of the anchors of every level")
    use_square_anchors: bool = option(
        True, "height := width, the original's for all recipes but pascal and YOLACT++")
    use_maskiou: bool = option(
        False, "predict each mask's IoU and multiply it into the mask's score (YOLACT++)")

    # Targets and loss
    positive_iou: float = fraction(0.5, "IoU from which a prior is an object's")
    negative_iou: float = fraction(0.4, "IoU below which a prior is background")
    crowd_iou: float = fraction(
        0.7, "background priors covered by a crowd by more than this become neutral")
    masks_to_train: int = option(100, "positives of an image whose masks are trained; the rest is "
                                 "made up for by a factor", above=0)
    bbox_alpha: float = option(1.5, "weight of the box loss", at_least=0)
    conf_alpha: float = option(1.0, "weight of the confidence loss", at_least=0)
    mask_alpha: float = option(6.125, "weight of the mask loss", at_least=0)
    semantic_alpha: float = option(1.0, "weight of the semantic segmentation loss", at_least=0)
    maskiou_alpha: float = option(25.0, "weight of the mask-IoU loss (YOLACT++)", at_least=0)
    discard_mask_area: int = option(25, "the mask-IoU network trains on masks of more than this "
                                    "many prototype pixels", at_least=0)
    ohem_negpos_ratio: float = option(3.0, "hard negatives mined for each positive", at_least=0)

    # Augmentation
    augment_photometric: bool = option(True, "distort brightness, contrast and colours")
    augment_expand: bool = option(True, "place the image on a larger canvas, so objects shrink")
    augment_crop: bool = option(True, "cut a random part out, so objects grow")
    augment_mirror: bool = option(True, "mirror left to right")

    # Optimisation
    optimizer: str = option("sgd", "update rule", choices=("sgd", "adamw"))
    batch_size: int = option(
        8, "images of a step that lr, lr_steps and max_iter are given for", above=0)
    lr: float = option(1e-3, "learning rate after the warm-up", above=0,
                       flags=("--lr", "--learning_rate", "--lr0"))
    momentum: float = option(0.9, "of SGD", at_least=0, flags=("--momentum",))
    decay: float = option(5e-4, "weight decay", at_least=0, flags=("--decay", "--weight_decay"))
    gamma: float = option(0.1, "factor on the learning rate at each of lr_steps", at_least=0,
                          flags=("--gamma",))
    schedule: str = option("step", "shape of the learning rate after its warm-up",
                           choices=("step", "cosine"), flags=("--schedule",), metavar="step|cosine")
    lr_steps: Tuple[int, ...] = option(
        (280000, 600000, 700000, 750000), "iterations at which the step schedule drops the rate")
    lr_warmup_init: float = option(1e-4, "learning rate that the warm-up starts at", at_least=0)
    lr_warmup_until: int = option(500, "iterations of the warm-up", at_least=0)
    lr_final_factor: float = option(0.01, "end of the cosine, as a fraction of lr", at_least=0)
    max_iter: int = option(800000, "iterations at the configuration's batch size (see "
                           "--no_autoscale)", above=0, flags=("--max_iter",))
    clip_grad_norm: float = option(
        0.0, "largest norm of the whole gradient; 0 does not limit it", at_least=0,
        flags=("--clip_grad_norm",), metavar="NORM")

    # Detection
    nms_conf_thresh: float = fraction(0.05, "score above which a prior enters the suppression")
    nms_thresh: float = fraction(0.5, "largest IoU of two detections that both stay")
    nms_top_k: int = option(
        200, "candidates of a class that enter the suppression; rows of a Detections",
        at_least=1, at_most=MOST_DETECTIONS)
    max_num_detections: int = option(
        100, "detections of an image", at_least=1, at_most=MOST_DETECTIONS)

    # New fields go below this line, with a default that changes nothing: checkpoints of earlier
    # versions do not have them, and mean these defaults.
    ema_decay: float = option(
        0.0, "score and save a moving average of the weights with this decay; 0 turns it off",
        flags=("--ema", "--ema_decay"), metavar="DECAY", flag_alone=0.9998)
    early_stopping: int = option(
        0, "end after this many validations in a row without a better mask mAP; 0 never does",
        at_least=0, flags=("--early_stopping", "--patience"), metavar="N")
    freeze: str = option(
        NOT_FROZEN, "do not train the backbone ('backbone'), or its stem and first stages (their "
        "number)", flags=("--freeze",), metavar="backbone|STAGES")
    class_weights: Union[str, Tuple[Tuple[str, float], ...]] = option(
        (), "factor on the confidence loss of a class's positives, by its name or by inverse "
        "frequency", flags=("--class_weights",), metavar="balanced|NAME=FACTOR,..",
        example="balanced or cat=2,dog=0.5")
    multi_scale: Tuple[int, ...] = option(
        (), "input sides in pixels to train on, drawn in turn; evaluation uses max_size",
        flags=("--multi_scale",), metavar="S,S,..", example="448,550,640")
    multi_scale_interval: int = option(
        10, "iterations that keep an input side", above=0, flags=("--multi_scale_interval",),
        metavar="N")
    epochs: int = option(
        0, "length in epochs in place of max_iter, with lr_steps in proportion and a warm-up of a "
        "tenth at most; 0: max_iter counts", at_least=0, flags=("--epochs",), metavar="N")
    augment_rotate: bool = option(
        False, "turn by 0, 90, 180 or 270 degrees: for images from microscopes or from above")

    def __post_init__(self) -> None:
        kinds = field_kinds()
        for field in dataclasses.fields(self):
            problem = value_problem(getattr(self, field.name), kinds[field.name], field.metadata)
            if problem:
                raise self._invalid(field.name, problem)
        if not self.name or set(self.name) & set("/\\"):
            raise self._invalid("name", "expected a text that can be part of a file name")
        if min(self.pixel_std) <= 0:
            raise self._invalid("pixel_std", "expected numbers above 0")
        if list(self.lr_steps) != sorted(self.lr_steps):
            raise self._invalid("lr_steps", "expected ascending iterations")
        for name, limit in (("negative_iou", "positive_iou"), ("max_num_detections", "nms_top_k")):
            largest = getattr(self, limit)
            if getattr(self, name) > largest:
                raise self._invalid(name, f"expected at most {limit}, which is {largest:g}")
        self._check_network()
        self._check_training_options()

    def _check_network(self) -> None:
        stages = len(BACKBONES[self.backbone].strides)
        if not self.selected_layers or not set(self.selected_layers) <= set(range(stages)):
            raise self._invalid("selected_layers", f"expected stages from 0 to {stages - 1}")
        levels = len(self.selected_layers) + self.fpn_num_downsample
        if len(self.pred_scales) != levels or len({len(level) for level in self.pred_scales}) != 1:
            raise self._invalid("pred_scales", f"expected a list of sides for each of the {levels} "
                                               "pyramid levels, all of the same length")
        lengths = sum(self.pred_scales, self.pred_aspect_ratios)
        if not self.num_anchors or min(lengths) <= 0:
            raise self._invalid("pred_scales", "expected sides and aspect ratios above 0")
        if any(self.dcn_layers) and not BACKBONES[self.backbone].deformable:
            raise self._invalid("dcn_layers", f"expected zeros: {self.backbone} has no deformable "
                                              "blocks")
        if self.use_maskiou and self.proto_size < SMALLEST_MASKIOU_INPUT:
            raise self._invalid("max_size", "expected at least 249: the mask-IoU network halves "
                                            "the masks five times without padding")

    def _check_training_options(self) -> None:
        if not 0 <= self.ema_decay < 1:
            raise self._invalid("ema_decay", "expected 0 (off) or a number below 1 such as 0.9998")
        stages = len(BACKBONES[self.backbone].strides)
        if self.freeze not in (NOT_FROZEN, WHOLE_BACKBONE, *map(str, range(1, stages + 1))):
            raise self._invalid("freeze", f"expected '{NOT_FROZEN}', '{WHOLE_BACKBONE}', or 1 to "
                                          f"{stages}, the number of stages")
        weights = () if self.class_weights == BALANCED else self.class_weights
        if isinstance(weights, str):
            raise self._invalid("class_weights", f"expected '{BALANCED}', or a factor for a name")
        if not all(factor > 0 for _, factor in weights):
            raise self._invalid("class_weights", "expected factors above 0")
        sides = self.multi_scale
        if len(set(sides)) != len(sides) or any(side < SMALLEST_SIDE for side in sides):
            raise self._invalid("multi_scale", "expected different input sides of at least "
                                               f"{SMALLEST_SIDE} pixels")
        for side in sides if self.use_maskiou else ():
            self.at_side(side)

    def _invalid(self, field: str, problem: str) -> UserError:
        return UserError(f"configuration '{self.name}': {field} is {getattr(self, field)!r}, "
                         f"{problem}")

    @property
    def num_anchors(self) -> int:
        """Anchors at each position of the finest level."""
        return len(self.pred_scales[0]) * len(self.pred_aspect_ratios)

    @property
    def feature_sizes(self) -> tuple[int, ...]:
        """Side of each pyramid level's feature map, finest first.

        Every stride-2 layer of the backbones and the pyramid is padded so that it halves rounding
        up, and so does dividing by all of them at once.
        """
        strides = BACKBONES[self.backbone].strides
        sizes = [math.ceil(self.max_size / strides[stage]) for stage in self.selected_layers]
        for _ in range(self.fpn_num_downsample):
            sizes.append(math.ceil(sizes[-1] / 2))
        return tuple(sizes)

    @property
    def semantic_size(self) -> int:
        """Side of the semantic segmentation logits: the finest pyramid level."""
        return self.feature_sizes[0]

    @property
    def proto_size(self) -> int:
        """Side of the prototype masks."""
        return 2 * self.semantic_size

    def at_side(self, side: int) -> Config:
        """The recipe for another input side; anchors keep their size in pixels."""
        return dataclasses.replace(self, max_size=side, multi_scale=())

    def at_largest_side(self) -> Config:
        """The recipe for the largest input that training sees."""
        return self.at_side(max(self.multi_scale or (self.max_size,)))

    def replace(self, **changes: Any) -> Config:
        """Return a copy with `changes`; an unknown field is a `UserError` naming the nearest."""
        for key in changes:
            check_known(key, f"configuration '{self.name}'")
        return dataclasses.replace(self, **{k: freeze(v) for k, v in changes.items()})

    def changes_from(self, other: Config) -> dict[str, Any]:
        """Fields, as plain types, in which this configuration differs from `other`."""
        mine, others = self.to_dict(), other.to_dict()
        return {key: value for key, value in mine.items() if value != others[key]}

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for checkpoints and logs; `Config.from_dict` reads it back."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Config:
        """Rebuild a `Config` written by `to_dict`.

        Fields that earlier versions did not have may be missing; they get their defaults, which do
        what those versions did.

        Raises:
            UserError: another field is missing, one is not known here, or a value is of a wrong
                type or out of its range.
        """
        if not isinstance(values.get("name"), str):
            raise UserError("a stored configuration has no 'name'; the file is damaged or foreign")
        name, fields = values["name"], list(field_kinds())
        for key in values:
            if key not in fields:
                raise UserError(f"the stored configuration '{name}' has a field {key!r} that is "
                                "not known here; a newer version of this project wrote it")
        for key in fields[:fields.index(_FIRST_NEW_FIELD)]:
            if key not in values:
                raise UserError(f"the stored configuration '{name}' has no '{key}'; the file is "
                                "damaged or foreign")
        return Config(**{key: freeze(value) for key, value in values.items()})


@functools.lru_cache(maxsize=1)
def field_kinds() -> Mapping[str, Any]:
    """Type of each field of a `Config`, in their order; kept, for annotations are slow to read."""
    return get_type_hints(Config)


def check_known(name: str, where: str) -> None:
    """Raise a `UserError` that names the nearest field where `where` asks for one there is none."""
    if name not in field_kinds():
        raise UserError(f"{where} has no field '{name}'{nearest(name, field_kinds())}")


@functools.lru_cache(maxsize=1)
def _recipes() -> Mapping[str, Config]:
    base = Config()
    resnet50 = base.replace(name="yolact_resnet50", backbone="resnet50",
                            backbone_weights=BACKBONES["resnet50"].weights)
    plus: dict[str, Any] = {
        "pred_scales": tuple(tuple(side * 2 ** (third / 3) for third in range(3))
                             for (side,) in base.pred_scales),
        "use_square_anchors": False,
        "use_maskiou": True,
    }
    shapes = base.replace(
        name="yolact_shapes", backbone="resnet_mini", backbone_weights="none", num_classes=5,
        max_size=160, fpn_features=64, head_features=64, proto_features=64, fpn_num_downsample=0,
        num_prototypes=16, pred_scales=((20, 30), (42, 60), (84, 110)), use_square_anchors=False,
        augment_photometric=False, augment_expand=False, augment_crop=False, optimizer="adamw",
        lr=2e-3, decay=1e-4, schedule="cosine", lr_warmup_until=50, clip_grad_norm=10.0,
        max_iter=2600)
    return {recipe.name: recipe for recipe in (
        base,
        base.replace(name="yolact_im400", max_size=400,
                     pred_scales=((17,), (34,), (69,), (139,), (279,))),
        base.replace(name="yolact_im700", max_size=700, masks_to_train=300,
                     pred_scales=((30,), (61,), (122,), (244,), (488,))),
        base.replace(name="yolact_darknet53", backbone="darknet53",
                     backbone_weights=BACKBONES["darknet53"].weights, selected_layers=(2, 3, 4),
                     pixel_mean=(0.0, 0.0, 0.0), pixel_std=(255.0, 255.0, 255.0)),
        resnet50,
        resnet50.replace(name="yolact_resnet50_pascal", dataset="pascal_sbd", num_classes=21,
                         pred_scales=((32,), (64,), (128,), (256,), (512,)),
                         use_square_anchors=False, max_iter=120000, lr_steps=(60000, 100000)),
        base.replace(name="yolact_plus_base", dcn_layers=(0, 4, 23, 3), dcn_interval=3, **plus),
        resnet50.replace(name="yolact_plus_resnet50", dcn_layers=(0, 4, 6, 3), **plus),
        shapes,
        shapes.replace(name="yolact_small", num_classes=81, max_size=256,
                       selected_layers=(0, 1, 2, 3), fpn_num_downsample=1, num_prototypes=32,
                       pred_scales=((12,), (24,), (48,), (96,), (192,)), augment_photometric=True,
                       nms_top_k=600, max_num_detections=400, batch_size=4, lr=1.5e-3,
                       lr_warmup_until=100, max_iter=1400),
    )}


def list_configs() -> list[str]:
    """Names of all recipes, in the order of the documentation."""
    return list(_recipes())


def get_config(name: str, **overrides: Any) -> Config:
    """Return the recipe `name`, with `overrides` applied.

    The original's spelling `yolact_base_config` is accepted too. An unknown name or field raises a
    `UserError` that names the nearest known one.
    """
    recipes = _recipes()
    key = name[:-len("_config")] if name.endswith("_config") else name
    if key not in recipes:
        raise UserError(f"unknown configuration '{name}'{nearest(key, recipes) or '.'} "
                        f"Known: {', '.join(recipes)}.")
    return recipes[key].replace(**overrides)
