"""Commands in the documents: those under `<!-- run -->` run on tiny data; of others recipe and flags are checked."""

import contextlib
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT, needs

from cleangpt import load_recipe, train
from cleangpt.data.prepare import prepare_data
from cleangpt.data.stream import summarize
from cleangpt.reporting.card import HOME

PAGES = sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("README*.md")])
RECIPES = sorted(path.stem for path in ROOT.glob("recipes/*.yaml"))
STEPS = ["--training.max_steps=2", "--training.macro_batch=2", "--training.batch_size=4", "--evaluation.max_batches=1"]
SPLIT = "--data.split={train: 0.001, validation: 0.0001, test: 0.0001}"


def commands(page: Path, only_run: bool) -> list[list[str]]:
    """The words of each command line in a page's bash blocks, comments and continued lines taken care of."""
    found = []
    for mark, block in re.findall(r"(<!-- run -->\n)?```bash\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and (mark or not only_run):
                found.append(words)
    return found


@pytest.mark.parametrize("name", ["README_zh.md", "first-model.md", "your-text.md", "recipes.md", "results.md"])
def test_a_chinese_page_has_the_commands_of_the_english_one(name):
    chinese, english = ROOT / "docs" / "zh" / name, ROOT / "docs" / name
    if name == "README_zh.md":
        chinese, english = ROOT / name, ROOT / "README.md"
    for only_run in (False, True):
        assert commands(chinese, only_run) == commands(english, only_run)


def ours(words: list[str]) -> tuple[str, list[str]] | None:
    """`train.py` or a script, and its arguments; None for a command that is not ours."""
    place = next((i for i, word in enumerate(words) if re.fullmatch(r"train\.py|scripts/\w+\.py", word)), None)
    return None if place is None else (words[place], words[place + 1 :])


def run(script: str, arguments: list[str], monkeypatch) -> str:
    """Runs a script in this process; what it printed."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(ROOT / Path(script).parent)  # as Python does for a script
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert end.value.code in (0, None), (script, arguments)
    return output.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_name_recipes_scripts_and_flags_that_there_are(page, text_file, monkeypatch):
    monkeypatch.chdir(ROOT)
    helps = {}
    for script, arguments in filter(None, map(ours, commands(page, only_run=False))):
        assert (ROOT / script).is_file(), script
        flags = [argument for argument in arguments if argument.startswith("--")]
        dotted = [flag for flag in flags if "." in flag.split("=")[0]]
        recipe = next((argument for argument in arguments if re.fullmatch(r"recipes/\w+\.yaml", argument)), None)
        if recipe is not None:
            here = [re.sub(r"(my_own|YOUR)\.txt", str(text_file), flag) for flag in dotted]
            here = [re.sub(r"(?<=trackers=)\[.*\]", "[]", flag) for flag in here]  # they are packages of their own
            here = [re.sub(r"(?<=lm_eval=)\{.*\}", "null", flag) for flag in here]  # and so is this
            load_recipe(recipe, here)
        if script != "train.py":
            command = (script, *arguments[:1]) if script == "scripts/benchmark.py" else (script,)
            helps[command] = helps.get(command) or run(script, [*command[1:], "--help"], monkeypatch)
            for flag in set(flags) - set(dotted):
                assert flag.split("=")[0] in helps[command], f"{command} {flag}"


def test_tables_of_keys_name_keys_that_there_are(text_file):
    keys = set()
    for page in (ROOT / "docs" / "from-nanogpt.md", ROOT / "docs" / "scaling.md", ROOT / "docs" / "your-text.md"):
        keys |= set(re.findall(r"`(?:--)?((?:training|optimizer|schedule|evaluation|checkpoint|tracking)(?:\.\w+)+)",
                               page.read_text()))  # fmt: skip
    recipe = load_recipe(ROOT / "recipes" / "adder.yaml").to_dict()
    assert len(keys) > 20
    for key in keys:
        section = recipe
        for part in key.split("."):
            assert part in section, key
            section = section[part]


def test_the_tests_that_proof_names_exist():
    named = re.findall(r"(test_\w+\.py)::(test_\w+)", (ROOT / "docs" / "proof.md").read_text())
    assert len(named) > 50
    missing = [f"{file}::{name}" for file, name in named if not defines(ROOT / "tests" / file, name)]
    assert not missing


def defines(file: Path, name: str) -> bool:
    return file.exists() and re.search(rf"^def {name}\(", file.read_text(), re.MULTILINE) is not None


@pytest.fixture
def workshop(tmp_path, monkeypatch, text_file) -> Path:
    """A folder to run in that has the project's recipes and a text."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "my_own.txt").write_text(text_file.read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_on_data_reads_what_was_built(tiny_text, capsys):
    folder = prepare_data(load_recipe(tiny_text, ["--data.block_size=16"])).folder
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)
    exec(code.replace('"..."', repr(str(folder))), {})
    assert capsys.readouterr().out.splitlines()[-1] == str(summarize(folder)["train"]["tokens"])


@pytest.mark.parametrize("name", ["first-model", "your-text", "your-architecture", "data"])
def test_what_a_page_tells_to_run_runs(name, workshop, monkeypatch):
    if name == "first-model":  # what `make train` leaves
        train(load_recipe("recipes/adder.yaml", [*STEPS, SPLIT]))
    found = commands(ROOT / "docs" / f"{name}.md", only_run=True)
    assert found
    for words in found:
        script, arguments = ours(words)
        arithmetic = [SPLIT] if "recipes/adder.yaml" in arguments else []
        tiny = {"train.py": STEPS + arithmetic, "scripts/evaluate_model.py": arithmetic}.get(script, [])
        run(script, [*arguments, *tiny], monkeypatch)
    assert name == "data" or list((workshop / "outputs").glob("*/final/README.md"))


@needs("nbclient", "ipykernel", extra="docs")
def test_the_notebook_runs(workshop):
    import nbclient
    import nbformat

    for name in ("train.py", "scripts"):
        (workshop / name).symlink_to(ROOT / name)
    notebook = nbformat.read(ROOT / "docs" / "first-model.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    assert HOME in parameters.source
    parameters.source += f"\nCHANGES = {[*STEPS, SPLIT]}"
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    shown = [output.data for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]
    assert sum("image/png" in data for data in shown) == 2  # the curves and the heat map
    assert (workshop / "outputs" / "smaller" / "final" / "README.md").exists()
