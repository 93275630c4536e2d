from __future__ import annotations

import numpy as np
import pytest
import torch

from octavo.errors import UserError
from octavo.sources import describe_module, image_inputs, open_model, text_inputs
from sources import tiny

PICTURE = np.random.default_rng(0).integers(0, 256, (16, 3, 3), dtype=np.uint8)


def test_arrays_and_pictures_give_the_same_inputs(saved):
    from PIL import Image

    loaded = open_model(saved("clip"))
    from_array = image_inputs(loaded, [PICTURE])["pixel_values"]
    torch.testing.assert_close(from_array, image_inputs(loaded, [Image.fromarray(PICTURE)])["pixel_values"])
    assert from_array.shape == (1, 3, 16, 16)


def test_grey_pictures_become_rgb(saved):
    from PIL import Image

    grey = Image.fromarray(PICTURE[..., 0])
    assert image_inputs(open_model(saved("vit")), [grey])["pixel_values"].shape == (1, 3, 16, 16)


def test_pictures_have_the_type_of_the_model(saved):
    loaded = open_model(saved("vit"), dtype="bfloat16")
    assert image_inputs(loaded, [PICTURE])["pixel_values"].dtype is torch.bfloat16


def test_an_array_that_is_no_picture_is_told(saved):
    with pytest.raises(UserError, match=r"a uint8 array \(height, width, 3\), not float32 \(3, 4, 4\)"):
        image_inputs(open_model(saved("vit")), [np.zeros((3, 4, 4), dtype=np.float32)])


def test_pairs_are_texts_and_pictures(saved):
    processor = open_model(saved("clip")).processor
    assert processor is not None
    made = processor.pairs([PICTURE, PICTURE], ["a cat", "a red dog"])
    assert made["input_ids"].shape == (2, 5)
    assert made["pixel_values"].shape == (2, 3, 16, 16)


def test_texts_are_cut(saved):
    loaded = open_model(saved("bert"))
    long = "cat " * 50
    assert text_inputs(loaded, [long])["input_ids"].shape == (1, 24)
    assert text_inputs(loaded, [long], max_length=7)["input_ids"].shape == (1, 7)


def test_a_tokenizer_without_padding_pads_with_its_end_and_masks_it(tmp_path):
    loaded = open_model(tiny.llama(tmp_path, pad_token=""))
    made = text_inputs(loaded, ["cat", "a red cat"])
    assert made["input_ids"][0].tolist()[2:] == [2, 2, 2]
    assert made["attention_mask"][0].tolist() == [1, 1, 1, 0, 0]


def test_a_tokenizer_without_padding_or_end_is_told(tmp_path):
    loaded = open_model(tiny.llama(tmp_path, pad_token="", eos_token=""))
    with pytest.raises(UserError, match="neither a padding token nor an end token"):
        text_inputs(loaded, ["cat"])


def test_a_language_model_pads_on_the_right(saved):
    loaded = open_model(saved("llama"))
    assert loaded.processor is not None
    loaded.processor.tokenizer.padding_side = "left"
    assert text_inputs(loaded, ["cat", "a red cat"])["attention_mask"][0].tolist() == [1, 1, 1, 0, 0]


def test_only_what_the_model_takes_is_given(saved):
    loaded = open_model(saved("llama"))
    assert loaded.processor is not None
    loaded.processor.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert set(text_inputs(loaded, ["cat"])) == {"input_ids", "attention_mask"}


def test_a_tokenizer_may_be_handed_in(saved):
    model = open_model(saved("bert")).model
    model.config._name_or_path = ""
    bare = describe_module(model)
    with pytest.raises(UserError, match="came without a processor"):
        text_inputs(bare, ["cat"])
    given = describe_module(model, tiny.tokenizer())
    assert text_inputs(given, ["cat " * 50])["input_ids"].shape == (1, 24)


def test_a_processor_of_transformers_may_be_handed_in(saved):
    from transformers import CLIPProcessor

    loaded = open_model(saved("clip"))
    whole = CLIPProcessor(loaded.processor.image_processor, loaded.processor.tokenizer)
    given = describe_module(loaded.model, whole)
    assert image_inputs(given, [PICTURE])["pixel_values"].shape == (1, 3, 16, 16)
    assert text_inputs(given, ["cat"])["input_ids"].shape == (1, 3)


def test_one_saved_processor_is_both(saved, tmp_path):
    from transformers import CLIPProcessor

    loaded = open_model(saved("clip"))
    CLIPProcessor(loaded.processor.image_processor, loaded.processor.tokenizer).save_pretrained(tmp_path)
    loaded.model.save_pretrained(tmp_path)
    again = open_model(tmp_path)
    torch.testing.assert_close(image_inputs(again, [PICTURE]), image_inputs(loaded, [PICTURE]))
    torch.testing.assert_close(text_inputs(again, ["cat"]), text_inputs(loaded, ["cat"]))
