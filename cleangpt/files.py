"""Files and folders that exist whole or not at all, whenever the process or the machine stops.

.name.writing   filled, every file flushed to disk, a manifest of sizes and SHA-256 last
name            its name once it is whole; the previous version is `.name.old` for that moment
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_file(path: Path, text: str) -> None:
    """Replaces a file's content with `text`."""
    temporary = path.with_name(f".{path.name}.writing")
    remove(temporary)
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    os.replace(temporary, path)


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Replaces `folder` with what `fill` writes, and a manifest."""
    temporary, old = folder.with_name(f".{folder.name}.writing"), folder.with_name(f".{folder.name}.old")
    for leftover in (temporary, old):
        remove(leftover)
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        _seal(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # makes room on a full disk
        raise
    if folder.exists():
        os.rename(folder, old)
    os.rename(temporary, folder)
    flush(folder.parent)
    remove(old)


def _seal(folder: Path) -> None:
    """Writes the manifest of a folder, makes all files as readable as it, and flushes everything to disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {str(file.relative_to(folder)): _digest_of(file) for file in files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for file in files:
        file.chmod((folder / "manifest.json").stat().st_mode)  # safetensors writes for the owner only
    for path in (*files, folder / "manifest.json", *{file.parent for file in files}, folder):
        flush(path)


def is_whole(folder: Path) -> bool:
    """Whether a folder holds the files of its manifest, byte for byte, and no links."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
        names = {str(path.relative_to(folder)) for path in paths} - {"manifest.json"}
        if folder.is_symlink() or any(path.is_symlink() for path in paths) or names != manifest.keys():
            return False
        return all(_digest_of(folder / name) == entry for name, entry in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def hint_at_model(path: str | Path) -> str:
    """What to say in an error about a run's folder in place of a model's: `; use outputs/mine/final`."""
    models = [Path(path, name) for name in ("final", "best")]
    return next((f"; use {model}" for model in models if (model / "config.json").is_file()), "")


def remove(path: Path) -> None:
    """Deletes a file or folder if it exists; of a link, never the target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_at_once(folder: Path) -> None:
    """Deletes a folder; a half-deleted one never keeps its name."""
    old = folder.with_name(f".{folder.name}.old")
    remove(old)
    if folder.exists():
        os.rename(folder, old)
        remove(old)


def clear_leftovers(folder: Path) -> None:
    """Deletes what a killed process left in `folder`; restores the old version if it was killed between the renames."""
    for path in folder.glob(".*"):
        whole = path.with_name(path.stem.removeprefix("."))
        if path.suffix == ".old" and not whole.exists() and is_whole(path):
            os.rename(path, whole)
        elif path.suffix in (".old", ".writing"):
            remove(path)


def flush(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(stream: io.BufferedReader | io.BytesIO) -> dict[str, str | int]:
    """Size and SHA-256 of a stream: an entry of a manifest."""
    return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest(), "size": stream.seek(0, os.SEEK_END)}


def _digest_of(file: Path) -> dict[str, str | int]:
    with open(file, "rb") as stream:
        return digest(stream)
