"""Translates tensor names of DINO's original repository and of detrex to this package's names."""

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor


Layout = Literal["original", "detrex"]
Rules = list[tuple[str, str | Callable[[re.Match[str]], str]]]
Copies = dict[str, dict[str, Tensor]]
"""Tensors by target name, and for each target by the names in the checkpoint."""

LEVELS: dict[Layout, str] = {"original": "transformer.level_embed", "detrex": "transformer.level_embeds"}
"""The tensor whose name distinguishes the layouts."""

SWIN: Rules = [
    (r"^(backbone\.model)\.patch_embed\.proj\.", r"\1.swin.embeddings.patch_embeddings.projection."),
    (r"^(backbone\.model)\.patch_embed\.norm\.", r"\1.swin.embeddings.norm."),
    (r"^(backbone\.model)\.layers\.", r"\1.swin.encoder.layers."),
    (r"^(backbone\.model\.swin\..+)\.norm1\.", r"\1.layernorm_before."),
    (r"^(backbone\.model\.swin\..+)\.norm2\.", r"\1.layernorm_after."),
    (r"^(backbone\.model\.swin\..+)\.attn\.", r"\1.attention."),
    (r"\.attention\.relative_position_bias_table$", ".attention.relative_position_bias.relative_position_bias_table"),
    (r"\.attention\.proj\.", ".attention.o_proj."),
]
CONVNEXT: Rules = [
    (r"^(backbone\.model)\.downsample_layers\.0\.0\.", r"\1.embeddings.patch_embeddings."),
    (r"^(backbone\.model)\.downsample_layers\.0\.1\.", r"\1.embeddings.layernorm."),
    (r"^(backbone\.model)\.downsample_layers\.(\d+)\.", r"\1.encoder.stages.\2.downsampling_layer."),
    (r"^(backbone\.model)\.stages\.(\d+)\.", r"\1.encoder.stages.\2.layers."),
    (r"^(backbone\.model\.encoder\..+)\.norm\.", r"\1.layernorm."),
    (r"^(backbone\.model\.encoder\..+)\.gamma$", r"\1.layer_scale_parameter"),
]
STAGE_NORMS: Rules = [
    (r"^(backbone\.model)\.norm(\d)\.", lambda found: f"{found[1]}.hidden_states_norms.stage{int(found[2]) + 1}."),
]
SHARED: Rules = [
    *SWIN,
    *CONVNEXT,
    *STAGE_NORMS,
    (r"^label_enc\.", "denoising_class_content."),
    (r"^transformer\.level_embeds?$", "level_embed"),
    (r"^transformer\.tgt_embed\.", "query_content."),
    (r"^transformer\.(encoder|decoder|enc_output|enc_output_norm)\.", r"\1."),
    (r"^(class|bbox)_embed\.", r"decoder.\1_embed."),
    (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
]
ORIGINAL: Rules = [
    (r"^backbone\.0\.(body\.)?", "backbone.model."),
    (r"^transformer\.enc_out_(class|bbox)_embed\.", r"enc_\1_embed."),
    (r"\.linear([12])\.", r".mlp.fc\1."),
    (r"^(transformer\.encoder\..+)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"^(transformer\.encoder\..+)\.norm2\.", r"\1.final_layer_norm."),
    (r"\.cross_attn\.", ".encoder_attn."),
    (r"^(transformer\.decoder\..+)\.norm1\.", r"\1.encoder_attn_layer_norm."),  # the decoder's norms are numbered
    (r"^(transformer\.decoder\..+)\.norm2\.", r"\1.self_attn_layer_norm."),  # in another order than they are used
    (r"^(transformer\.decoder\..+)\.norm3\.", r"\1.final_layer_norm."),
]
DETREX: Rules = [
    (r"^backbone\.(?!stem\.|res\d\.)", "backbone.model."),
    (r"^backbone\.stem\.conv1\.norm\.", "backbone.model.bn1."),
    (r"^backbone\.stem\.", "backbone.model."),
    (r"^backbone\.res([2-5])\.", lambda found: f"backbone.model.layer{int(found[1]) - 1}."),
    (r"^(backbone\..+)\.conv(\d)\.norm\.", r"\1.bn\2."),
    (r"^(backbone\..+)\.shortcut\.norm\.", r"\1.downsample.1."),
    (r"^(backbone\..+)\.shortcut\.", r"\1.downsample.0."),
    (r"^neck\.convs\.(\d+)\.conv\.", r"input_proj.\1.0."),
    (r"^neck\.convs\.(\d+)\.norm\.", r"input_proj.\1.1."),
    (r"\.attentions\.0\.attn\.", ".self_attn."),
    (r"\.attentions\.0\.", ".self_attn."),
    (r"\.attentions\.1\.", ".encoder_attn."),
    (r"\.ffns\.0\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffns\.0\.layers\.1\.", ".mlp.fc2."),
    (r"\.norms\.0\.", ".self_attn_layer_norm."),
    (r"^(transformer\.encoder\..+)\.norms\.1\.", r"\1.final_layer_norm."),
    (r"^(transformer\.decoder\..+)\.norms\.1\.", r"\1.encoder_attn_layer_norm."),
    (r"^(transformer\.decoder\..+)\.norms\.2\.", r"\1.final_layer_norm."),
]


def layout_of(state: dict[str, Tensor]) -> Layout:
    """Detects the repository that wrote a checkpoint by its tensor names."""
    for layout, name in LEVELS.items():
        if name in state:
            return layout
    raise ValueError(
        f"--checkpoint must contain one of {sorted(LEVELS.values())}, got names such as {sorted(state)[:5]}."
    )


def translate(state: dict[str, Tensor], layout: Layout) -> Copies:
    """Renames tensors to the names of [`DinoDetrModel`] and splits joint q, k, v projections; names that match no rule
    are kept."""
    rules = [*(ORIGINAL if layout == "original" else [*numbered(state), *DETREX]), *SHARED]
    found: Copies = defaultdict(dict)
    for source, tensor in state.items():
        if source.endswith((".num_batches_tracked", ".relative_position_index")):
            continue  # frozen BatchNorm layers have no such counter; the other follows from the size of Swin's windows
        place = source
        for pattern, replacement in rules:
            place = re.sub(pattern, replacement, place)
        if joint := re.search(r"\.(in_proj_|qkv\.)", place):
            for part, piece in zip("qkv", tensor.chunk(3), strict=False):
                found[place.replace(joint[0], f".{part}_proj.")][source] = piece
        else:
            found[place][source] = tensor
    return dict(found)


def numbered(state: dict[str, Tensor]) -> Rules:
    """detrex rules with continued numbering: extra levels after those of the stages, the encoder's heads last."""
    levels = count(state, r"neck\.convs\.(\d+)\.")
    layers = count(state, r"transformer\.decoder\.layers\.(\d+)\.")
    return [
        (r"^neck\.extra_convs\.(\d+)\.", lambda found: f"neck.convs.{int(found[1]) + levels}."),
        (rf"^(?:transformer\.decoder\.)?(class|bbox)_embed\.{layers}\.", r"enc_\1_embed."),
    ]


def count(names: Any, pattern: str) -> int:
    """Number of distinct matches of a pattern at the start of the names."""
    return len({match.groups() for name in names if (match := re.match(pattern, name))})


def joined(found: Copies) -> Copies:
    """The same tensors, with the heads of all decoder layers as copies of the first layer's heads."""
    layers = count(found, r"decoder\.layers\.(\d+)\.")
    together: Copies = defaultdict(dict)
    for place, copies in found.items():
        head = re.match(r"(decoder\.(?:class|bbox)_embed)\.(\d+)(\..+)", place)
        together[f"{head[1]}.0{head[3]}" if head and int(head[2]) < layers else place] |= copies
    return dict(together)


def differing(found: Copies) -> list[str]:
    """Names of unequal copies: for each target, the first copy and those that differ from it."""
    names: list[str] = []
    for first, *others in (list(copies.items()) for copies in found.values()):
        strange = [name for name, tensor in others if not torch.equal(tensor, first[1])]
        names += [first[0], *strange] if strange else []
    return names
