"""Losses on box-edge distributions: D-FINE's FGL and DDF.

D-FINE predicts the offset of each box edge from an initial box as a distribution over non-uniform bins, refined from
layer to layer. FGL is the cross entropy with the two bins next to the true offset; DDF distils the distributions of
the last layer into the other layers.

References:
    Peng et al., D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution Refinement,
    https://arxiv.org/abs/2410.13842
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.ops import box_convert

from .functional import gather_matched, scatter_matched


TEMPERATURE = 5.0  # softmax temperature of DDF [released code]


@dataclass(frozen=True)
class EdgeDistributions:
    """Distributions of the box edges that a decoder predicts.

    Attributes:
        logits (`torch.Tensor` of shape `(num_layers, batch_size, num_queries, 4, num_bins + 1)`): left, top, right,
            bottom.
        boxes (`torch.Tensor` of shape `(batch_size, num_queries, 4)`): initial boxes, detached; offsets are measured
            from their centre in units of their size.
        up, reg_scale (`float`): parameters of the bins: see [`bin_offsets`].
    """

    logits: Tensor
    boxes: Tensor
    up: float
    reg_scale: float

    def last(self) -> EdgeDistributions:
        """Only the last layer."""
        return replace(self, logits=self.logits[-1:])

    def of_images(self, rows: Tensor) -> EdgeDistributions:
        """Those of the images `rows` `(num_images,)`."""
        return replace(self, logits=self.logits[:, rows], boxes=self.boxes[rows])


def bin_offsets(num_bins: int, up: float, reg_scale: float, device: torch.device) -> Tensor:
    """Offset of each bin, `(num_bins + 1,)`, ascending: fine around 0, coarse outside (D-FINE's `W(n)`)."""
    bound = abs(up) * abs(reg_scale)
    place = torch.arange(num_bins + 1, device=device) - num_bins // 2
    offsets = place.sign() * ((bound + 1) ** (2 * place.abs() / (num_bins - 2)) - 1)
    ends = place.abs() == num_bins // 2
    return torch.where(ends, 2 * bound * place.sign(), offsets)


@torch.no_grad()
def edge_targets(edges: EdgeDistributions, index: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Bin positions of the true edges.

    Args:
        index (`torch.LongTensor` of shape `(num_layers, batch_size, max_boxes)`): query matched to each box.
        targets (`torch.Tensor` of shape `(batch_size, max_boxes, 4)`): ground-truth boxes.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the bin to the left, and the weight in [0, 1] of the bin to the right,
        both of shape `(num_layers, batch_size, max_boxes, 4)`.
    """
    num_bins = edges.logits.shape[-1] - 1
    first = gather_matched(edges.boxes.float().expand(index.shape[0], -1, -1, -1), index)
    corners = box_convert(targets.float(), "cxcywh", "xyxy")
    center, size = first[..., :2], first[..., 2:].repeat(1, 1, 1, 2)
    scale = abs(edges.reg_scale)
    distances = torch.cat([center - corners[..., :2], corners[..., 2:] - center], dim=-1)
    offsets = distances / (size / scale + 1e-16) - 0.5 * scale
    values = bin_offsets(num_bins, edges.up, scale, offsets.device)
    left = (torch.searchsorted(values, offsets, right=True) - 1).clamp(0, num_bins - 1)
    low, high = values[left], values[left + 1]
    return left, ((offsets - low) / (high - low)).clamp(0, 1)


def fine_grained_localization(edges: EdgeDistributions, index: Tensor, targets: Tensor, ious: Tensor) -> Tensor:
    """FGL: cross entropy with the two bins next to every true edge, weighted by the IoU of box and query.

    Args:
        index, targets: see [`edge_targets`].
        ious (`torch.Tensor` of shape `(num_layers, batch_size, max_boxes)`): detached.

    Returns:
        `torch.Tensor` of shape `(num_layers,)`: sums, to be divided by the number of boxes.
    """
    left, right_weight = edge_targets(edges, index, targets)
    # (num_layers, batch_size, max_boxes, 4, num_bins + 1)
    logits = gather_matched(edges.logits.flatten(-2), index).unflatten(-1, edges.logits.shape[-2:]).float()
    beside = logits.gather(-1, torch.stack([left, left + 1], dim=-1))  # (num_layers, batch_size, max_boxes, 4, 2)
    weight = torch.stack([1 - right_weight, right_weight], dim=-1)
    losses = logits.logsumexp(-1) - (weight * beside).sum(-1)
    return (losses.sum(-1) * ious * (index >= 0)).sum((1, 2))


def decoupled_focal(
    edges: EdgeDistributions, index: Tensor, ious: Tensor, last_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """DDF: KL divergence of every layer but the last from the distributions of the last layer.

    Matched queries are weighted by their IoU, unmatched ones by the highest class score of the last layer.

    Args:
        index (`torch.LongTensor` of shape `(num_layers, batch_size, max_boxes)`)
        ious (`torch.Tensor` of shape `(num_layers, batch_size, max_boxes)`): detached.
        last_logits (`torch.Tensor` of shape `(batch_size, num_queries, num_classes)`): class logits of the last layer.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(num_layers - 1,)`: sums over edges of matched and unmatched queries.
    """
    index, ious = index[:-1], ious[:-1]
    goal = (edges.logits[-1].detach().float() / TEMPERATURE).softmax(-1)
    own = (edges.logits[:-1].float() / TEMPERATURE).log_softmax(-1)
    divergence = (torch.xlogy(goal, goal).sum(-1) - (goal * own).sum(-1)).sum(-1)  # (num_layers - 1, batch, queries)
    best = last_logits.detach().float().sigmoid().amax(-1).expand_as(divergence)
    losses = TEMPERATURE**2 * divergence
    weighted = losses * scatter_matched(index, ious, best)
    chosen = scatter_matched(index, torch.ones_like(ious), torch.zeros_like(best))
    return (weighted * chosen).sum((1, 2)), (weighted * (1 - chosen)).sum((1, 2))
