"""Students that start from their teacher, and backbones whose first stages stay as they are."""

from __future__ import annotations

import pytest
import torch
import transformers

from hf_detrkd.distillation.freezing import freeze_stages, usual_stages
from hf_detrkd.distillation.initialization import init_from_teacher
from tests import tiny


def test_a_student_of_its_teacher_s_size_becomes_the_teacher(family: str) -> None:
    student, teacher = tiny.build(family, seed=1), tiny.build(family, seed=2)
    inherited = init_from_teacher(student, teacher)
    constants = {name for name in student.state_dict() if name.endswith(("decoder.up", "decoder.reg_scale"))}
    assert inherited.left.keys() == constants and inherited.copied.keys() | constants == student.state_dict().keys()
    taught = teacher.state_dict()
    assert all(torch.equal(value, taught[name]) for name, value in student.state_dict().items())
    count = len(inherited.copied)
    assert inherited.summary().startswith(f"{count} of {count + len(constants)} tensors were copied from the teacher.")


@pytest.mark.parametrize(
    ("own", "theirs", "taken"), [(1, 3, [2]), (2, 3, [1, 2]), (3, 6, [1, 3, 5]), (3, 2, [0, 1, 1])]
)
def test_fewer_layers_are_evenly_spaced_ones_and_the_last_is_the_last(own: int, theirs: int, taken: list[int]) -> None:
    student = tiny.build("detr", seed=1, decoder_layers=own, encoder_layers=own)
    teacher = tiny.build("detr", seed=2, decoder_layers=theirs, encoder_layers=theirs)
    inherited = init_from_teacher(student, teacher)
    assert not inherited.left
    for half in ("encoder", "decoder"):
        for layer, source in enumerate(taken):
            pair = [getattr(m.model, half).layers[i].state_dict() for m, i in ((student, layer), (teacher, source))]
            assert all(torch.equal(value, pair[1][name]) for name, value in pair[0].items())


def test_layers_of_a_yolos_are_evenly_spaced_too() -> None:
    student, teacher = (tiny.build("yolos", seed=n, num_hidden_layers=n) for n in (2, 4))
    init_from_teacher(student, teacher)
    for layer, source in enumerate((1, 3)):
        pair = [m.vit.encoder.layer[i].state_dict() for m, i in ((student, layer), (teacher, source))]
        assert all(torch.equal(value, pair[1][name]) for name, value in pair[0].items())


def test_heads_per_layer_follow_their_layers_and_the_encoder_s_head_stays_last() -> None:
    student, teacher = (tiny.build("deformable_detr/two_stage", seed=n, decoder_layers=n) for n in (2, 4))
    init_from_teacher(student, teacher)
    for own, source in ((0, 1), (1, 3), (2, 4)):
        pair = [m.bbox_embed[i].layers[0].weight for m, i in ((student, own), (teacher, source))]
        assert torch.equal(*pair), own


def test_another_width_leaves_what_does_not_fit_and_says_so() -> None:
    student, teacher = tiny.build("rt_detr", 32, seed=1), tiny.build("rt_detr", 64, seed=2)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    inherited = init_from_teacher(student, teacher)
    after = student.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in inherited.left)
    assert all(name.startswith("model.backbone") for name in inherited.copied if after[name].ndim == 4)
    assert "the shape differs: " in inherited.summary() and "model.decoder.layers" in inherited.summary()


def test_a_backbone_is_copied_whole_or_not_at_all() -> None:
    deeper = tiny.config("rt_detr").backbone_config.to_dict() | {"depths": [1, 2, 1, 1]}
    teacher = tiny.build("rt_detr", seed=2, backbone_config=transformers.RTDetrResNetConfig(**deeper))
    student = tiny.build("rt_detr", seed=1)
    inherited = init_from_teacher(student, teacher)
    assert not any("backbone" in name for name in inherited.copied)
    assert "the backbone differs: model.backbone" in inherited.summary()
    assert any(name.startswith("model.decoder.layers") for name in inherited.copied)


def test_bins_of_d_fine_stay_those_of_the_student_s_config() -> None:
    student, teacher = tiny.build("d_fine", seed=1), tiny.build("d_fine", seed=2, reg_scale=8.0, up=1.0)
    inherited = init_from_teacher(student, teacher)
    assert student.model.decoder.reg_scale.item() == student.config.reg_scale == 4.0
    assert set(inherited.left) == {"model.decoder.reg_scale", "model.decoder.up"}


@pytest.mark.parametrize("layers", [2, 4])
def test_rows_of_heads_follow_the_names_of_the_classes(layers: int) -> None:
    names = ["star", "moon", "square", "triangle", "cross"]  # in another order, and one that the teacher lacks
    student = tiny.build("rt_detr", seed=1, id2label=dict(enumerate(names)), decoder_layers=layers)
    teacher = tiny.build("rt_detr", seed=2)
    init_from_teacher(student, teacher)
    own, theirs = (m.model.decoder.class_embed[-1].weight for m in (student, teacher))
    for row, name in enumerate(names):
        if name in tiny.LABELS:
            assert torch.equal(own[row], theirs[tiny.LABELS.index(name)]), name


def test_a_teacher_of_which_nothing_fits_is_refused() -> None:
    with pytest.raises(
        ValueError, match="No tensor of the yolos teacher fits the detr student: disable init_from_teacher"
    ):
        init_from_teacher(tiny.build("detr"), tiny.build("yolos", 64))


# --- frozen stages ---------------------------------------------------------------------------------------------------


def timm_detr() -> transformers.PreTrainedModel:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "num_queries": 3}
    config = transformers.DetrConfig(
        use_timm_backbone=True,
        backbone="resnet18",
        use_pretrained_backbone=False,
        backbone_config=None,
        d_model=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        **sizes,
    )
    return transformers.DetrForObjectDetection(config).requires_grad_(True)


STAGES = ("embedder.", "encoder.stages.0.")
PARTS = {
    "detr": ("model.backbone.model.", STAGES),
    "dab-detr": ("model.backbone.conv_encoder.model.", STAGES),
    "rt_detr": ("model.backbone.model.", STAGES),
    "d_fine": ("model.backbone.model.", STAGES),
    "deimv2": ("model.conv_encoder.model.", STAGES),
    "timm": ("model.backbone.model.", ("conv1.", "layer1.")),
}
"""Where a backbone's names begin, and those of its stem and first stage."""


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_first_parts_of_a_backbone_are_frozen_and_nothing_else(name: str, number: int) -> None:
    model = timm_detr() if name == "timm" else tiny.build(name).requires_grad_(True)
    frozen = freeze_stages(model, number)
    root, parts = PARTS[name]
    chosen = [[n for n, _ in model.named_parameters() if n.startswith(root + part)] for part in parts]
    assert all(chosen)
    assert sorted(frozen) == sorted(n for names in chosen[:number] for n in names)
    assert sorted(frozen) == sorted(n for n, p in model.named_parameters() if not p.requires_grad)


FROZEN = (
    "detr",
    "table-transformer",
    "conditional_detr",
    "deformable_detr/two_stage",
    "dab-detr",
    "dino_detr",
    "faster_rcnn",
)


@pytest.mark.parametrize("name", [*FROZEN, "rt_detr", "d_fine", "lw_detr", "yolos"])
def test_a_trained_backbone_is_frozen_as_in_the_code_of_the_family_s_authors(name: str) -> None:
    assert usual_stages(tiny.build(name)) == (2 if name in FROZEN else 0)


def test_a_backbone_without_stages_is_refused_with_its_names() -> None:
    with pytest.raises(ValueError, match="freeze_stages is 2, but the backbone of this yolos has no part 0"):
        freeze_stages(tiny.build("yolos"), 2)
