"""Feature maps of two models, brought to one grid and one width, and where to look at them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses.functional import box_overlap, gather_matched
from ..structures.outputs import FeatureMap, Predictions
from ..structures.targets import Targets


TOP_PAIRS = 100  # (query, class) pairs that make the feature mask [released code of DETRDistill]
ROUNDING = 1e-4  # of a cell: a box that ends on a cell's border does not touch the next one


def projections(widths: Sequence[int], wanted: Sequence[int]) -> nn.ModuleList:
    """A 1x1 convolution for every level of the student whose width is not the teacher's.

    Args:
        widths (`Sequence[int]`): channels of the student's levels.
        wanted (`Sequence[int]`): channels of the teacher's, all equal.
    """
    (width,) = set(wanted)
    return nn.ModuleList(nn.Identity() if own == width else nn.Conv2d(own, width, 1) for own in widths)


def nearest_level(own: FeatureMap, others: Sequence[FeatureMap]) -> FeatureMap:
    """The map whose height is nearest, in octaves, to that of `own`."""
    height = own.values.shape[-2]
    return min(others, key=lambda other: abs(np.log2(other.values.shape[-2] / height)))


def on_the_grid_of(goal: FeatureMap, own: FeatureMap, projection: nn.Module) -> Tensor:
    """A student's map in the teacher's width and size, float32, `(batch_size, channels, height, width)`; bilinear
    where the sizes differ (ours), each image's own part of the map onto its part of the other."""
    projected: Tensor = projection(own.values.float())
    size = goal.values.shape[-2:]
    if own.padding is None and goal.padding is None:
        same = projected.shape[-2:] == size
        return projected if same else F.interpolate(projected, size, mode="bilinear", align_corners=False)
    if projected.shape[-2:] == size and own.padding is not None and goal.padding is not None:
        return projected
    axes = []
    for dimension in (1, 0):  # x, y
        cells = torch.arange(size[dimension], device=projected.device) + 0.5
        length = real_length(own, dimension)[:, None]
        inside = (cells / real_length(goal, dimension)[:, None] * length).clamp(min=0.5).minimum(length - 0.5)
        axes.append(2 * inside / projected.shape[2 + dimension] - 1)
    grid = torch.stack(torch.broadcast_tensors(axes[0][:, None, :], axes[1][:, :, None]), -1)
    return F.grid_sample(projected, grid, mode="bilinear", padding_mode="border", align_corners=False)


def real_length(features: FeatureMap, dimension: int) -> Tensor:
    """Cells of each image along the height (0) or the width (1) that are not padding, `(batch_size,)`."""
    values = features.values
    if features.padding is None:
        return torch.full((values.shape[0],), values.shape[2 + dimension], device=values.device)
    return (~features.padding).any(2 - dimension).sum(1)


def real_cells(features: FeatureMap) -> Tensor | int:
    """Cells of a map that are not padding: of each image `(batch_size,)`, or of all where nothing is padded."""
    if features.padding is None:
        return features.values.shape[-2:].numel()
    return (~features.padding).sum((1, 2)).clamp(min=1)


def cells_of(targets: Targets, goal: FeatureMap) -> tuple[Tensor, Tensor]:
    """Cells that a box touches: its extent in cells, from floor to ceiling, at least one; boxes are in [0, 1] of the
    image, which is the part of the map that is not padding.

    Returns:
        `tuple`: bool of shape `(batch_size, max_boxes, height, width)`, and areas `(batch_size, max_boxes)` in cells.
    """
    masks, extents = [], []
    for axis, dimension in ((0, 2), (1, 1)):  # x along the width, y along the height
        size = goal.values.shape[dimension + 1]
        length = real_length(goal, dimension - 1)[:, None]
        center, half = targets.boxes[..., axis] * length, targets.boxes[..., axis + 2] * length / 2
        end = length.to(center.dtype)
        first = (center - half + ROUNDING).floor().clamp(min=0).minimum(end - 1)
        last = (center + half - ROUNDING).ceil().maximum(first + 1).minimum(end)
        cells = torch.arange(size, device=first.device)
        masks.append((cells >= first[..., None]) & (cells < last[..., None]))
        extents.append(last - first)
    inside = masks[1][..., :, None] & masks[0][..., None, :] & targets.valid[..., None, None]
    return inside, extents[0] * extents[1]


@torch.no_grad()
def query_direction(layer: Predictions, targets: Targets, gamma: float | None) -> Tensor:
    """Weighted sum of the unit decoder states of the best (query, class) pairs.

    Since cosines are linear in the unit query, `sum_i w_i cos(q_i, f)` is the cosine-like product of this one vector
    with the unit feature.

    Args:
        layer ([`Predictions`]): the teacher's, with `hidden_states`.
        targets ([`Targets`]): where an image has no object, the scores alone are the weights.
        gamma (`float`, *optional*): weights are score^gamma * IoU^(1 - gamma), or score * IoU without it.

    Returns:
        `torch.Tensor` of shape `(batch_size, width)`.
    """
    assert layer.hidden_states is not None
    scores = layer.scores()
    best, cells = scores.flatten(1).topk(min(TOP_PAIRS, scores[0].numel()))
    rows = cells // scores.shape[-1]
    overlap = box_overlap(layer.boxes[:, :, None], targets.boxes[:, None])[0]
    overlap = overlap.masked_fill(~targets.valid[:, None], 0.0)
    nearest = F.pad(overlap, (0, 1)).amax(-1).gather(1, rows)
    weight = best * nearest if gamma is None else best.pow(gamma) * nearest.pow(1 - gamma)
    weight = torch.where(targets.valid.any(1, keepdim=True), weight, best)
    states = F.normalize(layer.hidden_states.float(), dim=-1)
    return (weight[..., None] * gather_matched(states, rows)).sum(1)


@torch.no_grad()
def feature_mask(direction: Tensor, features: FeatureMap) -> Tensor:
    """Where a map resembles the teacher's best queries.

    Args:
        direction (`torch.Tensor` of shape `(batch_size, width)`): see [`query_direction`].
        features ([`FeatureMap`]): the teacher's.

    Returns:
        `torch.Tensor` of shape `(batch_size, height, width)` in (0, 1], its maximum 1 in every image; 0 on padding.
    """
    unit = F.normalize(features.values.float(), dim=1)
    mask = torch.einsum("bc,bchw->bhw", direction, unit).clamp(min=0.01)
    if features.padding is not None:
        mask = mask.masked_fill(features.padding, 0.0)
    return mask / mask.amax((1, 2), keepdim=True)
