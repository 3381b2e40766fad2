"""Configuration of DINO."""

from dataclasses import is_dataclass
from typing import Any

import transformers
from transformers import DeformableDetrConfig


class DinoDetrConfig(DeformableDetrConfig):
    """Configuration of [`DinoDetrForObjectDetection`]: Deformable DETR's with the paper's values (ResNet-50, 4-scale)
    and DINO's additional options.

    Args:
        num_queries (`int`, defaults to 900): queries, each with a learned content and a box proposed by the encoder.
        encoder_ffn_dim, decoder_ffn_dim (`int`, defaults to 2048), dropout (`float`, defaults to 0): as in the paper.
        num_feature_levels (`int`, defaults to 4): 5 for the 5-scale model, whose backbone also returns stride 4.
        num_denoising (`int`, defaults to 100): positive denoising queries (noised boxes) per image in training, and
            as many negative ones, split into groups by the image with most boxes; 0 disables denoising.
        label_noise_ratio (`float`, defaults to 0.5): half of this fraction of their labels is resampled.
        box_noise_scale (`float`, defaults to 1.0): the corners of positive boxes move by less than this fraction of
            half the box size, those of negative boxes by one to two times as much.
        share_prediction_heads (`bool`, defaults to `True`): one class and one box head for all decoder layers, as in
            the original repository; `False` as in detrex.
        position_temperature (`float`, defaults to 20): temperature of the sine position embeddings of the feature maps
            (detrex: 10000).
        centered_positions (`bool`, defaults to `False`): compute these at the centres of cells, as in detrex, instead
            of their ends.
        class_cost (`float`, defaults to 2), class_loss_coefficient (`float`, defaults to 1): class weights of matcher
            and loss; the others as in Deformable DETR.
        kwargs: see [`~transformers.DeformableDetrConfig`]; `backbone` names a timm model.

    References:
        Zhang et al., DINO: DETR with Improved DeNoising Anchor Boxes, https://arxiv.org/abs/2203.03605
    """

    model_type = "dino_detr"
    _auto_class = "AutoConfig"  # saved configs include this code

    backbone_config: Any = None
    num_queries: int = 900
    encoder_ffn_dim: int = 2048
    decoder_ffn_dim: int = 2048
    dropout: float | int = 0.0
    two_stage: bool = True
    with_box_refine: bool = True
    auxiliary_loss: bool = True
    num_denoising: int = 100
    label_noise_ratio: float = 0.5
    box_noise_scale: float = 1.0
    share_prediction_heads: bool = True
    position_temperature: float | int = 20
    centered_positions: bool = False
    class_cost: float | int = 2
    class_loss_coefficient: float | int = 1

    if not is_dataclass(DeformableDetrConfig):  # the fields above would be ignored

        def __init__(self, **kwargs: Any):
            raise ValueError(
                f"dino_detr needs transformers>=5.4, but {transformers.__version__} is installed: upgrade "
                "transformers, or choose a model of another family."
            )

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_feature_levels < 2:
            raise ValueError(
                f"DINO needs at least 2 feature levels, got num_feature_levels={self.num_feature_levels}."
            )
        if self.backbone_config is None:
            stages = min(self.num_feature_levels - 1, 4)  # the coarsest level is computed from the one before
            self.backbone_config = {
                "model_type": "timm_backbone",
                "backbone": kwargs.pop("backbone", None) or "resnet50",
                "num_channels": self.num_channels,
                "features_only": True,
                "use_pretrained_backbone": False,
                "out_indices": list(range(5 - stages, 5)),
            }
        super().__post_init__(**kwargs)


__all__ = ["DinoDetrConfig"]
