"""Built data, cached under a fingerprint of what it is built from.

    ingredients (a dictionary) ──> fingerprint ──> <datasets cache>/cleangpt/<fingerprint>/

A build fills a temporary folder, renamed once complete; the next build clears what a killed one left.
`checksums.json` tells a damaged folder, which is built again.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock
from huggingface_hub.constants import HF_HOME

from ..errors import UserError

verified: set[Path] = set()  # folders found whole by this process


def file_hash(path: str | Path) -> str:
    """xxHash (XXH3, 128 bits) of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def fingerprint(ingredients: dict[str, Any]) -> str:
    """xxHash (XXH3, 128 bits) of JSON-able `ingredients`; the order of their keys does not matter."""
    return xxhash.xxh3_128_hexdigest(json.dumps(ingredients, sort_keys=True, ensure_ascii=False).encode())


def build_once(ingredients: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """The folder that `build` fills from `ingredients` unless it exists, in one process while others wait.

    A folder with a file that is missing or has changed is built again, with a warning.

    Raises:
        UserError: if the cache folder cannot be written to.
    """
    root = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME, "datasets")).expanduser() / "cleangpt"
    folder = root / fingerprint(ingredients)
    if is_whole(folder):
        return folder
    temporary = root / f"building-{folder.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if is_whole(folder):  # another process has built it
                return folder
            if folder.exists():
                logging.getLogger(__name__).warning(f"{folder} is damaged and built again")
                shutil.rmtree(folder)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            try:
                build(temporary)
                (temporary / "ingredients.json").write_text(json.dumps(ingredients, indent=1, ensure_ascii=False))
                files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
                sums = {path.relative_to(temporary).as_posix(): file_hash(path) for path in files}
                (temporary / "checksums.json").write_text(json.dumps(sums, indent=1))
                os.rename(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError((str(root), f"cannot be used as the data cache: {error.strerror or error}")) from error
    verified.add(folder)
    return folder


def is_whole(folder: Path) -> bool:
    """Whether each file of a built folder is there and as it was written; looks once in the life of a process."""
    if folder not in verified:
        try:
            sums = json.loads((folder / "checksums.json").read_bytes())
            if any(file_hash(folder / file) != expected for file, expected in sums.items()):
                return False
        except (OSError, ValueError, AttributeError):
            return False
        verified.add(folder)
    return True
