"""Configs of tiny detectors, one function per family.

Names are those of `DetectorSpec.family`. To add one: a function that returns its config, and a line of `CONFIGS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from hf_detrkd.models import DinoDetrConfig, FasterRCNNConfig
from hf_detrkd.models.compat import is_missing


NUM_QUERIES = 7
NUM_LAYERS = 3
NUM_DENOISING = 10
NUM_GROUPS = 3


def _resnet(kind: str, first: int) -> Any:
    return getattr(transformers, kind)(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=[f"stage{i}" for i in range(first, 5)],
    )


def _common(width: int) -> dict[str, Any]:
    return {
        "d_model": width,
        "num_queries": NUM_QUERIES,
        "encoder_layers": 2,
        "decoder_layers": NUM_LAYERS,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "dropout": 0.0,
    }


def _detr(kind: str) -> Callable[[int, dict[str, Any]], Any]:
    def make(width: int, overrides: dict[str, Any]) -> Any:
        settings = _common(width) | {"backbone_config": _resnet("ResNetConfig", 1)}
        return getattr(transformers, kind)(**settings | overrides)

    return make


def _deformable_detr(**form: bool) -> Callable[[int, dict[str, Any]], Any]:
    def make(width: int, overrides: dict[str, Any]) -> Any:
        settings = _common(width) | {"backbone_config": _resnet("ResNetConfig", 2), "num_feature_levels": 4}
        settings |= {"two_stage_num_proposals": NUM_QUERIES} | form
        return transformers.DeformableDetrConfig(**settings | overrides)

    return make


def _dino_detr(width: int, overrides: dict[str, Any]) -> Any:
    settings = _common(width) | {"backbone_config": _resnet("ResNetConfig", 2), "num_denoising": NUM_DENOISING}
    return DinoDetrConfig(**settings | overrides)


def _hybrid(width: int) -> dict[str, Any]:
    return {
        "encoder_layers": 1,
        "encoder_hidden_dim": width,
        "encoder_in_channels": [16, 24, 32],
        "decoder_in_channels": [width] * 3,
        "num_denoising": NUM_DENOISING,
    }


def _rt_detr(kind: str) -> Callable[[int, dict[str, Any]], Any]:
    def make(width: int, overrides: dict[str, Any]) -> Any:
        settings = _common(width) | _hybrid(width) | {"backbone_config": _resnet("RTDetrResNetConfig", 2)}
        return getattr(transformers, kind)(**settings | overrides)

    return make


def _dab_detr(width: int, overrides: dict[str, Any]) -> Any:
    settings = _common(width) | {"backbone_config": _resnet("ResNetConfig", 1)} | overrides
    settings["hidden_size"] = settings.pop("d_model")
    return transformers.DabDetrConfig(**settings)


def _d_fine(kind: str) -> Callable[[int, dict[str, Any]], Any]:
    def make(width: int, overrides: dict[str, Any]) -> Any:
        backbone = transformers.HGNetV2Config(
            embedding_size=8,
            hidden_sizes=[8, 16, 24, 32],
            depths=[1] * 4,
            stem_channels=[3, 8, 8],
            stage_in_channels=[8, 8, 16, 24],
            stage_mid_channels=[8] * 4,
            stage_out_channels=[8, 16, 24, 32],
            stage_num_blocks=[1] * 4,
            stage_downsample=[False, True, True, True],
            stage_light_block=[False, False, True, True],
            stage_kernel_size=[3] * 4,
            stage_numb_of_layers=[2] * 4,
            out_features=["stage2", "stage3", "stage4"],
        )
        settings = (
            _common(width) | _hybrid(width) | {"backbone_config": backbone, "max_num_bins": 8, "depth_mult": 0.34}
        )
        return getattr(transformers, kind)(**settings | overrides)

    return make


def _windowed(kind: str, backbone: str, **form: Any) -> Callable[[int, dict[str, Any]], Any]:
    def make(width: int, overrides: dict[str, Any]) -> Any:
        vit = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 64, "patch_size": 8}
        extra = dict(form)
        projector = extra.pop("projector", {})
        settings = {
            "backbone_config": getattr(transformers, backbone)(**vit | extra),
            "d_model": width,
            "num_queries": NUM_QUERIES,
            "decoder_layers": NUM_LAYERS,
            "decoder_ffn_dim": 48,
            "decoder_self_attention_heads": 4,
            "decoder_cross_attention_heads": 4,
            "group_detr": NUM_GROUPS,
            "dropout": 0.0,
        }
        return getattr(transformers, kind)(**settings | projector | overrides)

    return make


def _faster_rcnn(width: int, overrides: dict[str, Any]) -> Any:
    settings = {
        "backbone": "resnet18",
        "backbone_kwargs": {"layers": [1, 1, 1, 1], "channels": [16, 24, 32, 48]},
        "fpn_channels": width,
        "representation_size": 2 * width,
        "anchor_sizes": [8, 16, 32, 64, 128],
        "options": {"box_detections_per_img": 20, "box_batch_size_per_image": 64},
    }
    return FasterRCNNConfig(**settings | overrides)


def _yolos(width: int, overrides: dict[str, Any]) -> Any:
    settings = {
        "hidden_size": width,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": [64, 64],
        "patch_size": 16,
        "num_detection_tokens": NUM_QUERIES,
    }
    return transformers.YolosConfig(**settings | overrides)


CONFIGS: dict[str, Callable[[int, dict[str, Any]], Any]] = {
    "detr": _detr("DetrConfig"),
    "table-transformer": _detr("TableTransformerConfig"),
    "conditional_detr": _detr("ConditionalDetrConfig"),
    "dab-detr": _dab_detr,
    "deformable_detr/plain": _deformable_detr(),
    "deformable_detr/refine": _deformable_detr(with_box_refine=True),
    "deformable_detr/two_stage": _deformable_detr(with_box_refine=True, two_stage=True),
    "dino_detr": _dino_detr,
    "rt_detr": _rt_detr("RTDetrConfig"),
    "rt_detr_v2": _rt_detr("RTDetrV2Config"),
    "d_fine": _d_fine("DFineConfig"),
    "deimv2": _d_fine("Deimv2Config"),
    "lw_detr": _windowed(
        "LwDetrConfig",
        "LwDetrViTConfig",
        pretrain_image_size=64,
        num_windows=4,
        window_block_indices=[0, 2],
        out_indices=[2, 4],
        projector={"projector_scale_factors": [1.0, 0.5]},
    ),
    "rf_detr": _windowed("RfDetrConfig", "RfDetrDinov2Config", num_windows=2, out_features=["stage2", "stage4"]),
    "yolos": _yolos,
    "faster_rcnn": _faster_rcnn,
}
for family in filter(is_missing, tuple(CONFIGS)):
    del CONFIGS[family]
