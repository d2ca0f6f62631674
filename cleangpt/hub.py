"""Publishing on the Hugging Face Hub, in the background; whatever the Hub does, the run goes on.

    best/, final/ ──> snapshot ──> waits (the newest only) ──> one commit ──> on the Hub
                      (hard links)          ^────────────────── failed: tried again with the next push, told at the end

A push is a single commit, so the repository always shows one model whole. The token is read where huggingface_hub
reads it, and cut out of whatever the Hub answers.
"""

import io
import json
import os
import re
import shlex
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, set_client_factory
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils._http import default_client_factory

from .files import digest

SILENCE_S = 60.0  # after which a connection that says nothing is given up
SLOWEST = 500_000  # bytes a second that an upload may be expected to reach

RUN_FILES = ("recipe.yaml", "metrics.jsonl")  # of the run's folder, published beside the model
# What a saved model of whatever kind consists of: a push takes away what is left of another kind.
MODEL_FILES = re.compile(
    r"(config|generation_config|manifest|special_tokens_map|tokenizer\w*|vocab)\.json|merges\.txt|chat_template\.jinja"
    r"|model.*\.safetensors(\.index\.json)?|(configuration|modeling)_\w+\.py|curves\.png"
)


def push_folder(
    folder: Path, repo_id: str, private: bool, message: str, beside: dict[str, Path] | None = None, kind: str = "model"
) -> str:
    """Uploads a folder as one commit; makes the repository where there is none. A model's card says to load it there.

    Args:
        folder: a saved model's; of a dataset, built data, which lie under their own name in the repository.
        repo_id: `user/name`, or `name` in the token's namespace. private: visible to its owner only.
        message: of the commit. beside: further files and folders by their path in the repository.
        kind: `model` or `dataset`.

    Returns:
        The repository's full id.

    Raises:
        ConnectionError: when it is not there afterwards, with a message that says why and holds no token.
    """
    try:
        _give_up_on_silence()
        api = HfApi()
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True, repo_type=kind).repo_id
        info = api.repo_info(repo_id, repo_type=kind)
        if private and not info.private:
            raise ValueError(f"{repo_id} is public; say hub.private: false, or make it private there")
        files = _files_in(folder, f"{folder.name}/" if kind == "dataset" else "")
        for place, path in (beside or {}).items():
            files |= _files_in(path, f"{place}/") if path.is_dir() else {place: path}
        changes = [
            CommitOperationAdd(place, content) for place, content in sorted(_with_card_of(repo_id, files).items())
        ]
        there = {sibling.rfilename for sibling in info.siblings or ()} - files.keys()
        if kind == "model":
            changes += [CommitOperationDelete(place) for place in sorted(there) if MODEL_FILES.fullmatch(place)]
        api.create_commit(
            repo_id,
            changes,
            commit_message=message,
            repo_type=kind,
        )
    except Exception as error:  # the network and the Hub raise many kinds
        raise ConnectionError(_without_token(f"{type(error).__name__}: {error}")) from None
    return repo_id


def _files_in(folder: Path, prefix: str) -> dict[str, Path]:
    """The files below a folder, hidden ones left out, by their path in the repository."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        f"{prefix}{place.as_posix()}": path
        for place, path in files.items()
        if not any(part.startswith(".") for part in place.parts)
    }


def _with_card_of(repo_id: str, files: dict[str, Path]) -> dict[str, Path | bytes]:
    """The files; a card that tells to load a folder of this machine names the repository, and the manifest follows."""
    text = files["README.md"].read_text(encoding="utf-8") if "README.md" in files else ""
    folder = re.search(r'from_pretrained\("([^"]+)"', text)
    if not folder:
        return dict(files)
    card = text.replace(folder[1], repo_id).encode()
    changed = {"README.md": card}
    if "manifest.json" in files:
        manifest = json.loads(files["manifest.json"].read_text())
        manifest["README.md"] = digest(io.BytesIO(card))
        changed["manifest.json"] = json.dumps(manifest, indent=1).encode()
    return files | changed


def _give_up_on_silence() -> None:
    """By itself huggingface_hub waits for an answer for ever."""

    def make_client():
        client = default_client_factory()
        client.timeout = SILENCE_S
        return client

    set_client_factory(make_client)


def _without_token(text: str) -> str:
    token = get_token()
    return " ".join((text.replace(token, "***") if token else text).split())


@dataclass
class Push:
    """What waits to be uploaded."""

    snapshot: Path
    """The files as they were, hard links where the disk has them."""
    folder: Path
    """Where they come from."""
    message: str


class Publisher:
    """Pushes a run's models one at a time, in a thread that never holds up the loop.

    Args:
        repo_id, private: as in `push_folder`.
        run_folder: with `recipe.yaml` and `metrics.jsonl`. active: false where nothing is to be pushed.
    """

    def __init__(self, repo_id: str, private: bool, run_folder: Path, active: bool):
        self.repo_id, self.private = repo_id, private
        self.run_folder, self.active = run_folder, active
        self.lock, self.thread = threading.Lock(), None
        self.pending: Push | None = None  # the newest that is not on the Hub
        self.current: Push | None = None  # under way
        self.error: str | None = None  # of the last try
        self.count = 0
        if self.active:
            disable_progress_bars()  # they would break into the run's own
            for leftover in run_folder.glob(".push-*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def push(self, folder: Path, message: str) -> None:
        """Takes a snapshot of a saved model's folder and returns; an older one that still waits is dropped."""
        if not self.active or not folder.is_dir():  # no best model yet
            return
        self.count += 1
        snapshot = self.run_folder / f".push-{self.count}"
        shutil.copytree(folder, snapshot, copy_function=_link)
        for name in RUN_FILES:
            shutil.copy2(self.run_folder / name, snapshot / name)  # copied: the run still writes to them
        with self.lock:
            if self.pending is not None and self.pending is not self.current:
                shutil.rmtree(self.pending.snapshot)
            self.pending = Push(snapshot, folder, message)
            if self.thread is None:
                self.thread = threading.Thread(target=self._work, daemon=True)
                self.thread.start()

    def _work(self) -> None:
        """Uploads until nothing new is pending; what failed stays pending."""
        tried = None
        while True:
            with self.lock:
                self.current = self.pending
                if self.current is None or self.current is tried:
                    self.current = self.thread = None
                    return
            tried, self.error = self.current, None
            try:
                push_folder(tried.snapshot, self.repo_id, self.private, tried.message)
            except ConnectionError as error:
                self.error = str(error)
            with self.lock:
                if self.error is None and self.pending is tried:
                    self.pending = None
                if self.pending is not tried:
                    shutil.rmtree(tried.snapshot, ignore_errors=True)

    def close(self, say: Callable[[str], None], wait: bool = True) -> None:
        """Tells what is not on the Hub and how to repeat the push, where there is something to tell.

        Args:
            say: takes a line. wait: for what is under way, no longer than an upload of its size may take.
        """
        with self.lock:
            thread, push = self.thread, self.pending
        if push is None:
            return
        if thread is not None and wait:
            size = sum(path.stat().st_size for path in push.snapshot.rglob("*") if path.is_file())
            thread.join(SILENCE_S + 2 * size / SLOWEST)  # an older one may be under way before it
        with self.lock:
            if self.pending is None:
                return
            self.pending = None
            for snapshot in self.run_folder.glob(".push-*"):
                shutil.rmtree(snapshot, ignore_errors=True)
        say(f"not pushed to the Hub: {self.error or 'it has not answered in time'}. To push it again:")
        say(f"  python scripts/push_to_hub.py {shlex.quote(str(push.folder))} {self.repo_id}")


def _link(source: str, target: str) -> None:
    """A hard link, which a folder renamed or deleted meanwhile does not touch; a copy where the disk has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
