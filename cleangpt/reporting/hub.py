"""Publishing on the Hugging Face Hub, in the background: no failure of the Hub touches the run.

    best/, final/ ──> snapshot ──> waits (only the newest) ──> one commit ──> on the Hub
                      (hard links)                                 └──────> failed: the newest is reported at the end

A push is a single commit, so the repository never mixes two models.
"""

import os
import queue
import re
import shlex
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_session, get_token
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import build_hf_headers, disable_progress_bars, hf_raise_for_status

from .card import published_files

SILENCE_S = 60.0  # a connection that is silent for so long has failed
MIN_SPEED = 500_000  # bytes per second of the slowest upload worth waiting for
RUN_FILES = ("recipe.yaml", "metrics.jsonl")  # in the run's folder, published with the model
# All that a saved model may consist of: a push deletes what a model of another kind left behind.
MODEL_FILES = re.compile(
    r"(config|generation_config|manifest|special_tokens_map|tokenizer\w*|vocab)\.json|merges\.txt|chat_template\.jinja"
    r"|model.*\.safetensors(\.index\.json)?|(configuration|modeling)_\w+\.py|generation\.py|curves\.png"
)


def push_folder(
    folder: Path, repo_id: str, private: bool, message: str, beside: dict[str, Path] | None = None, kind: str = "model"
) -> str:
    """Uploads a folder as one commit, to a new repository if necessary, and returns the repository's full id.

    Args:
        folder: a saved model, or a part of a dataset, which keeps its folder's name in the repository.
        repo_id: `user/name`, or `name` in the token's namespace.
        beside: further files and folders by their path in the repository.
        kind: `model` or `dataset`.

    Raises:
        ConnectionError: if the commit was not made, with a message that says why and holds no token.
    """
    files: dict[str, Path] = {}
    with _hub() as api:
        for place, source in {folder.name if kind == "dataset" else "": folder, **(beside or {})}.items():
            names = glob("**", root_dir=source, recursive=True) if source.is_dir() else [""]  # no hidden files
            files |= {Path(place, name).as_posix(): source / name for name in names if (source / name).is_file()}
        if not files:
            raise FileNotFoundError(f"no files in {folder}")  # deleted meanwhile; must not empty the repository
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True, repo_type=kind).repo_id
        info = api.repo_info(repo_id, repo_type=kind, timeout=SILENCE_S)
        if private and not info.private:
            raise ValueError(f"{repo_id} is public; set hub.private: false, or make it private there")
        there = {file.rfilename for file in info.siblings or ()}  # type: ignore[union-attr]
        stale = filter(MODEL_FILES.fullmatch, there - files.keys()) if kind == "model" else ()
        added = [CommitOperationAdd(*file) for file in (files | published_files(files, repo_id)).items()]
        api.create_commit(repo_id, [*added, *map(CommitOperationDelete, stale)], commit_message=message, repo_type=kind)
    return repo_id


def require_own(repo_id: str, recipe: Path | None) -> None:
    """Refuses a repository with the model of another run than that of `recipe`; a run is known by its recipe.yaml.

    Raises:
        ConnectionError: if there is such a model, or the Hub does not say.
    """
    with _hub() as api:
        repo_id = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
        try:
            there = {file.rfilename for file in api.model_info(repo_id, timeout=SILENCE_S).siblings or ()}
        except RepositoryNotFoundError:
            return
        if not any(map(MODEL_FILES.fullmatch, there)):
            return
        theirs = None
        if "recipe.yaml" in there:
            address = f"{api.endpoint}/{repo_id}/resolve/main/recipe.yaml"
            answer = get_session().get(address, headers=build_hf_headers(), follow_redirects=True)
            hf_raise_for_status(answer)
            theirs = _run_of(answer.text)
        if theirs is None or theirs != _run_of(recipe.read_text(encoding="utf-8") if recipe else ""):
            other = f"the model of run {theirs}" if theirs else "a model of no run"
            raise FileExistsError(f"{repo_id} holds {other}; scripts/push_to_hub.py --replace replaces it")


def _run_of(recipe: str) -> str | None:
    """The name of the run in a recipe.yaml; None without one, or if another program wrote it."""
    values = yaml.safe_load(recipe)
    run = values.get("run") if isinstance(values, dict) else None
    return run.get("name") if isinstance(run, dict) else None


@contextmanager
def _hub() -> Iterator[HfApi]:
    """The Hub with a limit to its silence; what goes wrong is a `ConnectionError` whose message holds no token."""
    session = get_session()
    timeout, session.timeout = session.timeout, SILENCE_S  # by default huggingface_hub waits forever
    try:
        yield HfApi()
    except Exception as error:  # network and Hub raise many kinds
        message, token = " ".join(f"{type(error).__name__}: {error}".split()), get_token()
        raise ConnectionError(message.replace(token, "***") if token else message) from None
    finally:
        session.timeout = timeout


def push_dataset(folders: Mapping[str, Path], repo_id: str, private: bool, card: str) -> str:
    """Publishes built data (see `build_text`), a configuration a label, with their tokenizer and `card`.

    Raises:
        ConnectionError: as `push_folder` does.
    """
    from datasets import load_from_disk  # half a second that only this needs

    with tempfile.TemporaryDirectory() as temporary:
        readme = Path(temporary, "README.md")
        readme.write_text(card)
        tokenizer = next(iter(folders.values())) / "tokenizer"
        repo_id = push_folder(tokenizer, repo_id, private, "Tokenizer and card", {"README.md": readme}, "dataset")
    with _hub():
        for label, folder in folders.items():  # which adds to the card how to read it
            load_from_disk(str(folder)).push_to_hub(repo_id, label or "default")
    return repo_id


@dataclass
class Push:
    """A model on its way to the Hub."""

    folder: Path
    snapshot: Path  # its files as they were, hard links where the disk has them
    message: str
    error: str = "it did not answer in time"  # "" once the commit is made


class Publisher:
    """Pushes the models of a run in `run_folder` one at a time, in a thread that never holds up the run."""

    def __init__(self, repo_id: str, private: bool, run_folder: Path, active: bool):
        self.repo_id, self.private, self.run_folder, self.active = repo_id, private, run_folder, active
        self.newest: Push | None = None
        self.waiting: queue.SimpleQueue[Push | None] = queue.SimpleQueue()  # one push, or None to end the thread
        # Not `HfApi.run_as_future`: at exit Python joins the threads of its pool, however long the Hub is silent.
        self.thread = threading.Thread(target=self._work, daemon=True)
        if active:
            self.thread.start()

    def push(self, folder: Path, message: str) -> None:
        """Takes a snapshot of a saved model and returns; a push that still waits is dropped."""
        if not self.active or not folder.is_dir():  # no best model yet
            return
        snapshot = Path(tempfile.mkdtemp(prefix=".push-", dir=self.run_folder))
        try:  # hard links survive the folder's replacement
            shutil.copytree(folder, snapshot, copy_function=os.link, dirs_exist_ok=True)
        except OSError:  # the disk has none
            shutil.copytree(folder, snapshot, dirs_exist_ok=True)
        for name in RUN_FILES:
            shutil.copy2(self.run_folder / name, snapshot)  # copies, since the run still writes to them
        with suppress(queue.Empty):
            if older := self.waiting.get_nowait():
                shutil.rmtree(older.snapshot)
        self.newest = Push(folder, snapshot, message)
        self.waiting.put(self.newest)

    def _work(self) -> None:
        while push := self.waiting.get():
            if push is self.newest:  # neither superseded nor given up
                try:
                    with disable_progress_bars():  # they would break the run's own
                        require_own(self.repo_id, push.snapshot / "recipe.yaml")
                        self.repo_id = push_folder(push.snapshot, self.repo_id, self.private, push.message)
                    push.error = ""
                except ConnectionError as error:
                    push.error = str(error)
            shutil.rmtree(push.snapshot, ignore_errors=True)

    def close(self, say: Callable[[str], None], wait: bool = True) -> None:
        """Ends the thread; if the newest push is not on the Hub, says why and how to repeat it.

        It may `wait` for that push, at most as long as an upload of its size may take.
        """
        self.waiting.put(None)
        if (push := self.newest) is None:
            return
        if wait:
            size = sum(path.stat().st_size for path in push.folder.rglob("*"))
            self.thread.join(SILENCE_S + 2 * size / MIN_SPEED)  # an older one may be under way before it
        self.newest = None
        for snapshot in self.run_folder.glob(".push-*"):  # those of a killed run too
            shutil.rmtree(snapshot, ignore_errors=True)
        if not push.error:
            say(f"pushed to {constants.ENDPOINT}/{self.repo_id}: {push.message}")
        else:
            say(f"not pushed to the Hub: {push.error}. To push it again:")
            say(f"  python scripts/push_to_hub.py {shlex.quote(str(push.folder))} {self.repo_id}")
