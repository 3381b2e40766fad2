"""The papers' formulas, one query, one pair and one layer at a time: the oracle of the methods' tests.

Nothing here imports `hf_detrkd`. A layer is a `Layer` of plain tensors of one image; everything is float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, box_iou, generalized_box_iou


@dataclass
class Layer:
    """One image's answers of one decoder layer: `logits` `(N, C)` (softmax: `C + 1`), `boxes` `(N, 4)`, `states`."""

    logits: Tensor
    boxes: Tensor
    activation: str
    states: Tensor | None = None

    def probabilities(self, query: int) -> Tensor:
        logits = self.logits[query]
        return logits.sigmoid() if self.activation == "sigmoid" else logits.softmax(-1)

    def scores(self, query: int) -> Tensor:
        """Without no-object."""
        probabilities = self.probabilities(query)
        return probabilities if self.activation == "sigmoid" else probabilities[:-1]


def taught_by(num_student: int, num_teacher: int) -> dict[int, list[int]]:
    """Student layer -> the teacher layers that meet there, counted from 1 as in the formula."""
    found: dict[int, list[int]] = {}
    for teacher in range(1, num_teacher + 1):
        found.setdefault(math.ceil(teacher * num_student / num_teacher), []).append(teacher)
    return found


def iou(box: Tensor, other: Tensor) -> Tensor:
    return box_iou(*(box_convert(b[None], "cxcywh", "xyxy") for b in (box, other)))[0, 0]


def giou(box: Tensor, other: Tensor) -> Tensor:
    return generalized_box_iou(*(box_convert(b[None], "cxcywh", "xyxy") for b in (box, other)))[0, 0]


def l1(box: Tensor, other: Tensor) -> Tensor:
    return sum((abs(a - b) for a, b in zip(box, other, strict=True)), torch.zeros((), dtype=box.dtype))


def soft_targets(teacher: Layer, query: int, activation: str) -> Tensor:
    """The teacher's probabilities as the student's kind of head states them."""
    if teacher.activation == activation:
        return teacher.probabilities(query)
    scores = teacher.scores(query)
    if activation == "sigmoid":
        return scores
    row = torch.cat([scores, 1 - scores.max()[None]])
    return row / row.sum()


def cross_entropy(logits: Tensor, targets: Tensor, activation: str) -> Tensor:
    if activation == "softmax":
        return -(targets * logits.log_softmax(-1)).sum()
    return -sum(
        p * torch.log(z.sigmoid()) + (1 - p) * torch.log((-z).sigmoid()) for z, p in zip(logits, targets, strict=True)
    )


def entropy(targets: Tensor, activation: str) -> Tensor:
    total = torch.zeros((), dtype=targets.dtype)
    for p in targets:
        for q in (p, 1 - p) if activation == "sigmoid" else (p,):
            if q > 0:
                total = total - q * q.log()
    return total


def class_divergence(logits: Tensor, targets: Tensor, activation: str) -> Tensor:
    """Cross entropy minus what no student can remove."""
    return cross_entropy(logits, targets, activation) - entropy(targets, activation)


def kl(teacher_logits: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """`sum p_T log(p_T / p_S)`."""
    p, q = (z / temperature for z in (teacher_logits, logits))
    p, q = p.exp() / p.exp().sum(), q.exp() / q.exp().sum()
    return sum(a * (a / b).log() for a, b in zip(p, q, strict=True))


def assign(cost: Tensor) -> list[tuple[int, int]]:
    """Pairs (row, column) of least total cost."""
    if 0 in cost.shape:
        return []
    rows, columns = linear_sum_assignment(cost.detach().numpy())
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


# --- KD-DETR (section 2): answers `[layer][image]` to the same queries -----------------------------------------------

Answers = list[list[Layer]]


def kd_detr(
    student: Answers,
    teacher: Answers,
    released: bool = False,
    tempered: bool = True,
    foreground: bool = True,
    last: bool = True,
    temperature: float = 10.0,
) -> dict[tuple[str, int], Tensor]:
    """The unweighted losses of one group of points by part and student layer (from 0)."""
    depths = len(student), len(teacher)
    taught = {s: [depths[1]] for s in range(1, depths[0] + 1)} if last else taught_by(*depths)
    losses = {}
    for s, teachers in taught.items():
        sums = [
            _kd_detr_layer(student[s - 1], teacher[t - 1], teacher[-1], released, tempered, foreground, temperature)
            for t in teachers
        ]
        for part in ("class", "box", "giou"):
            losses[part, s - 1] = sum(found[part] for found in sums) / len(sums)
    return losses


def _kd_detr_layer(
    student: list[Layer],
    teacher: list[Layer],
    last: list[Layer],
    released: bool,
    tempered: bool,
    foreground: bool,
    temperature: float,
) -> dict[str, Tensor]:
    sums = dict.fromkeys(("class", "box", "giou"), torch.zeros((), dtype=torch.float64))
    weights = [[image.scores(i).max() if foreground else 1.0 for i in range(len(image.boxes))] for image in last]
    everything = sum(sum(row) for row in weights)
    for image, row in enumerate(weights):
        for i, weight in enumerate(row):
            mine, wanted = student[image], teacher[image]
            if tempered and mine.activation == wanted.activation:
                divergence = temperature**2 * kl(wanted.logits[i], mine.logits[i], temperature)
            else:
                targets = soft_targets(wanted, i, mine.activation)
                divergence = class_divergence(mine.logits[i], targets, mine.activation)
            distance, generalized = l1(mine.boxes[i], wanted.boxes[i]), giou(mine.boxes[i], wanted.boxes[i])
            if released:
                sums["class"] = sums["class"] + weight * divergence / len(mine.scores(i))
                sums["box"] = sums["box"] + weight * distance / 4 / everything
                sums["giou"] = sums["giou"] + weight * (1 - generalized) / everything
            else:
                share = weight / sum(row) / len(weights)
                sums["class"] = sums["class"] + share * divergence
                sums["box"] = sums["box"] + share * distance
                sums["giou"] = sums["giou"] + share * (1 - generalized)
    return sums


# --- DETRDistill (section 1) -----------------------------------------------------------------------------------------


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


def pair_cost(student: Layer, teacher: Layer) -> Tensor:
    cost = torch.zeros(len(student.boxes), len(teacher.boxes), dtype=torch.float64)
    for n in range(len(student.boxes)):
        for m in range(len(teacher.boxes)):
            targets = soft_targets(teacher, m, student.activation)
            entries = cross_entropy(student.logits[n], targets, student.activation)
            distance, generalized = l1(student.boxes[n], teacher.boxes[m]), giou(student.boxes[n], teacher.boxes[m])
            cost[n, m] = entries + 5 * distance - 2 * generalized
    return cost


def pair_answers(student: Layer, teacher: Layer, positive: list[int]) -> tuple[list, list]:
    """Pairs (student query, teacher query) of the paper's form: of the positives, then of the rest."""
    cost, pairs, free = pair_cost(student, teacher), [], list(range(len(student.boxes)))
    for columns in (positive, [m for m in range(len(teacher.boxes)) if m not in positive]):
        found = assign(cost[free][:, columns])
        pairs.append([(free[row], columns[column]) for row, column in found])
        free = [n for n in free if n not in {taken for taken, _ in pairs[-1]}]
    return pairs[0], pairs[1]


Truth = list[tuple[list[int], Tensor]]  # labels and boxes of each image


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


# --- CLoCKDistill (section 3) ----------------------------------------------------------------------------------------


def bilinear(features: Tensor, height: int, width: int) -> Tensor:
    """`(D, h, w)` on another grid: every cell is read at its centre, between the four cells around it."""
    resized = torch.zeros(features.shape[0], height, width, dtype=torch.float64)
    last = features.shape[1] - 1, features.shape[2] - 1
    for y in range(height):
        for x in range(width):
            place = (y + 0.5) * features.shape[1] / height - 0.5, (x + 0.5) * features.shape[2] / width - 0.5
            (top, left), total = map(math.floor, place), torch.zeros(features.shape[0], dtype=torch.float64)
            for row in (top, top + 1):
                for column in (left, left + 1):
                    share = (1 - abs(place[0] - row)) * (1 - abs(place[1] - column))
                    nearest = features[:, min(max(row, 0), last[0]), min(max(column, 0), last[1])]
                    total = total + share * nearest
            resized[:, y, x] = total
    return resized


def cells_of(box: Tensor, height: int, width: int) -> list[tuple[int, int]]:
    """Cells (y, x) that a box touches, on a map of `height` x `width` real cells: at least one. An edge that rounding
    alone pushes over a cell's border stays on it."""
    cx, cy, w, h = box.tolist()
    sides = []
    for center, size, cells in ((cy, h, height), (cx, w, width)):
        first = math.floor(round((center - size / 2) * cells, 4))
        last = math.ceil(round((center + size / 2) * cells, 4)) - 1
        first = min(max(first, 0), cells - 1)
        sides.append(range(first, max(min(last, cells - 1), first) + 1))
    return [(y, x) for y in sides[0] for x in sides[1]]


def clockdistill_memory(
    projected: Tensor,
    memory: Tensor,
    real: Tensor,
    truth: Truth,
    own_real: Tensor,
    alpha: float = 5e-5,
    beta: float = 1e-7,
) -> tuple[Tensor, Tensor]:
    """One level of one batch: the parts on objects and on the rest.

    Args:
        projected: the student's map in the teacher's width, `(B, D, h, w)`, on any grid.
        memory: the teacher's, `(B, D, height, width)`.
        real: cells that are image, `(B, height, width)`: a rectangle from the upper left corner.
        own_real: the same of the student, `(B, h, w)`. Where the grids differ, image lies on image.
    """
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(2)]
    for image, (_, boxes) in enumerate(truth):
        cells = real[image].nonzero().tolist()
        height, width = (max(cell[side] for cell in cells) + 1 for side in (0, 1))
        inside = [cells_of(box, height, width) for box in boxes]
        background = [cell for cell in map(tuple, cells) if not any(cell in found for found in inside)]
        mine = projected[image]
        if own_real[image].shape != real[image].shape or not own_real[image].equal(real[image]):
            own = own_real[image].nonzero().tolist()
            own_height, own_width = (max(cell[side] for cell in own) + 1 for side in (0, 1))
            mine = bilinear(mine[:, :own_height, :own_width], height, width)
        for y, x in map(tuple, cells):
            squares = sum((a - b) ** 2 for a, b in zip(mine[:, y, x], memory[image, :, y, x], strict=True))
            areas = [len(found) for found in inside if (y, x) in found]
            share = 1 / min(areas) if areas else 1 / len(background)
            part = 0 if areas else 1
            sums[part] = sums[part] + (beta if part else alpha) * share * squares / len(truth)
    return sums[0], sums[1]


def clockdistill_queries(
    student: Answers, teacher: Answers, counts: list[int], tempered: bool = True, temperature: float = 10.0
) -> dict[tuple[str, int], Tensor]:
    """The answers to one query per box, of which an image has `counts`; unweighted, by part and student layer."""

    def real(answers: Answers) -> Answers:
        return [
            [
                Layer(image.logits[:count], image.boxes[:count], image.activation)
                for image, count in zip(layer, counts, strict=True)
            ]
            for layer in answers
        ]

    return kd_detr(real(student), real(teacher), tempered=tempered, last=False, temperature=temperature)


# --- the gate, after Sun et al. (section 4) --------------------------------------------------------------------------


def better_answers(student: list[Layer], teacher: list[Layer], truth: Truth) -> Tensor:
    """One layer's answers to the same queries: 1 where the teacher's class (row 0) or box (1, 2) is better."""
    found = torch.zeros(3, len(truth), len(teacher[0].boxes))
    for image, (labels, boxes) in enumerate(truth):
        for i, theirs in enumerate(teacher[image].boxes):
            overlaps = [float(iou(theirs, box)) for box in boxes]
            if max(overlaps, default=0.0) < 0.5:
                continue
            k = overlaps.index(max(overlaps))
            scores = [float(side[image].scores(i)[labels[k]]) for side in (student, teacher)]
            found[0, image, i] = scores[1] > scores[0]
            found[1:, image, i] = overlaps[k] > float(iou(student[image].boxes[i], boxes[k]))
    return found


def better_objects(student: list[Layer], teacher: list[Layer], truth: Truth) -> list[list[bool]]:
    """By image and object."""
    found: list[list[bool]] = []
    for image, (labels, boxes) in enumerate(truth):
        found.append([])
        for label, box in zip(labels, boxes, strict=True):
            best = []
            for side in (student[image], teacher[image]):
                rows = range(len(side.boxes))
                best.append(max(float(side.scores(i)[label] * iou(side.boxes[i], box)) for i in rows))
            found[-1].append(best[1] > best[0])
    return found
