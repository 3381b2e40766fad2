"""The end of a run: figures, pictures, report and card of a plain trainer, whatever part of them fails."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from PIL import Image

from hf_detrkd import DistillationTrainer
from hf_detrkd.artifacts.model_card import write_card
from hf_detrkd.artifacts.plots.curves import curve_panels
from hf_detrkd.artifacts.record import Record
from hf_detrkd.artifacts.redaction import portable
from hf_detrkd.distillation.teacher import Origin
from hf_detrkd.evaluation.efficiency import measure_efficiency
from hf_detrkd.training import finish as finishing
from hf_detrkd.training.finish import finish_run
from hf_detrkd.training.run_facts import evaluation_of, teacher_facts
from tests import tiny
from tests.runs import make_trainer


@pytest.fixture
def trained(tmp_path: Path) -> DistillationTrainer:
    trainer = make_trainer(tmp_path / "out", method="kd_detr")
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    return trainer


def test_a_plain_trainer_gets_what_the_script_gives(
    trained: DistillationTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finishing, "measure_efficiency", partial(measure_efficiency, seconds=0.05))
    folder = Path(trained.args.output_dir)
    trainable = sum(p.requires_grad for p in trained.student.parameters())
    assert finish_run(trained) is None
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary) == ["teacher", "distilled"]
    for row in summary.values():
        assert row["gflops"] > 0 and row["latency"]["1"]["median_ms"] > 0
        assert (row["image_size"], row["precision"]) == ([64, 64], "float32")
    for name in ("predictions.png", "curves.png", "per_class.png", "pr_curves.png"):
        assert Image.open(folder / name).width > 300
    assert "report.html" in {file.name for file in folder.iterdir()}
    facts = json.loads((folder / "run.json").read_text())
    assert (facts["train_images"], facts["eval_images"], facts["image_size"]) == (8, 4, [64, 64])
    assert sum(p.requires_grad for p in trained.student.parameters()) == trainable > 0


def test_a_part_that_fails_is_a_warning_and_the_card_comes(
    trained: DistillationTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One part after the other; all others are real or, once tried, skipped."""
    said: list[str] = []
    monkeypatch.setattr(finishing.logger, "warning", said.append)

    def failing(*args: Any) -> None:
        raise MemoryError("too little of it")

    card = Path(trained.args.output_dir) / "README.md"
    for part in ("measure_efficiency", "draw_predictions", "write_plots", "write_report"):
        monkeypatch.setattr(finishing, part, failing)
        finish_run(trained, measure=part == "measure_efficiency")
        assert len(said) == 1 and "too little of it" in said[0]
        assert card.is_file()
        card.unlink()
        said.clear()
        monkeypatch.setattr(finishing, part, lambda *args: None)


def test_the_figures_of_a_plain_trainer_are_of_the_weights_that_it_has(trained: DistillationTrainer) -> None:
    rows = [{"step": 1, "eval_map": 0.3}, {"step": 2, "eval_map": 0.2}, {"step": 2, "train_runtime": 1.0}]
    trained.state.log_history, trained.state.best_global_step = rows, 1
    assert evaluation_of(trained.state, trained.args.load_best_model_at_end)["eval_map"] == 0.2
    trained.args.load_best_model_at_end = True
    assert evaluation_of(trained.state, trained.args.load_best_model_at_end)["eval_map"] == 0.3
    rows.append({"step": 2, "eval_map": 0.31})  # evaluated after the training
    assert evaluation_of(trained.state, trained.args.load_best_model_at_end)["eval_map"] == 0.31


def test_a_teacher_that_was_checked_on_a_sample_has_no_figure_beside_the_students(
    trained: DistillationTrainer,
) -> None:
    trained.teacher_metrics = {"teacher_map": 0.7}
    trained.fill_record()
    assert trained.record.models["teacher"]["map"] == 0.7
    trained.record, trained.args.teacher_check_samples = Record(), 2
    trained.fill_record()
    assert trained.record.models["teacher"]["map"] is None


def test_run_files_are_written_once_and_no_later_table_loses_a_figure(
    trained: DistillationTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    replace = Path.replace  # by which whole files get their names
    monkeypatch.setattr(Path, "replace", lambda file, goal: written.append(goal.name) or replace(file, goal))
    trained.create_model_card()  # as a push in between does
    trained.record.add_model("distilled", {"seconds_per_step": 0.5, "map": None})
    finish_run(trained, measure=False)
    assert written.count("run.json") == 1
    row = json.loads((Path(trained.args.output_dir) / "summary.json").read_text())["distilled"]
    assert row["seconds_per_step"] == 0.5 and row["map"] == trained.state.log_history[-1]["eval_map"]
    written.clear()
    finish_run(trained, measure=False)
    assert not {"run.json", "summary.json", "precision.json"} & set(written)  # nothing changed


def test_the_card_and_the_curves_of_a_method_that_is_not_ours_come_from_the_folder_alone(tmp_path: Path) -> None:
    record = Record()
    paper = {"title": "Somebody's method", "arxiv": "2501.00001", "citation": "@misc{somebody}"}
    record.add_facts({"method": "mine", "methods": ["mine"], "papers": [paper], "teacher": {"name": "big"}})
    record.add_model("distilled", {"map": 0.5})
    log = [{"step": step, "loss": 2.0, "task_loss": 1.0, "mine_class": 1.0 / step} for step in (1, 2)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    run = record.write(tmp_path)
    assert [panel.title for panel in curve_panels(run) if panel.series][-1] == "mine_class"
    card = write_card(run).read_text()
    assert "`mine`" in card and "arxiv.org/abs/2501.00001" in card and "@misc{somebody}" in card


def test_the_teachers_origin_is_told(trained: DistillationTrainer, tmp_path: Path) -> None:
    teacher = trained.distiller.teacher
    assert portable(teacher_facts(trained.distiller.teacher)) == {
        "name": "rt_detr",
        "source": "memory",
        "revision": None,
    }
    teacher.origin = Origin.of(str(tmp_path), "rt_detr", "main")
    assert portable(teacher_facts(trained.distiller.teacher)) == {
        "name": tmp_path.name,
        "source": "folder",
        "revision": None,
    }


def test_a_teacher_from_the_hub_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of the Hub's client holds two commits; transformers no longer tells which one it loaded."""
    repository, commits = tmp_path / "models--somebody--teacher", {"main": "a" * 40, "v0": "b" * 40}
    (repository / "refs").mkdir(parents=True)
    for branch, commit in commits.items():
        (repository / "refs" / branch).write_text(commit)
        tiny.build("rt_detr").save_pretrained(repository / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for revision, commit in [*commits.items(), ("b" * 40, "b" * 40), ("unknown", "unknown")]:
        assert Origin.of("somebody/teacher", "rt_detr", revision) == Origin("somebody/teacher", "hub", commit)
    assert Origin.of("somebody/teacher", "rt_detr").revision is None  # given as an object: nobody knows


def test_facts_leave_the_machine_without_paths_and_secrets_but_classes_and_papers_as_they_are(tmp_path: Path) -> None:
    record, citation = Record(), "@misc{a, title={Token distillation}, author={{\\O}stergaard}}"
    record.add_facts({"classes": ["/m/011k07", "token ring"], "papers": [{"citation": citation}]})
    record.facts |= {"dataset_name": "/home/me/images", "arguments": {"hub_token": "x", "seed": 1}}
    facts = record.write(tmp_path).facts
    assert (facts["classes"], facts["papers"]) == (["/m/011k07", "token ring"], [{"citation": citation}])
    assert (facts["dataset_name"], facts["arguments"]) == ("images", {"seed": 1})
