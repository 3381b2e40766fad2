"""Configuration of Faster R-CNN."""

from typing import Any

from transformers import PreTrainedConfig


class FasterRCNNConfig(PreTrainedConfig):
    """Configuration of [`FasterRCNNForObjectDetection`]: a torchvision detector, or its parts on a timm backbone.

    Args:
        torchvision_name (`str`, defaults to `"fasterrcnn_resnet50_fpn"`): torchvision's builder; not used with a
            `backbone`.
        backbone (`str`, *optional*): name of a timm model that returns features at strides 4, 8, 16 and 32.
        backbone_kwargs (`dict`, *optional*): arguments of `timm.create_model`.
        fpn_channels (`int`, defaults to 256), representation_size (`int`, defaults to 1024): widths of pyramid and
            box head, only with a timm backbone.
        anchor_sizes (`list[int]`, defaults to `[32, 64, 128, 256, 512]`): in pixels, for the four levels of the
            pyramid and the coarser one used only for proposals; only with a timm backbone.
        options (`dict`, *optional*): further arguments of torchvision's `FasterRCNN`, such as `box_score_thresh`.
        frozen_batch_norm (`bool`, *optional*): the backbone's BatchNorm layers have fixed weights and statistics, as
            in torchvision's pretrained detectors. Default: no, unless the training starts from trained backbone
            weights.
        batch_norm_eps (`float`, *optional*): epsilon of the frozen layers. Default: that of the backbone.

    References:
        Ren et al., Faster R-CNN, https://arxiv.org/abs/1506.01497; Lin et al., Feature Pyramid Networks,
        https://arxiv.org/abs/1612.03144
    """

    model_type = "faster_rcnn"
    _auto_class = "AutoConfig"  # saved configs include this code

    torchvision_name: str = "fasterrcnn_resnet50_fpn"
    backbone: str | None = None
    backbone_kwargs: dict[str, Any] | None = None
    fpn_channels: int = 256
    representation_size: int = 1024
    anchor_sizes: list[int] | tuple[int, ...] = (32, 64, 128, 256, 512)
    options: dict[str, Any] | None = None
    frozen_batch_norm: bool | None = None
    batch_norm_eps: float | None = None

    @property
    def level_widths(self) -> tuple[int, ...]:
        """Channels of the levels that boxes are pooled from."""
        if self.backbone is not None:
            return (self.fpn_channels,) * 4
        return (256,) * (2 if "mobilenet" in self.torchvision_name else 4)

    @property
    def hidden_size(self) -> int:
        """Width of a box's representation."""
        return 1024 if self.backbone is None else self.representation_size

    @property
    def num_detections(self) -> int:
        """Number of detections per image, including padding."""
        return (self.options or {}).get("box_detections_per_img", 100)


__all__ = ["FasterRCNNConfig"]
