"""`convert_dino.py` on checkpoints with a Swin Transformer or a ConvNeXt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForObjectDetection

from hf_detrkd.distillation.freezing import freeze_stages
from hf_detrkd.models.dino_detr.convert_backbones import Shapes, backbone_of
from hf_detrkd.models.dino_detr.convert_checkpoint import convert
from hf_detrkd.models.dino_detr.convert_names import Layout, layout_of, translate
from tests.models.conversion.backbones import (
    CONVNEXT,
    DEPTHS,
    HEADS,
    SWIN,
    WIDTHS,
    WINDOW,
    Stages,
    convnext,
    detector,
    swin,
)
from tests.models.conversion.checkpoints import State, both_layouts


KINDS = {"swin": (swin, SWIN), "convnext": (convnext, CONVNEXT)}
both_kinds = pytest.mark.parametrize("kind", KINDS)


def checkpoint(kind: str, layout: str, levels: int = 4) -> tuple[Stages, State]:
    """A backbone and a checkpoint of it; the original ConvNeXt has a norm after its first stage in any case."""
    build, rules = KINDS[kind]
    backbone = build()
    stages = 4 if (kind, layout) == ("convnext", "original") else levels - 1
    return backbone, detector(layout, backbone.original(rules, stages), levels)


@torch.no_grad()
@both_kinds
@both_layouts
@pytest.mark.parametrize("levels", [4, 5])
def test_the_backbone_computes_what_torchvision_s_does(kind: str, layout: str, levels: int) -> None:
    backbone, state = checkpoint(kind, layout, levels)
    model = convert(state, layout_of(state)).eval()
    pixels = torch.randn(1, 3, 100, 140)  # the maps are no multiples of the windows, nor even
    expected = backbone(pixels)[5 - levels :]
    found = model.model.backbone(pixels, torch.ones(1, 100, 140))
    for (values, _), wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(values, wanted, atol=1e-4, rtol=1e-4)
    assert model(pixels).logits.isfinite().all()


@both_kinds
@both_layouts
def test_size_is_that_of_the_checkpoint_and_the_model_loads_again(kind: str, layout: str, tmp_path: Path) -> None:
    _, state = checkpoint(kind, layout)
    model = convert(state, layout)
    config = model.config.backbone_config
    assert (config.model_type, config.depths, config.out_indices) == (kind, DEPTHS, [2, 3, 4])
    if kind == "swin":
        assert (config.embed_dim, config.num_heads, config.window_size, config.mlp_ratio) == (8, HEADS, WINDOW, 4)
    else:
        assert config.hidden_sizes == WIDTHS
    model.save_pretrained(tmp_path)
    again, expected = AutoModelForObjectDetection.from_pretrained(tmp_path).state_dict(), model.state_dict()
    assert again.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.items())


@both_kinds
def test_a_norm_that_the_model_reads_must_be_there(kind: str) -> None:
    _, state = checkpoint(kind, "original")
    with pytest.raises(ValueError, match=r"1 missing for backbone\.model\.hidden_states_norms\.stage3\.bias"):
        convert({name: tensor for name, tensor in state.items() if name != "backbone.0.norm2.bias"}, "original")


@both_kinds
def test_stages_can_be_frozen(kind: str) -> None:
    _, state = checkpoint(kind, "original")
    frozen = freeze_stages(convert(state, "original"), 2)
    assert any("embeddings" in name for name in frozen) and any("s.0." in name for name in frozen)
    assert not any(f"encoder.{part}.1." in name for part in ("layers", "stages") for name in frozen)


def meta(**shapes: tuple[int, ...]) -> State:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def released_swin(width: int, heads: list[int], window: int) -> State:
    """Names and shapes of the Swin Transformers of the released checkpoints, of which the first blocks are enough."""
    state = meta(**{"patch_embed.proj.weight": (width, 3, 4, 4)})
    for stage, (depth, number) in enumerate(zip((2, 2, 18, 2), heads, strict=True)):
        inner = width * 2**stage
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            state |= meta(**{f"{name}.attn.relative_position_bias_table": ((2 * window - 1) ** 2, number)})
            state |= meta(**{f"{name}.mlp.fc1.weight": (4 * inner, inner)})
    return state


def released_convnext(widths: list[int]) -> State:
    state = meta(**{"downsample_layers.0.0.weight": (widths[0], 3, 4, 4)})
    for stage, (depth, width) in enumerate(zip((3, 3, 27, 3), widths, strict=True)):
        for block in range(depth):
            state |= meta(**{f"stages.{stage}.{block}.dwconv.weight": (width, 1, 7, 7)})
    return state


@pytest.mark.parametrize(("layout", "prefix"), [("original", "backbone.0."), ("detrex", "backbone.")])
def test_the_sizes_of_the_released_checkpoints_are_found(layout: Layout, prefix: str) -> None:
    def config(state: State, levels: int) -> dict:
        named = {f"{prefix}{name}": tensor for name, tensor in state.items()}
        return backbone_of(Shapes(translate(named, layout)), levels)["backbone_config"]

    large = config(released_swin(192, [6, 12, 24, 48], 12), 5)
    assert (large["embed_dim"], large["depths"], large["num_heads"]) == (192, [2, 2, 18, 2], [6, 12, 24, 48])
    assert (large["window_size"], large["mlp_ratio"], large["out_indices"]) == (12, 4, [1, 2, 3, 4])
    assert config(released_swin(128, [4, 8, 16, 32], 7), 4)["window_size"] == 7
    huge = config(released_convnext([256, 512, 1024, 2048]), 4)
    assert (huge["hidden_sizes"], huge["depths"]) == ([256, 512, 1024, 2048], [3, 3, 27, 3])
    assert huge["out_indices"] == [2, 3, 4]
