"""Recipes: read, merged, checked; every mistake told under its key."""

import shutil

import pytest
import yaml
from conftest import ROOT, run_python

from cleangpt import UserError, load_recipe
from cleangpt.models.build import load_config
from cleangpt.recipe.reading import parse_recipe

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def problems(path, *overrides) -> dict[str, str]:
    """The mistakes that loading tells, key to message."""
    with pytest.raises(UserError) as error:
        load_recipe(path, overrides)
    return dict(error.value.problems)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_file_loads(path):
    assert load_recipe(path).run.name == path.stem


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_written_and_read_again_is_the_same(path, tmp_path):
    recipe = load_recipe(path)
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize("template", ["{question} {answer}", "{question}", "Q: {question}", "'{a}: {b}'", '"{a}\\n"'])
def test_a_template_is_written_as_it_reads(template):
    recipe = load_recipe(ROOT / "recipes" / "tinystory.yaml", [f"--data.template={template}"])
    assert recipe.data.template == template.strip("'\"").replace("\\n", "\n")


def test_the_command_line_wins_over_the_file_and_the_file_over_its_base(write_recipe, tmp_path):
    write_recipe("below", data={"path": "addition"}, training={"max_steps": 1, "batch_size": 2}, model={"n_embd": 8})
    top = tmp_path / "top.yaml"
    top.write_text(
        yaml.safe_dump({"base": "below.yaml", "training": {"batch_size": 3}, "model": {"model_type": "nanogpt"}})
    )
    recipe = load_recipe(top, ["--optimizer.lr=3e-4", "--model.hidden_size=24", "--model.n_head=2"])
    assert recipe.training.max_steps == 1
    assert recipe.training.batch_size == 3
    assert recipe.optimizer.lr == 3e-4
    assert recipe.model == {"model_type": "nanogpt", "hidden_size": 24, "num_attention_heads": 2}
    assert recipe.run.name == "top"


def test_a_null_model_key_is_left_out(tiny_adder):
    assert "bias" not in load_recipe(tiny_adder, ["--model.bias=null"]).model


def test_model_keys_keep_their_order(tiny_adder):
    options = [f"--model.{key}=8" for key in ("vocab_size", "intermediate_size", "max_position_embeddings")]
    keys = [key for key in load_recipe(tiny_adder, options).model if key != "model_type"]
    written = ["hidden_size", "num_attention_heads", "num_hidden_layers"]  # PyYAML sorted the fixture's
    assert keys == [*written, "vocab_size", "intermediate_size", "max_position_embeddings"]


def test_a_base_that_builds_on_itself_is_refused(tmp_path):
    (tmp_path / "loop.yaml").write_text("base: loop.yaml")
    assert "itself" in problems(tmp_path / "loop.yaml")["base"]


def test_the_contract_line(tiny_adder):
    message = problems(tiny_adder, "--optimizer.lr=fast")["optimizer.lr"]
    assert f"optimizer.lr: {message}" == "optimizer.lr: expected a number above 0, got 'fast'"


def test_a_typo_gets_the_nearest_key(tiny_adder):
    found = problems(tiny_adder, "--training.max_stepz=3", "--trainin.x=1", "--model.n_heads=2")
    assert "max_steps" in found["training.max_stepz"]
    assert "training" in found["trainin"]
    assert "n_head" in found["model.n_heads"]


def test_all_mistakes_are_told_at_once(tiny_text):
    found = problems(
        tiny_text,
        "--optimizer.lr=-1",
        "--optimizer.nam=adamw",
        "--model.num_attention_heads=3",
        "--data.data_files=missing.txt",
        "--run.seed=x",
    )
    assert set(found) == {
        "optimizer.lr", "optimizer.nam", "model.num_attention_heads", "data.data_files", "run.seed"
    }  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [
        {"run.seed": "x", "training.micro_batch_size": "99"},
        {"training.batch_size": "0", "tracking.log_every": "0", "hub.repo_id": "a/b/c"},
        {"data.num_proc": "x", "data.split": "{train: 2}", "training.micro_batch_size": "99"},
        {"data.path": "null", "model.n_hed": "3", "schedule.accumulation.begin": "0.5"},
        {"tokenizer": "3", "data.data_files": "missing.txt"},
    ],
)
def test_a_mistake_hides_no_other(tiny_text, overrides):
    found = problems(tiny_text, "nonsense", *(f"--{key}={value}" for key, value in overrides.items()))
    assert set(found) == {"nonsense", *overrides}


def test_what_depends_on_a_mistake_is_no_mistake(tiny_text):
    found = problems(tiny_text, "--training.batch_size=big", "--training.micro_batch_size=99")
    assert set(found) == {"training.batch_size"}


def test_heads_left_out_are_as_many_as_there_are():
    model = {"model_type": "qwen3", "num_attention_heads": 4}
    assert load_config(model).num_key_value_heads == 4
    assert load_config({**model, "num_key_value_heads": 2}).num_key_value_heads == 2


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("--model={model_type: qwen3, num_attention_heads: 4, num_key_value_heads: 3}", "model.num_key_value_heads"),
        ("--run.seed=18446744073709551616", "run.seed"),
        ("--schedule.lr={style: wsd, warmup_ratio: 0.9}", "schedule.lr.decay_ratio"),
        ("--training.batch_size=0", "training.batch_size"),
        ("--training.batch_size=2.5", "training.batch_size"),
        ("--training.micro_batch_size=99", "training.micro_batch_size"),
        ("--training.max_epochs=1", "training.max_steps"),
        ("--training.mixed_precision=fp8", "training.mixed_precision"),
        ("--optimizer.betas=[0.9]", "optimizer.betas"),
        ("--optimizer.lr=.nan", "optimizer.lr"),
        ("--schedule.lr.style=step", "schedule.lr.style"),
        ("--schedule.lr.warmup_ratio=1.5", "schedule.lr.warmup_ratio"),
        ("--schedule.accumulation.begin=0.5", "schedule.accumulation.begin"),
        ("--data.split={train: 0.9, validation: 0.2}", "data.split"),
        ("--data.data_files=[]", "data.data_files"),
        ("--data=3", "data"),
        ("--tokenizer.path=somewhere", "tokenizer"),
        ("--checkpoint.metric=eval/accuracy", "checkpoint.metric"),
        ("--model.model_type=nanogtp", "model.model_type"),
        ("--model.model_type=vit", "model.model_type"),
        ("--model.hidden_size=wide", "model.hidden_size"),
        ("--model.activation_function=swish", "model.activation_function"),
        ("--model.dropout=1.5", "model.dropout"),
        ("--hub={push: true, repo_id: a/b/c}", "hub.repo_id"),
        ("--training.max_steps=[", "--training.max_steps=["),
        ("training.max_steps=3", "training.max_steps=3"),
    ],
)
def test_a_mistake_is_told_under_its_key(tiny_text, override, key):
    assert key in problems(tiny_text, override)


def test_an_unquoted_no_is_a_precision(tiny_adder):
    assert load_recipe(tiny_adder, ["--training.mixed_precision=no"]).training.mixed_precision == "no"


def test_arithmetic_has_no_bytes(tiny_adder):
    assert "no bytes" in problems(tiny_adder, "--checkpoint.metric=eval/bits_per_byte")["checkpoint.metric"]


@pytest.mark.parametrize(
    "content", ["", "- 1", "data: [", "\x00", "data: !!python/object/apply:os.system [ls]", "a: 1\na: 2"]
)
def test_a_file_that_is_no_recipe_is_an_error(tmp_path, content):
    (tmp_path / "bad.yaml").write_text(content)
    assert problems(tmp_path / "bad.yaml")


def test_a_missing_recipe_is_an_error(tmp_path):
    assert str(tmp_path / "none.yaml") in problems(tmp_path / "none.yaml")


def test_plain_values_make_a_recipe():
    recipe = parse_recipe(
        {"data": {"path": "addition"}, "model": {"model_type": "qwen3"}, "training": {"max_steps": 1}}, "x"
    )
    assert recipe.folder.as_posix() == "outputs/x"


def test_errors_are_lines_on_stderr_with_exit_code_2(tiny_adder):
    done = run_python("train.py", tiny_adder, "--optimizer.lr=fast", "--training.max_stepz=3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert sorted(line.split(":")[0] for line in done.stderr.splitlines()) == ["error", "error"]
    assert "error: optimizer.lr: expected a number above 0, got 'fast'" in done.stderr.splitlines()


SHOW_HELP = """
import runpy, sys
sys.argv, sys.path[0] = ["train.py", "--help"], "."
try:
    runpy.run_path("train.py", run_name="__main__")
finally:
    print("loaded:", [name for name in ("datasets", "wandb", "matplotlib", "cleangpt.training") if name in sys.modules])
"""


def test_help_lists_every_key_and_loads_no_trainer():
    done = run_python("-c", SHOW_HELP)
    assert done.returncode == 0
    for key in (
        "--optimizer.lr",
        "--training.early_stopping.patience",
        "--schedule.lr.style",
        "--tokenizer.train.kind",
    ):
        assert key in done.stdout
    assert "The peak learning rate." in done.stdout
    assert done.stdout.endswith("loaded: []\n")


def test_conversations_are_packed_as_documents(write_recipe, stories_file):
    data = {"path": "json", "data_files": str(stories_file), "messages_column": "messages"}
    model, training = {"model_type": "nanogpt", "n_embd": 8, "n_head": 2}, {"max_steps": 1}
    options = {"model": model, "training": training}
    chat = {"train": {"kind": "char", "chat": True}}
    recipe = load_recipe(write_recipe(data=data, tokenizer=chat, **options))
    assert recipe.data.packing == "documents"
    path = write_recipe(data=data, tokenizer={"train": {"kind": "char"}}, **options)
    wrong = problems(path, "--data.packing=blocks", "--data.template=The {a}")
    assert wrong == {
        "data.packing": "conversations are packed as documents, remove the key, got blocks",
        "data.template": "conversations have the tokenizer's, remove one of template and data.messages_column",
        "tokenizer.train.chat": "expected true, as data.messages_column needs a chat template",
    }
    assert "lines of text have no columns" in problems(path, "--data.path=text")["data.messages_column"]


def test_a_missing_file_that_make_writes_says_so(tmp_path, monkeypatch):
    shutil.copy(ROOT / "Makefile", tmp_path)
    monkeypatch.chdir(tmp_path)
    message = problems(ROOT / "recipes" / "chat_adder.yaml")["data.data_files"]
    assert message.endswith("got 'data/chat_adder/train.jsonl': `make data/chat_adder/train.jsonl` writes it")
