"""lm-eval, an independent implementation, finds the same figures to four decimals."""

import re

import pytest
from accelerate import Accelerator
from conftest import ROOT, needs, read_metrics, run_python
from huggingface_hub import ModelCard

from cleangpt import UserError, load_recipe, train
from cleangpt.evaluation.evaluate import evaluate
from cleangpt.evaluation.grading import grade
from cleangpt.evaluation.tasks import evaluate_tasks, load_tasks
from cleangpt.models.build import load_model
from cleangpt.training.setup import load_data

pytestmark = needs("lm_eval")


def run_lm_eval(model, task: str, recipe, overrides: list[str]) -> dict[str, float]:
    """What `lm_eval run --include_path lm_eval_tasks` reports, without the names of its filters."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    choice = {"recipe": str(recipe), "overrides": overrides}
    tasks = TaskManager(include_path=str(ROOT / "lm_eval_tasks"), include_defaults=False, metadata=choice)
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model)},
        tasks=[task],
        task_manager=tasks,
        batch_size=64,
        device="cpu",
        bootstrap_iters=0,
    )["results"][task]
    return {name.split(",")[0]: value for name, value in results.items()}


@pytest.mark.parametrize("path", ["addition", "multiplication"])
@pytest.mark.parametrize("options", [[], ["--data.zero_pad=false", "--data.reverse_answer=false"]], ids=["", "plain"])
def test_accuracy(tiny_adder, path, options):
    options = [f"--data.path={path}", "--data.num_digits=2", *options]
    learn = ["--training.max_steps=150", "--training.macro_batch=150", "--optimizer.lr=0.01"]
    learn += ["--training.batch_size=64", "--model.hidden_size=32", "--tracking.log_every=50"]
    final = train(load_recipe(tiny_adder, [*options, *learn]))
    _, data = load_data(load_recipe(tiny_adder, options))
    ours, _ = grade(Accelerator(cpu=True), load_model(final).eval(), data.tokenizer, data.splits["test"], 100)
    theirs = run_lm_eval(final, f"cleangpt_{path}", tiny_adder, options)
    assert 0 < ours["accuracy"] < 1
    assert theirs["exact_match"] == pytest.approx(ours["accuracy"], abs=5e-5)


@pytest.mark.parametrize("kind", ["char", "bpe", "documents", "packed"])
def test_text(tiny_text, stories_file, kind):
    options = [] if kind == "char" else ["--tokenizer.train.kind=bpe", "--tokenizer.train.vocab_size=300"]
    if kind in ("documents", "packed"):
        options += ["--data.path=json", f"--data.data_files={stories_file}", "--data.block_size=64"]
    if kind == "packed":
        options += ["--data.packing=documents"]
    final = train(load_recipe(tiny_text, [*options, "--training.max_steps=30", "--optimizer.lr=0.01"]))
    _, data = load_data(load_recipe(tiny_text, options))
    ours = evaluate(Accelerator(cpu=True), load_model(final), data.splits["validation"], 10)
    theirs = run_lm_eval(final, "cleangpt_perplexity", tiny_text, options)
    assert set(ours) == {"loss", "perplexity", "bits_per_byte"}
    for name, value in ours.items():
        assert theirs[name] == pytest.approx(value, abs=5e-5), name


def test_a_run_measures_tasks_as_its_own_and_ends_with_the_same_bytes(tiny_adder):
    """At each boundary, on the validation split; evaluate_model.py measures as the run does."""
    learn = ["--data.num_digits=2", "--training.max_steps=60", "--training.macro_batch=30", "--optimizer.lr=0.01"]
    tasks = ["--evaluation.lm_eval={tasks: [cleangpt_addition]}", "--run.name=with"]
    plain, with_tasks = (train(load_recipe(tiny_adder, [*learn, *options])) for options in ([], tasks))
    assert (plain / "model.safetensors").read_bytes() == (with_tasks / "model.safetensors").read_bytes()
    lines = [line for line in read_metrics(with_tasks.parent) if "eval/accuracy" in line]
    assert [line["step"] for line in lines] == [0, 30, 60]
    assert [line["eval/exact_match/cleangpt_addition"] for line in lines] == [line["eval/accuracy"] for line in lines]
    results = ModelCard.load(with_tasks / "README.md").data.eval_results
    assert ("exact_match", "cleangpt_addition") in {(result.metric_type, result.dataset_name) for result in results}


WORK = """
import sys
from cleangpt import load_recipe, train
from cleangpt.training.launch import join_processes
if "sharded" in sys.argv:
    from sharded import shard_on_cpus
    shard_on_cpus()
join_processes()
train(load_recipe(sys.argv[1], sys.argv[3:]))
"""


@pytest.mark.parametrize(("kind", "limit"), [("ddp", 7), ("ddp", 1), ("sharded", 7)])
def test_two_processes_measure_what_one_does(tiny_text, tmp_path, kind, limit):
    tasks = f"--evaluation.lm_eval={{tasks: [cleangpt_perplexity], limit: {limit}}}"
    options = [tasks, "--training.max_steps=20", "--training.macro_batch=20", "--optimizer.lr=0.01"]
    one = train(load_recipe(tiny_text, [*options, "--run.name=one"])).parent
    (tmp_path / "work.py").write_text(WORK)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "work.py"]
    done = run_python(*launch, tiny_text, kind, *options, f"--run.name={kind}", PYTHONPATH=str(ROOT / "tests"))
    assert done.returncode == 0, done.stderr
    name = "eval/loss/cleangpt_perplexity"
    expected, found = (
        [line[name] for line in read_metrics(folder) if name in line] for folder in (one, one.with_name(kind))
    )
    assert len(found) == 2 and found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("cleangpt_adition", "unknown task 'cleangpt_adition', did you mean cleangpt_addition?"),
        ("cleangpt_perplexity", "cleangpt_perplexity cannot be loaded"),  # which is for text
    ],
)
def test_a_task_that_cannot_be_run_is_refused(tiny_adder, task, message):
    with pytest.raises(UserError, match=f"evaluation.lm_eval.tasks: {re.escape(message)}"):
        train(recipe := load_recipe(tiny_adder, [f"--evaluation.lm_eval.tasks=[{task}]"]))
    assert not recipe.folder.exists()


def test_a_task_for_which_the_model_has_too_few_positions_is_refused(tiny_text):
    longer = ["--evaluation.lm_eval={tasks: [cleangpt_perplexity], limit: 3}", "--data.block_size=32"]
    recipe, model = load_recipe(tiny_text, longer), load_model(train(load_recipe(tiny_text)))
    _, data = load_data(recipe)
    with pytest.raises(UserError, match=r"lm_eval.tasks: cleangpt_perplexity: a model of 16 positions cannot do them"):
        evaluate_tasks(Accelerator(cpu=True), model, data.tokenizer, load_tasks(recipe), 16, 3)


def test_the_task_says_how_much_is_written_not_the_model(tiny_adder):
    options = ["--evaluation.lm_eval={tasks: [cleangpt_addition], limit: 3}"]
    recipe = load_recipe(tiny_adder, options)
    (_, data), model, seen = load_data(recipe), load_model(train(recipe)), []
    model.generation_config.max_new_tokens = 1  # an answer has two
    generate = model.generate
    model.generate = lambda *args, **kwargs: seen.append(generate(*args, **kwargs)) or seen[-1]
    evaluate_tasks(Accelerator(cpu=True), model, data.tokenizer, load_tasks(recipe), 16, 3)
    assert seen and all(ids.shape[1] == 4 + 2 for ids in seen)
    assert model.generation_config.max_new_tokens == 1


def test_averaged_weights_are_measured_too(tiny_text):
    options = ["--training.ema=0.9", "--evaluation.lm_eval={tasks: [cleangpt_perplexity]}"]
    lines = read_metrics(train(load_recipe(tiny_text, options)).parent)
    last = [line for line in lines if "eval/loss" in line][-1]
    for name in ("eval/loss", "eval/ema/loss"):
        assert last[f"{name}/cleangpt_perplexity"] == pytest.approx(last[name], abs=1e-5)
