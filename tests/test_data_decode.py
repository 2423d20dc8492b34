"""Decoding: images of every mode become square RGB; what would be falsified is refused."""

import io

import numpy as np
import pytest
from PIL import Image

from bs_jax.data.decode import UnreadableError, decode_square


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "image",
    [
        Image.new("L", (9, 7), 90),
        Image.new("1", (9, 7), 1),
        Image.new("LA", (9, 7), (90, 3)),
        Image.new("RGBA", (9, 7), (90, 80, 70, 3)),
        Image.new("RGB", (9, 7), (90, 80, 70)).quantize(4),
    ],
    ids=lambda image: image.mode,
)
def test_other_modes_become_rgb(image):
    found = decode_square(encode(image), 5, "squash")
    assert found.shape == (5, 5, 3)
    assert (found == np.array(image.convert("RGBA").convert("RGB").getpixel((0, 0)))).all()


def test_cmyk_and_palette_transparency_become_rgb():
    red = decode_square(encode(Image.new("CMYK", (9, 7), (0, 255, 255, 0)), "JPEG"), 5, "squash")
    assert np.abs(red.astype(int) - [254, 0, 0]).max() < 4
    palette = Image.new("RGB", (9, 7), (90, 80, 70)).quantize(4)
    found = decode_square(encode(palette, transparency=bytes([0, 255])), 5, "squash")
    assert (found == [90, 80, 70]).all()


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_more_than_eight_bits_are_refused(mode):
    with pytest.raises(UnreadableError, match=r"8 bits"):
        decode_square(encode(Image.new(mode, (4, 4)), "TIFF"), 4, "squash")


@pytest.mark.parametrize("fit", ["squash", "crop"])
def test_resizing_is_antialiased(fit):
    # A fine chequerboard has the mean grey; sampling single pixels would give black or white.
    board = np.indices((64, 64)).sum(0) % 2 * 255
    found = decode_square(encode(Image.fromarray(board.astype(np.uint8))), 8, fit)
    assert np.abs(found.astype(int) - 127).max() < 8


def test_orientation_tags_are_ignored():
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    tagged = decode_square(encode(image, exif=exif), 8, "squash")
    np.testing.assert_array_equal(tagged[..., 0], np.asarray(image))
