import time

import numpy as np
import pytest

from octavo.demo import tasks
from octavo.demo.captions import vocabulary
from octavo.demo.pictures import SIZE


def test_calibration_is_drawn_by_seed_and_a_longer_list_begins_alike():
    few, more, other = tasks.calibration_pairs(8), tasks.calibration_pairs(16), tasks.calibration_pairs(8, seed=1)
    np.testing.assert_array_equal(few.images, more.images[:8])
    assert few.captions == more.captions[:8]
    assert few.captions != other.captions
    assert few.images.shape == (8, SIZE, SIZE, 3)
    assert few.images.dtype == np.uint8


def test_shapes_100():
    data = tasks.shapes_100()
    assert data.images.shape == (2000, SIZE, SIZE, 3)
    assert len(set(data.class_names)) == 100
    np.testing.assert_array_equal(np.bincount(data.labels), np.full(100, 20))


def test_shapes_1k():
    data = tasks.shapes_1k()
    assert data.images.shape == (5000, SIZE, SIZE, 3)
    assert len(set(data.class_names)) == 1000
    np.testing.assert_array_equal(np.bincount(data.labels), np.full(1000, 5))


def test_scenes_have_a_thousand_different_captions():
    pairs = tasks.scenes()
    assert pairs.images.shape == (1000, SIZE, SIZE, 3)
    assert len(set(pairs.captions)) == 1000


def test_prompts_and_captions_use_the_known_words():
    words = set(vocabulary())
    data = tasks.shapes_1k()
    prompts = [template.format(name) for template in data.templates for name in data.class_names]
    assert {word for text in prompts + tasks.scenes().captions for word in text.split()} <= words


@pytest.mark.slow
def test_everything_is_drawn_in_half_a_minute():
    start_s = time.process_time()
    num = len(tasks.calibration_pairs().images)
    num += sum(len(task().images) for task in (tasks.shapes_100, tasks.shapes_1k, tasks.scenes))
    assert num == 16_192
    assert time.process_time() - start_s < 30
