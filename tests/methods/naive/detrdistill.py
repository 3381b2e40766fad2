"""DETRDistill (section 1): matched answers, masked features, and the teacher's queries with its own pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.methods.naive.answers import (
    Answers,
    Layer,
    Truth,
    assign,
    class_divergence,
    cross_entropy,
    giou,
    iou,
    l1,
    soft_targets,
    taught_by,
)


def match_objects(answers: Layer, labels: list[int], boxes: Tensor) -> list[tuple[int, int]]:
    """DETR's own matching with ground truth, as pairs (query, object): class 2, L1 5, GIoU 2."""
    cost = torch.zeros(len(answers.boxes), len(labels), dtype=torch.float64)
    for i in range(len(answers.boxes)):
        for j, label in enumerate(labels):
            p = answers.probabilities(i)[label]
            if answers.activation == "softmax":
                class_cost = -p
            else:
                class_cost = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
            distance, generalized = l1(answers.boxes[i], boxes[j]), giou(answers.boxes[i], boxes[j])
            cost[i, j] = 2 * class_cost + 5 * distance - 2 * generalized
    return assign(cost)


def pair_cost(student: Layer, teacher: Layer, boxes_only: bool = False) -> Tensor:
    cost = torch.zeros(len(student.boxes), len(teacher.boxes), dtype=torch.float64)
    for n in range(len(student.boxes)):
        for m in range(len(teacher.boxes)):
            targets = soft_targets(teacher, m, student.activation)
            entries = cross_entropy(student.logits[n], targets, student.activation)
            distance, generalized = l1(student.boxes[n], teacher.boxes[m]), giou(student.boxes[n], teacher.boxes[m])
            cost[n, m] = (0 if boxes_only else entries) + 5 * distance - 2 * generalized
    return cost


def pair_answers(student: Layer, teacher: Layer, positive: list[int]) -> tuple[list, list]:
    """Pairs (student query, teacher query) of the paper's form: of the positives, then of the rest."""
    pairs, free = [], list(range(len(student.boxes)))
    for negative in (False, True):
        cost = pair_cost(student, teacher, boxes_only=negative)
        columns = [m for m in range(len(teacher.boxes)) if (m in positive) != negative]
        found = assign(cost[free][:, columns])
        pairs.append([(free[row], columns[column]) for row, column in found])
        free = [n for n in free if n not in {taken for taken, _ in pairs[-1]}]
    return pairs[0], pairs[1]


def detrdistill_logits(
    student: Answers, teacher: Answers, truth: Truth, released: bool = False
) -> dict[tuple[str, int], Tensor]:
    """The matched answers, by part (with its group) and student layer (from 0)."""
    losses: dict[tuple[str, int], Tensor] = {}
    for s, teachers in taught_by(len(student), len(teacher)).items():
        for t in teachers:
            groups: dict[str, list[dict[str, Tensor]]] = {"": [], "_positive": [], "_negative": []}
            for mine, wanted, (labels, boxes) in zip(student[s - 1], teacher[t - 1], truth, strict=True):
                if released:
                    found = {"": assign(pair_cost(mine, wanted))}
                else:
                    positive = [query for query, _ in match_objects(wanted, labels, boxes)]
                    found = dict(zip(("_positive", "_negative"), pair_answers(mine, wanted, positive), strict=True))
                for group, pairs in found.items():
                    groups[group] += [_compared(mine, n, wanted, m) for n, m in pairs]
            for group in ("",) if released else ("_positive", "_negative"):
                for part in ("class", "box", "giou"):
                    if (part, group) != ("class", "_negative"):
                        values = [terms[part] for terms in groups[group]]
                        mean = sum(values) / max(len(values), 1) / len(teachers)
                        key = part + group, s - 1
                        losses[key] = losses.get(key, 0) + mean
    return losses


def _compared(student: Layer, n: int, teacher: Layer, m: int) -> dict[str, Tensor]:
    targets = soft_targets(teacher, m, student.activation)
    return {
        "class": class_divergence(student.logits[n], targets, student.activation),
        "box": l1(student.boxes[n], teacher.boxes[m]),
        "giou": 1 - giou(student.boxes[n], teacher.boxes[m]),
    }


def feature_mask(teacher: Layer, boxes: Tensor, features: Tensor, real: Tensor, gamma: float | None) -> Tensor:
    """`(height, width)` from `features` `(D, height, width)`; `gamma` is `None` in the released form."""
    cells = [(float(score), i) for i in range(len(teacher.boxes)) for score in teacher.scores(i)]
    weights = []
    for score, i in sorted(cells, reverse=True)[:100]:
        if len(boxes):
            overlap = max(float(iou(teacher.boxes[i], box)) for box in boxes)
            weights.append((score * overlap if gamma is None else score**gamma * overlap ** (1 - gamma), i))
        else:
            weights.append((score, i))
    mask = torch.zeros(features.shape[1:], dtype=torch.float64)
    for y, x in real.nonzero().tolist():
        cosines = [
            weight
            * torch.dot(teacher.states[i], features[:, y, x])
            / teacher.states[i].norm()
            / features[:, y, x].norm()
            for weight, i in weights
        ]
        mask[y, x] = max(float(sum(cosines)), 0.01)
    return mask / mask.max()


def detrdistill_feature(
    projected: Tensor, features: Tensor, real: Tensor, teacher: Answers, truth: Truth, gamma: float | None
) -> Tensor:
    """One level: the student's projected map and the teacher's, `(B, D, height, width)`; a mean over real cells."""
    total = torch.zeros((), dtype=torch.float64)
    for image, (_, boxes) in enumerate(truth):
        for layer in teacher:
            mask = feature_mask(layer[image], boxes, features[image], real[image], gamma)
            for y, x in real[image].nonzero().tolist():
                for mine, wanted in zip(projected[image, :, y, x], features[image, :, y, x], strict=True):
                    share = int(real[image].sum()) * features.shape[1] * len(truth)
                    total = total + (mask[y, x] * wanted - mask[y, x] * mine) ** 2 / share
    return total


def detrdistill_assignment(
    asked: Answers, teacher: Answers, truth: Truth, released: bool = False
) -> dict[tuple[str, int], Tensor]:
    """Ordinary detection losses of the student's answers to the teacher's queries, by part and student layer."""
    losses: dict[tuple[str, int], Tensor] = {}
    for s, teachers in taught_by(len(asked), len(teacher)).items():
        for t in teachers:
            sums = dict.fromkeys(("class", "box", "giou"), torch.zeros((), dtype=torch.float64))
            objects, entries = sum(len(labels) for labels, _ in truth), 0.0
            for mine, wanted, (labels, boxes) in zip(asked[s - 1], teacher[t - 1], truth, strict=True):
                given = dict(match_objects(mine if released else wanted, labels, boxes))
                for query in range(len(mine.boxes)):
                    label = labels[given[query]] if query in given else None
                    value, weight = _detection_class_loss(mine, query, label)
                    sums["class"], entries = sums["class"] + value, entries + weight
                    if query in given:
                        sums["box"] = sums["box"] + l1(mine.boxes[query], boxes[given[query]])
                        sums["giou"] = sums["giou"] + 1 - giou(mine.boxes[query], boxes[given[query]])
            for part, value in sums.items():
                softmax = part == "class" and asked[0][0].activation == "softmax"
                value = value / (entries if softmax else max(objects, 1)) / len(teachers)
                losses[part, s - 1] = losses.get((part, s - 1), 0) + value
    return losses


def _detection_class_loss(answers: Layer, query: int, label: int | None) -> tuple[Tensor, float]:
    """Cross entropy with no-object at 0.1, or focal loss (0.25, 2) summed over classes, with the query's weight."""
    probabilities = answers.probabilities(query)
    if answers.activation == "softmax":
        weight = 0.1 if label is None else 1.0
        return -weight * probabilities[-1 if label is None else label].log(), weight
    total = torch.zeros((), dtype=torch.float64)
    for c, p in enumerate(probabilities):
        value = -0.25 * (1 - p) ** 2 * p.log() if c == label else -0.75 * p**2 * (1 - p).log()
        total = total + value
    return total, 1.0
