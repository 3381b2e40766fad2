"""Pictures: boxes where they belong, in the right colours, with names that can be read."""

from __future__ import annotations

import pytest
import torch
from PIL import Image, ImageChops

from hf_detrkd.artifacts.draw_boxes import class_colors, comparison_grid, draw_detections


RED, GREEN = (255, 0, 0), (0, 255, 0)


def blank(width=400, height=400, color="white"):
    return Image.new("RGB", (width, height), color)


def extent(picture, color):
    """The smallest frame around all pixels of a colour."""
    different = ImageChops.difference(picture, Image.new("RGB", picture.size, color)).convert("L")
    return different.point(lambda value: 255 * (value == 0)).getbbox()


def test_a_box_is_drawn_around_its_pixels():
    picture = draw_detections(blank(), torch.tensor([[100.0, 150.0, 300.0, 350.0]]), [""], color=RED)
    left, top, right, bottom = extent(picture, RED)
    assert (left, right, bottom) == (100, 301, 351)
    assert top < 150  # the name's background stands on the box
    assert picture.getpixel((100, 250)) == RED and picture.getpixel((200, 250)) == (255, 255, 255)


def test_the_given_image_stays_as_it_is():
    image = blank()
    draw_detections(image, [[10, 10, 50, 50]], ["cat"])
    assert image.getcolors() == [(400 * 400, (255, 255, 255))]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_any_mode_becomes_rgb(mode):
    assert draw_detections(Image.new(mode, (400, 300)), [], []).mode == "RGB"


def test_thumbnails_are_enlarged_with_their_boxes():
    picture = draw_detections(blank(128, 64), [[32, 16, 96, 48]], [""], color=RED)
    assert picture.size == (320, 160)
    left, _, right, bottom = extent(picture, RED)
    assert (left, right, bottom) == (80, 241, 121)
    assert draw_detections(blank(128, 64), [], [], min_side=1).size == (128, 64)


def test_colours_are_by_class():
    colors = {"cat": RED, "dog": GREEN}
    boxes = [[20, 100, 120, 200], [220, 100, 320, 200]]
    picture = draw_detections(blank(), boxes, ["cat", "dog"], color=colors)
    assert extent(picture, RED)[2] <= 200 and extent(picture, GREEN)[0] >= 200
    alike = [draw_detections(blank(), boxes[:1], [name]) for name in ("cat", "cat", "dog")]
    assert alike[0].tobytes() == alike[1].tobytes() != alike[2].tobytes()


def test_every_class_gets_a_colour_of_its_own():
    colors = class_colors(f"class {i}" for i in range(40))
    assert len(colors) == len(set(colors.values())) == 40
    assert class_colors(["a", "b"]) == {name: class_colors(["a", "b", "c"])[name] for name in "ab"}


def test_scores_are_printed():
    boxes = [[100, 100, 300, 300]]
    without = draw_detections(blank(), boxes, ["cat"], color=RED)
    pictures = [
        draw_detections(blank(), boxes, ["cat"], scores, RED) for scores in ([0.51], [0.52], torch.tensor([0.52]))
    ]
    assert without.tobytes() != pictures[0].tobytes() != pictures[1].tobytes() == pictures[2].tobytes()


def test_the_best_detection_lies_on_top():
    colors, boxes = {"cat": RED, "dog": GREEN}, [[100, 100, 300, 300]] * 2
    for scores, best in (([0.9, 0.1], RED), ([0.1, 0.9], GREEN)):
        assert draw_detections(blank(), boxes, ["cat", "dog"], scores, colors).getpixel((100, 200)) == best


def test_names_of_the_same_place_do_not_hide_each_other():
    colors, box = {"dog": RED, "cat": GREEN, "": GREEN}, [100, 100, 300, 300]

    def green(names, scores):
        picture = draw_detections(blank(), [box] * len(names), names, scores, colors)
        return sum(count for count, color in picture.getcolors(maxcolors=10000) if color == GREEN)

    name = green(["cat"], None) - green([""], None)  # pixels of the background of three letters
    assert name > 100
    assert green(["dog", "cat"], None) > name  # the frame lies under the other one, the name does not


@pytest.mark.parametrize("box", [[-50, -50, 500, 500], [390, 390, 399, 399], [0, 0, 3, 3], [350, 20, 340, 10]])
def test_boxes_at_and_beyond_the_edge_keep_their_names(box):
    picture = draw_detections(blank(), [box], ["a rather long name"], [0.5], RED)
    background = picture.crop(extent(picture, RED))
    assert background.width > 100  # the whole name is inside


def test_a_name_wider_than_the_picture_is_no_error():
    draw_detections(blank(30, 400), [[5, 5, 20, 20]], ["a name much wider than this picture"], [0.5], min_side=1)


@pytest.mark.parametrize("boxes, labels, scores", [([[0, 0, 1, 1]], [], None), ([[0, 0, 1, 1]], ["cat"], [])])
def test_boxes_labels_and_scores_have_to_be_equally_many(boxes, labels, scores):
    with pytest.raises(ValueError, match="equally many, got 1, "):
        draw_detections(blank(), boxes, labels, scores)


def test_a_grid_has_a_row_per_image_under_headings():
    rows = [[blank(320, 200, "red"), blank(320, 200, "lime")], [blank(100, 300, "red"), blank(100, 300, "lime")]]
    grid = comparison_grid(rows, ["Truth", "Distilled"])
    left, top, right, bottom = extent(grid, RED)
    assert (right - left, bottom - top) == (320, 508)  # two rows and the gap
    assert top >= 30 and extent(grid.crop((0, 0, grid.width, top)), (0, 0, 0)) is not None  # black on white: headings
    assert extent(grid, GREEN)[0] > right
    assert grid.size == (3 * 8 + 2 * 320, top + 508 + 8)


@pytest.mark.parametrize(
    "rows, got", [([], "no row"), ([[blank()]], r"\[1\]"), ([[blank()] * 2, [blank()]], r"\[1, 2\]")]
)
def test_a_grid_refuses_rows_that_do_not_fit_the_headings(rows, got):
    with pytest.raises(ValueError, match=f"each row must hold 2 pictures, one per title, got {got}"):
        comparison_grid(rows, ["Truth", "Distilled"])
