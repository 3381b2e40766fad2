"""Swin Transformer and ConvNeXt of torchvision, in the names of DINO's original repository."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt, LayerNorm2d
from torchvision.models.swin_transformer import SwinTransformer

from tests.models.conversion.checkpoints import BUILDERS, WIDTH, State


DEPTHS, HEADS, WINDOW, WIDTHS = [2, 1, 2, 1], [1, 2, 4, 8], 2, [8, 16, 32, 64]

SWIN = [
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    (r"^features\.([1357])\.(\d+)\.", lambda m: f"layers.{int(m[1]) // 2}.blocks.{m[2]}."),
    (r"^features\.([246])\.", lambda m: f"layers.{int(m[1]) // 2 - 1}.downsample."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
]
CONVNEXT = [
    (r"^features\.0\.([01])\.", r"downsample_layers.0.\1."),
    (r"^features\.([246])\.", lambda m: f"downsample_layers.{int(m[1]) // 2}."),
    (r"^features\.([1357])\.(\d+)\.", lambda m: f"stages.{int(m[1]) // 2}.{m[2]}."),
    (r"\.block\.0\.", ".dwconv."),
    (r"\.block\.2\.", ".norm."),
    (r"\.block\.3\.", ".pwconv1."),
    (r"\.block\.5\.", ".pwconv2."),
    (r"\.layer_scale$", ".gamma"),
]


class Stages(nn.Module):
    """A backbone of torchvision and the norms that both repositories put after its stages."""

    def __init__(self, backbone: nn.Module, norms: list[nn.Module]):
        super().__init__()
        self.backbone, self.norms = backbone, nn.ModuleList(norms)
        for name, tensor in self.state_dict().items():
            if tensor.is_floating_point():
                offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                tensor.copy_(
                    offset + torch.randn_like(tensor) * (0.1 if tensor.ndim == 1 else tensor[0].numel() ** -0.5)
                )

    def forward(self, pixels: Tensor) -> list[Tensor]:
        maps, values = [], pixels
        for number, layer in enumerate(self.backbone.features):
            values = layer(values)
            if number % 2:
                maps.append(self.normal(values, self.norms[number // 2]))
        return maps

    def normal(self, values: Tensor, norm: nn.Module) -> Tensor:
        """Swin's maps have their channels last."""
        return norm(values) if isinstance(norm, LayerNorm2d) else norm(values).permute(0, 3, 1, 2)

    def original(self, rules: list, levels: int) -> State:
        """Its tensors in the names of the original repository, with a norm for each of the last stages."""
        state = {}
        for name, tensor in self.backbone.state_dict().items():
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
            if not name.startswith(("norm.", "head.", "classifier.")):
                state[name] = tensor.flatten() if name.endswith(".gamma") else tensor
        for stage in range(4 - levels, 4):
            state |= {f"norm{stage}.{name}": tensor for name, tensor in self.norms[stage].state_dict().items()}
        return state


def swin() -> Stages:
    """A small Swin Transformer with torchvision's parts."""
    backbone = SwinTransformer([4, 4], WIDTHS[0], DEPTHS, HEADS, [WINDOW, WINDOW], stochastic_depth_prob=0.0)
    return Stages(backbone, [nn.LayerNorm(width, eps=1e-5) for width in WIDTHS]).eval()


def convnext() -> Stages:
    """A small ConvNeXt with torchvision's parts."""
    following: list[int | None] = [*WIDTHS[1:], None]
    settings = [CNBlockConfig(*sizes) for sizes in zip(WIDTHS, following, DEPTHS, strict=True)]
    return Stages(ConvNeXt(settings), [LayerNorm2d(width, eps=1e-6) for width in WIDTHS]).eval()


def detector(layout: str, backbone: State, levels: int = 4) -> State:
    """A checkpoint of a repository with another backbone than ResNet."""
    state = {name: tensor for name, tensor in BUILDERS[layout](levels).items() if not name.startswith("backbone.")}
    prefix = {"original": "backbone.0.", "detrex": "backbone."}[layout]
    state |= {f"{prefix}{name}": tensor for name, tensor in backbone.items()}
    for level, inputs in enumerate([*WIDTHS[5 - levels :], WIDTHS[-1]]):
        last = level == levels - 1
        name = {
            "original": f"input_proj.{level}.0",
            "detrex": f"neck.{'extra_convs.0' if last else f'convs.{level}'}.conv",
        }
        state[f"{name[layout]}.weight"] = torch.randn(WIDTH, inputs, *((3, 3) if last else (1, 1))) / 10
    return state
