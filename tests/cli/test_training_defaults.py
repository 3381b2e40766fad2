"""A command line without training arguments trains, evaluates and keeps the best student."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hf_detrkd.cli.arguments import Arguments, parse
from hf_detrkd.cli.run_setup import build_trainer, load_splits


def parsed(*words: str, student: str = "--model_name_or_path=tiny") -> Arguments:
    return parse(["--dataset_name=shapes", student, "--use_cpu", *words])


def test_a_run_evaluates_each_epoch_and_keeps_its_best_student() -> None:
    config = parsed("--output_dir=x").config
    assert (config.eval_strategy, config.save_strategy, config.save_total_limit) == ("epoch", "epoch", 2)
    assert config.load_best_model_at_end and config.num_train_epochs == 50 and config.max_steps == -1
    assert (config.learning_rate, config.backbone_learning_rate, config.weight_decay) == (1e-4, 1e-5, 1e-4)
    assert config.get_warmup_steps(1000) == 50 and config.lr_scheduler_type == "cosine"


def test_what_is_given_takes_the_place_of_what_belongs_to_it() -> None:
    config = parsed("--output_dir=x", "--eval_strategy=no", "--learning_rate=3e-4", "--max_steps=7").config
    assert (config.eval_strategy, config.save_strategy) == ("no", "steps") and not config.load_best_model_at_end
    assert (config.learning_rate, config.backbone_learning_rate, config.weight_decay) == (3e-4, None, 1e-4)
    assert config.max_steps == 7 and config.num_train_epochs == 3  # transformers' default, which is not used
    assert parsed("--output_dir=x", "--warmup_steps=0").config.lr_scheduler_type == "linear"


def test_a_metric_or_a_limit_of_checkpoints_leaves_the_evaluations_as_they_are(tmp_path: Path) -> None:
    config = parsed("--output_dir=x", "--metric_for_best_model=eval_loss", "--save_total_limit=5").config
    assert (config.eval_strategy, config.save_strategy, config.save_total_limit) == ("epoch", "epoch", 5)
    assert config.load_best_model_at_end and config.metric_for_best_model == "eval_loss"
    file = tmp_path / "recipe.yaml"
    file.write_text("save_total_limit: null\n")
    assert parsed("--output_dir=x", f"--config={file}").config.save_total_limit is None
    assert not config.greater_is_better and parsed("--output_dir=x").config.greater_is_better


def test_a_new_backbone_learns_as_fast_as_the_rest() -> None:
    config = "scripts/recipes/quickstart/student_config.json"
    assert parsed("--output_dir=x", student=f"--config_name={config}").config.backbone_learning_rate is None


def test_a_recipe_is_given_too_and_the_one_that_a_run_writes_repeats_it(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"save_strategy": "steps", "weight_decay": 0.0}))
    first = parsed("--output_dir=x", f"--config={file}")
    assert first.config.eval_strategy == "no" and first.config.weight_decay == 0.0
    file.write_text(yaml.safe_dump(first.recipe))
    second = parse([f"--config={file}"])
    assert {**second.values, "config": None} == {**first.values, "config": None}


def test_a_stream_has_no_epochs_to_evaluate_after() -> None:
    config = parsed("--output_dir=x", "--streaming", "--max_steps=5").config
    assert config.eval_strategy == "no" and not config.load_best_model_at_end


def test_a_run_stops_when_its_student_gets_no_better(tmp_path: Path) -> None:
    sizes = ["--max_train_samples=8", "--max_eval_samples=4", "--image_size=64"]
    given = parsed(
        *[f"--output_dir={tmp_path}", "--early_stopping_patience=2", "--num_train_epochs=9", "--learning_rate=0"],
        *["--per_device_train_batch_size=8", *sizes],
        student="--config_name=scripts/recipes/quickstart/student_config.json",
    )
    trainer = build_trainer(given, load_splits(given))
    trainer.train()
    assert trainer.state.global_step == 3  # of 9: two evaluations after the first were no better
    with pytest.raises(ValueError, match="--early_stopping_patience must be at least 1"):
        parsed("--output_dir=x", "--early_stopping_patience=0")
