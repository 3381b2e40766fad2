"""Several teachers with stored answers, each of which teaches the classes that it knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..answers.merged import MergedAnswers, part_of
from ..data.collator import PREFIX
from ..evaluation import class_figures
from ..losses.functional import UNKNOWN
from ..methods import DistillationMethod
from ..structures.outputs import DetectorOutput, DetectorSpec, ObjectQueries, Predictions
from .class_map import ClassMap
from .stored_teacher import StoredTeacher
from .teacher import Origin


Merge = Literal["mean", "best"]
CERTAIN = 1e-6  # of a mean score, whose logit must be finite


class MergedTeacher(StoredTeacher):
    """Several [`StoredTeacher`]s in the role of one.

    Their own queries are put side by side, and each compares only the classes that its teacher knows. Where all were
    asked the same queries, each class has the mean score of the teachers that know it, and a query the box of the
    teacher that is surest.

    Args:
        members (`Sequence[StoredTeacher]`)
        merge (`str`): where several know a class: `mean`, all of them teach it; `best`, the one with the highest AP of
            the class on the evaluation set.

    Raises:
        ValueError: the answers differ in form or seed; with `best`, answers without metrics, or a teacher that is best
            in no class.
    """

    def __init__(self, members: Sequence[StoredTeacher], merge: Merge):
        if len({member.seed for member in members}) > 1:
            raise ValueError("Answers of several teachers must have the same --augmentation_seed.")
        self.answers: Any = MergedAnswers([member.answers for member in members])
        self._members = best_members(members) if merge == "best" else list(members)
        origins = [member.origin for member in members]
        self.origin = Origin(" + ".join(origin.name for origin in origins), origins[0].source)
        names = self._members[0].class_map.student
        known = [any(one.class_map.columns[place] is not None for one in self._members) for place in range(len(names))]
        self.class_map = ClassMap(names, names, tuple(i if one else None for i, one in enumerate(known)))
        self.spec = merged_spec([member.spec for member in members], len(names))

    @property
    def members(self) -> list[StoredTeacher]:
        return self._members

    @property
    def seed(self) -> int:
        return self._members[0].seed

    @property
    def num_parameters(self) -> int | None:
        sizes = [member.num_parameters for member in self._members]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def check(
        self,
        dataset: Any,
        methods: Sequence[DistillationMethod],
        teacher_image_size: str | None = None,
        teacher: str | None = None,
        pseudo_threshold: float | None = None,
    ) -> None:
        """See [`StoredTeacher.check`], of every member.

        Raises:
            ValueError: also for a method that cannot be taught by several.
        """
        for method in methods:
            if method.needs_teacher and not method.reads.merges:
                raise ValueError(
                    f"Several teachers can teach kd_detr, with the teacher's last layer, but not {method.name} as it "
                    "is set here: name one of them in --teacher_answers."
                )
        for member in self._members:
            member.check(dataset, methods, teacher_image_size, None, pseudo_threshold)

    def labeling(self, threshold: float, hard: bool) -> Any:
        return MergedAnswers([member.labeling(threshold, hard) for member in self._members])

    def metrics(self, dataset: Any, id2label: Mapping[int, str]) -> dict[str, float] | None:
        """`None`: each member has its own."""
        return None

    def of(self, batch: Mapping[str, Any]) -> DetectorOutput:
        stored = {name.removeprefix(PREFIX): values for name, values in batch.items() if name.startswith(PREFIX)}
        outputs = [
            member.of({f"{PREFIX}{name}": values for name, values in part_of(stored, number).items()})
            for number, member in enumerate(self._members)
        ]
        decoded = [output.decoded or {} for output in outputs]
        return replace(
            outputs[0],
            layers=(beside([output.layers[-1] for output in outputs]),),
            queries=queries_beside([output.queries for output in outputs]),
            features={"neck": (), "encoder": ()},
            decoded={name: (mean_of([one[name][-1] for one in decoded]),) for name in decoded[0]},
        )


def merged_spec(specs: Sequence[DetectorSpec], num_classes: int) -> DetectorSpec:
    """A detector with the queries of all, and of their fields the places that all have."""
    places = frozenset({"boxes", "points"}).intersection(*(spec.query_fields for spec in specs))
    family = " + ".join(dict.fromkeys(spec.family for spec in specs))
    queries = sum(spec.num_queries for spec in specs)
    return DetectorSpec(family, places, 0, 1, queries, num_classes, "sigmoid")


def best_members(members: Sequence[StoredTeacher]) -> list[StoredTeacher]:
    """The teachers, each with only the classes in which it has the highest AP, the first one on ties.

    Raises:
        ValueError: answers without metrics, or a teacher that is best in no class.
    """
    names = members[0].class_map.student
    figures = class_figures(dict(enumerate(names)))
    table = torch.full((len(members), len(names)), -torch.inf)
    for row, member in enumerate(members):
        found = member.stored_metrics()
        for place, column in enumerate(member.class_map.columns):
            if column is not None:
                key = f"teacher_{figures[place]}"
                if key not in found:
                    raise ValueError(
                        f"--teacher_merge best compares the teachers' AP of each class, but the answers in "
                        f"{member.answers.folder} have none for {names[place]!r}: make them again with an evaluation "
                        "set of these classes, or set --teacher_merge mean."
                    )
                table[row, place] = found[key]
    winner = table.argmax(0).tolist()
    kept = [[winner[place] == row for place in range(len(names))] for row in range(len(members))]
    return [member.with_classes(wanted) for member, wanted in zip(members, kept, strict=True)]


def beside(layers: Sequence[Predictions]) -> Predictions:
    """The queries of all teachers one after the other, each with the classes that its teacher knows."""
    activation = layers[0].activation
    if any(layer.activation != activation for layer in layers):
        layers = [as_sigmoid(layer) for layer in layers]
        activation = "sigmoid"
    logits, boxes = (torch.cat([vars(layer)[name] for layer in layers], 1) for name in ("logits", "boxes"))
    known = None
    if any(layer.known is not None for layer in layers):
        known = torch.cat([known_of(layer).expand(*layer.logits.shape[:2], -1) for layer in layers], 1)
    return Predictions(logits, boxes, activation=activation, known=known)


def queries_beside(queries: Sequence[ObjectQueries]) -> ObjectQueries:
    """The places of all queries, boxes if all have them."""
    if all(one.boxes is not None for one in queries):
        return ObjectQueries(boxes=torch.cat([one.boxes for one in queries if one.boxes is not None], 1))
    centers = [one.centers for one in queries]
    if any(one is None for one in centers):
        return ObjectQueries()
    return ObjectQueries(points=torch.cat([one for one in centers if one is not None], 1))


def mean_of(answers: Sequence[Predictions]) -> Predictions:
    """One prediction for queries that all teachers were asked: the mean score over those that know a class, and the
    box of the one with the highest score."""
    known = torch.stack([known_of(one) for one in answers])  # (num_teachers, num_classes)
    scores = torch.stack([one.scores() for one in answers]) * known[:, None, None]
    mean = scores.sum(0) / known.sum(0).clamp(min=1)
    anyone = known.any(0)
    logits = torch.logit(mean, eps=CERTAIN).masked_fill(~anyone, UNKNOWN)
    surest = scores.amax(-1).argmax(0)[None, ..., None].expand(1, *answers[0].boxes.shape)
    boxes = torch.stack([one.boxes for one in answers]).gather(0, surest)[0]
    return Predictions(logits, boxes, known=None if all_known(answers) else anyone)


def all_known(answers: Sequence[Predictions]) -> bool:
    """True if a teacher knows every class."""
    return any(one.known is None for one in answers)


def known_of(layer: Predictions) -> Tensor:
    """The classes that a teacher knows, bool `(num_classes,)`."""
    if layer.known is not None:
        return layer.known
    return torch.ones(layer.num_classes, dtype=torch.bool, device=layer.logits.device)


def as_sigmoid(layer: Predictions) -> Predictions:
    """The same scores as those of a sigmoid head."""
    logits = torch.logit(layer.scores(), eps=CERTAIN)
    if layer.known is not None:
        logits = logits.masked_fill(~layer.known, UNKNOWN)
    return replace(layer, logits=logits, activation="sigmoid")
