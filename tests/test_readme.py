"""Claims of the README, the documentation and PAPERS.md."""

from __future__ import annotations

import ast
import importlib
import os
import re
from pathlib import Path

import pytest
from transformers import AutoModelForObjectDetection

from hf_detrkd.cli import arguments as distill_arguments
from hf_detrkd.cli.main import COMMANDS, split_arguments
from hf_detrkd.data.shapes import SHAPE_CLASSES
from hf_detrkd.distillation.student import load_image_processor
from hf_detrkd.export.parity import FLOAT32
from hf_detrkd.models.compat import FAMILY_SINCE, is_missing
from tests import ROOT, script, tiny
from tests.cli.doctor.runs import write_shapes


export_table, support_table = script("export_table"), script("support_table")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
HOME = "https://github.com/hf-detrkd/hf_detrkd/blob/main/"  # absolute, so that PyPI shows them
RAW = "https://raw.githubusercontent.com/hf-detrkd/hf_detrkd/main/"


def text_of(page: Path) -> str:
    """A page whose links to this repository are relative."""
    return page.read_text().replace(HOME, os.path.relpath(ROOT, page.parent) + "/")


@pytest.mark.skipif(any(map(is_missing, FAMILY_SINCE)), reason="this transformers lacks some of its families")
def test_the_table_of_pairs_is_what_the_code_does() -> None:
    page = (ROOT / "docs" / "models.md").read_text()
    assert support_table.with_table(page) == page
    table = page.split(support_table.START)[1].split(support_table.END)[0]
    assert all(table.count(family) == 2 for family in ("table-transformer", "conditional_detr", "rf_detr", "yolos"))


@pytest.mark.skipif(any(map(is_missing, FAMILY_SINCE)), reason="this transformers lacks some of its families")
def test_the_table_of_exports_has_a_row_of_every_family_as_its_script_writes_it() -> None:
    text = (ROOT / "docs" / "sharing.md").read_text()
    rows = export_table.rows_in(text)
    assert list(rows) == list(export_table.tiny.DETECTORS) and export_table.with_rows(text, rows) == text
    for row in rows.values():
        opset, dynamic, _, _, scores, boxes = (cell.strip() for cell in row.split("|")[2:8])
        assert int(opset) >= 18 and dynamic == "yes"
        assert float(scores) <= FLOAT32.scores and float(boxes) <= FLOAT32.boxes


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_parses_and_every_file_exists(page: Path, tmp_path: Path) -> None:
    text = text_of(page).replace("\\\n", " ")
    (tmp_path / "recipe.yaml").write_text("config_name: x\noutput_dir: y\n")
    for line in re.findall(r"^ {4}((?:accelerate launch|python|hf-detrkd) .*)$", text, flags=re.MULTILINE):
        words = [
            word.replace("recipe.yaml", str(tmp_path / "recipe.yaml")) for word in line.partition("  #")[0].split()
        ]
        scripts = [word for word in words if word.startswith("scripts/")]
        assert all((ROOT / word).exists() for word in scripts), line
        if words[0] == "hf-detrkd":
            assert words[1] in COMMANDS, line
        if words[:2] in (["hf-detrkd", "distill"], ["hf-detrkd", "doctor"], ["hf-detrkd", "answer"]):
            parse(split_arguments(words[2:])[1])
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link


def parse(words: list[str]) -> None:
    """As the script does, where there may be no hardware for it."""
    distill_arguments.parse([word for word in words if word != "--bf16"])


def test_every_function_and_file_that_papers_names_exists() -> None:
    text = (ROOT / "PAPERS.md").read_text()
    files = list((ROOT / "hf_detrkd").rglob("*.py"))
    texts = {path.stem: "\n".join(one.read_text() for one in files if one.stem == path.stem) for path in files}
    classes = {
        node.name: [ast.unparse(member) for member in node.body]
        for text_of_file in map(Path.read_text, files)
        for node in ast.parse(text_of_file).body
        if isinstance(node, ast.ClassDef)
    }
    made = {n: c for one in texts.values() for n, c in re.findall(r"^(\w+) = (\w+)\(", one, re.M)}
    named = [(made.get(owner, owner), name) for owner, name in re.findall(r"`(\w+)\.(\w+)`", text)]
    assert len(named) > 40
    for owner, name in named:
        if name in ("py", "yaml"):
            assert owner in texts or any(ROOT.rglob(f"{owner}.{name}")), owner
        elif owner in classes:
            assert any(re.search(rf"\b{name}\b", member) for member in classes[owner]), f"{owner}.{name}"
        else:
            assert re.search(rf"^(def|class) {name}\b|^{name} = ", texts[owner], re.M), f"{owner}.{name}"
    for path in re.findall(r"`((?:hf_detrkd|tests|scripts)/[\w/]+\.\w+)`", text):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_python_example_compiles_and_imports_what_there_is(page: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("hf_detrkd"):
                module = importlib.import_module(str(node.module))
                assert all(name.name in dir(module) for name in node.names), ast.unparse(node)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_headings_that_links_point_to_exist(page: Path) -> None:
    for link in re.findall(r"\]\(([^):]*\.md)?#([^)]+)\)", text_of(page)):
        other = (page.parent / link[0] if link[0] else page).read_text()
        headings = re.findall(r"^#+ (.+)$", other, flags=re.MULTILINE)
        assert link[1] in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, link


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert all(f"]({page.name})" in index for page in PAGES[1:] if page.name != "README.md")


@pytest.mark.skipif(any(map(is_missing, FAMILY_SINCE)), reason="this transformers lacks some of its families")
def test_the_families_whose_attention_the_hub_has_a_kernel_for_are_those_that_the_page_names() -> None:
    def layers(name: str) -> set[str]:
        return {type(module).__name__ for module in tiny.build(name).modules()}

    found = {name.split("/")[0] for name in tiny.DETECTORS if "MultiScaleDeformableAttention" in layers(name)}
    (sentence,) = re.findall(r"deformable attention of (.*?) by a CUDA", (ROOT / "docs" / "fast_steps.md").read_text())
    assert set(re.findall(r"`(\w+)`", sentence)) == found


def test_make_knows_the_commands_that_the_readme_names() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:`|^ {4})make ([a-z]+)", README, flags=re.MULTILINE))
    assert {"demo", "test", "help"} <= named <= targets


def test_the_readme_is_short_and_shows_the_same_everywhere() -> None:
    assert len(README.split()) <= 900
    assert not [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("https://")]
    pictures = re.findall(rf"{re.escape(RAW)}([^)]+)", README)
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)


def test_the_readme_s_example_trains_a_student_that_loads_without_this_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shapes_teacher: str
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.build("rt_detr").save_pretrained("small")
    load_image_processor(tiny.build("rt_detr"), image_size=(64, 64)).save_pretrained("small")
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    changes = {
        "path/to/folder": write_shapes(tmp_path / "data"),
        "PekingU/rtdetr_r18vd": "small",
        "outputs/teacher": shapes_teacher,
        "(640, 640)": "(64, 64)",
        "num_train_epochs=50": "max_steps=1, min_teacher_map=0.0, report_to='none'",
    }
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    exec(compile(code, "README.md", "exec"), {})
    student = AutoModelForObjectDetection.from_pretrained("outputs/student")
    assert list(student.config.id2label.values()) == list(SHAPE_CLASSES)
