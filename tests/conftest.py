"""Tiny data, tiny recipes, real processes. Nothing here needs the network or a home folder."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import types
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from hypothesis import settings

# Before anything imports the libraries that read them.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="cleangpt-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"  # with xet an upload to a server without it fails
os.environ["WANDB_MODE"] = "offline"
for _name in ("MASTER_ADDR", "WORLD_SIZE", "RANK", "LOCAL_RANK", "HF_DATASETS_CACHE", "HF_TOKEN"):
    os.environ.pop(_name, None)

settings.register_profile("fixed", derandomize=True)

ROOT = Path(__file__).parents[1]

LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "A stitch in time saves nine, said the tailor to the fox.",
    "",
    "What is done cannot be undone; what is said may be said again.",
]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """A text of about 6,000 characters in 200 lines."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} {LINES[i % 4]}\n" for i in range(130)))
    return path


@pytest.fixture(scope="session")
def stories_file(tmp_path_factory) -> Path:
    """40 short documents as JSON lines."""
    path = tmp_path_factory.mktemp("json") / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": f"Story {i}. {LINES[i % 4]} The end."}) + "\n" for i in range(40)))
    return path


@pytest.fixture(scope="session", autouse=True)
def made_conversations() -> Path:
    """What recipes/chat_adder.yaml reads, made as `make train` makes it unless it is there."""
    file = ROOT / "data" / "chat_adder" / "train.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.parent / "lock"):  # tests run in several processes
        if not file.is_file():
            subprocess.run([sys.executable, ROOT / "scripts" / "make_conversations.py", file.parent], check=True)
    return file


@pytest.fixture(scope="session")
def conversations_file(made_conversations, tmp_path_factory) -> Path:
    """60 conversations of train."""
    path = tmp_path_factory.mktemp("chat") / "conversations.jsonl"
    path.write_text("".join(made_conversations.read_text().splitlines(keepends=True)[:60]))
    return path


@pytest.fixture
def write_recipe(tmp_path):
    """Writes a recipe of the given sections into a temporary folder and returns its path."""

    def write(name: str = "tiny", **sections) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"run": {"output_dir": str(tmp_path / "outputs")}, **sections}))
        return path

    return write


@pytest.fixture
def tiny_text(write_recipe, text_file) -> Path:
    """A recipe that trains a tiny NanoGPT on characters for six steps with a boundary every third."""
    return write_recipe(
        data={"path": "text", "data_files": str(text_file), "block_size": 16},
        tokenizer={"train": {"kind": "char"}},
        model={"model_type": "nanogpt", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        training={"max_steps": 6, "batch_size": 4, "macro_batch": 3},
        evaluation={"prompts": []},  # samples at the end only, which take their time
        tracking={"log_every": 1},
    )


def raising(error: Exception):
    """A function that raises `error`, whatever it is called with."""

    def function(*arguments, **options):
        raise error

    return function


@pytest.fixture
def tiny_adder(write_recipe) -> Path:
    """A recipe that trains a tiny NanoGPT on one-digit addition."""
    return write_recipe(
        data={"path": "addition", "num_digits": 1},
        model={"model_type": "nanogpt", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        training={"max_steps": 4, "batch_size": 8, "macro_batch": 2},
        tracking={"log_every": 1},
    )


@pytest.fixture
def hub(monkeypatch):
    """A Hub of this test's own, see `hub_server.py`; this process and those that get its environment use it."""
    import huggingface_hub.utils._http as http
    from hub_server import HubServer
    from huggingface_hub import constants

    server = HubServer("hf_secretsecretsecret")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hurried = {**vars(http.time), "sleep": lambda seconds: None}  # between two tries of a request
    monkeypatch.setattr(http, "time", types.SimpleNamespace(**hurried))
    monkeypatch.setenv("HF_TOKEN", server.token)
    http.close_session()
    yield server
    http.close_session()
    server.shutdown()
    server.server_close()


def write_split(folder: Path, name: str, documents: list, labels: list | None = None, rows_a_batch: int = 2) -> None:
    """Adds a split of documents (arrays of ids) to a folder such as `build_text` fills, in several record batches."""
    from cleangpt.data import encoding

    batches = [slice(i, i + rows_a_batch) for i in range(0, len(documents), rows_a_batch)]
    tables = (encoding.to_table(documents[rows], labels and labels[rows]) for rows in batches)
    encoding.write_tables(tables, folder / name / "data.arrow")
    tokens = encoding.describe_split(folder / name, name)
    counts = {"documents": len(documents), "bytes": 1, "empty": 0, "tokens": tokens}
    summary = json.loads((folder / "summary.json").read_text()) if (folder / "summary.json").exists() else {}
    (folder / "summary.json").write_text(json.dumps(summary | {name: counts}))


def needs(*packages: str, extra: str = "clients"):
    """Marks a test of an extra's packages: `make extras` runs it, `make test` does not."""
    return pytest.mark.extras(*packages, extra=extra)


def pytest_runtest_setup(item):
    """A test whose packages are missing fails in a run of the extras, so that a green one ran them all."""
    for mark in item.iter_markers("extras"):
        missing = [package for package in mark.args if importlib.util.find_spec(package) is None]
        if missing:
            leave = pytest.fail if "extras" in item.config.option.markexpr else pytest.skip
            leave(f'{", ".join(missing)}: pip install -e ".[{mark.kwargs["extra"]}]"')


def run_python(*arguments, **environment) -> subprocess.CompletedProcess:
    """Runs `python ARGUMENTS` in the project's root, as a user would."""
    return run_command(sys.executable, *arguments, **environment)


def run_command(*command, **environment) -> subprocess.CompletedProcess:
    """Runs a command in the project's root; the environment may be added to."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
