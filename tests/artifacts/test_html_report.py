"""The page on a run: it holds the run's numbers, loads nothing, and tells nothing of the machine it was made on."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from hf_detrkd.artifacts.html_report import ALTERNATIVES, gain_of, shown, title_of, write_report
from hf_detrkd.artifacts.run_folder import Run


LATENCY = {"1": {"median_ms": 21.25, "low_ms": 20.0, "high_ms": 22.9, "images_per_second": 47.0}}
TEACHER = {"map": 0.735, "map_50": 0.878, "map_75": 0.8, "parameters": 4070856, "classes": {"cat": 0.7, "owl": None}}
CONTROL = {"map": 0.323, "map_50": 0.559, "map_75": 0.331, "parameters": 2315550, "classes": {"cat": 0.3}}
DISTILLED = {
    "map": 0.426,
    "map_50": 0.67,
    "map_75": 0.483,
    "parameters": 2315550,
    "seconds_per_step": 1.6599,
    "gflops": 1.14,
    "latency": LATENCY,
    "classes": {"cat": 0.0, "owl": None},
}
FACTS = {
    "dataset_name": "somebody/pets",
    "train_split": "train",
    "eval_split": "val",
    "train_images": 2960,
    "eval_images": 67,
    "classes": ["cat", "owl"],
    "image_size": [256, 320],
    "method": "kd_detr",
    "teacher": {"name": "PekingU/rtdetr_r50vd", "revision": "main"},
    "base_model": "PekingU/rtdetr_r18vd",
    "command": "accelerate launch scripts/distill.py --method kd_detr",
    "device": "AMD EPYC, 1 core",
    "processes": 2,
    "versions": {"python": "3.11.2", "torch": "2.15.0"},
    "seed": 7,
}


def make_run(folder=Path("student"), **changes):
    fields = {
        "folder": folder,
        "facts": FACTS,
        "models": {"teacher": TEACHER, "control": CONTROL, "distilled": DISTILLED},
        "recipe": {"learning_rate": 0.0001, "bf16": True, "loss_weights": {"kd_detr_class": 2.5}},
        "results": {},
        "histories": {},
        "precision": {},
    }
    return Run(**fields | changes)


class Page(HTMLParser):
    """What a browser would make of a page: elements with their attributes, table rows, and words."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.rows, self.words, self.in_cell = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.words.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(folder, **changes):
    return Page(write_report(make_run(folder, **changes)).read_text(encoding="utf-8"))


def test_the_main_table_holds_every_figure(tmp_path):
    rows = page_of(tmp_path).rows
    missing = "not measured"
    for row in (
        ["", "teacher", "control", "distilled"],
        ["mAP, %", "73.5", "32.3", "42.6"],
        ["mAP50, %", "87.8", "55.9", "67.0"],
        ["mAP75, %", "80.0", "33.1", "48.3"],
        ["Parameters", "4,070,856", "2,315,550", "2,315,550"],
        ["GFLOPs / image", missing, missing, "1.14"],
        ["Latency at batch 1, ms", missing, missing, "21.2 (20.0 to 22.9)"],
        ["Training, s / step", missing, missing, "1.660"],
    ):
        assert row in rows


def test_other_batches_have_rows_of_their_own(tmp_path):
    latency = {"16": {**LATENCY["1"], "median_ms": 99.0}, "2": LATENCY["1"]}
    rows = page_of(tmp_path, models={"distilled": {**DISTILLED, "latency": latency}}).rows
    assert [row for row in rows if row[0].startswith("Latency")] == [
        ["Latency at batch 1, ms", "not measured"],
        ["Latency at batch 2, ms", "21.2 (20.0 to 22.9)"],
        ["Latency at batch 16, ms", "99.0 (20.0 to 22.9)"],
    ]


def test_by_class_no_objects_not_measured_and_zero_are_told_apart(tmp_path):
    rows = page_of(tmp_path).rows
    assert ["cat", "70.0", "30.0", "0.0"] in rows
    assert ["owl", "no objects", "not measured", "no objects"] in rows


def test_data_recipe_and_machine_are_told(tmp_path):
    page = page_of(tmp_path)
    for row in (
        ["Data set", "somebody/pets"],
        ["Training", "train, 2,960 images"],
        ["Evaluation", "val, 67 images"],
        ["Image size", "256 x 320 pixels"],
        ["Classes", "2: cat, owl"],
        ["learning_rate", "0.0001"],
        ["bf16", "true"],
        ["loss_weights", '{"kd_detr_class": 2.5}'],
        ["Teacher", "PekingU/rtdetr_r50vd (revision main)"],
        ["Seed", "7"],
        ["Device", "AMD EPYC, 1 core"],
        ["Processes", "2"],
        ["torch", "2.15.0"],
    ):
        assert row in page.rows
    assert FACTS["command"] in page.words


def test_title_and_gain_say_what_the_run_was_for():
    run = make_run()
    assert title_of(run) == "kd_detr: PekingU/rtdetr_r50vd → PekingU/rtdetr_r18vd"
    assert gain_of(run) == (
        "The student reaches 42.6 mAP: 10.3 points more than the control and 30.9 points less than the teacher."
    )
    alone = make_run(facts={"method": "none"}, models={"student": {"map": 0.5}})
    assert title_of(alone) == "student, trained without a teacher"
    assert gain_of(alone) == "The student reaches 50.0 mAP."
    queries = make_run(facts={"method": "extra_queries"})
    assert title_of(queries) == "student, trained without a teacher (extra_queries)"
    assert gain_of(make_run(models={"distilled": {"map": -1.0}})) == ""


def test_pictures_are_inside_the_page_with_words_for_who_cannot_see_them(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "curves.png")
    Image.new("RGB", (50, 20), "blue").save(tmp_path / "predictions.png")
    first, second = page_of(tmp_path).named("img")
    for image, name, size in ((first, "predictions.png", (50, 20)), (second, "curves.png", (40, 30))):
        kind, data = image["src"].split(",")
        assert kind == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == size
        assert image["alt"] == ALTERNATIVES[name] and len(image["alt"]) > 40


def test_nothing_is_loaded_and_nothing_runs(tmp_path):
    for name in ALTERNATIVES:
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    page = page_of(tmp_path)
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "a"})
    sources = [a[key] for _, a in page.elements for key in ("src", "href", "srcset", "action") if key in a]
    assert len(sources) == 4 and all(source.startswith("data:") for source in sources)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import| on\w+=", re.sub(r"base64,[^\"]+", "", text))


HOSTILE = "<script>alert('x')</script>"


def test_hostile_values_are_text(tmp_path):
    models = {"distilled": {"map": 0.5, "classes": {HOSTILE: 0.5, '"><img src=x onerror=y>': None}}}
    facts = {**FACTS, "dataset_name": HOSTILE, "classes": [HOSTILE], "command": HOSTILE, "device": HOSTILE}
    page = page_of(tmp_path, models=models, facts=facts, recipe={HOSTILE: HOSTILE}, precision={})
    assert not page.named("script") and not page.named("img")
    assert [HOSTILE, "50.0"] in page.rows and ['"><img src=x onerror=y>', "no objects"] in page.rows
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;" in text and "<script" not in text


@pytest.mark.parametrize(
    "value, text",
    [
        ("/home/somebody/data/cards", "cards"),
        ("/home/somebody/my data/cards/", "cards"),
        ("~/data/cards", "cards"),
        ("C:\\Users\\somebody\\cards", "cards"),
        ("file:///home/somebody/cards", "cards"),
        ("cuda of /home/somebody/x, host:/home/somebody/y", "cuda of x, host:y"),
        ('run --a=/root/b/c.yaml --d \'{"e": "/mnt/f/g.pt"}\'', 'run --a=c.yaml --d \'{"e": "g.pt"}\''),
        (["/srv/a/b", {"c": "/srv/d"}], '["b", {"c": "d"}]'),
        ("scripts/recipes/quickstart.yaml", "scripts/recipes/quickstart.yaml"),
        ("--a ../x --b ./y --c PekingU/rtdetr_r18vd", "--a ../x --b ./y --c PekingU/rtdetr_r18vd"),
        ({"a": "C:\\Users\\somebody\\x"}, '{"a": "x"}'),
        ("https://huggingface.co/datasets/x", "https://huggingface.co/datasets/x"),
        ("1 / 2 and n/a", "1 / 2 and n/a"),
        (True, "true"),
        (1e-05, "1e-05"),
    ],
)
def test_of_absolute_paths_the_last_part_is_shown(value, text):
    assert shown(value) == text


@pytest.mark.parametrize(
    "value, text",
    [
        ("hf_" + "a1B2" * 8, "(hidden)"),
        ("--x ghp_" + "a1B2" * 9, "--x (hidden)"),
        ("HF_TOKEN=abc accelerate launch", "HF_TOKEN=(hidden) accelerate launch"),
        ("x --hub_token abc --seed 1", "x --hub_token (hidden) --seed 1"),
        ({"api_key": "abc", "seed": 1}, '{"seed": 1}'),
        ("https://me:secret@host/x", "https://host/x"),
        ("--include_num_input_tokens_seen false", "--include_num_input_tokens_seen false"),
    ],
)
def test_secrets_are_hidden(value, text):
    assert shown(value) == text


def test_the_page_tells_no_path_of_the_machine_and_no_token(tmp_path):
    home = "/home/somebody"
    facts = {
        **FACTS,
        "dataset_name": f"{home}/data/cards",
        "base_model": f"{home}/models/r18",
        "teacher": {"name": f"{home}/outputs/teacher", "revision": "main"},
        "command": f"HF_TOKEN=hf_{'x1' * 16} distill.py --output_dir {home}/outputs/run",
    }
    recipe = {"output_dir": f"{home}/outputs/run", "hub_token": "verysecret", "wandb_api_key": "verysecret"}
    write_report(make_run(tmp_path, facts=facts, recipe=recipe))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for leak in ("somebody", "/home", "verysecret", "x1x1", str(tmp_path.parent)):
        assert leak not in text
    for kept in ("cards", "r18", "teacher", "run"):
        assert kept in text


def test_a_bare_folder_gives_a_page(tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    page = Page(write_report(Run.read(tmp_path)).read_text(encoding="utf-8"))
    assert "Nothing was measured." in page.words and not page.named("img")
    assert ["Data set", "not measured"] in page.rows


def test_the_page_fits_a_phone_and_both_colour_schemes(tmp_path):
    page = page_of(tmp_path)
    metas = {meta.get("name"): meta.get("content") for meta in page.named("meta")}
    assert metas["viewport"] == "width=device-width, initial-scale=1" and metas["color-scheme"] == "light dark"
    boxes = [place for place, (_, a) in enumerate(page.elements) if a.get("class") == "wide"]
    wide = [place for place, (tag, _) in enumerate(page.elements) if tag in ("table", "img")]
    assert [place - 1 for place in wide] == boxes  # each scrolls inside its own box
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ".wide { overflow-x: auto;" in text and "prefers-color-scheme: dark" in text
