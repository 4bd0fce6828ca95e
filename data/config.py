"""Every released recipe, as a few lines over the base recipe.

A `Config` is frozen. Only the `build_*` / `from_config` functions read one; the modules they build
take plain arguments. Recipes that belong to the original keep its names and its numbers
(dbolya/yolact, data/config.py); `yolact_shapes` is ours and trains on a CPU in minutes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Dict, List, Tuple, Union, get_type_hints

from utils.errors import UserError, nearest

_WORDS = {int: "a whole number", float: "a finite number", str: "a text", bool: "True or False"}


def fits(value: Any, kind: Any) -> bool:
    """Whether `value` may stand in a field of type `kind`, e.g. `Tuple[int, ...]`.

    Whole numbers are numbers, True and False are not. Lists do not pass for tuples.
    """
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and (
            math.isfinite(value))
    if kind is str:
        return isinstance(value, str)
    parts = kind.__args__
    if kind.__origin__ is Union:
        return any(fits(value, part) for part in parts)
    if not isinstance(value, tuple):
        return False
    if parts[-1] is Ellipsis:
        return all(fits(item, parts[0]) for item in value)
    return len(value) == len(parts) and all(map(fits, value, parts))


def expectation(kind: Any) -> str:
    """What `fits` accepts, for a sentence: `a list of whole numbers`."""
    if kind in _WORDS:
        return _WORDS[kind]
    parts = kind.__args__
    if kind.__origin__ is Union:
        return " or ".join(expectation(part) for part in parts)
    if parts[-1] is Ellipsis:
        return f"a list, each item {expectation(parts[0])}"
    return "a list of {} items ({})".format(len(parts), ", ".join(map(expectation, parts)))


def freeze(value: Any) -> Any:
    """Lists become tuples and dicts pairs, all the way down, so that a Config is hashable."""
    if isinstance(value, dict):
        return tuple((key, freeze(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in value)
    return value


BACKBONES = ("resnet101", "resnet50", "resnet_mini", "darknet53")
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("step", "cosine")
DATASETS = ("coco2017", "pascal_sbd")

NOT_FROZEN, WHOLE_BACKBONE = "none", "backbone"
"""Words for `Config.freeze`, beside a number of stages."""
BALANCED = "balanced"
"""Word for `Config.class_weights`, beside weights by name."""

SMALLEST_SIDE = 64
"""Pixels that each of `Config.multi_scale` has at least: two positions of a ResNet's last stage."""

SMALLEST_MASKIOU_INPUT = 63
"""Prototype pixels a side from which `layers.mask_iou.MaskIouNet` has an output."""

IMAGENET_MEAN = (123.68, 116.78, 103.94)
IMAGENET_STD = (58.40, 57.12, 57.38)

_ABOVE_ZERO = ("max_size", "fpn_features", "head_features", "proto_features", "num_prototypes",
               "masks_to_train", "batch_size", "max_iter", "lr", "nms_top_k", "max_num_detections",
               "multi_scale_interval")
_NOT_NEGATIVE = ("fpn_num_downsample", "bbox_alpha", "conf_alpha", "mask_alpha", "semantic_alpha",
                 "maskiou_alpha", "discard_mask_area", "ohem_negpos_ratio", "momentum", "decay",
                 "gamma", "lr_warmup_init", "lr_warmup_until", "lr_final_factor",
                 "clip_grad_norm", "early_stopping")
_FRACTIONS = ("positive_iou", "negative_iou", "crowd_iou", "nms_conf_thresh", "nms_thresh")
_FIRST_NEW_FIELD = "ema_decay"


@dataclass(frozen=True)
class Config:
    """One recipe: what is built, how it is trained, how its detections are read.

    Sizes named in pixels refer to the network's input, a square of `max_size`.
    """

    name: str
    """Recipe name; the first part of every checkpoint's file name."""
    dataset: str = "coco2017"
    """Layout under --data: `coco2017` (train2017, val2017, annotations) or `pascal_sbd`."""
    num_classes: int = 81
    """C, classes with background. Training and evaluation set it from the annotation file."""

    # Network
    backbone: str = "resnet101"
    backbone_weights: str = "resnet101_reducedfc.pth"
    """File under the weights folder with the ImageNet backbone."""
    selected_layers: Tuple[int, ...] = (1, 2, 3)
    """Backbone stages (0-based) that feed the FPN, finest first."""
    dcn_layers: Tuple[int, ...] = (0, 0, 0, 0)
    """Blocks at the end of each ResNet stage that may be deformable (YOLACT++)."""
    dcn_interval: int = 1
    """Of these, the blocks whose index in the stage is a multiple of this are deformable."""
    max_size: int = 550
    """S, side of the square network input in pixels."""
    pixel_mean: Tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from the image, RGB, in 0..255."""
    pixel_std: Tuple[float, float, float] = IMAGENET_STD
    """Divides the image after the mean, RGB, in 0..255."""
    fpn_features: int = 256
    fpn_num_downsample: int = 2
    """Extra pyramid levels above the last backbone stage, by stride-2 convolutions."""
    head_features: int = 256
    proto_features: int = 256
    num_prototypes: int = 32
    """k, prototype masks per image and coefficients per prior."""
    pred_scales: Tuple[Tuple[float, ...], ...] = ((24,), (48,), (96,), (192,), (384,))
    """Anchor sides in pixels, for each pyramid level, finest first."""
    pred_aspect_ratios: Tuple[float, ...] = (1, 1 / 2, 2)
    """Width over height of the anchors of every level."""
    use_square_anchors: bool = True
    """Height := width, the original's anchors for every recipe but pascal and YOLACT++."""
    use_maskiou: bool = False
    """Predict each mask's IoU and multiply it into the mask's score (YOLACT++)."""

    # Targets and loss
    positive_iou: float = 0.5
    negative_iou: float = 0.4
    crowd_iou: float = 0.7
    """Background priors covered by a crowd by more than this become neutral."""
    masks_to_train: int = 100
    """K, positives per image whose masks are trained; the rest is made up for by a factor."""
    bbox_alpha: float = 1.5
    conf_alpha: float = 1.0
    mask_alpha: float = 6.125
    semantic_alpha: float = 1.0
    maskiou_alpha: float = 25.0
    discard_mask_area: int = 25
    """The mask-IoU network trains on masks of more than this many prototype pixels."""
    ohem_negpos_ratio: float = 3.0

    # Augmentation
    augment_photometric: bool = True
    augment_expand: bool = True
    augment_crop: bool = True
    augment_mirror: bool = True

    # Optimisation
    optimizer: str = "sgd"
    batch_size: int = 8
    """Total batch that `lr`, `lr_steps` and `max_iter` are given for (the auto-scaling's 1)."""
    lr: float = 1e-3
    momentum: float = 0.9
    decay: float = 5e-4
    gamma: float = 0.1
    """Factor on the learning rate at each of `lr_steps`."""
    schedule: str = "step"
    lr_steps: Tuple[int, ...] = (280000, 600000, 700000, 750000)
    lr_warmup_init: float = 1e-4
    lr_warmup_until: int = 500
    lr_final_factor: float = 0.01
    """Where the cosine schedule ends, as a fraction of `lr`."""
    max_iter: int = 800000
    clip_grad_norm: float = 0.0
    """Largest gradient norm; 0 turns clipping off."""

    # Detection
    nms_conf_thresh: float = 0.05
    nms_thresh: float = 0.5
    nms_top_k: int = 200
    """Candidates per class that enter NMS, and N, the rows of a `Detections`."""
    max_num_detections: int = 100

    # New fields go below this line, with a default that changes nothing: checkpoints of earlier
    # versions do not have them, and mean these defaults.
    ema_decay: float = 0.0
    """Decay of the moving average of the weights that is scored and saved; 0 turns it off."""
    early_stopping: int = 0
    """End after this many validations in a row without a better mask mAP; 0 never does."""
    freeze: str = NOT_FROZEN
    """Part of the backbone that is not trained: `none`, `backbone`, or a number of stages counted
    from the image ("1" is the stem and the first stage)."""
    class_weights: Union[str, Tuple[Tuple[str, float], ...]] = ()
    """Factor on the confidence loss of each class's positives: `balanced`, or (name, factor) of
    some classes; the others have 1."""
    multi_scale: Tuple[int, ...] = ()
    """Input sides to train on, drawn in turn; empty for `max_size` alone, which is also what
    evaluation uses."""
    multi_scale_interval: int = 10
    """Iterations between two changes of the input side."""

    def __post_init__(self) -> None:
        kinds = get_type_hints(Config)
        for field in dataclasses.fields(self):
            if not fits(getattr(self, field.name), kinds[field.name]):
                raise _invalid(self, field.name, expectation(kinds[field.name]))
        if not self.name or "/" in self.name or "\\" in self.name:
            raise _invalid(self, "name", "a text that can be part of a file name")
        _check_choice(self, "backbone", BACKBONES)
        _check_choice(self, "optimizer", OPTIMIZERS)
        _check_choice(self, "schedule", SCHEDULES)
        _check_choice(self, "dataset", DATASETS)
        self._check_ranges()
        self._check_order()
        if self.num_classes < 2:
            raise _invalid(self, "num_classes", "at least 2 (background and one class)")
        levels = len(self.selected_layers) + self.fpn_num_downsample
        if len(self.pred_scales) != levels:
            raise _invalid(self, "pred_scales", "one list of anchor sides for each of the "
                                                f"{levels} pyramid levels")
        self._check_plus()
        self._check_training_options()

    def _check_ranges(self) -> None:
        for field in _ABOVE_ZERO:
            if not getattr(self, field) > 0:
                raise _invalid(self, field, "a number above 0")
        for field in _NOT_NEGATIVE:
            if getattr(self, field) < 0:
                raise _invalid(self, field, "0 or more")
        for field in _FRACTIONS:
            if not 0 <= getattr(self, field) <= 1:
                raise _invalid(self, field, "a number from 0 to 1")
        if not all(value > 0 for value in self.pixel_std):
            raise _invalid(self, "pixel_std", "numbers above 0")

    def _check_order(self) -> None:
        if list(self.lr_steps) != sorted(self.lr_steps):
            raise _invalid(self, "lr_steps", "ascending iterations")
        for field, limit in (("negative_iou", "positive_iou"), ("max_num_detections", "nms_top_k")):
            if getattr(self, field) > getattr(self, limit):
                raise _invalid(self, field, f"at most {limit}, which is {getattr(self, limit):g}")

    def _check_training_options(self) -> None:
        if not 0 <= self.ema_decay < 1:
            raise _invalid(self, "ema_decay", "0 (off) or a number below 1 such as 0.9998")
        stages = self.num_stages
        if self.freeze not in (NOT_FROZEN, WHOLE_BACKBONE) and self.freeze not in (
                str(count) for count in range(1, stages + 1)):
            raise _invalid(self, "freeze", f"'{NOT_FROZEN}', '{WHOLE_BACKBONE}', or 1 to {stages}, "
                                           "the number of stages")
        if isinstance(self.class_weights, str):
            if self.class_weights != BALANCED:
                raise _invalid(self, "class_weights", f"'{BALANCED}', or a factor for each name")
        elif not all(factor > 0 for _, factor in self.class_weights):
            raise _invalid(self, "class_weights", "factors above 0")
        if len(set(self.multi_scale)) != len(self.multi_scale) or any(
                side < SMALLEST_SIDE for side in self.multi_scale):
            raise _invalid(self, "multi_scale", "different input sides of at least "
                                                f"{SMALLEST_SIDE} pixels"
                           )
        for side in self.multi_scale if self.use_maskiou else ():
            self.at_side(side)

    def _check_plus(self) -> None:
        if any(self.dcn_layers) and self.backbone not in ("resnet50", "resnet101"):
            raise _invalid(self, "dcn_layers", "zeros: only resnet50 and resnet101 have "
                           "deformable blocks")
        if len(self.dcn_layers) != 4 or self.dcn_interval < 1:
            raise _invalid(self, "dcn_layers", "four numbers, and dcn_interval 1 or more")
        if self.use_maskiou and self.proto_size < SMALLEST_MASKIOU_INPUT:
            raise _invalid(self, "max_size", "at least 249: the mask-IoU network halves the masks "
                           "five times without padding")

    @property
    def num_anchors(self) -> int:
        """Anchors at each position of the finest level."""
        return len(self.pred_scales[0]) * len(self.pred_aspect_ratios)

    @property
    def feature_sizes(self) -> Tuple[int, ...]:
        """Side of each pyramid level's feature map, finest first.

        Every stride-2 layer of the backbones and the FPN is padded so that it halves rounding up.
        """
        strides = [2 ** (stage + self._first_stage_power) for stage in self.selected_layers]
        sizes = [_halve_up(self.max_size, stride) for stride in strides]
        for _ in range(self.fpn_num_downsample):
            sizes.append(math.ceil(sizes[-1] / 2))
        return tuple(sizes)

    @property
    def proto_size(self) -> int:
        """Side of the prototype masks: twice the finest pyramid level."""
        return 2 * self.feature_sizes[0]

    @property
    def semantic_size(self) -> int:
        """Side of the semantic segmentation logits: the finest pyramid level."""
        return self.feature_sizes[0]

    @property
    def num_stages(self) -> int:
        """Stages of the backbone."""
        return 5 if self.backbone == "darknet53" else 4

    @property
    def _first_stage_power(self) -> int:
        # A ResNet's first stage keeps the stem's stride of 4, DarkNet's first stage halves once.
        return 1 if self.backbone == "darknet53" else 2

    def at_side(self, side: int) -> Config:
        """The recipe for another input side; anchors keep their size in pixels."""
        return dataclasses.replace(self, max_size=side, multi_scale=())

    def at_largest_side(self) -> Config:
        """The recipe for the largest input that training sees."""
        return self.at_side(max(self.multi_scale or (self.max_size,)))

    def replace(self, **changes: Any) -> Config:
        """Return a copy with `changes`; an unknown field is a `UserError` naming the nearest."""
        fields = [field.name for field in dataclasses.fields(self)]
        for key in changes:
            if key not in fields:
                raise UserError(f"configuration '{self.name}' has no field "
                                f"'{key}'{nearest(key, fields)}")
        return dataclasses.replace(self, **{k: freeze(v) for k, v in changes.items()})

    def to_dict(self) -> Dict[str, Any]:
        """Plain types only, for checkpoints and logs; `Config.from_dict` reads it back."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: Dict[str, Any]) -> Config:
        """Rebuild a `Config` written by `to_dict`.

        Fields that earlier versions did not have may be missing; they get their defaults, which do
        what those versions did.

        Raises:
            UserError: another field is missing, one is not known here, or a value is of a wrong
                type or out of its range.
        """
        if not isinstance(values.get("name"), str):
            raise UserError("a stored configuration has no 'name'; the file is damaged or foreign")
        name = values["name"]
        fields = [field.name for field in dataclasses.fields(Config)]
        for key in values:
            if key not in fields:
                raise UserError(f"the stored configuration '{name}' has a field {key!r} that is "
                                "not known here; a newer version of this project wrote it, use "
                                "that one"
                                )
        for key in fields[:fields.index(_FIRST_NEW_FIELD)]:
            if key not in values:
                raise UserError(f"the stored configuration '{name}' has no '{key}'; the file is "
                                "damaged or foreign")
        return Config(**{key: freeze(value) for key, value in values.items()})


def _halve_up(size: int, stride: int) -> int:
    while stride > 1:
        size = math.ceil(size / 2)
        stride //= 2
    return size


def _invalid(config: Config, field: str, expected: str) -> UserError:
    return UserError(f"configuration '{config.name}': {field} is {getattr(config, field)!r}, "
                     f"expected {expected}")


def _check_choice(config: Config, field: str, choices: Tuple[str, ...]) -> None:
    value = getattr(config, field)
    if value not in choices:
        raise UserError("configuration '{}': unknown {} '{}'{} Known: {}.".format(
            config.name, field, value, nearest(str(value), choices) or ".", ", ".join(choices)))


def _scaled(scales: Tuple[Tuple[float, ...], ...], size: int) -> Tuple[Tuple[float, ...], ...]:
    """Anchor sides of the 550 px recipe for another input side, in whole pixels."""
    return tuple(tuple(int(side * size / 550) for side in level) for level in scales)


def _recipes() -> Dict[str, Config]:
    base = Config(name="yolact_base")
    resnet50 = base.replace(name="yolact_resnet50", backbone="resnet50",
                            backbone_weights="resnet50-19c8e357.pth")
    plus: Dict[str, Any] = {
        "pred_scales": tuple(tuple(side * 2 ** (third / 3) for third in range(3))
                             for (side,) in base.pred_scales),
        "use_square_anchors": False,
        "use_maskiou": True,
    }
    recipes = [
        base,
        base.replace(name="yolact_im400", max_size=400, pred_scales=_scaled(base.pred_scales, 400)),
        base.replace(name="yolact_im700", max_size=700, pred_scales=_scaled(base.pred_scales, 700),
                     masks_to_train=300),
        base.replace(name="yolact_darknet53", backbone="darknet53",
                     backbone_weights="darknet53.pth", selected_layers=(2, 3, 4),
                     pixel_mean=(0.0, 0.0, 0.0), pixel_std=(255.0, 255.0, 255.0)),
        resnet50,
        resnet50.replace(name="yolact_resnet50_pascal", dataset="pascal_sbd", num_classes=21,
                         pred_scales=((32,), (64,), (128,), (256,), (512,)),
                         use_square_anchors=False, max_iter=120000, lr_steps=(60000, 100000)),
        base.replace(name="yolact_plus_base", dcn_layers=(0, 4, 23, 3), dcn_interval=3, **plus),
        resnet50.replace(name="yolact_plus_resnet50", dcn_layers=(0, 4, 6, 3), **plus),
        base.replace(name="yolact_shapes", backbone="resnet_mini", backbone_weights="none",
                     num_classes=5, max_size=160, fpn_features=64, head_features=64,
                     proto_features=64, fpn_num_downsample=0, num_prototypes=16,
                     pred_scales=((20, 30), (42, 60), (84, 110)), use_square_anchors=False,
                     augment_photometric=False, augment_expand=False, augment_crop=False,
                     optimizer="adamw", lr=2e-3, decay=1e-4, schedule="cosine",
                     lr_warmup_until=50, clip_grad_norm=10.0, max_iter=2600),
    ]
    return {recipe.name: recipe for recipe in recipes}


def list_configs() -> List[str]:
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
        raise UserError("unknown configuration '{}'{} Known: {}.".format(
            name, nearest(key, recipes) or ".", ", ".join(recipes)))
    return recipes[key].replace(**overrides)
