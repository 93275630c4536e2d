"""Training, calibration and test share no scene: by construction, and in what is really drawn."""

from itertools import combinations, islice

import pytest

from octavo.demo import tasks
from octavo.demo.pictures import draw_all
from octavo.demo.sampling import Split, scene_key, split_of
from octavo.demo.streams import described_scenes


def some_scenes(split, num):
    return [scene for scene, _ in islice(described_scenes(split, "seed 0"), num)]


@pytest.mark.parametrize("split", Split)
def test_a_stream_stays_in_its_split(split):
    for name in ("seed 0", "seed 1", "another"):
        scenes = [scene for scene, _ in islice(described_scenes(split, name), 300)]
        assert {split_of(scene) for scene in scenes} == {split}


def test_no_scene_and_no_picture_recurs_across_splits():
    drawn = {split: some_scenes(split, 600) for split in Split}
    keys = {split: {scene_key(scene) for scene in scenes} for split, scenes in drawn.items()}
    pictures = {split: {picture.tobytes() for picture in draw_all(scenes)} for split, scenes in drawn.items()}
    for one, other in combinations(Split, 2):
        assert keys[one].isdisjoint(keys[other])
        assert pictures[one].isdisjoint(pictures[other])


@pytest.mark.slow
def test_no_picture_of_the_demo_recurs():
    """All 16,192 pictures of calibration and tasks are different from each other, and from 4,096 of training."""
    sets = [
        tasks.calibration_pairs().images,
        tasks.shapes_100().images,
        tasks.shapes_1k().images,
        tasks.scenes().images,
        draw_all(some_scenes(Split.TRAINING, 4096)),
    ]
    assert sum(map(len, sets)) == 16_192 + 4096
    assert len({picture.tobytes() for pictures in sets for picture in pictures}) == 16_192 + 4096


def test_the_key_says_all_that_is_seen_of_the_objects():
    """Scenes of one key differ in colour shade, background, strokes and noise only: never in split."""
    scene = some_scenes(Split.TEST, 1)[0]
    for thing in scene.things:
        for value in (thing.shape, thing.texture, thing.size, thing.colour_name, thing.x, thing.y, thing.radius):
            assert str(value) in scene_key(scene)


def test_the_tasks_are_of_the_test_split(monkeypatch):
    seen = []
    monkeypatch.setattr(tasks, "draw_all", lambda scenes: seen.extend(scenes))
    tasks.shapes_100()
    tasks.shapes_1k()
    tasks.scenes()
    assert len(seen) == 8000
    assert {split_of(scene) for scene in seen} == {Split.TEST}
