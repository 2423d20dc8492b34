"""One encoded image (JPEG, PNG, ...) to one square RGB array of uint8."""

from __future__ import annotations

import contextlib
import functools
import io
import threading
import warnings
from collections.abc import Iterator

import numpy as np

# Endings of the formats below, as Pillow knows them.
SUFFIXES = frozenset(
    (
        *(".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".gif", ".webp"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".avif", ".avifs"),
        *(".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    )
)

# A file above this is no training image; of an archive several are in memory at once.
MAX_BYTES = 64 << 20
# Pillow knows many more, among them EPS, for which it would start an interpreter.
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "PPM", "TIFF", "AVIF", "JPEG2000")

_FILTERS_LOCK = threading.Lock()


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of the formats that this Pillow was built with."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


class UnreadableError(Exception):
    """An image that cannot be decoded; the message says why."""


def decode_square(encoded: bytes, size: int, fit: str) -> np.ndarray:
    """Decode an image to RGB and resize it, bilinear with antialiasing.

    Grey, palette and CMYK images are converted, transparency is dropped, of an animation the first
    frame is taken. EXIF orientation is ignored, as the usual data sets and their published results
    do.

    Args:
      encoded: the file's bytes.
      size: height and width of the result, pixels.
      fit: `"squash"` or `"crop"`, see `bs_jax.data.Storage`.

    Returns:
      uint8 [size, size, 3].

    Raises:
      UnreadableError: not an image, damaged, cut short, too large, or of more than 8 bits.
    """
    from PIL import Image

    if not encoded:
        raise UnreadableError("empty file")
    # Decoders meet hostile bytes with exceptions of every kind (struct.error, SyntaxError, ...).
    try:
        with Image.open(io.BytesIO(encoded), formats=_formats()) as image:
            if image.mode.startswith(("I", "F")):
                raise UnreadableError(f"mode {image.mode}, want 8 bits a channel")
            # By way of RGBA, since Pillow warns about palettes with transparency otherwise.
            image = image.convert("RGBA") if image.mode in ("P", "PA") else image
            image = image.convert("RGB")
            side, (width, height) = min(image.size), image.size
            left, top = (width - side) / 2, (height - side) / 2
            box = (left, top, left + side, top + side) if fit == "crop" else None
            resized = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
            return np.asarray(resized)
    except UnreadableError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableError(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels") from error
    except Image.UnidentifiedImageError as error:
        raise UnreadableError(f"not an image ({', '.join(_formats())})") from error
    except Exception as error:
        raise UnreadableError(" ".join(str(error).split()) or type(error).__name__) from error


def aspect_ratio(encoded: bytes) -> float:
    """Width over height of an image that `decode_square` has read; reads its header alone."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded), formats=_formats()) as image:
        return image.width / image.height


@contextlib.contextmanager
def strict_decoding() -> Iterator[None]:
    """Refuse decompression bombs, and keep quiet about harmless oddities, while decoding."""
    from PIL import Image

    # Python's warning filters are global: worker threads obey them too, and two that set them at
    # once would mix them up.
    with _FILTERS_LOCK, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield
