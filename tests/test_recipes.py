"""The recipes of the papers' rows: what they say is understood, adds up, and trains, at a small size."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection, PreTrainedModel, get_scheduler

from hf_detrkd import METHODS, DistillationTrainer
from hf_detrkd.adapters import adapter_for
from hf_detrkd.cli import arguments as distill_arguments
from hf_detrkd.cli import run_setup
from hf_detrkd.data import DetectionSplits, DetectionTransform, load_detection_splits, parse_image_size
from hf_detrkd.distillation.freezing import apply_freezing, freeze_stages
from hf_detrkd.distillation.student import build_student
from tests import ROOT


FOLDER = ROOT / "scripts" / "recipes" / "papers"
CONFIGS = FOLDER / "configs"
RECIPES = sorted(FOLDER.glob("*.yaml"))


HOUSEKEEPING = {
    *("output_dir", "dataset_train_split", "dataset_eval_split", "per_device_eval_batch_size", "report_to"),
    *("dataloader_num_workers", "eval_strategy", "save_strategy", "save_total_limit"),
}
"""Fields that no paper has an opinion on."""

HUB = {"IDEA-Research/dab-detr-resnet-50": "dab_detr_r50", "SenseTime/deformable-detr": "deformable_detr_r50"}
"""Teachers of the Hub and the configs that stand for them where there is no network."""

IMAGES = {"coco": 118_287, "kitti": 7_481 - round(0.2 * 7_481)}
"""Images of COCO's train2017, and of KITTI's labelled ones those that are not the fifth for validation."""

SHRINK = {
    "hidden_size": 8,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 15,
}
"""What both models' sizes are divided by: their relations stay."""

SHRINK_FASTER_RCNN = {"fpn_channels": 8, "representation_size": 32}

BACKBONES = {
    "mobilenetv2_100": "mobilenetv2_035",
    "resnet18": "test_resnet",
    "resnet50": "resnet10t",
    "resnet101": "resnet14t",
}
"""Small ones of timm with the names of the large ones' parts, in the same order of sizes."""

PARTS = {
    "detrdistill": {
        *(f"logits_{part}_positive" for part in ("class", "box", "giou")),
        *(f"logits_{part}_negative" for part in ("box", "giou")),
        *(f"assignment_{part}" for part in ("class", "box", "giou")),
        "feature",
    },
    "kd_detr": {f"{part}_{group}" for part in ("class", "box", "giou") for group in ("general", "specific")},
    "clockdistill": {"foreground", "background", "class", "box", "giou"},
    "task_adaptive": {"features", "class", "box", "class_pass", "box_pass"},
}
"""What each method has to write into the log."""

FASTER_RCNN = {"kd_detr_dino_r50_faster_rcnn_r50_coco", "task_adaptive_faster_rcnn_r101_r50_coco"}

DROPS = {
    "kd_detr_dino_r101_r50_coco": (11, 12),
    "kd_detr_dino_r50_r18_coco": (11, 12),
    "clockdistill_dino_coco": (11, 12),
    "kd_detr_dino_r50_faster_rcnn_r50_coco": (16, 24),
    "task_adaptive_faster_rcnn_r101_r50_coco": (8, 12),
}
"""The epochs after which the rate falls and the run ends, where they are not 40 and 50."""

every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


def commands(recipe: Path) -> list[str]:
    """The commands in a recipe's first comment, each as one line."""
    text = re.sub(r"\\\n#\s+", "", recipe.read_text())
    return re.findall(r"^#   (hf-detrkd distill .*)$", text, flags=re.MULTILINE)


def arguments(command: str) -> list[str]:
    """What a command gives to the script."""
    words = command.removeprefix("hf-detrkd distill ").split()
    return words[2:] if words[0] == "--num_processes" else words


def method_of(recipe: Path) -> str:
    """The method that a recipe's name begins with."""
    (method,) = [name for name in PARTS if recipe.stem.startswith(f"{name}_")]
    return method


def teacher_config(name: str) -> Path:
    """The config of a teacher by its Hub id, or by its folder below outputs/teachers."""
    if name in HUB:
        return CONFIGS / f"{HUB[name]}.json"
    assert re.fullmatch(r"outputs/teachers/(coco|kitti)/\w+", name), f"{name} is neither on the Hub nor to be trained"
    return CONFIGS / f"{Path(name).name}.json"


def shrunk(config_file: Path, folder: Path) -> str:
    """A JSON file of the same model at a small size."""
    config = AutoConfig.from_pretrained(config_file)
    proposals = config.model_type == "faster_rcnn"
    for name, divisor in (SHRINK_FASTER_RCNN if proposals else SHRINK).items():
        assert getattr(config, name) % divisor == 0, name
        setattr(config, name, getattr(config, name) // divisor)
    holder = config if proposals else config.backbone_config
    holder.backbone = BACKBONES[holder.backbone]
    file = folder / config_file.name
    file.write_text(config.to_json_string())
    return str(file)


def on_meta(config_file: Path) -> PreTrainedModel:
    """A model at its full size, without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForObjectDetection.from_config(AutoConfig.from_pretrained(config_file))


@functools.cache
def shapes() -> DetectionSplits:
    return load_detection_splits("shapes", max_train_samples=2, max_eval_samples=2, shapes_size=(64, 64))


def test_there_is_a_recipe_for_every_row_that_the_readme_lists_and_no_config_too_many() -> None:
    text = (FOLDER / "README.md").read_text()
    assert sorted(re.findall(r"`((?:detrdistill|kd_detr|clockdistill|task_adaptive)_\w+)`", text)) == [
        r.stem for r in RECIPES
    ]
    for recipe in RECIPES:
        figures = re.findall(r"(\d\d\.\d) (?:alone|distilled)", recipe.read_text())
        (row,) = [line for line in text.splitlines() if f"`{recipe.stem}`" in line]
        assert [cell.strip() for cell in row.split("|")[4:6]] == (figures or ["not seen", "not seen"])
    used = {Path(name).name for recipe in RECIPES for name in re.findall(r"configs/\w+\.json", recipe.read_text())}
    used |= {f"{name}.json" for name in HUB.values()}
    assert used == {path.name for path in CONFIGS.glob("*.json")}


@every_recipe
def test_the_readme_says_of_each_field_whose_it_is(recipe: Path) -> None:
    text = (FOLDER / "README.md").read_text()
    lines = [line.split("|")[1:-1] for line in text.split("## Whose each field is")[1].splitlines() if "| `" in line]
    table = {name: cells for first, *cells in lines for name in re.findall(r"`(\w+)`", first)}
    column = 3 if recipe.stem in FASTER_RCNN else ("detrdistill", "kd_detr", "clockdistill").index(method_of(recipe))
    fields = yaml.safe_load(recipe.read_text()).keys() - HOUSEKEEPING
    assert [name for name in fields if table[name][column].strip() == "-"] == []


@every_recipe
def test_its_commands_are_understood(recipe: Path) -> None:
    first, *others = commands(recipe)
    given = distill_arguments.parse(arguments(first))
    script, config = given.script, given.config
    assert f"--config papers/{recipe.stem} " in first
    assert config.method == method_of(recipe)
    assert [type(options) for options in given.methods] == [METHODS[config.method].config_class]
    assert (ROOT / script.config_name).is_file()
    assert script.backbone_weights is not None
    assert script.dataset_name == f"path/to/{recipe.stem.split('_')[-1]}"
    assert parse_image_size(script.image_size) == (800, 1333)
    assert script.keep_aspect_ratio
    teacher = config.teacher_model_name_or_path
    assert teacher_config(teacher).is_file()
    assert len(others) == (0 if teacher in HUB else 1)
    for other in others:
        given = distill_arguments.parse(arguments(other))
        assert (given.config.method, given.config.output_dir) == ("none", teacher)
        assert ROOT / given.script.config_name == teacher_config(teacher)


def test_every_row_of_the_ablation_is_other_options() -> None:
    recipe = FOLDER / "kd_detr_dab_r50_r18_coco.yaml"
    rows = re.findall(r"^#   \d\d\.\d [\w, ]+: (--.*)$", recipe.read_text(), flags=re.MULTILINE)
    seen = []
    for row in ("", *rows):
        given = distill_arguments.parse(arguments(commands(recipe)[0]) + row.split())
        points = [(o.general_points, o.specific_points, o.foreground_weight) for o in given.methods]
        seen.append((given.config.method, *points))
    assert seen == [
        ("kd_detr", (300, True, True)),
        ("none",),
        ("kd_detr", (300, False, False)),
        ("kd_detr", (300, False, True)),
        ("kd_detr", (0, True, False)),
        ("kd_detr", (0, True, True)),
    ]


@every_recipe
def test_the_rate_falls_after_its_epochs(recipe: Path) -> None:
    command = commands(recipe)[0]
    config = distill_arguments.parse(arguments(command)).config
    processes = int(re.findall(r"--num_processes (\d+)", command)[0])
    batch = config.per_device_train_batch_size
    large = config.method == "kd_detr" and "dino" not in recipe.stem
    assert processes * batch * config.gradient_accumulation_steps == (64 if large else 16)
    epoch = math.ceil(math.ceil(IMAGES[recipe.stem.split("_")[-1]] / batch) / processes)
    steps = int(config.num_train_epochs * epoch)
    scheduler = get_scheduler(
        config.lr_scheduler_type,
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0),
        config.get_warmup_steps(steps),
        steps,
        config.lr_scheduler_kwargs,
    )
    (factor,) = scheduler.lr_lambdas
    drop, end = DROPS.get(recipe.stem, (40, 50))
    first = 500 if recipe.stem in FASTER_RCNN else 0
    places = (first, drop * epoch - 1, drop * epoch, end * epoch - 1)
    assert [factor(step) for step in places] == [1.0, 1.0, 0.1, 0.1]
    assert steps == end * epoch


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_a_config_is_what_its_name_says_at_full_size(file: Path) -> None:
    model = on_meta(file)
    config = model.config
    family, backbone = file.stem.rsplit("_", 1)
    names = {"r18": "resnet18", "r50": "resnet50", "r101": "resnet101", "mobilenetv2": "mobilenetv2_100"}
    assert config.model_type.replace("-", "_").removesuffix("_detr") == family.removesuffix("_detr")
    if family == "faster_rcnn":
        assert (config.backbone, config.fpn_channels, config.representation_size) == (names[backbone], 256, 1024)
    else:
        assert config.backbone_config.backbone == names[backbone]
        sizes = (config.hidden_size, config.encoder_layers, config.decoder_layers, config.num_queries)
        assert sizes == (256, 6, 6, 900 if family == "dino" else 300)
    prefix = adapter_for(model).backbone_prefix
    body = [module for name, module in model.named_modules() if name.startswith(prefix)]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in body)  # all frozen
    # transformers' own freezing of BatchNorm takes timm's activations away: MobileNetV2 would be linear.
    assert sum(isinstance(module, nn.ReLU | nn.ReLU6) for module in body) > 16


@every_recipe
def test_both_models_at_full_size(recipe: Path) -> None:
    given = distill_arguments.parse(arguments(commands(recipe)[0]))
    files = teacher_config(given.config.teacher_model_name_or_path), ROOT / given.script.config_name
    teacher, student = (on_meta(file) for file in files)
    across = recipe.stem == "kd_detr_dino_r50_faster_rcnn_r50_coco"
    assert (teacher.config.model_type == student.config.model_type) != across
    assert teacher.num_parameters() > student.num_parameters()
    for model in (student, teacher):  # which is trained by the same recipe
        apply_freezing(model, given.config.freeze)
        freeze_stages(model, given.config.freeze_stages)
        for name, weight in adapter_for(model).backbone_parameters():
            part = re.sub(
                r"^(conv_encoder\.)?(model\.)?(_backbone\.)?",
                "",
                name.removeprefix(adapter_for(model).backbone_prefix),
            )
            assert weight.requires_grad != part.startswith(("conv1.", "conv_stem.", "layer1.", "blocks.0.")), name


@every_recipe
def test_one_step_at_a_small_size(recipe: Path, tmp_path: Path) -> None:
    config_name = distill_arguments.parse(["--config", str(recipe)]).script.config_name
    small = {"config_name": shrunk(ROOT / config_name, tmp_path), "output_dir": str(tmp_path), "image_size": 64}
    small |= {"max_steps": 1, "per_device_train_batch_size": 2, "dataloader_num_workers": 0, "logging_steps": 1}
    small |= {"eval_strategy": "no", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    small |= {"warmup_steps": 0}  # the first step of a warm-up moves nothing
    given = [word for key, value in small.items() for word in (f"--{key}", str(value))]
    asked = distill_arguments.parse(["--config", str(recipe), *given, "--short_sides", "64", "72"])
    config = asked.config
    classes = shapes().train.classes
    student, processor = run_setup.make_student(asked.script, classes, config)
    teacher = build_student(shrunk(teacher_config(config.teacher_model_name_or_path), tmp_path), classes)
    assert teacher.num_parameters() > student.num_parameters()
    with torch.no_grad():
        for parameter in teacher.parameters():  # heads that start at zero would answer as the student's
            parameter.add_(0.05 * torch.randn_like(parameter))

    transform = DetectionTransform.for_processor(processor, asked.augmentation)
    trainer = DistillationTrainer(
        model=student,
        args=config,
        teacher_model=teacher,
        method_config=asked.methods,
        train_dataset=shapes().train.with_transform(transform, seed=0),
        processing_class=processor,
    )
    before = {name: weight.detach().clone() for name, weight in trainer.distiller.named_parameters()}
    trainer.train()

    log = trainer.state.log_history[0]
    assert math.isfinite(log["loss"])
    parts = {key.removeprefix(f"{config.method}_"): log[key] for key in log if key.startswith(f"{config.method}_")}
    assert parts.keys() == PARTS[config.method]
    gated = {"box", "box_pass"} if config.method == "task_adaptive" else set()  # a random teacher is seldom better
    assert all(math.isfinite(value) and (value > 0 or name in gated) for name, value in parts.items()), parts
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups}
    dino = {1e-4, 1e-5} if "dino" in recipe.stem else {2e-4, 2e-5}
    assert rates == ({2e-2} if recipe.stem in FASTER_RCNN else dino)
    now = trainer.distiller.named_parameters()
    moved = {name.removeprefix("student.") for name, weight in now if not torch.equal(weight, before[name])}
    trained = {name for name, weight in student.named_parameters() if weight.requires_grad}
    backbone = {name for name, _ in adapter_for(student).backbone_parameters()}
    assert {name for name in moved if not name.startswith("methods.")} <= trained
    assert len(moved & trained) >= 0.8 * len(trained)
    assert moved & backbone
    assert backbone - trained  # stem and first stage


def test_the_teacher_of_the_quickstart_runs_in_a_plain_script() -> None:
    folder = ROOT / "scripts" / "recipes" / "quickstart" / "teacher"
    model, processor = AutoModelForObjectDetection.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    outputs = model(**processor(images=Image.new("RGB", (200, 100)), return_tensors="pt"))
    assert outputs.logits.dtype == torch.float32 and outputs.logits.isfinite().all()
