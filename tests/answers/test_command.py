"""`hf-detrkd answer` and a training that reads what it wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hf_detrkd.answers import StoredAnswers
from hf_detrkd.cli import answer, distill
from hf_detrkd.cli import arguments as command_line
from hf_detrkd.cli.doctor import main as doctor
from hf_detrkd.distillation.stored_teacher import METRICS, StoredTeacher
from tests import tiny


@pytest.fixture
def words(tmp_path: Path, shapes_teacher: str) -> list[str]:
    """A run of two steps with a random teacher."""
    (tmp_path / "student.json").write_text(json.dumps(tiny.config("rt_detr").to_dict()))
    text = f"--config_name {tmp_path}/student.json --teacher_model_name_or_path {shapes_teacher} --method kd_detr"
    text += " --general_points 5 --image_size 64 --max_train_samples 6 --max_eval_samples 3 --use_cpu --max_steps 2"
    text += " --per_device_train_batch_size 2 --per_device_eval_batch_size 4 --disable_tqdm true --min_teacher_map 0"
    text += f" --measure_efficiency false --report_to none --output_dir {tmp_path}/out --logging_steps 1"
    text += " --dataset_name shapes --augmentation_views 2"
    return text.split()


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_a_training_reads_the_answers_and_needs_no_teacher(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "answers"
    given = [*words, "--teacher_answers", str(folder)]
    answer.main(given)
    printed = capsys.readouterr().out
    assert "12 rows (6 images, 2 views) of" in printed and "Answered 12 of 12 rows" in printed
    assert f"train with --teacher_answers {folder}" in printed
    assert len(StoredAnswers(folder)) == 12
    answer.main(given)  # nothing is left to do
    assert "Answered" not in capsys.readouterr().out

    without = [word for word in given if word not in ("--teacher_model_name_or_path", str(tmp_path / "teacher"))]
    distill.main([*without, "--run_control", "true"])
    summary = results(tmp_path / "out")
    assert list(summary) == ["teacher", "control", "distilled"]
    assert summary["teacher"]["map"] == json.loads((folder / METRICS).read_text())["metrics"]["teacher_map"]
    assert summary["teacher"]["parameters"] > summary["distilled"]["parameters"]
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["teacher"]["source"] == "folder" and run["teacher"]["name"] == "teacher"
    assert str(tmp_path) not in (folder / "manifest.json").read_text()
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert any(entry.get("kd_detr_class_general", 0) > 0 for entry in state["log_history"])
    recipe = command_line.read_recipe(str(tmp_path / "out" / "recipe.yaml"))
    assert recipe["teacher_answers"] == str(folder)

    with pytest.raises(ValueError, match=r"questions\.kd_detr\.general\.points is 5 in the answers and 6 in this run"):
        distill.main([*without, "--general_points", "6", "--output_dir", str(tmp_path / "other")])


def test_auto_makes_the_answers_first(tmp_path: Path, words: list[str]) -> None:
    distill.main([*words, "--teacher_answers", "auto"])
    assert len(StoredAnswers(tmp_path / "out" / "answers")) == 12
    assert results(tmp_path / "out")["distilled"]["map"] is not None


def test_moved_answers_are_one_row_an_image_and_need_no_views(tmp_path: Path, words: list[str]) -> None:
    given = [*words[: words.index("--augmentation_views")], "--general_points", "0", "--answers_form", "moved"]
    distill.main([*given, "--teacher_answers", "auto"])
    answers = StoredAnswers(tmp_path / "out" / "answers")
    assert len(answers) == 6 and answers.moved
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert any(entry.get("kd_detr_class_specific", 0) > 0 for entry in state["log_history"])
    assert command_line.parse([*given, "--teacher_answers", "auto"]).config.augmentation_views is None


def test_the_guard_of_the_teacher_s_map_holds(tmp_path: Path, words: list[str]) -> None:
    given = [*words, "--teacher_answers", str(tmp_path / "answers")]
    answer.main(given)
    with pytest.raises(ValueError, match=r"below the required minimum of 90"):
        distill.main([*given, "--min_teacher_map", "0.9", "--run_control", "true"])
    assert not (tmp_path / "out" / "control").exists()  # it is known before the control is trained
    with pytest.raises(ValueError, match=r"below the required minimum of 90"):
        answer.main([*words, "--teacher_answers", str(tmp_path / "others"), "--min_teacher_map", "0.9"])
    assert not (tmp_path / "others").exists()


def test_metrics_of_other_images_are_none(tmp_path: Path, words: list[str], caplog: pytest.LogCaptureFixture) -> None:
    given = [*words, "--teacher_answers", str(tmp_path / "answers")]
    answer.main(given)
    place = given.index("--max_eval_samples") + 1
    distill.main([*given[:place], "2", *given[place + 1 :], "--min_teacher_map", "0.9"])
    assert results(tmp_path / "out")["teacher"]["map"] is None


def test_a_resumed_run_does_not_need_the_teacher_again(tmp_path: Path, words: list[str], shapes_teacher: str) -> None:
    given = [*words, "--teacher_answers", "auto", "--save_strategy", "steps", "--save_steps", "1"]
    distill.main(given)
    shutil.rmtree(shapes_teacher)
    distill.main([*given, "--max_steps", "3", "--resume_from_checkpoint", "true"])
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 3


def test_a_run_without_a_method_has_neither_answers_nor_views(tmp_path: Path, words: list[str]) -> None:
    plain = [word for word in words if word not in ("--general_points", "5", "--method", "kd_detr")]
    short = plain[: plain.index("--augmentation_views")]
    config = command_line.parse([*short, "--teacher_answers", str(tmp_path)]).config
    assert config.teacher_answers is None and config.augmentation_views is None


def test_the_doctor_leaves_a_stored_teacher_alone(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*words, "--teacher_answers", str(tmp_path / "answers")]
    answer.main(given)
    doctor.main(given)
    assert "Its answers are stored and fit the run" in capsys.readouterr().out
    doctor.main([*words, "--teacher_answers", "auto"])
    assert "Its answers are stored" not in capsys.readouterr().out


@pytest.mark.parametrize("folder", [None, "auto"])
def test_the_folder_has_to_be_named(words: list[str], folder: str | None) -> None:
    with pytest.raises(ValueError, match="Say where the answers are stored: --teacher_answers"):
        answer.main([*words, *([] if folder is None else ["--teacher_answers", folder])])


def test_a_run_without_a_teacher_has_no_answers(tmp_path: Path, words: list[str]) -> None:
    plain = [word for word in words if word not in ("--general_points", "5", "--method", "kd_detr")]
    with pytest.raises(ValueError, match="Answers are those of a teacher: set --method"):
        answer.main([*plain, "--teacher_answers", str(tmp_path / "answers")])


def test_a_disk_that_is_too_small_is_refused_before_anything_is_answered(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(answer.shutil, "disk_usage", lambda _: small)
    with pytest.raises(ValueError, match=r"is too small for the answers, 0\.0 GB are free: 12 rows"):
        answer.main([*words, "--teacher_answers", str(tmp_path / "answers")])
    assert [file.name for file in (tmp_path / "answers").iterdir()] == [METRICS]


def test_stored_answers_have_four_views_by_default(tmp_path: Path, words: list[str]) -> None:
    short = words[: words.index("--augmentation_views")]
    config = command_line.parse([*short, "--teacher_answers", str(tmp_path)]).config
    assert config.augmentation_views == 4
    assert command_line.parse(short).config.augmentation_views is None
    for wrong in (["--augmentation_views", "0"], ["--answers_dtype", "int8"]):
        with pytest.raises(ValueError, match=r"must be"):
            command_line.parse([*short, *wrong])


def test_the_stored_teacher_has_the_size_of_the_teacher(tmp_path: Path, words: list[str]) -> None:
    answer.main([*words, "--teacher_answers", str(tmp_path / "answers")])
    there = StoredTeacher(StoredAnswers(tmp_path / "answers"), ["box", "disc"])
    assert there.num_parameters > 10_000 and there.to("cpu") is there
    assert not there.class_map.is_identity and there.class_map.is_complete
    with pytest.raises(ValueError, match="The batch has no answers"):
        there.of({})


def test_images_without_labels_teach_beside_the_labelled_ones(tmp_path: Path, words: list[str]) -> None:
    given = [*words, "--labeled_fraction", "0.5", "--unlabeled_fraction", "0.3", "--pseudo_threshold", "0.1"]
    with pytest.raises(ValueError, match="taught by stored answers of the teacher: set --teacher_answers auto"):
        distill.main(given)
    distill.main([*given, "--teacher_answers", "auto", "--run_control", "true"])
    answers = StoredAnswers(tmp_path / "out" / "answers")
    assert len(answers) == 12 and sorted(answers.image_ids < 0) == [False] * 3 + [True] * 3
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (run["train_images"], run["unlabeled_images"]) == (3, 3)
    control = json.loads((tmp_path / "out" / "control" / "trainer_state.json").read_text())
    assert control["log_history"][0]["epoch"] == 0.5  # its three images are two batches
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Trained on 3 images of `shapes`, split `train`, and 3 images without labels," in card
    assert "3 images, and 3 without labels" in (tmp_path / "out" / "report.html").read_text()
    distill.main([*given, "--teacher_answers", "auto", "--pseudo_labels", "true", "--output_dir", f"{tmp_path}/hard"])
    states = [json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("out", "hard")]
    assert states[0]["log_history"][0]["task_loss"] != states[1]["log_history"][0]["task_loss"]


def test_a_loss_of_the_model_s_own_refuses_images_without_labels(tmp_path: Path, words: list[str]) -> None:
    given = [*words, "--labeled_fraction", "0.5", "--teacher_answers", "auto", "--criterion", "transformers"]
    with pytest.raises(ValueError, match="cannot leave out images without labels: leave out --unlabeled_dataset_name"):
        distill.main(given)
