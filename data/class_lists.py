"""Class names and category ids of the data sets that published weights were trained on.

For weights files that carry no names: the original's and its relatives'. The order is that of the
classes in the network.
"""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Sequence


class ClassList(NamedTuple):
    """Foreground classes in the network's order."""

    names: List[str]
    category_ids: List[int]
    """What files in COCO's format call them."""


# COCO 2017 numbers its 80 categories 1..90 and leaves out these.
_COCO_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
_COCO = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe,
backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite,
baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork,
knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake,
chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush"""
_PASCAL = """
aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse,
motorbike, person, pottedplant, sheep, sofa, train, tvmonitor"""


def _split(text: str) -> List[str]:
    return [name.strip() for name in text.replace("\n", " ").split(",")]


def coco_classes() -> ClassList:
    """The 80 categories of COCO 2017."""
    return ClassList(_split(_COCO), [n for n in range(1, 91) if n not in _COCO_GAPS])


def pascal_classes() -> ClassList:
    """The 20 classes of Pascal VOC."""
    return ClassList(_split(_PASCAL), list(range(1, 21)))


def find_classes(count: int, names: Optional[Sequence[str]] = None,
                 category_ids: Optional[Sequence[int]] = None,
                 dataset: Optional[str] = None) -> ClassList:
    """Put together what is known about the `count` foreground classes of a network.

    Args:
        count: foreground classes.
        names: as stored with the weights, or None.
        category_ids: as stored with the weights, or None.
        dataset: `Config.dataset` of the weights; names the classes where nothing else does and
            their number fits.

    Raises:
        ValueError: not `count` names or ids.
    """
    for values in (names, category_ids):
        if values is not None and len(values) != count:
            raise ValueError("{} names or ids for {} classes".format(len(values), count))
    for known, its_dataset in ((coco_classes(), "coco2017"), (pascal_classes(), "pascal_sbd")):
        fits = list(names) == known.names if names is not None else (
            dataset == its_dataset and count == len(known.names))
        if fits:
            return ClassList(known.names, known.category_ids if category_ids is None
                             else list(category_ids))
    return ClassList(
        ["class {}".format(n) for n in range(1, count + 1)] if names is None else list(names),
        list(range(1, count + 1)) if category_ids is None else list(category_ids))
