"""Where the recipes lie: ``configs/`` of a checkout, ``bs_jax/configs/`` of an installed wheel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def folder() -> Path:
    """The folder of the project's own recipes."""
    packaged = _PACKAGE / "configs"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "configs"


def find(text: str) -> str:
    """The recipe that ``--config`` names, also from a folder that has no ``configs/``.

    Args:
        text: the path of a config file, perhaps with a colon and the name of a form. A file that
            exists wins. Else ``configs/NAME.py`` and ``NAME`` are the project's own recipe of that
            name.

    Returns:
        The text, with the path of the project's own recipe where that one is meant.

    Example:
        >>> Path(find("configs/imagenette.py:quick")).name
        'imagenette.py:quick'
        >>> Path(find("imagenette:quick")).name
        'imagenette.py:quick'
        >>> find("elsewhere/imagenette.py")
        'elsewhere/imagenette.py'
    """
    path, colon, form = text.partition(":")
    own = folder() / Path(path).name
    if Path(path).parent == Path() and not Path(path).suffix:
        own = own.with_suffix(".py")
    elif Path(path).parent != Path("configs"):
        return text
    if Path(path).exists() or not own.is_file():
        return text
    return f"{own}{colon}{form}"


def found(argv: Sequence[str]) -> list[str]:
    """The command line with the recipe of ``--config`` found.

    Example:
        >>> found(["main.py", "--config", "other.py", "--config=other.py", "--dry_run"])
        ['main.py', '--config', 'other.py', '--config=other.py', '--dry_run']
    """
    words: list[str] = []
    for word in argv:
        name, equals, value = word.partition("=")
        if name in ("--config", "-config") and equals:
            words.append(f"{name}={find(value)}")
        else:
            words.append(find(word) if words and words[-1] in ("--config", "-config") else word)
    return words
