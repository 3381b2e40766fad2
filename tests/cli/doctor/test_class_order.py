"""Classes that the teacher calls otherwise than the class map says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from hf_detrkd.cli.doctor import View, renamed, with_renamed
from hf_detrkd.cli.doctor import check_teacher as doctor_teacher
from hf_detrkd.distillation.teacher import NO_NORMALIZATION
from tests.cli.doctor.runs import SIDE, answers, changed_teacher, line, said


def test_exchanged_names_are_named_and_the_class_map_that_is_offered_heals_them(
    tmp_path: Path, shapes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = [View((SIDE, SIDE), NO_NORMALIZATION)]  # the preprocessing is not in doubt
    monkeypatch.setattr(doctor_teacher, "candidate_views", lambda trainer: right)
    names = ["disc", "ring", "triangle", "cross", "box", "diamond"]  # box and ring exchanged
    ids = {name: i for i, name in enumerate(names)}
    teacher = changed_teacher(tmp_path, "config.json", id2label={str(i): n for n, i in ids.items()}, label2id=ids)
    text = said(answers(line(tmp_path, shapes, teacher=teacher)), "class order", "problem")
    assert "box as 'ring'" in text and "ring as 'box'" in text and "disc" not in text
    offered = text.splitlines()[-2:]
    assert yaml.safe_load("\n".join(offered)) == {"box": "ring", "ring": "box"}
    (tmp_path / "map.yaml").write_text("\n".join(offered))
    healed = answers(line(tmp_path, shapes, "--class_map", str(tmp_path / "map.yaml"), teacher=teacher))
    said(healed, "class order", "ok")
    promised = re.search(r"it has ([\d.]+) mAP instead of ([\d.]+):", text)
    assert promised is not None and float(promised[1]) > float(promised[2]) + 10
    assert f"{100 * healed.facts['teacher']['map']:.1f}" == promised[1]


def test_classes_count_as_renamed_only_where_the_answers_are_plain() -> None:
    cycle = np.array([[0, 9, 1], [1, 0, 8], [9, 0, 0]])
    assert renamed(cycle, (0, 1, 2)) == {0: 1, 1: 2, 2: 0}
    assert with_renamed((0, 1, 2), {0: 1, 1: 2, 2: 0}) == [1, 2, 0]
    assert with_renamed((0, 1, 2), {0: 1}) == [1, None, 2]
    assert renamed(np.array([[9, 0, 1], [0, 9, 0], [8, 0, 3]]), (0, 1, 2)) == {}  # confused, not exchanged
    assert renamed(np.array([[0, 2, 0], [2, 0, 0], [0, 0, 9]]), (0, 1, 2)) == {}  # too few
    assert renamed(np.array([[0, 0, 7], [0, 0, 8], [0, 0, 9]]), (0, 1, None)) == {}  # it knows one word
    assert renamed(np.array([[5, 6, 0], [6, 5, 0], [0, 0, 9]]), (0, 1, 2)) == {}  # undecided
    assert renamed(np.array([[0, 7, 0], [9, 0, 0]]), (None, 0)) == {0: 1}  # a partner that the names did not tell
