"""Publishing: what is pushed loads elsewhere bit for bit; no fault of the Hub touches the run, no output the token."""

import hashlib
import json
import os
import random
import runpy
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, run_python
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import cleangpt.reporting.hub
from cleangpt import Stopped, UserError, load_recipe, train
from cleangpt.data.prepare import prepare_data
from cleangpt.data.stream import summarize
from cleangpt.reporting.card import without_paths
from cleangpt.reporting.hub import Publisher, push_folder, require_own
from cleangpt.training.checkpoint import is_whole

PUSH = ["--hub.push=true", "--hub.repo_id=me/tiny"]
FAULTS = ["refuse", "error", "drop", "stall", "cut"]

ELSEWHERE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("me/tiny", trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained("me/tiny", trust_remote_code=True)
assert "cleangpt" not in sys.modules
torch.save(model(**tokenizer("The fox", return_tensors="pt")).logits, sys.argv[1])
"""


@pytest.fixture
def hurry(monkeypatch):
    """A Hub that says nothing is given up soon."""
    monkeypatch.setattr(cleangpt.reporting.hub, "SILENCE_S", 0.2)


def same_weights(one, other) -> bool:
    one, other = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def is_on(hub, final) -> bool:
    """Whether the repository's head is exactly this model, with the files of its run."""
    wanted = {path.relative_to(final).as_posix(): path for path in final.rglob("*") if path.is_file()}
    wanted |= {name: final.parent / name for name in ("recipe.yaml", "metrics.jsonl")}
    wanted = {name: path.read_bytes() for name, path in wanted.items() if name != "manifest.json"}
    wanted["README.md"] = wanted["README.md"].replace(str(final).encode(), b"me/tiny")
    recipe = without_paths(yaml.safe_load(wanted["recipe.yaml"]))
    wanted["recipe.yaml"] = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).encode()
    files = hub.files("me/tiny")
    manifest = json.loads(files.pop("manifest.json"))
    return files == wanted and manifest["README.md"]["sha256"] == hashlib.sha256(wanted["README.md"]).hexdigest()


def test_what_is_pushed_loads_elsewhere_bit_for_bit(hub, tiny_text, tmp_path):
    final = train(load_recipe(tiny_text, PUSH))
    assert is_on(hub, final)
    assert hub.repos["models", "me/tiny"].private
    titles = [commit["title"] for commit in hub.repos["models", "me/tiny"].commits]
    assert titles[-1] == "Final model, step 6"
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "logits.pt")],
        cwd=tmp_path,
        env={
            "HF_HOME": str(tmp_path / "home"),
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            **hub.environment,
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(final).eval()
    tokenizer = AutoTokenizer.from_pretrained(final)
    expected = model(**tokenizer("The fox", return_tensors="pt")).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_push_that_fails_says_why_without_the_token(fault, hub, hurry, tiny_text):
    final = train(load_recipe(tiny_text))
    hub.fault = lambda request: fault if "commit" in request else None
    with pytest.raises(ConnectionError) as error:
        push_folder(final, "me/tiny", True, "test")
    assert str(error.value) and hub.token not in str(error.value)
    assert error.value.__cause__ is None and error.value.__suppress_context__
    hub.fault = lambda request: None
    push_folder(final, "me/tiny", True, "test")
    assert hub.files("me/tiny")["config.json"] == (final / "config.json").read_bytes()


@pytest.fixture
def reference(tiny_text):
    """The final folder of a run without a Hub."""
    return train(load_recipe(tiny_text, ["--training.macro_batch=1", "--run.name=reference"]))


@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(100, 150), marks=pytest.mark.soak)])
def test_random_faults_leave_the_run_alone(seeds, hub, hurry, tiny_text, reference, capfd, caplog, monkeypatch):
    """Each new best is pushed through random faults; then the Hub is well, and what the run told to do is done."""
    for seed in seeds:
        hub.repos.clear()
        chance = random.Random(seed)
        hub.fault = lambda request, chance=chance: chance.choice(FAULTS) if chance.random() < 0.2 else None
        recipe = load_recipe(tiny_text, [*PUSH, f"--run.name=faulty-{seed}", "--training.macro_batch=1"])
        final = train(recipe)
        hub.fault = lambda request: None
        output = capfd.readouterr()
        assert same_weights(final, reference)
        lines = [line for line in output.out.splitlines() if "push_to_hub.py" in line]
        if lines:
            _, script, *arguments = shlex.split(lines[0])
            monkeypatch.setattr("sys.argv", [script, *arguments])
            runpy.run_path(str(ROOT / script))["main"]()
        assert is_on(hub, final)
        assert not list(recipe.folder.glob(".push-*"))
        told = output.out + output.err + caplog.text + "".join(p.read_text() for p in recipe.folder.rglob("*.[myj]*"))
        assert hub.token not in told


def test_a_run_that_is_stopped_tells_what_is_not_pushed(hub, hurry, tiny_text, capsys, monkeypatch):
    hub.fault = lambda request: "refuse"
    # As if a signal came in each step.
    monkeypatch.setattr("cleangpt.training.launch.StopVote.__call__", lambda vote, wish: True)
    recipe = load_recipe(tiny_text, [*PUSH, "--training.macro_batch=1"])
    for _ in range(2):  # what the second one makes up for is the first one's boundary, with a best model
        with pytest.raises(Stopped):
            train(recipe)
    assert f"push_to_hub.py {recipe.folder / 'best'} me/tiny" in capsys.readouterr().out
    assert not list(recipe.folder.glob(".push-*"))


def test_the_run_goes_on_while_the_hub_is_silent(hub, tiny_text):
    """Six pushes to a Hub that answers nothing for 20 seconds each."""
    hub.fault = lambda request: "stall"
    recipe = load_recipe(tiny_text, [*PUSH, "--training.macro_batch=1"])
    done = threading.Event()
    threading.Thread(target=lambda: (train(recipe), done.set()), daemon=True).start()
    for _ in range(300):
        if (recipe.folder / "final" / "config.json").exists():
            break
        time.sleep(0.1)
    assert (recipe.folder / "final" / "config.json").exists() and not done.is_set()
    assert len(list(recipe.folder.glob(".push-*"))) == 2  # the one under way and the newest
    hub.fault = lambda request: None
    hub.released.set()
    assert done.wait(20)
    assert is_on(hub, recipe.folder / "final")


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's folder with a best model, every file of which is YAML that says "old"."""
    run = tmp_path / "run"
    (run / "best").mkdir(parents=True)
    for name in ("recipe.yaml", "metrics.jsonl", "best/config.json", "best/model.safetensors"):
        (run / name).write_text("- old\n")
    return run


QUIT = """
import sys, time
from pathlib import Path
from cleangpt.reporting.hub import Publisher

run = Path(sys.argv[1])
publisher = Publisher("me/tiny", True, run, True)
publisher.push(run / "best", "old")
time.sleep(1)
publisher.close(print, wait=False)
print(time.time())
"""


def test_a_silent_hub_does_not_delay_the_exit(hub, run):
    hub.fault = lambda request: "stall"
    done = run_python("-c", QUIT, run, **hub.environment)
    assert hub.requests and "it did not answer in time" in done.stdout, done.stderr
    assert time.time() - float(done.stdout.split()[-1]) < hub.stall_s / 2


def test_a_folder_replaced_during_its_push_is_not_mixed(hub, run):
    publisher = Publisher("me/tiny", True, run, True)
    hub.fault = lambda request: "stall" if "lfs" in request else None
    publisher.push(run / "best", "old")
    (run / "best").rename(run / "gone")
    (run / "best").mkdir()
    (run / "best" / "config.json").write_text("new")
    for file in (run / "gone").iterdir():
        file.unlink()
    hub.fault = lambda request: None
    hub.released.set()
    publisher.close((said := []).append)
    assert said == [f"pushed to {hub.url}/me/tiny: old"]
    assert set(hub.files("me/tiny").values()) == {b"- old\n"}


def test_a_push_that_was_killed_leaves_nothing_and_is_whole_the_next_time(hub, tiny_text):
    final = train(load_recipe(tiny_text))
    hub.fault = lambda request: "stall" if "lfs" in request else None
    command = [sys.executable, "scripts/push_to_hub.py", final, "me/tiny"]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **hub.environment}, stderr=subprocess.DEVNULL)
    while not any("lfs" in request for request in hub.requests):
        time.sleep(0.05)
        assert process.poll() is None
    process.kill()
    process.wait()
    assert hub.files("me/tiny") == {}
    hub.fault = lambda request: None
    done = run_python(*command[1:], **hub.environment)
    assert (done.returncode, done.stdout) == (0, "pushed to me/tiny\n"), done.stderr
    assert is_on(hub, final)


def test_a_native_model_and_a_checkpoint_on_request(hub, tiny_text, tmp_path):
    final = train(load_recipe(tiny_text))
    push_folder(final, "me/tiny", True, "first as it is", {"recipe.yaml": final.parent / "recipe.yaml"})
    done = run_python("scripts/push_to_hub.py", final, "me/tiny", "--native", "--checkpoint", **hub.environment)
    assert done.returncode == 0, done.stderr
    files = hub.files("me/tiny")
    assert json.loads(files["config.json"])["model_type"] == "gpt2"
    assert b'from_pretrained("me/tiny")' in files["README.md"] and b"model-index" in files["README.md"]
    assert not any(name.endswith(".py") for name in files if "checkpoints" not in name)
    for name, content in files.items():
        (tmp_path / "back" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / name).write_bytes(content)
    assert is_whole(tmp_path / "back" / "checkpoints" / "step-00000006")
    # No path of this machine, such as those of the text and of the outputs, is published.
    assert not any(str(tmp_path.parent).encode() in content for content in files.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("nowhere", "me/tiny"), "model: expected a saved model's folder"), ((".", "me/a/b"), "repo_id: ")],
)
def test_what_cannot_be_pushed_is_refused(arguments, message):
    done = run_python("scripts/push_to_hub.py", *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_nothing_private_goes_to_a_public_repository(hub, tiny_text):
    final = train(load_recipe(tiny_text, [*PUSH, "--hub.private=false"]))
    assert not hub.repos["models", "me/tiny"].private
    with pytest.raises(ConnectionError, match="me/tiny is public"):
        push_folder(final, "me/tiny", True, "test")


def test_a_repository_with_another_model_is_left_alone_unless_told(hub, tiny_text, capsys):
    train(load_recipe(tiny_text, [*PUSH, "--run.name=one"]))
    before = hub.files("me/tiny")
    final = train(load_recipe(tiny_text, [*PUSH, "--run.name=two"]))
    assert "me/tiny holds the model of run one; scripts/push_to_hub.py --replace" in capsys.readouterr().out
    assert hub.files("me/tiny") == before
    done = run_python("scripts/push_to_hub.py", final, "me/tiny", **hub.environment)
    assert done.returncode == 2 and "repo_id: not pushed" in done.stderr and "holds the model of run one" in done.stderr
    assert hub.files("me/tiny") == before
    done = run_python("scripts/push_to_hub.py", final, "me/tiny", "--replace", **hub.environment)
    assert done.returncode == 0, done.stderr
    require_own("tiny", final.parent / "recipe.yaml")  # in the token's namespace
    with pytest.raises(ConnectionError, match="holds the model of run two"):
        require_own("me/tiny", None)


def test_the_repository_is_checked_before_the_run(tiny_text):
    with pytest.raises(UserError, match=r"hub\.repo_id"):
        load_recipe(tiny_text, ["--hub.push=true", "--run.name=not a name"])


def test_the_sources_of_a_mixture_are_configurations_of_a_dataset(hub, write_recipe, text_file, stories_file, tmp_path):
    sources = [{"path": "text", "data_files": str(text_file)}, {"path": "json", "data_files": str(stories_file)}]
    recipe = write_recipe(
        data={"sources": sources, "block_size": 16},
        tokenizer={"train": {"kind": "char"}},
        model={"model_type": "nanogpt"},
        training={"max_steps": 1},
    )
    done = run_python("scripts/prepare_data.py", recipe, "--push", "me/data", **hub.environment)
    assert done.returncode == 0, done.stderr
    assert b"| stories, train | 36 |" in hub.files("me/data", "datasets")["README.md"]
    taken = [{"path": "me/data", "name": name, "label": name} for name in ("text", "stories")]
    options = [f"--data.sources={json.dumps(taken)}", "--tokenizer.train=null", "--training.batch_size=2"]
    done = run_python("train.py", recipe, *options, **hub.environment, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert "eval/loss/stories" in (tmp_path / "outputs" / "tiny" / "metrics.jsonl").read_text()


def test_built_data_go_to_the_hub_and_back(hub, tiny_text, tmp_path):
    built = prepare_data(load_recipe(tiny_text))
    done = run_python("scripts/prepare_data.py", tiny_text, "--push", "me/data", **hub.environment)
    assert done.returncode == 0, done.stderr
    card = hub.files("me/data", "datasets")["README.md"].decode()
    assert f"| train | 1 | {summarize(built.folder)['train']['tokens']:,} |" in card and "kind: char" in card
    read = "import datasets; print(datasets.load_dataset('me/data')['validation']['input_ids'][0][:9])"
    elsewhere = hub.environment | {"HF_HOME": str(tmp_path / "home")}
    done = run_python("-c", read, **elsewhere)
    expected = next(iter(built.splits["validation"].stream))[:9].tolist()
    assert done.returncode == 0 and done.stdout.strip() == str(expected), done.stderr
    taken = ["--data.path=me/data", "--data.data_files=null", "--tokenizer.train=null"]
    done = run_python("train.py", tiny_text, *taken, **elsewhere)
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "outputs" / "tiny" / "final")
    assert tokenizer.get_vocab() == built.tokenizer.get_vocab()
