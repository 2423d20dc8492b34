"""Small images, and folders and archives of them in the official layout."""

import io
import pathlib
import struct
import tarfile
import zlib

from PIL import Image


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def colour(index: int, size: tuple[int, int] = (12, 10)) -> bytes:
    return encode(Image.new("RGB", size, (index * 20 % 256, 255 - index * 20 % 256, 7)))


def make_tree(root: pathlib.Path, classes=("cat", "dog"), train=3, val=2, val_name="val"):
    count = 0
    for split, number in (("train", train), (val_name, val)):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                (folder / f"{i}.png").write_bytes(colour(count))
                count += 1
    return root


def make_archive(tree: pathlib.Path, path: pathlib.Path, top: str = "pets") -> pathlib.Path:
    mode = "w:gz" if path.suffix in (".tgz", ".gz") else "w"
    with tarfile.open(path, mode) as tar:
        tar.add(tree, arcname=top)
    return path


def bomb(width: int, height: int) -> bytes:
    def part(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", b"") + part(b"IEND", b"")
