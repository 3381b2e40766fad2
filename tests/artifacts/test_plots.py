"""Pictures of a run: they hold the run's numbers, and leave out what was not measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from hf_detrkd.artifacts.plots import write_plots
from hf_detrkd.artifacts.plots.curves import draw_curves
from hf_detrkd.artifacts.plots.per_class import draw_per_class
from hf_detrkd.artifacts.plots.precision import draw_precision
from hf_detrkd.artifacts.plots.style import MODEL_COLORS
from hf_detrkd.artifacts.run_folder import Run


ALL = ["curves.png", "per_class.png", "pr_curves.png"]
RECALLS = [i / 100 for i in range(101)]


def history(scale=1.0, evaluations=(100, 200), terms=()):
    """What a `Trainer` logs over 200 steps: one row for each 50, and one for each evaluation."""
    rows = [
        {
            "step": step,
            "loss": 9.0,
            "task_loss": scale * 1000 / step,
            "task_box": 0.1,
            "learning_rate": 1e-4,
            "grad_norm": 3.0,
            **{term: 100 / step / 10**place for place, term in enumerate(terms)},
        }
        for step in (50, 100, 150, 200)
    ]
    rows += [{"step": s, "eval_map": scale * s / 1000, "eval_map_50": scale * s / 500} for s in evaluations]
    rows += [{"step": 200, "train_loss": 5.0}]
    return rows


def make_run(folder=Path(), **changes):
    row = {"map": 0.4, "map_50": 0.6, "map_75": 0.5, "classes": {"cat": 0.5, "dog": 0.3, "owl": None}}
    curves = {"50": {"cat": [1 - r for r in RECALLS], "dog": [1.0 for _ in RECALLS]}, "75": {"cat": [0.5] * 101}}
    terms = ("distillation_loss", "kd_detr_class_specific", "kd_detr_box_general")
    fields = {
        "folder": folder,
        "facts": {"methods": ["kd_detr"]},
        "models": {"teacher": {**row, "map": 0.7}, "control": {**row, "map": 0.2}, "distilled": row},
        "recipe": {},
        "results": {},
        "histories": {"distilled": history(1.0, terms=terms), "control": history(0.5)},
        "precision": {"teacher": curves, "distilled": curves},
    }
    return Run(**fields | changes)


def charts(figure):
    return {ax.get_title(): ax for ax in figure.axes}


def line(ax, label):
    (found,) = [one for one in ax.get_lines() if one.get_label() == label]
    return found


def texts(figure):
    """All words in a figure, class names and legends included."""
    labels = [t.get_text() for ax in figure.axes for t in [*ax.texts, *ax.get_yticklabels(), ax.title]]
    legends = [*figure.legends, *(ax.get_legend() for ax in figure.axes if ax.get_legend())]
    return labels + [t.get_text() for legend in legends for t in [legend.get_title(), *legend.get_texts()]]


def cut_off(figure: Figure) -> list[str]:
    """Words that lie beyond the edge of the picture."""
    figure.draw_without_rendering()
    outside = []
    for ax in figure.axes:
        for text in [*ax.texts, *ax.get_yticklabels(), ax.title, ax.xaxis.label, ax.yaxis.label]:
            box = text.get_window_extent()
            if text.get_text() and not (figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1):
                outside.append(text.get_text())
    return outside


def test_pictures_are_written_and_not_blank(tmp_path):
    files = write_plots(make_run(tmp_path))
    assert [file.name for file in files] == ALL
    for file in files:
        with Image.open(file) as picture:
            assert 800 <= picture.width <= 2500 and 200 <= picture.height <= 2500
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 50


def test_curves_hold_the_history():
    run = make_run()
    found = charts(draw_curves(run))
    for name, scale in (("distilled", 1.0), ("control", 0.5)):
        task = line(found["Task loss"], name)
        assert list(task.get_xdata()) == [50, 100, 150, 200]
        assert list(task.get_ydata()) == pytest.approx([scale * 1000 / step for step in (50, 100, 150, 200)])
        assert list(line(found["mAP"], name).get_xdata()) == [100, 200]
        assert list(line(found["mAP"], name).get_ydata()) == pytest.approx([scale * 10, scale * 20])
        assert list(line(found["mAP50"], name).get_ydata()) == pytest.approx([scale * 20, scale * 40])
    assert list(line(found["mAP"], "teacher").get_ydata()) == pytest.approx([70, 70])
    assert line(found["mAP"], "teacher").get_linestyle() == "--"


def test_every_distillation_term_has_a_chart_and_the_task_s_parts_have_none():
    found = charts(draw_curves(make_run()))
    terms = ["Distillation, all terms", "kd_detr_class_specific", "kd_detr_box_general"]
    assert list(found) == ["Task loss", "mAP", "mAP50", *terms]
    for place, term in enumerate(terms):
        (only,) = found[term].get_lines()
        assert only.get_label() == "distilled"
        assert list(only.get_ydata()) == pytest.approx([100 / step / 10**place for step in (50, 100, 150, 200)])


def test_charts_say_what_their_axes_are():
    for figure in (draw_curves(make_run()), draw_precision(make_run())):
        assert all(ax.get_title() and ax.get_xlabel() and ax.get_ylabel() for ax in figure.axes)
    (bars,) = draw_per_class(make_run()).axes
    assert bars.get_xlabel() == "AP over IoU 0.50 to 0.95, %" and bars.get_ylabel() == "class"


def test_a_model_has_one_colour_in_all_pictures():
    run = make_run()
    seen: dict[str, set[str]] = {}
    for ax in [*draw_curves(run).axes, *draw_precision(run).axes[::2]]:
        for one in ax.get_lines():
            seen.setdefault(one.get_label().split(",")[0], set()).add(to_hex(one.get_color()))
    for bars in draw_per_class(run).axes[0].containers:
        seen.setdefault(bars.get_label(), set()).add(to_hex(bars.patches[0].get_facecolor()))
    assert seen == {name: {MODEL_COLORS[name].lower()} for name in ("teacher", "control", "distilled")}


def test_a_single_evaluation_is_a_visible_point():
    run = make_run(histories={"distilled": history(evaluations=(200,))})
    only = line(charts(draw_curves(run))["mAP"], "distilled")
    assert list(only.get_xdata()) == [200] and only.get_marker() == "o" and only.get_markersize() >= 5


def test_without_evaluations_between_the_last_figure_stands_at_the_last_step():
    found = charts(draw_curves(make_run(histories={"distilled": history(evaluations=())})))
    only = line(found["mAP"], "distilled")
    assert (list(only.get_xdata()), list(only.get_ydata())) == ([200], pytest.approx([40]))


def test_the_best_checkpoint_s_figure_does_not_replace_the_last_step_s():
    again = [*history(), {"step": 200, "eval_map": 0.9, "eval_map_50": 0.9}]
    found = charts(draw_curves(make_run(histories={"distilled": again})))
    assert list(line(found["mAP"], "distilled").get_ydata()) == pytest.approx([10, 20])


def test_a_term_of_many_magnitudes_gets_a_logarithmic_axis():
    rows = [{"step": step, "loss": 1.0, "kd_detr_x": 10.0**-step, "kd_detr_y": 1.0} for step in range(1, 5)]
    found = charts(draw_curves(make_run(histories={"distilled": rows})))
    assert found["kd_detr_x"].get_yscale() == "log" and found["kd_detr_y"].get_yscale() == "linear"


def test_percentages_stay_on_a_linear_axis():
    rows = [{"step": step, "eval_map": value, "eval_map_50": value} for step, value in ((1, 0.001), (2, 0.4))]
    found = charts(draw_curves(make_run(histories={"distilled": rows})))
    assert found["mAP"].get_yscale() == "linear" and found["mAP"].get_ylim()[0] == 0


def test_bars_are_the_classes_precision_with_the_student_s_best_first():
    (ax,) = draw_per_class(make_run()).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["cat", "dog", "owl"]
    widths = [(bars.get_label(), bars.patches[0].get_width()) for bars in ax.containers]
    names = ("teacher", "control", "distilled")
    assert widths == [(n, pytest.approx(50)) for n in names] + [(n, pytest.approx(30)) for n in names]
    assert [text.get_text() for text in ax.texts][-1] == " no objects in the evaluation set"


def test_zero_is_told_from_not_measured():
    models = {"teacher": {"classes": {"cat": 0.0}}, "distilled": {"classes": {"cat": 0.2, "dog": 0.1}}}
    words = [text.get_text() for text in draw_per_class(make_run(models=models)).axes[0].texts]
    assert words == [" 0.0", " 20.0", " not measured", " 10.0"]


def many(count, known=None):
    known = count if known is None else known
    return {f"class {i}": i / count if i < known else None for i in range(count)}


def test_of_a_hundred_classes_the_best_and_the_worst_are_drawn():
    figure = draw_per_class(make_run(models={"distilled": {"classes": many(100)}}))
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert shown == [f"class {i}" for i in [*range(99, 79, -1), *range(19, -1, -1)]]
    assert "AP by class: the 20 best and 20 worst of 100, by the AP of distilled" in texts(figure)
    assert not cut_off(figure)


def test_of_many_classes_those_without_objects_are_left_out():
    figure = draw_per_class(make_run(models={"distilled": {"classes": many(100, known=30)}}))
    assert len(figure.axes[0].get_yticklabels()) == 30 and not figure.axes[0].get_lines()
    assert "AP by class: 30 of 100 classes, those with objects" in texts(figure)


def test_height_grows_with_the_classes():
    few, more = (draw_per_class(make_run(models={"distilled": {"classes": many(n)}})) for n in (1, 40))
    assert few.get_figheight() < 3 < 10 < more.get_figheight()


def test_precision_curves_are_means_over_classes_and_the_student_s_classes():
    found = charts(draw_precision(make_run()))
    mean = line(found["IoU 0.50: mean over the classes"], "distilled, 75.0")
    assert list(mean.get_xdata()) == pytest.approx([100 * r for r in RECALLS])
    assert list(mean.get_ydata()) == pytest.approx([100 - 50 * r for r in RECALLS])
    cat = line(found["IoU 0.50: distilled, by class"], "cat, 50.0")
    assert list(cat.get_ydata()) == pytest.approx([100 - 100 * r for r in RECALLS])
    assert [one.get_label() for one in found["IoU 0.75: distilled, by class"].get_lines()] == ["cat, 50.0"]


def test_a_class_has_one_colour_at_both_overlaps():
    high, low = [0.9] * 101, [0.2] * 101
    curves = {"50": {"cat": high, "dog": low}, "75": {"cat": low, "dog": high}}
    found = draw_precision(make_run(precision={"distilled": curves})).axes[1::2]
    colors = [{one.get_label().split(",")[0]: one.get_color() for one in ax.get_lines()} for ax in found]
    assert colors[0] == colors[1] and len(set(colors[0].values())) == 2


def test_of_a_hundred_curves_seven_are_named():
    curves = {"50": {f"class {i}": [i / 100] * 101 for i in range(100)}}
    ax = draw_precision(make_run(precision={"distilled": curves})).axes[1]
    names = [text.get_text().split(",")[0] for text in ax.get_legend().get_texts()]
    assert names == [f"class {i}" for i in (99, 98, 97, 96, 2, 1, 0)] + ["93 other classes"]
    assert len(ax.get_lines()) == 101


@pytest.mark.parametrize(
    "missing, left",
    [
        ({"precision": {}}, ["curves.png", "per_class.png"]),
        ({"histories": {"distilled": []}}, ["per_class.png", "pr_curves.png"]),
        ({"models": {"distilled": {"map": None}}}, ["curves.png", "pr_curves.png"]),
        ({"models": {}, "histories": {"student": []}, "precision": {}}, []),
        (
            {"precision": {"teacher": {"50": {"cat": [0.5] * 101}, "75": {}}}},
            ["curves.png", "per_class.png", "pr_curves.png"],
        ),
    ],
)
def test_what_was_not_measured_is_left_out(tmp_path, missing, left):
    files = write_plots(make_run(tmp_path, **missing))
    assert [file.name for file in files] == left == sorted(file.name for file in tmp_path.iterdir())


@pytest.mark.parametrize("name", ["$x$", "_under", "a" * 200, "two\nlines", r"\frac{", "<b>&"])
def test_any_class_name_can_be_drawn(tmp_path, name):
    curves = {"50": {name: [0.5] * 101}}
    run = make_run(tmp_path, models={"distilled": {"classes": {name: 0.5}}}, precision={"distilled": curves})
    assert len(write_plots(run)) == 3
    start = name.split()[0][:20].replace("$", r"\$")
    for figure in (draw_per_class(run), draw_precision(run)):
        assert any(text.startswith(start) for text in texts(figure)) and not cut_off(figure)
