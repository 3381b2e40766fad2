"""A teacher that is not there: its stored answers take its place in training."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..answers import StoredAnswers, as_output, first_difference
from ..answers.reader import METRICS
from ..data import DetectionDataset
from ..data.collator import PREFIX
from ..evaluation import class_figures
from ..methods import DistillationMethod
from ..structures.outputs import DetectorOutput, DetectorSpec
from ..structures.teacher_parts import IN_MAPS, STILL
from .class_map import ClassMap
from .teacher import Origin, StudentOrder


class StoredTeacher:
    """The answers that a teacher gave once, in the role of a [`Teacher`] in training.

    Args:
        answers ([`StoredAnswers`])
        class_names (`Sequence[str]`): the student's classes.
        class_map (`dict[str, str | None]`, *optional*): student class to teacher class, where the names differ.

    Raises:
        ValueError: the teacher knows none of the classes, or `class_map` is wrong.
    """

    def __init__(
        self, answers: StoredAnswers, class_names: Sequence[str], class_map: Mapping[str, str | None] | None = None
    ):
        self.answers, facts = answers, answers.manifest.teacher
        self.origin = Origin(facts["name"], facts["source"], facts["revision"])
        self.class_map = ClassMap.match(class_names, facts["classes"], class_map)
        self.spec: DetectorSpec = answers.manifest.detector_spec()
        self._in_student_order = StudentOrder(self.class_map)

    @property
    def members(self) -> list[StoredTeacher]:
        """The teachers that it stands for: itself."""
        return [self]

    def by_name(self) -> dict[str, StoredTeacher]:
        """The teachers by their names in reports: `teacher`, or `teacher 1`, `teacher 2` and so on."""
        if len(self.members) == 1:
            return {"teacher": self.members[0]}
        return {f"teacher {number}": one for number, one in enumerate(self.members, 1)}

    @property
    def seed(self) -> int:
        """Seed of the random queries that it was asked."""
        return self.answers.manifest.seed

    def with_classes(self, wanted: Sequence[bool]) -> StoredTeacher:
        """The same teacher, which teaches only some of the student's classes.

        Raises:
            ValueError: it knows none of them.
        """
        pairs = zip(self.class_map.columns, wanted, strict=True)
        columns = tuple(column if one else None for column, one in pairs)
        if all(column is None for column in columns):
            raise ValueError(f"The teacher {self.origin.name} is best in no class: leave it out of --teacher_answers.")
        found = copy.copy(self)
        found.class_map = replace(self.class_map, columns=columns)
        found._in_student_order = StudentOrder(found.class_map)
        return found

    def check(
        self,
        dataset: Any,
        methods: Sequence[DistillationMethod],
        teacher_image_size: str | None = None,
        teacher: str | None = None,
        pseudo_threshold: float | None = None,
    ) -> None:
        """Checks that the answers are those to the images and questions of a run.

        Args:
            dataset: the training set.
            methods (`Sequence[DistillationMethod]`)
            teacher_image_size (`str`, *optional*), teacher (`str`, *optional*): `teacher_image_size` and
                `teacher_model_name_or_path` of the run.
            pseudo_threshold (`float`, *optional*): that of the run, if it has images without labels.

        Raises:
            ValueError: the first difference, and what to do.
        """
        methods = [method for method in methods if method.needs_teacher]
        manifest, again = self.answers.manifest, "Make the answers again with hf-detrkd answer, or change the run."
        if not isinstance(dataset, DetectionDataset) or dataset.transform is None:
            raise ValueError(
                "Stored answers need a DetectionDataset with a transform as train_dataset, got "
                f"{type(dataset).__name__}."
            )
        images = dataset.described() | {"teacher_image_size": teacher_image_size, "form": manifest.images["form"]}
        if self.answers.moved:  # which do not depend on the augmentation
            images |= {name: manifest.images[name] for name in ("augmentation", "seed", "views")}
        other = first_difference(manifest.images, images, "images") or self._other_teacher(teacher)
        for method in methods if other is None else ():
            asked, stored = method.asked_of(pseudo_threshold), manifest.questions.get(method.name, {})
            other = other or first_difference(stored, asked, f"questions.{method.name}")
        if other is not None:
            raise ValueError(f"The answers in {self.answers.folder} do not fit this run: {other}. {again}")
        self._check_columns(methods, again)
        records = dataset.records
        strange = [one.image_id for one in records if not self.answers.knows(one.image_id, one.fingerprint)]
        if strange:
            raise ValueError(
                f"The answers in {self.answers.folder} lack {len(strange)} of {len(dataset)} training images, such as "
                f"that with the id {strange[0]}, or had another name, size or annotations of them. {again}"
            )

    def labeling(self, threshold: float, hard: bool) -> StoredAnswers:
        """The answers, which also offer labels for images that nobody labelled: detections with at least the score
        `threshold`, which count for the detection loss, too, if `hard`."""
        columns = self.class_map.columns
        places = range(len(self.class_map.teacher))
        classes = [columns.index(place) if place in columns else -1 for place in places]
        return self.answers.with_pseudo_labels(threshold, classes, hard)

    def _other_teacher(self, name: str | None) -> str | None:
        """The difference between the run's teacher and that of the answers, if both are known by name."""
        facts = self.answers.manifest.teacher
        if name is None or facts["source"] not in ("hub", "folder"):
            return None
        known = name if facts["source"] == "hub" else Path(name).name
        return first_difference(facts["name"], known, "teacher.name")

    def _check_columns(self, methods: Sequence[DistillationMethod], again: str) -> None:
        columns = self.answers.manifest.columns
        for method in methods:
            parts = method.reads
            if parts.missing is not None:
                raise ValueError(
                    f"Stored answers cannot be used here: {parts.missing}. Train with the teacher itself."
                )
            if self.answers.moved and not parts.moves:
                raise ValueError(
                    f"The answers in {self.answers.folder} move with the image, but {method.name} here reads more "
                    "than the teacher's own predictions: set --general_points 0 (kd_detr) or --feature_weight 0 "
                    "(detrdistill), or make answers with --answers_form views."
                )
            wanted = [f"layers/{self.spec.num_layers - 1}/logits"] if parts.all_layers else []
            wanted += ["layers/0/hidden_states"] if parts.states else []
            wanted += [f"features/{name}/0" for name in sorted(parts.features)]
            optional = STILL if self.answers.moved else IN_MAPS
            wanted += [f"queries/{name}" for name in sorted(parts.queries - optional)]
            missing = [name for name in wanted if name not in columns]
            if missing:
                raise ValueError(
                    f"{method.name} needs the column {missing[0]}, which the answers in {self.answers.folder} lack. "
                    f"{again}"
                )

    @property
    def num_parameters(self) -> int | None:
        """Size of the teacher's model; `None` if its answers are detections of an unknown one."""
        size: int | None = self.answers.manifest.teacher["parameters"]
        return size

    def metrics(self, dataset: Any, id2label: Mapping[int, str]) -> dict[str, float] | None:
        """Its metrics on an evaluation set, from `teacher_results.json` of the answers; `None` if they were not
        measured on these images and classes."""
        found = self._measured()
        if not isinstance(dataset, DetectionDataset) or found.get("evaluation") != dataset.images_hash():
            return None
        figures = self.stored_metrics()
        named = all(f"teacher_{name}" in figures for name in class_figures(dict(id2label)).values())
        return figures if named else None

    def _measured(self) -> dict[str, Any]:
        """The content of `teacher_results.json` of the answers; empty if they have none."""
        file = self.answers.folder / METRICS
        return json.loads(file.read_text()) if file.is_file() else {}

    def stored_metrics(self) -> dict[str, float]:
        """Its metrics on the evaluation set of the pass in which it answered; empty if none were measured."""
        return dict(self._measured().get("metrics", {}))

    def to(self, device: torch.device | str) -> StoredTeacher:
        return self

    def of(self, batch: Mapping[str, Any]) -> DetectorOutput:
        """The teacher's output for a collated batch of a data set [`with_answers`]."""
        columns = {name.removeprefix(PREFIX): values for name, values in batch.items() if name.startswith(PREFIX)}
        if not columns:
            raise ValueError("The batch has no answers: its data set needs with_answers().")
        grids = [(height, width) for height, width in self.answers.manifest.grids]
        output = as_output(columns, self.spec.activation, grids)
        decoded = {name: self._in_student_order(layers) for name, layers in (output.decoded or {}).items()}
        return replace(output, layers=self._in_student_order(output.layers), decoded=decoded)
