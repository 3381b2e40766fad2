"""Helpers that convert external queries into decoder arguments."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..structures.outputs import ObjectQueries


def inverse_sigmoid(values: Tensor, eps: float = 1e-5) -> Tensor:
    """Logits of numbers in [0, 1], in float32: in 16 bits the logit of 1 is infinite."""
    return torch.logit(values.float(), eps)


def take_rows(tokens: Tensor, rows: Tensor) -> Tensor:
    """Selects tokens `(batch_size, num_tokens, width)` at `rows` `(batch_size, num_rows)`."""
    return tokens.gather(1, rows[..., None].expand(-1, -1, tokens.shape[-1]))


def nearest_own(queries: ObjectQueries, own: ObjectQueries, names: tuple[str, ...]) -> ObjectQueries:
    """Fills missing fields of queries from the nearest own query by box or point (ours).

    Args:
        queries ([`ObjectQueries`]): with `boxes` or `points`.
        own ([`ObjectQueries`]): with the same, and all of `names`; detached.
        names (`tuple[str]`): fields to fill.
    """
    missing = [name for name in names if name not in queries.fields]
    if not missing:
        return queries
    own = own.detach()
    if queries.boxes is not None and own.boxes is not None:
        places, others = queries.boxes, own.boxes
    else:
        assert queries.centers is not None and own.points is not None
        places, others = queries.centers, own.points
    nearest = torch.cdist(places.float(), others.float()).argmin(-1)
    return replace(queries, **{name: take_rows(own.tensors[name], nearest) for name in missing})
