"""Built data, cached under a fingerprint of what it is built from.

    ingredients (a dictionary) ──> fingerprint ──> <datasets cache>/cleangpt/<fingerprint>/

A build fills a temporary folder, renamed once complete; the next build clears what a killed one left.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import xxhash
from filelock import FileLock

from ..errors import UserError


def file_hash(path: str | Path) -> str:
    """xxHash (XXH3, 128 bits) of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def fingerprint(ingredients: dict[str, Any]) -> str:
    """xxHash (XXH3, 128 bits) of JSON-able `ingredients`; the order of their keys does not matter."""
    return xxhash.xxh3_128_hexdigest(json.dumps(ingredients, sort_keys=True, ensure_ascii=False).encode())


def build_once(ingredients: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """The folder that `build` fills from `ingredients` unless it exists, in one process while others wait.

    Raises:
        UserError: if the cache folder cannot be written to.
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
