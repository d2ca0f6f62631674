"""Built data, found again exactly when what it was built from is the same, and built once.

    what went in (a dictionary) ──> fingerprint ──> <datasets cache>/cleangpt/<fingerprint>/

A build writes into a folder beside it, which is renamed when it is whole: what a killed build leaves does not count,
and the next one clears it away.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import xxhash
from filelock import FileLock

from ..errors import UserError


def file_hash(path: str | Path) -> str:
    """xxHash (XXH3, 128 bits) of a file's content."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(ingredients: dict) -> str:
    """A name for `ingredients`, which JSON can write: the same for equal dictionaries, another for any other."""
    return xxhash.xxh3_128_hexdigest(json.dumps(ingredients, sort_keys=True, ensure_ascii=False).encode())


def build_once(ingredients: dict, build: Callable[[Path], None]) -> Path:
    """The folder that `build` fills from `ingredients`; it is called only when no such folder exists yet.

    Any number of processes may ask at once: one builds, the others wait for it.

    Raises:
        UserError: when the cache folder cannot be written to.
    """
    root = Path(datasets.config.HF_DATASETS_CACHE) / "cleangpt"
    folder = root / fingerprint(ingredients)
    if folder.exists():
        return folder
    temporary = root / f"building-{folder.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                try:
                    build(temporary)
                    (temporary / "ingredients.json").write_text(json.dumps(ingredients, indent=1, ensure_ascii=False))
                    os.rename(temporary, folder)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError((str(root), f"cannot be used as the data cache: {error.strerror or error}")) from error
    return folder
