"""A run of a few steps on a few generated images, here or in processes of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

from hf_detrkd import METHODS, DistillationConfig, DistillationTrainer
from hf_detrkd.answers import AnswerWriter
from hf_detrkd.data import AugmentationConfig, DetectionDataset, DetectionTransform, load_detection_splits
from hf_detrkd.data.unlabeled import UnlabeledRecords
from hf_detrkd.distillation.answering import Answering, answer_shards
from hf_detrkd.distillation.student import load_image_processor
from hf_detrkd.training.config import method_names
from tests import tiny
from tests.processes import finish, start
from tests.together import run_together


SIZE = (64, 64)
BATCH_NORM = r"(encoder_input_proj|decoder_input_proj)\.\d+\.1\.|norm\w*\.(weight|bias)$"


class SequentialTrainer(DistillationTrainer):
    """Images in order: so that runs with another split of the batch see the same images."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def make_trainer(
    folder: str | Path,
    family: str = "rt_detr",
    method: str = "none",
    widths: tuple[int, int] = (32, 32),
    method_config: dict[str, Any] | None = None,
    images: int = 8,
    empty: tuple[int, ...] = (),
    unlabeled: tuple[int, ...] = (),
    augment: bool = False,
    trainer_class: type[DistillationTrainer] = SequentialTrainer,
    student: dict[str, Any] | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **arguments: Any,
) -> DistillationTrainer:
    """A trainer of a tiny student, with a tiny teacher where there is a method; `empty` images lose their boxes, and
    the labels of `unlabeled` ones are unknown."""
    splits = load_detection_splits("shapes", max_train_samples=images, max_eval_samples=4, shapes_size=SIZE)
    classes = {"id2label": dict(enumerate(splits.train.classes))}
    classes["label2id"] = {name: i for i, name in classes["id2label"].items()}
    model = tiny.build(family, widths[0], seed=1, **classes, **(student or {}))
    live = method != "none" and "teacher_answers" not in arguments
    teacher = tiny.build(family, widths[1], seed=2, **classes) if live else None
    processor = load_image_processor(model, image_size=SIZE)
    augmentation = AugmentationConfig() if augment else AugmentationConfig.none()
    transform, views = DetectionTransform(SIZE, augmentation=augmentation), arguments.get("augmentation_views")
    train = without_labels(splits.train, unlabeled).with_transform(transform, 3, views)
    processor.do_normalize = False
    defaults = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 2, "use_cpu": True}
    defaults |= {
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_grad_norm": 1.0,
        "min_teacher_map": 0.0,  # the tiny teachers are random
    }
    return trainer_class(
        model=model,
        args=DistillationConfig(str(folder), method=method, **defaults | arguments),
        teacher_model=teacher,
        method_config=[METHODS[name].config_class(**(method_config or {})) for name in method_names(method)],
        train_dataset=WithoutBoxes(train, empty) if empty else train,
        eval_dataset=splits.eval.with_transform(DetectionTransform(SIZE)),
        processing_class=processor,
        callbacks=callbacks,
    )


def without_labels(dataset: DetectionDataset, places: tuple[int, ...]) -> DetectionDataset:
    """The same images, some of which nobody labelled."""
    unknown = UnlabeledRecords(dataset.records)
    return dataset.with_records([unknown[i] if i in places else r for i, r in enumerate(dataset.records)])


class WithoutBoxes(torch.utils.data.Dataset):
    """A data set some of whose images have lost their boxes."""

    def __init__(self, dataset: Any, empty: tuple[int, ...]):
        self.dataset, self.empty = dataset, empty

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.dataset[index]
        if index in self.empty:
            item["labels"] |= {name: item["labels"][name][:0] for name in ("class_labels", "boxes", "area", "iscrowd")}
        return item


def store_answers(folder: Path, **options: Any) -> Path:
    """Stores the answers that a run of [`make_trainer`] with these options asks of its teacher."""
    options |= {name: tuple(options[name]) for name in ("unlabeled",) if name in options}
    trainer = make_trainer(folder.parent / "asked", **options)
    threshold = trainer.args.pseudo_threshold if options.get("unlabeled") else None
    methods: list[Any] = list(trainer.distiller.methods.values())
    answering = Answering(trainer.distiller.teacher, methods, 0, padded=False, pseudo_threshold=threshold)
    data, collate = trainer.train_dataset, trainer.data_collator
    names = {"name": "shapes", "split": "train", "teacher_image_size": None}
    writer = AnswerWriter(folder, answering.manifest(data, collate([data.view_of(0, 0)]), names, "float32", 8))
    writer.begin()
    for _ in answer_shards(answering, data, writer, writer.missing(), 4, collate, torch.device("cpu")):
        pass
    return folder


def weights_of(trainer: DistillationTrainer) -> dict[str, torch.Tensor]:
    """Everything that was trained, by name: student and projections."""
    return {name: value.detach().clone() for name, value in trainer.distiller.state_dict().items()}


def run(folder: Path, processes: Literal[1, 2] = 1, **arguments: Any) -> dict[str, torch.Tensor]:
    """The weights after [`work`] in processes of its own."""
    if processes == 1:
        log = folder / "process.log"
        finish(start(work, (folder, arguments), log), log)
    else:
        run_together(work, folder, arguments)
    return load_file(folder / "weights.safetensors")


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance, msg=name)


def assert_same_update(
    before: dict[str, torch.Tensor],
    one: dict[str, torch.Tensor],
    other: dict[str, torch.Tensor],
    tolerance: float = 1e-5,
) -> None:
    """One plain gradient step each: the difference is at most so much of the step's length."""
    floats = [name for name, value in before.items() if value.is_floating_point()]
    step = torch.cat([(one[name] - before[name]).flatten() for name in floats])
    difference = torch.cat([(one[name] - other[name]).flatten() for name in floats])
    assert step.norm() > 0
    assert difference.norm() <= tolerance * step.norm(), (difference.norm(), step.norm())


def assert_trained(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    """A parameter has moved; statistics of BatchNorm move without any training."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    moved = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert any(not name.endswith(statistics) for name in moved)


def work(folder: str | Path, arguments: dict[str, Any]) -> None:
    """A whole run; leaves its weights, log and metrics in its folder."""
    options = {key: tuple(v) if key in ("empty", "unlabeled", "widths") else v for key, v in arguments.items()}
    looks_first = options.pop("looks_first", False)
    trainer = make_trainer(folder, **options)
    if looks_first:  # what is evaluated before the training must not change it
        trainer.evaluate()
        trainer.evaluate_teacher()
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        save_file({k: v.contiguous() for k, v in weights_of(trainer).items()}, Path(folder, "weights.safetensors"))
        report = {"log": trainer.state.log_history, "metrics": metrics}
        Path(folder, "report.json").write_text(json.dumps(report))
    trainer.accelerator.wait_for_everyone()
