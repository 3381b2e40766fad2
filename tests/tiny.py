"""A zoo of tiny random detectors, one per family: built from configs in milliseconds, no network.

Names are those of `DetectorSpec.family`. To add one: a function that returns its config, and a line of `_CONFIGS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hf_detrkd.models import DinoDetrConfig, FasterRCNNConfig


LABELS = ("circle", "square", "triangle", "star", "cross")
NUM_CLASSES = len(LABELS)
NUM_QUERIES = 7
NUM_LAYERS = 3
NUM_DENOISING = 10
NUM_GROUPS = 3


def build(name: str, width: int = 32, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """A random detector in eval mode, as `from_config` makes it (a frozen backbone stays frozen), except that every
    parameter is moved a little, so that weights that start at zero cannot hide an error, and that live BatchNorm
    starts at 1.

    Args:
        name (`str`): one of [`FAMILIES`].
        width (`int`): channels of encoder and decoder, a multiple of 32.
        seed (`int`): of the weights.
        overrides: fields of the model's config.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForObjectDetection.from_config(config(name, width, **overrides))
        _perturb(model, 0.3 if name == "faster_rcnn" else 1.0)  # deep, and not normalised in eval mode
    return model.eval()


def config(name: str, width: int = 32, **overrides: Any) -> transformers.PreTrainedConfig:
    """The config of [`build`]."""
    settings = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    return _CONFIGS[name](width, settings | overrides)


def batch(
    size: int | tuple[int, int] = 64,
    padded: bool = False,
    boxes: Sequence[int] = (2, 1),
    masked: bool | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Random images with as many boxes each as `boxes` says: `pixel_values`, `pixel_mask` and `labels`.

    Args:
        size (`int` or `tuple[int, int]`): height and width of the images, in pixels.
        padded (`bool`): the last image ends after three quarters of its height and of its width; the rest is padding.
        masked (`bool`, *optional*): whether there is a `pixel_mask`; default: if `padded`.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.randn(len(boxes), 3, height, width, generator=generator)
    mask = torch.ones(len(boxes), height, width, dtype=torch.long)
    if padded:
        mask[-1, height * 3 // 4 :] = 0
        mask[-1, :, width * 3 // 4 :] = 0
    inputs: dict[str, Any] = {"pixel_values": pixels * mask[:, None]}
    if padded if masked is None else masked:
        inputs["pixel_mask"] = mask
    return inputs | {"labels": [random_label(count, generator) for count in boxes]}


def random_label(count: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Ground truth of one image with `count` boxes."""
    classes = torch.randint(0, NUM_CLASSES, (count,), generator=generator)
    return {"class_labels": classes, "boxes": random_boxes(count, generator=generator)}


def random_boxes(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    """cxcywh in [0, 1], inside the image, of shape `(*shape, 4)`."""
    sizes = torch.rand(*shape, 2, generator=generator) * 0.4 + 0.05
    centers = sizes / 2 + torch.rand(*shape, 2, generator=generator) * (1 - sizes)
    return torch.cat([centers, sizes], -1)


def _perturb(model: nn.Module, amount: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("decoder.up", "decoder.reg_scale")):
                continue  # constants, which the loss takes from the config
            fan_in = parameter[0].numel()
            parameter.add_(amount * torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else fan_in**-0.5))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(1.0)
            if isinstance(module, nn.Embedding):
                module.weight.normal_()  # queries that differ as much as trained ones do


# --- one function per family -----------------------------------------------------------------------------------------


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


_CONFIGS: dict[str, Callable[[int, dict[str, Any]], Any]] = {
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
DETECTORS = tuple(_CONFIGS)
FAMILIES = tuple(name for name in DETECTORS if name != "faster_rcnn")
"""Those of set prediction, which share one contract."""
ASKABLE = tuple(name for name in FAMILIES if name != "yolos")
"""Those whose decoder takes queries from outside."""
HYBRID = ("rt_detr", "rt_detr_v2", "d_fine", "deimv2")
"""Those of RT-DETR's line: contents are encoder tokens, and a model's outputs hold its denoising rows."""
DENOISING = ("dino_detr", *HYBRID)
"""Those with denoising queries in training; their own queries are proposals of the encoder."""
GROUPED = ("lw_detr", "rf_detr")
"""Those with groups of queries in training."""
UNBOUNDED = ("d_fine", "deimv2", *GROUPED)
"""Those whose boxes pass no sigmoid and may leave the image: rounding grows with random ones."""
