"""Vision and vision-language models of transformers, and diffusers' denoisers."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers as hf

from zoo.made import Case, ids

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**SMALL, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGE = {"image_size": 16, "patch_size": 8}


def pictures(size: int = 16) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def vit() -> Case:
    return hf.ViTForImageClassification(hf.ViTConfig(**SMALL, **IMAGE)), pictures()


def deit() -> Case:
    return hf.DeiTModel(hf.DeiTConfig(**SMALL, **IMAGE)), pictures()


def swin() -> Case:
    config = hf.SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=2)
    return hf.SwinModel(config), pictures()


def dinov2() -> Case:
    return hf.Dinov2Model(hf.Dinov2Config(**SMALL, **IMAGE, mlp_ratio=2)), pictures()


def clip() -> Case:
    text = {**TEXT, "max_position_embeddings": 12}
    config = hf.CLIPConfig(text_config=text, vision_config={**SMALL, **IMAGE}, projection_dim=16)
    return hf.CLIPModel(config), {"input_ids": ids(2, 7), **pictures()}


def siglip() -> Case:
    text = {**TEXT, "max_position_embeddings": 12}
    return hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config={**SMALL, **IMAGE})), {
        "input_ids": ids(2, 7),
        **pictures(),
    }


def qwen2_vl() -> Case:
    rope = {"rope_type": "default", "type": "default", "mrope_section": [1, 1, 2]}
    text = {**TEXT, "num_key_value_heads": 2, "rope_scaling": rope}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    config = hf.Qwen2VLConfig(
        text_config=text, vision_config={**vision, "spatial_merge_size": 2, "temporal_patch_size": 2},
        image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63,
    )  # fmt: skip
    tokens = ids(1, 9)
    tokens[0, 1:6] = torch.tensor([62, 60, 60, 60, 60])
    grid = torch.tensor([[1, 4, 4]])
    batch = {"input_ids": tokens, "pixel_values": torch.randn(16, 3 * 2 * 4 * 4), "image_grid_thw": grid}
    kinds = (tokens == 60).int()
    return hf.Qwen2VLForConditionalGeneration(config), {**batch, "mm_token_type_ids": kinds, "use_cache": False}


def llava() -> Case:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**SMALL, **IMAGE), text_config=hf.LlamaConfig(**TEXT), image_token_id=60
    )
    tokens = ids(2, 9)
    tokens[:, 1:5] = 60
    return hf.LlavaForConditionalGeneration(config), {"input_ids": tokens, **pictures(), "use_cache": False}


def sam() -> Case:
    vision = {
        **SMALL,
        **IMAGE,
        "output_channels": 16,
        "num_pos_feats": 8,
        "window_size": 2,
        "global_attn_indexes": [1],
        "mlp_dim": 48,
    }
    prompt = {"hidden_size": 16, "image_size": 16, "patch_size": 8, "mask_input_channels": 4}
    mask = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "mlp_dim": 24,
        "iou_head_hidden_dim": 16,
    }
    config = hf.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask)
    points = torch.tensor([[[[3.0, 4.0]]], [[[9.0, 2.0]]]])
    return hf.SamModel(config), {**pictures(), "input_points": points}


def detr() -> Case:
    backbone = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    config = hf.DetrConfig(
        use_timm_backbone=False, backbone_config=backbone, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_queries=5,
    )  # fmt: skip
    return hf.DetrForObjectDetection(config), pictures(32)


def convnext() -> Case:
    return hf.ConvNextModel(hf.ConvNextConfig(depths=[1, 1], hidden_sizes=[16, 24], num_stages=2)), pictures(32)


def resnet() -> Case:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1])
    return hf.ResNetForImageClassification(config), pictures(32)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def unet2d() -> Case:
    blocks: dict[str, Any] = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (8, 16)}
    model = diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, norm_num_groups=4, cross_attention_dim=12, attention_head_dim=2, **blocks
    )
    batch = {"sample": noise(2, 4, 8, 8), "timestep": torch.tensor([3, 9]), "encoder_hidden_states": noise(2, 5, 12)}
    return model, batch


def dit() -> Case:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        norm_num_groups=4, num_embeds_ada_norm=10,
    )  # fmt: skip
    times, labels = torch.tensor([3, 9]), torch.tensor([1, 5])
    return model, {"hidden_states": noise(2, 4, 8, 8), "timestep": times, "class_labels": labels}


def flux() -> Case:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    text = {"encoder_hidden_states": noise(2, 5, 12), "pooled_projections": noise(2, 10), "txt_ids": torch.zeros(5, 3)}
    image = {"hidden_states": noise(2, 6, 4), "img_ids": torch.arange(18.0).view(6, 3), "timestep": torch.rand(2)}
    return model, {**text, **image}


def sd3() -> Case:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=12, caption_projection_dim=32, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    text = {"encoder_hidden_states": noise(2, 5, 12), "pooled_projections": noise(2, 10)}
    return model, {"hidden_states": noise(2, 4, 8, 8), "timestep": torch.tensor([3, 9]), **text}


VISION = (
    vit, deit, swin, dinov2, clip, siglip, qwen2_vl, llava, sam, detr, convnext, resnet, unet2d, dit, flux, sd3
)  # fmt: skip
