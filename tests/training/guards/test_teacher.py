"""The check of the teacher: what it can detect on the evaluation images, by its classes and in its frame."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml

from hf_detrkd import DistillationTrainer
from tests.runs import weights_of
from tests.training.guards.runs import broken


CLASSES = ["disc", "box", "triangle", "cross", "ring", "diamond"]
PERMUTED = dict(zip(CLASSES, CLASSES[1:] + CLASSES[:1], strict=True))


def test_a_teacher_that_can_detect_passes_and_its_figures_are_kept(make_run, tmp_path, capsys):
    trainer = make_run()
    trainer.train()
    kept = json.loads((tmp_path / "out" / "teacher_results.json").read_text())
    assert kept["teacher_map"] == trainer.teacher_metrics["teacher_map"] > 0.5
    printed = capsys.readouterr().out
    assert f"The teacher has {100 * kept['teacher_map']:.1f} mAP on 40 evaluation images" in printed
    assert "diamond   diamond" in printed


def test_only_the_first_images_are_looked_at_where_that_is_asked(make_run, capsys):
    make_run(teacher_check_samples=3).train()
    assert "on 3 evaluation images" in capsys.readouterr().out


def test_a_permuted_class_map_stops_the_run_with_the_table(make_run, tmp_path):
    (tmp_path / "map.yaml").write_text(yaml.safe_dump(PERMUTED))
    trainer = make_run(class_map=str(tmp_path / "map.yaml"))
    before = weights_of(trainer)
    message = r"has \d\.\d mAP on 40 evaluation images, below the required minimum of 5(.|\n)*order of its classes"
    with pytest.raises(ValueError, match=message + r"(.|\n)*disc      box"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in weights_of(trainer).items())


def in_another_frame(trainer: DistillationTrainer) -> None:
    """As a teacher answers whose boxes were relative to a canvas of twice the image's size."""
    teacher = trainer.distiller.teacher
    encode = teacher.adapter.encode

    def shifted(*args: Any) -> Any:
        output, answers = encode(*args)
        return replace(output, layers=tuple(replace(x, boxes=x.boxes / 2) for x in output.layers)), answers

    teacher.adapter.encode = shifted


def test_a_teacher_of_another_box_frame_stops_the_run(make_run):
    trainer = make_run()
    in_another_frame(trainer)
    with pytest.raises(ValueError, match=r"below the required minimum of 5(.|\n)*the format of its boxes"):
        trainer.train()


def test_the_check_is_one_switch(make_run, tmp_path):
    trainer = make_run(min_teacher_map=0)
    in_another_frame(trainer)
    trainer.train()
    assert not (tmp_path / "out" / "teacher_results.json").exists()


def test_a_teacher_is_judged_by_the_classes_that_it_knows(make_run, tmp_path, capsys):
    """Of six classes it knows two: over all of them its mAP would be a third."""
    (tmp_path / "map.yaml").write_text(yaml.safe_dump(dict.fromkeys(("triangle", "cross", "ring", "diamond"))))
    trainer = make_run(class_map=str(tmp_path / "map.yaml"), min_teacher_map=0.4, max_steps=1)
    trainer.train()
    assert trainer.teacher_metrics["teacher_map"] < 0.4
    assert "triangle  - (ignored in class losses)" in capsys.readouterr().out


def test_several_evaluation_sets_are_checked_by_the_first(make_run, capsys):
    trainer = make_run()
    trainer.eval_dataset = {"first": trainer.eval_dataset, "second": trainer.train_dataset}
    trainer.train()
    assert "on 40 evaluation images" in capsys.readouterr().out


def test_without_an_evaluation_set_the_teacher_teaches_unseen(make_run):
    trainer = make_run()
    trainer.eval_dataset = None
    trainer.train()
    assert trainer.teacher_metrics is None


def test_a_nan_teacher_fails_the_teacher_s_check(make_run):
    trainer = make_run()
    broken(trainer)
    with pytest.raises(ValueError, match=r"below the required minimum of 5"):
        trainer.train()


def test_a_size_for_the_teacher_that_the_data_set_does_not_show_is_refused(make_run):
    with pytest.raises(ValueError, match="teacher_image_size is 96x96, but the data set yields no teacher_pixel"):
        make_run(teacher_image_size="96").train()
    for own in ("128", "128x128", 128):  # the student's own size
        make_run(teacher_image_size=own).train()
