"""lm-eval, an independent implementation, finds the same figures to four decimals."""

import pytest
from accelerate import Accelerator
from conftest import ROOT, needs

from cleangpt import load_recipe, train
from cleangpt.evaluation.evaluate import evaluate
from cleangpt.evaluation.grading import grade
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
