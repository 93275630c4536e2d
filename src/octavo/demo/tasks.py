"""The data of the demo model: pairs to calibrate with, and three tasks.

Drawn by seed when asked for, never stored: the same bytes everywhere.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np

from octavo.demo.captions import TEMPLATES, caption, full_name, short_name
from octavo.demo.dice import Dice
from octavo.demo.pictures import Scene, draw_all
from octavo.demo.sampling import COLOURS, HEAVY, SHAPES, SIZES, TEXTURE_NAMES, Look, Split, one_thing, sample
from octavo.demo.streams import any_two, described_scenes

_PICTURES_PER_CLASS_100 = 20
_PICTURES_PER_CLASS_1K = 5
_NUM_SCENES = 1000


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pictures and what is said about them, in the same order.

    ``images``: ``(num_pairs, height, width, 3)``, uint8.
    """

    images: np.ndarray
    captions: list[str]


@dataclass(frozen=True, slots=True)
class ZeroShotData:
    """Pictures to sort into classes known by their names alone.

    ``images``: ``(num_pictures, height, width, 3)``, uint8; ``labels``: ``(num_pictures,)``, int64, places in
    ``class_names``. A prompt is a template with a class name in its braces.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: list[str]
    templates: list[str]


def calibration_pairs(num: int = 8192, seed: int = 0) -> Pairs:
    """``num`` pairs to calibrate with, of one and of two objects; a longer list begins like a shorter one."""
    described = described_scenes(Split.CALIBRATION, f"seed {seed}")
    return _as_pairs([next(described) for _ in range(num)])


def shapes_100() -> ZeroShotData:
    """100 classes, 2,000 pictures: shape and colour; texture and size are free."""
    dice = Dice("shapes-100")
    kinds = list(product(SHAPES, COLOURS))
    scenes, labels = [], []
    for label, (shape, colour) in enumerate(kinds):
        for _ in range(_PICTURES_PER_CLASS_100):
            look = (shape, colour, dice.pick(TEXTURE_NAMES), dice.pick(SIZES))
            scenes.append(_test_scene(dice, look))
            labels.append(label)
    return _as_zero_shot(scenes, labels, [short_name(*kind) for kind in kinds])


def shapes_1k() -> ZeroShotData:
    """1,000 classes, 5,000 pictures: shape, colour, texture and size."""
    dice = Dice("shapes-1k")
    looks = list(product(SHAPES, COLOURS, TEXTURE_NAMES, SIZES))
    labels = [label for label in range(len(looks)) for _ in range(_PICTURES_PER_CLASS_1K)]
    scenes = [_test_scene(dice, looks[label]) for label in labels]
    return _as_zero_shot(scenes, labels, [full_name(*look) for look in looks])


def scenes() -> Pairs:
    """1,000 pairs of two objects each, no caption twice: find the caption of a picture, the picture of a caption."""
    dice = Dice("scenes")
    found: dict[str, Scene] = {}
    while len(found) < _NUM_SCENES:
        scene = sample(Split.TEST, dice, lambda dice: any_two(dice, HEAVY))
        found.setdefault(caption(scene, dice), scene)
    return _as_pairs([(scene, words) for words, scene in found.items()])


def _test_scene(dice: Dice, look: Look) -> Scene:
    return sample(Split.TEST, dice, lambda dice: one_thing(dice, look, HEAVY))


def _as_pairs(described: list[tuple[Scene, str]]) -> Pairs:
    return Pairs(draw_all([scene for scene, _ in described]), [words for _, words in described])


def _as_zero_shot(scenes: list[Scene], labels: list[int], class_names: list[str]) -> ZeroShotData:
    return ZeroShotData(draw_all(scenes), np.array(labels, dtype=np.int64), class_names, list(TEMPLATES))
