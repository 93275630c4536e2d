"""Facts written by hand: a CLIP with two towers, a six-layer encoder, a language model with experts and a tied head."""

from __future__ import annotations

from octavo.spec.facts import ModelFacts, SiteFacts, Slot
from octavo.spec.recipe import Recipe

LAYER_SLOTS = (Slot.WEIGHT, Slot.INPUT, Slot.OUTPUT)
ATTENTION_SLOTS = (Slot.QUERY, Slot.KEY, Slot.VALUE, Slot.SOFTMAX, Slot.ATTENTION_OUTPUT)
TOKENS = 16


def linear(name: str, out_features: int, in_features: int, tied_to: str = "") -> SiteFacts:
    values = out_features * in_features
    own = {f"{name}.bias": out_features} | ({} if tied_to else {f"{name}.weight": values})
    return SiteFacts(
        name,
        "linear",
        "Linear",
        LAYER_SLOTS,
        base_types=("Module",),
        weight_shape=(out_features, in_features),
        parameters=own,
        parameter_bytes=4 * sum(own.values()),
        weight_name=f"{name}.weight",
        macs=TOKENS * values,
        tied_to=tied_to,
    )


def norm(name: str, width: int) -> SiteFacts:
    parameters = {f"{name}.weight": width, f"{name}.bias": width}
    return SiteFacts(name, "norm", "LayerNorm", (Slot.INPUT,), parameters=parameters, parameter_bytes=8 * width, macs=0)


def embedding(name: str, rows: int, width: int) -> SiteFacts:
    return SiteFacts(
        name,
        "embedding",
        "Embedding",
        (Slot.WEIGHT,),
        weight_shape=(rows, width),
        parameters={f"{name}.weight": rows * width},
        parameter_bytes=4 * rows * width,
        weight_name=f"{name}.weight",
        macs=0,
    )


def patches(name: str, width: int) -> SiteFacts:
    return SiteFacts(
        name,
        "conv",
        "Conv2d",
        LAYER_SLOTS,
        base_types=("_ConvNd", "Module"),
        weight_shape=(width, 192),
        parameters={f"{name}.weight": width * 192},
        parameter_bytes=4 * width * 192,
        weight_name=f"{name}.weight",
        macs=width * 192 * 64,
    )


def attention(name: str, width: int) -> SiteFacts:
    return SiteFacts(name, "attention", "CLIPAttention", ATTENTION_SLOTS, macs=2 * TOKENS * TOKENS * width)


def bare_parameter(module: str, type_name: str, name: str, count: int) -> SiteFacts:
    full = name if module == "(model)" else f"{module}.{name}"
    return SiteFacts(module, "other", type_name, parameters={full: count}, parameter_bytes=4 * count)


def model(name: str, sites: list[SiteFacts], *, type_name: str = "Model", buffers: int = 0) -> ModelFacts:
    parameters = sum(sum(site.parameters.values()) for site in sites)
    total_bytes = sum(site.parameter_bytes for site in sites) + buffers
    return ModelFacts(name, type_name, tuple(sites), parameters, total_bytes, was_traced=True)


def _tower(prefix: str, layers: int, width: int) -> list[SiteFacts]:
    sites = []
    for layer in range(layers):
        at = f"{prefix}.encoder.layers.{layer}"
        sites.append(norm(f"{at}.layer_norm1", width))
        sites += [linear(f"{at}.self_attn.{which}_proj", width, width) for which in ("q", "k", "v")]
        sites += [attention(f"{at}.self_attn", width), linear(f"{at}.self_attn.out_proj", width, width)]
        sites += [norm(f"{at}.layer_norm2", width), linear(f"{at}.mlp.fc1", 4 * width, width)]
        sites += [linear(f"{at}.mlp.fc2", width, 4 * width)]
    return sites


def clip() -> ModelFacts:
    width = 96
    text = [
        embedding("text_model.embeddings.token_embedding", 512, width),
        *_tower("text_model", 4, width),
        norm("text_model.final_layer_norm", width),
    ]
    vision = [
        bare_parameter("vision_model.embeddings", "CLIPVisionEmbeddings", "class_embedding", width),
        patches("vision_model.embeddings.patch_embedding", width),
        norm("vision_model.pre_layrnorm", width),
        *_tower("vision_model", 4, width),
        norm("vision_model.post_layernorm", width),
    ]
    heads = [linear("visual_projection", 64, width), linear("text_projection", 64, width)]
    root = [bare_parameter("(model)", "CLIPModel", "logit_scale", 1)]
    return model("demo:clip", root + text + vision + heads, type_name="CLIPModel", buffers=1040)


def encoder() -> ModelFacts:
    sites = [embedding("embeddings.word_embeddings", 30522, 384), norm("embeddings.LayerNorm", 384)]
    for layer in range(6):
        at = f"encoder.layer.{layer}"
        sites += [linear(f"{at}.attention.self.{which}", 384, 384) for which in ("query", "key", "value")]
        sites += [attention(f"{at}.attention.self", 384), linear(f"{at}.attention.output.dense", 384, 384)]
        sites += [norm(f"{at}.attention.output.LayerNorm", 384), linear(f"{at}.intermediate.dense", 1536, 384)]
        sites += [linear(f"{at}.output.dense", 384, 1536), norm(f"{at}.output.LayerNorm", 384)]
    return model("all-minilm", [*sites, linear("pooler.dense", 384, 384)], type_name="BertModel")


def mixture() -> ModelFacts:
    """A causal language model with experts; its head shares the embedding's weight."""
    sites = [embedding("model.embed_tokens", 1000, 64)]
    for layer in range(2):
        at = f"model.layers.{layer}"
        sites += [norm(f"{at}.input_layernorm", 64), linear(f"{at}.self_attn.q_proj", 64, 64)]
        sites += [attention(f"{at}.self_attn", 64), linear(f"{at}.mlp.gate", 4, 64)]
        sites += [linear(f"{at}.mlp.experts.{expert}.{w}", 128, 64) for expert in range(4) for w in ("w1", "w3")]
    sites += [norm("model.norm", 64), linear("lm_head", 1000, 64, tied_to="model.embed_tokens")]
    return model("mixture", sites, type_name="MixtureForCausalLM")


def fits(recipe: Recipe, facts: ModelFacts) -> bool:
    """Whether the groups of a preset's first rule divide every linear layer."""
    weight = next(spec for slot, spec in recipe.rules[0].action.items() if slot is Slot.WEIGHT).format
    return not any(weight.misfit(site.weight_shape) for site in facts.sites if site.operation == "linear")
