import dataclasses
import hashlib

import numpy as np
import pytest

from octavo.demo.dice import Dice
from octavo.demo.pictures import SIZE, UNIT, Scene, Thing, draw, draw_all
from octavo.demo.sampling import Split
from octavo.demo.streams import described_scenes
from octavo.demo.tasks import calibration_pairs

DISC = Thing("circle", "plain", "large", "red", (200, 40, 40), (0, 0, 0), 20 * UNIT, 30 * UNIT, 10 * UNIT, 0, 0)
GREY = ((100, 100, 100), (100, 100, 100))


def digest(pictures: np.ndarray) -> str:
    return hashlib.sha256(pictures.tobytes()).hexdigest()


def test_pictures_are_the_same_on_every_machine():
    pairs = calibration_pairs(64)
    assert digest(pairs.images) == "5b7b951af4a1ac4a81950e32ee5b95eaa1c3da624a04dcccf8a2bf9dd9e57089"
    assert (
        hashlib.sha256("\n".join(pairs.captions).encode()).hexdigest()
        == "8ffeb2a8807987dfd6c7e4086902792e0638908cb39b88e00ab9699983e1bbdb"
    )


def test_a_disc_is_where_the_scene_says():
    picture = draw(Scene((DISC,), (), GREY, noise=0, noise_seed=0))
    assert picture.shape == (SIZE, SIZE, 3)
    assert picture.dtype == np.uint8
    assert tuple(picture[30, 20]) == (200, 40, 40)
    assert tuple(picture[5, 40]) == (100, 100, 100)
    rows, columns = np.nonzero(picture[:, :, 0] > 150)
    assert rows.mean() + 0.5 == pytest.approx(30, abs=0.1)
    assert columns.mean() + 0.5 == pytest.approx(20, abs=0.1)


def test_noise_stays_within_its_amplitude():
    quiet = Scene((DISC,), (), GREY, noise=0, noise_seed=5)
    loud = dataclasses.replace(quiet, noise=30)
    difference = draw(loud).astype(int) - draw(quiet).astype(int)
    assert 25 < np.abs(difference).max() <= 30
    assert abs(difference.mean()) < 1


def test_every_field_matters():
    scene, _ = next(described_scenes(Split.TRAINING, "fields"))
    thing = scene.things[0]
    changed = {
        "x": thing.x + 16,
        "y": thing.y + 16,
        "radius": thing.radius + 16,
        "turn": thing.turn + 16,
        "shape": "ring" if thing.shape != "ring" else "star",
        "colour": (1, 2, 3),
        "shade": (90, 90, 90),
    }
    plain = draw(scene)
    for field, value in changed.items():
        other = dataclasses.replace(scene, things=(dataclasses.replace(thing, **{field: value}), *scene.things[1:]))
        assert not np.array_equal(draw(other), plain), field


def test_draw_all_draws_each():
    scenes = [scene for scene, _ in zip_first(described_scenes(Split.TEST, "each"), 3)]
    np.testing.assert_array_equal(draw_all(scenes), np.stack([draw(scene) for scene in scenes]))


def zip_first(stream, num):
    return [next(stream) for _ in range(num)]


def test_the_frame_turns_by_an_angle_and_keeps_lengths():
    turned = dataclasses.replace(DISC, turn=Dice("turn").between(1, 12))
    upright, rotated = (draw(Scene((thing,), (), GREY, noise=0, noise_seed=0)) for thing in (DISC, turned))
    assert np.abs(upright.astype(int) - rotated.astype(int)).max() <= 1
