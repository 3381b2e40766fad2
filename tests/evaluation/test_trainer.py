"""COCO figures through `Trainer`, in one process and in two."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_detrkd.evaluation import FIGURES, CocoEvaluator, gatherable
from hf_detrkd.evaluation.coco_results import evaluate_coco_files, read_coco_files
from tests.evaluation.boxes import ANNOTATIONS, DETECTIONS, OFFICIAL
from tests.together import run_together


class FileTrainer(Trainer):
    """Answers with the detections of a results file, through the gathering of a real training evaluation."""

    def __init__(self, num_images, batch_size, output_dir, annotations, detections, **arguments):
        id2label, *rows = read_coco_files(annotations, detections)
        self.found, self.truth = ([of_image(part, i) for i in range(num_images)] for part in rows)
        self.evaluator, self.seen = CocoEvaluator(id2label), []
        arguments = TrainingArguments(
            output_dir,
            per_device_eval_batch_size=batch_size,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            **arguments,
        )
        super().__init__(
            torch.nn.Linear(1, 1),
            arguments,
            data_collator=lambda indices: {"indices": torch.tensor(indices)},
            eval_dataset=list(range(num_images)),
            compute_metrics=self.compute_figures,
        )

    def compute_figures(self, evaluation, compute_result=True):
        self.seen += evaluation.label_ids["image_id"].tolist()
        return self.evaluator(evaluation, compute_result)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        pick = inputs["indices"].tolist()
        return torch.zeros(()), *gatherable([self.found[i] for i in pick], [self.truth[i] for i in pick])


def of_image(rows, number):
    """The boxes of an image as tensors, in the metric's form."""
    rows = rows[rows["image"] == number]
    corners = np.concatenate([rows["box"][:, :2], rows["box"][:, :2] + rows["box"][:, 2:]], axis=1)
    names = {"score": "scores", "area": "area", "iscrowd": "iscrowd"}
    columns = {"boxes": corners, "labels": rows["label"].copy()}
    columns |= {names[name]: rows[name].copy() for name in names if name in rows.dtype.names}
    return {"image_id": torch.tensor(number)} | {name: torch.from_numpy(values) for name, values in columns.items()}


def seven_images(folder):
    """Files of seven images with 0 to 6 boxes, found more or less, and some that are not there."""
    generator = torch.Generator().manual_seed(0)
    annotations, answers = [], []
    for image_id in range(7):
        for box in torch.rand(image_id, 4, generator=generator).add(0.2).mul(50).tolist():
            annotations.append({"image_id": image_id, "category_id": len(annotations) % 2, "bbox": box, "iscrowd": 0})
            moved = [value + float(torch.randn((), generator=generator)) * 3 for value in box[:2]]
            answers.append({**annotations[-1], "bbox": [*moved, *box[2:]]})
        answers.append({"image_id": image_id, "category_id": 1, "bbox": [70, 70, 9, 9]})
    for answer in answers:
        answer["score"] = float(torch.rand((), generator=generator))
    truth = {
        "images": [{"id": i} for i in range(7)],
        "annotations": annotations,
        "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}],
    }
    paths = folder / "truth.json", folder / "answers.json"
    for path, content in zip(paths, (truth, answers), strict=True):
        path.write_text(json.dumps(content))
    return paths


def evaluate_twice(files, num_images, batch_size, folder, **arguments):
    trainer = FileTrainer(num_images, batch_size, folder, *files, **arguments)
    runs = []
    for _ in range(2):
        trainer.seen.clear()
        figures = trainer.evaluate()
        runs.append({"seen": sorted(trainer.seen), "figures": [figures[f"eval_{name}"] for name in FIGURES]})
    return runs


@pytest.mark.parametrize("streaming", [True, False])
def test_trainer_gives_the_figures_of_the_files(tmp_path, streaming):
    files = seven_images(tmp_path)
    expected = evaluate_coco_files(*files)
    assert 0.1 < expected["map"] < 0.9
    for run in evaluate_twice(files, 7, 2, tmp_path, batch_eval_metrics=streaming):
        assert len(run["seen"]) == len(set(run["seen"])) == 7
        assert run["figures"] == pytest.approx([expected[name] for name in FIGURES], abs=1e-9)


@pytest.mark.distributed
def test_two_processes_give_the_figures_of_one_in_each(tmp_path):
    expected = evaluate_coco_files(*seven_images(tmp_path))
    run_together(work, tmp_path)
    for rank in range(2):
        runs = json.loads((tmp_path / f"rank{rank}.json").read_text())
        for run in runs["uneven"]:
            assert len(run["seen"]) == len(set(run["seen"])) == 7
            assert run["figures"] == pytest.approx([expected[name] for name in FIGURES], abs=1e-9)
        for run in runs.get("halves", []):  # where the real data is there
            assert len(run["seen"]) == len(set(run["seen"])) == 100
            assert run["figures"] == pytest.approx(OFFICIAL, abs=1e-6)


def work(folder):
    """One of the two processes."""
    settings = {"batch_eval_metrics": True, "ddp_backend": "gloo"}
    uneven = folder / "truth.json", folder / "answers.json"
    runs = {"uneven": evaluate_twice(uneven, 7, 2, folder, **settings)}
    if ANNOTATIONS.is_file():
        runs["halves"] = evaluate_twice((ANNOTATIONS, DETECTIONS), 100, 10, folder, **settings)
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(runs))
    torch.distributed.barrier()
