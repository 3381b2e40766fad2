from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from hf_detrkd.data import UnreadableImageError
from hf_detrkd.data.images import read_image, read_size


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


COLOR = Image.new("RGB", (6, 4), (200, 100, 50))
PALETTE = Image.fromarray(np.array([[0, 1, 2, 2, 2, 2]] + [[2] * 6] * 3, np.uint8)).convert("P")
PALETTE.putpalette([0, 0, 0, 255, 255, 255, 200, 100, 50])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(COLOR), (200, 100, 50)),
        (encoded(COLOR.convert("L")), (124, 124, 124)),
        (encoded(COLOR.convert("1", dither=Image.Dither.NONE)), (0, 0, 0)),
        (encoded(COLOR.convert("RGBA")), (200, 100, 50)),
        (encoded(COLOR.convert("LA")), (124, 124, 124)),
        (encoded(COLOR.quantize(4)), (200, 100, 50)),
        (encoded(PALETTE, transparency=b"\x80\x80\x80"), (200, 100, 50)),
        (encoded(COLOR.convert("CMYK"), "TIFF"), (200, 100, 50)),
        (encoded(Image.fromarray(np.full((4, 6), 0x7B12, np.uint16))), (0x7B, 0x7B, 0x7B)),
        (encoded(Image.fromarray(np.full((4, 6), 0x7B12, np.int32)), "TIFF"), (0x7B, 0x7B, 0x7B)),
    ],
    ids=["rgb", "gray", "1 bit", "rgba", "gray+alpha", "palette", "palette+alpha", "cmyk", "16 bit", "32 bit"],
)
@pytest.mark.filterwarnings("error")
def test_every_mode_becomes_rgb(content, expected):
    image = read_image(content, "x")
    assert image.mode == "RGB" and image.size == (6, 4)
    assert np.abs(np.subtract(image.getpixel((2, 2)), expected)).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_pixels_and_size(orientation):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:10, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(pixels), exif=exif)
    image = read_image(content, "x")
    assert image.size == read_size(content) == ((20, 40) if orientation >= 5 else (40, 20))
    corners = [image.getpixel(at)[0] for at in ((2, 2), (image.width - 3, 2), (2, image.height - 3))]
    wanted = {1: 0, 2: 1, 3: None, 4: 2, 5: 0, 6: 1, 7: None, 8: 2}[orientation]
    assert [value > 128 for value in corners] == [i == wanted for i in range(3)]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image",
        encoded(Image.effect_noise((64, 64), 50), "JPEG")[:900],
        encoded(Image.effect_noise((64, 64), 50))[:900],
    ],
    ids=["empty", "text", "cut JPEG", "cut PNG"],
)
def test_unreadable_image_names_its_file(content):
    with pytest.raises(UnreadableImageError, match=r"image a/b.jpg cannot be read .* `--skip_unreadable_images`"):
        read_image(content, "a/b.jpg")


def test_missing_file_and_unknown_range_are_unreadable(tmp_path):
    with pytest.raises(UnreadableImageError, match=r"gone.png cannot be read \(.*No such file"):
        read_image(tmp_path / "gone.png", "gone.png")
    floats = encoded(Image.new("F", (3, 3)), "TIFF")
    with pytest.raises(UnreadableImageError, match="floating point numbers of no known range"):
        read_image(floats, "x.tif")


def test_size_of_an_unreadable_file_is_unknown(tmp_path):
    assert read_size(b"no image") == read_size(tmp_path / "gone.png") == (0, 0)


def test_image_bombs_are_unreadable(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UnreadableImageError, match=r"bomb.png is too large .* set --max_image_pixels"):
        read_image(encoded(COLOR), "bomb.png")
