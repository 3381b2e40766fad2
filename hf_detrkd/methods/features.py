"""Feature distillation helpers: alignment of the maps of two models, and masks of boxes and queries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses.functional import box_overlap, gather_matched
from ..structures.outputs import FeatureMap, Predictions, stacked
from ..structures.targets import Targets


TOP_PAIRS = 100  # (query, class) pairs that make the feature mask [released code of DETRDistill]
ROUNDING = 1e-4  # tolerance in cells: a box that ends on a cell border does not touch the next cell


def projections(widths: Sequence[int], wanted: Sequence[int]) -> nn.ModuleList:
    """1x1 convolutions to the teacher's width, one per student level; identity where the widths are equal.

    Args:
        widths (`Sequence[int]`): channels of the student's levels.
        wanted (`Sequence[int]`): channels of the teacher's levels, all equal.
    """
    (width,) = set(wanted)
    return nn.ModuleList(nn.Identity() if own == width else nn.Conv2d(own, width, 1) for own in widths)


def nearest_level(own: FeatureMap, others: Sequence[FeatureMap]) -> FeatureMap:
    """The map whose height is nearest to that of `own` on a log2 scale."""
    height = own.values.shape[-2]
    return min(others, key=lambda other: abs(np.log2(other.values.shape[-2] / height)))


def on_the_grid_of(goal: FeatureMap, own: FeatureMap, projection: nn.Module) -> Tensor:
    """Projects a student map to the teacher's width and size, float32, `(batch_size, channels, height, width)`.

    Different sizes are interpolated bilinearly (ours); with padding, the valid part of each image is mapped to its
    valid part in the teacher's map.
    """
    projected: Tensor = projection(own.values.float())
    size = goal.values.shape[-2:]
    if own.padding is None and goal.padding is None:
        same = projected.shape[-2:] == size
        return projected if same else F.interpolate(projected, size, mode="bilinear", align_corners=False)
    if projected.shape[-2:] == size and own.padding is not None and goal.padding is not None:
        return projected
    axes = []  # x (batch_size, width) and y (batch_size, height) in [-1, 1], as grid_sample expects
    for dimension in (1, 0):  # x, y
        cells = torch.arange(size[dimension], device=projected.device) + 0.5
        length = real_length(own, dimension)[:, None]
        inside = (cells / real_length(goal, dimension)[:, None] * length).clamp(min=0.5).minimum(length - 0.5)
        axes.append(2 * inside / projected.shape[2 + dimension] - 1)
    # (batch_size, height, width, 2)
    grid = torch.stack(torch.broadcast_tensors(axes[0][:, None, :], axes[1][:, :, None]), -1)
    return F.grid_sample(projected, grid, mode="bilinear", padding_mode="border", align_corners=False)


def real_length(features: FeatureMap, dimension: int) -> Tensor:
    """Number of cells of each image along the height (0) or width (1) that are not padding, `(batch_size,)`."""
    values = features.values
    if features.padding is None:
        return torch.full((values.shape[0],), values.shape[2 + dimension], device=values.device)
    return (~features.padding).any(2 - dimension).sum(1)


def standardized(values: Tensor, padding: Tensor | None) -> Tensor:
    """Maps `(batch_size, channels, height, width)` whose channels have mean 0 and variance 1 over the cells of each
    image that are not padding `(batch_size, height, width)`."""
    real = values.new_ones(1, 1, 1, 1) if padding is None else (~padding)[:, None].to(values)
    count = real.expand(values.shape[0], 1, *values.shape[2:]).sum((2, 3), keepdim=True).clamp(min=1)
    centred = (values - (values * real).sum((2, 3), keepdim=True) / count) * real
    return centred * ((centred.square().sum((2, 3), keepdim=True) / count) + 1e-5).rsqrt()


def real_cells(features: FeatureMap) -> Tensor | int:
    """Number of cells that are not padding: per image `(batch_size,)`, or one number if nothing is padded."""
    if features.padding is None:
        return features.values.shape[-2:].numel()
    return (~features.padding).sum((1, 2)).clamp(min=1)


def cells_of(targets: Targets, goal: FeatureMap) -> tuple[Tensor, Tensor]:
    """Cells that each box touches: its extent in cells from floor to ceiling, at least one cell.

    Boxes are in [0, 1] of the image, which is the part of the map that is not padding.

    Returns:
        `tuple`: bool of shape `(batch_size, max_boxes, height, width)`, and areas `(batch_size, max_boxes)` in cells.
    """
    masks, extents = [], []
    for axis, dimension in ((0, 2), (1, 1)):  # x along the width, y along the height
        size = goal.values.shape[dimension + 1]
        length = real_length(goal, dimension - 1)[:, None]
        center, half = targets.boxes[..., axis] * length, targets.boxes[..., axis + 2] * length / 2
        end = length.to(center.dtype)
        # First and last cell of each box, (batch_size, max_boxes).
        first = (center - half + ROUNDING).floor().clamp(min=0).minimum(end - 1)
        last = (center + half - ROUNDING).ceil().maximum(first + 1).minimum(end)
        cells = torch.arange(size, device=first.device)
        masks.append((cells >= first[..., None]) & (cells < last[..., None]))
        extents.append(last - first)
    inside = masks[1][..., :, None] & masks[0][..., None, :] & targets.valid[..., None, None]
    return inside, extents[0] * extents[1]


@torch.no_grad()
def query_directions(layers: Sequence[Predictions], targets: Targets, gamma: float | None) -> Tensor:
    """Weighted sum of the unit decoder states of the best (query, class) pairs of each layer.

    The cosine is linear in the unit query, so `sum_i w_i cos(q_i, f)` equals the dot product of this one vector with
    the unit feature.

    Args:
        layers (`Sequence[Predictions]`): the teacher's predictions, with `hidden_states`.
        targets ([`Targets`]): for an image without objects the weights are the scores.
        gamma (`float`, *optional*): weights are score^gamma * IoU^(1 - gamma), or score * IoU if `None`.

    Returns:
        `torch.Tensor` of shape `(num_layers, batch_size, width)`.
    """
    answers = stacked(layers)
    states = torch.stack([layer.hidden_states for layer in layers if layer.hidden_states is not None])
    scores = answers.scores()
    best, cells = scores.flatten(2).topk(min(TOP_PAIRS, scores[0, 0].numel()))
    rows = cells // scores.shape[-1]  # query of each pair, (num_layers, batch_size, TOP_PAIRS)
    # (num_layers, batch_size, num_queries, max_boxes)
    overlap = box_overlap(answers.boxes[..., :, None, :], targets.boxes[:, None])[0]
    overlap = overlap.masked_fill(~targets.valid[:, None], 0.0)
    nearest = F.pad(overlap, (0, 1)).amax(-1).gather(-1, rows)
    weight = best * nearest if gamma is None else best.pow(gamma) * nearest.pow(1 - gamma)
    weight = torch.where(targets.valid.any(1, keepdim=True), weight, best)
    states = F.normalize(states.float(), dim=-1)
    return (weight[..., None] * gather_matched(states, rows)).sum(2)


@torch.no_grad()
def feature_masks(directions: Tensor, features: FeatureMap) -> Tensor:
    """Similarity masks of a map to the best queries of each layer of the teacher.

    Args:
        directions (`torch.Tensor` of shape `(num_layers, batch_size, width)`): see [`query_directions`].
        features ([`FeatureMap`]): a map of the teacher.

    Returns:
        `torch.Tensor` of shape `(num_layers, batch_size, height, width)` in (0, 1], with maximum 1 in every image; 0
        on padding.
    """
    unit = F.normalize(features.values.float(), dim=1)
    mask = torch.einsum("lbc,bchw->lbhw", directions, unit).clamp(min=0.01)
    if features.padding is not None:
        mask = mask.masked_fill(features.padding, 0.0)
    return mask / mask.amax((-2, -1), keepdim=True)
