"""The loop: exact accumulation, exact resume, every recipe runs, the result loads."""

import json
import shutil
import statistics

import pytest
import torch
from conftest import ROOT, read_metrics, run_python
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline

from cleangpt import UserError, load_recipe, train
from cleangpt.data.tokenization import bpe_tokenizer
from cleangpt.models.build import choose_attention
from cleangpt.training.checkpoint import list_checkpoints
from cleangpt.training.setup import build_run, find_run, resolve
from cleangpt.training.step import accumulate, step_seed


def losses(folder) -> list[float]:
    return [line["train/loss"] for line in read_metrics(folder) if "train/loss" in line]


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def without_times(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in ("elapsed_s", "tokens_per_second", "mfu")} for line in lines]


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


TINY_MODEL = ["--model.hidden_size=16", "--model.num_hidden_layers=1", "--model.num_attention_heads=2"]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_runs(path, tmp_path, text_file, stories_file, conversations_file):
    options = [*TINY_MODEL, f"--run.output_dir={tmp_path}", "--training.max_steps=2", "--training.batch_size=4"]
    options += ["--training.micro_batch_size=2", "--evaluation.num_problems=10", "--evaluation.max_batches=2"]
    if "shakespeare" in path.stem:
        options += [f"--data.data_files={text_file}", "--data.block_size=16"]
    if "tinystory" in path.stem:
        options += ["--data.path=json", f"--data.data_files={stories_file}", "--data.block_size=32"]
        options += ["--tokenizer.train.vocab_size=300"]
    if "finetune" in path.stem:
        tiny = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=16)
        GPT2LMHeadModel(tiny).save_pretrained(tmp_path / "gpt2")
        bpe_tokenizer([text_file.read_text()], 300).save_pretrained(tmp_path / "gpt2")
        options = [option for option in options if "--model" not in option]
        options += [f"--data.data_files={text_file}", "--data.block_size=16"]
        options += [f"--model.init_from={tmp_path / 'gpt2'}", f"--tokenizer.path={tmp_path / 'gpt2'}"]
    if "chat" in path.stem:
        options += [f"--data.data_files={conversations_file}", "--data.block_size=64"]
    elif "multiplier" in path.stem or "adder" in path.stem:
        options += ["--data.num_digits=1"]
    recipe = load_recipe(path, options)
    final = train(recipe)
    assert json.loads((final / "config.json").read_text())["model_type"] == recipe.model.get("model_type", "gpt2")
    assert (final / "README.md").read_text().startswith("---")


TRAIN = """
import sys
from cleangpt import load_recipe, train
train(load_recipe(sys.argv[1], ["--run.name=again"]))
print("loaded:", [name for name in ("datasets", "pandas", "evaluate", "wandb") if name in sys.modules])
"""


def test_a_run_on_built_data_loads_no_library_that_it_does_not_need(tiny_text):
    train(load_recipe(tiny_text))
    done = run_python("-c", TRAIN, tiny_text)
    assert done.stdout.endswith("loaded: []\n")


COMMAND = """
import gc, runpy, sys
import cleangpt.training.loop
cleangpt.training.loop.train = lambda recipe: print("collects garbage:", gc.isenabled())
sys.argv = ["train.py", sys.argv[1]]
runpy.run_path("train.py", run_name="__main__")
"""


def test_the_command_collects_garbage_while_it_trains(tiny_text):
    done = run_python("-c", COMMAND, tiny_text)
    assert done.stdout == "collects garbage: True\n"


def test_any_causal_model_of_transformers_trains(tiny_adder):
    options = ["--model.model_type=qwen3", "--model.intermediate_size=32", "--model.num_key_value_heads=1"]
    final = train(load_recipe(tiny_adder, [*options, "--model.head_dim=8"]))
    assert AutoModelForCausalLM.from_pretrained(final).config.model_type == "qwen3"


def test_a_run_leaves_what_it_promises(tiny_text, tmp_path):
    recipe = load_recipe(tiny_text, ["--run.name=mine"])
    assert train(recipe) == tmp_path / "outputs" / "mine" / "final"
    folder = recipe.folder
    assert load_recipe(folder / "recipe.yaml") == resolve(recipe)[0]
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000006"]
    for model in (folder / "best", folder / "final", folder / "checkpoints" / "step-00000006" / "model"):
        config = AutoModelForCausalLM.from_pretrained(model).config
        tokenizer = AutoTokenizer.from_pretrained(model)
        assert config.vocab_size == len(tokenizer)
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.max_position_embeddings == 16
    lines = read_metrics(folder)
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 3, 6]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["tokens"] == 6 * 4 * 16
    for key in ("lr", "weight_decay", "accumulation", "grad_norm", "tokens_per_second", "elapsed_s"):
        assert key in lines[2]
    for key in ("eval/perplexity", "eval/bits_per_byte", "data/coverage", "data/visits"):
        assert key in lines[-1]


def test_the_result_speaks_through_a_pipeline(tiny_text):
    speak = pipeline("text-generation", str(train(load_recipe(tiny_text))))
    text = speak("The ")[0]["generated_text"]
    assert text.startswith("The ") and len(text) > 4


def test_plain_transformers_calls_read_an_answer(tiny_adder):
    learn = ["--training.max_steps=300", "--training.macro_batch=300", "--optimizer.lr=0.01"]
    final = train(load_recipe(tiny_adder, [*learn, "--model.hidden_size=32", "--training.batch_size=32"]))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    text = tokenizer.decode(model.generate(**tokenizer("3+4=", return_tensors="pt"))[0])
    assert text == "3+4=70"


@pytest.mark.parametrize("packing", ["windows", "blocks", "documents"])
def test_every_packing_trains(write_recipe, stories_file, packing):
    recipe = write_recipe(
        data={"path": "json", "data_files": str(stories_file), "block_size": 24, "packing": packing},
        tokenizer={"train": {"kind": "bpe", "vocab_size": 300}},
        model={"model_type": "nanollama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        training={"max_steps": 60, "batch_size": 8, "macro_batch": 60},
        optimizer={"lr": 1e-2},
    )
    train(recipe := load_recipe(recipe))
    evaluations = [line["eval/loss"] for line in read_metrics(recipe.folder) if "eval/loss" in line]
    assert evaluations[-1] < evaluations[0] - 1


@pytest.mark.parametrize("packing", ["windows", "documents"])
def test_micro_steps_leave_the_gradient_as_it_is(tiny_text, stories_file, packing):
    """Ragged numbers of targets included, in float64 to 1e-12."""
    options = ["--data.path=json", f"--data.data_files={stories_file}", f"--data.packing={packing}"]
    options += ["--tokenizer.train.kind=bpe", "--tokenizer.train.vocab_size=300"]
    gradients = []
    for size in (4, 3, 1):
        recipe = load_recipe(
            tiny_text, [*options, f"--training.micro_batch_size={size}", f"--run.name={packing}{size}"]
        )
        run = build_run(*find_run(recipe))
        run.model.double()
        loss = accumulate(run.accelerator, run.model, run.loader.batch(1))
        gradients.append((torch.cat([weight.grad.flatten() for weight in run.model.parameters()]), loss))
    for gradient, loss in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0][0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(loss, gradients[0][1], rtol=1e-6, atol=0)


def test_a_growing_batch_is_seen_in_the_tokens(tiny_text):
    options = [
        "--schedule.accumulation.style=linear",
        "--schedule.accumulation.begin=1",
        "--schedule.accumulation.end=3",
    ]
    train(recipe := load_recipe(tiny_text, options))
    lines = [line for line in read_metrics(recipe.folder) if "train/loss" in line]
    assert [line["accumulation"] for line in lines] == [1, 2, 2, 2, 3, 3]
    assert lines[-1]["tokens"] == sum(line["accumulation"] for line in lines) * 4 * 16


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tiny_text, optimizer):
    """Stopped after its first boundary, dropout on."""
    options = ["--model.dropout=0.2", f"--optimizer.name={optimizer}", "--checkpoint.keep_last=9"]
    whole = load_recipe(tiny_text, [*options, "--run.name=whole"])
    train(whole)
    first = list_checkpoints(whole.folder)[0]
    resumed = load_recipe(tiny_text, [*options, "--run.name=resumed", f"--training.resume={first}"])
    train(resumed)
    assert losses(resumed.folder) == losses(whole.folder)[3:]
    assert_same_weights(weights(resumed.folder / "final"), weights(whole.folder / "final"))
    ends = [list_checkpoints(folder)[-1] / "optimizer.safetensors" for folder in (whole.folder, resumed.folder)]
    assert_same_weights(load_file(ends[0]), load_file(ends[1]))


def test_evaluation_leaves_the_training_run_alone(tiny_text):
    """With dropout and samples, after every step or only at the end: the same weights bit for bit."""
    options = ["--model.dropout=0.2", "--training.macro_batch=1", "--evaluation.prompts=[The, A]"]
    train(often := load_recipe(tiny_text, [*options, "--run.name=often"]))
    train(rarely := load_recipe(tiny_text, [*options, "--run.name=rarely", "--evaluation.every=100"]))
    assert sum("eval/loss" in line for line in read_metrics(often.folder)) == 7
    assert sum("eval/loss" in line for line in read_metrics(rarely.folder)) == 2
    assert losses(often.folder) == losses(rarely.folder)
    assert_same_weights(weights(often.folder / "final"), weights(rarely.folder / "final"))


def test_without_an_evaluation_before_training_the_run_is_the_same(tiny_text):
    train(usual := load_recipe(tiny_text, ["--run.name=usual"]))
    train(late := load_recipe(tiny_text, ["--run.name=late", "--evaluation.at_start=false"]))
    assert [line["step"] for line in read_metrics(late.folder) if "eval/loss" in line] == [3, 6]
    assert_same_weights(weights(usual.folder / "final"), weights(late.folder / "final"))


def test_a_trial_saves_nothing_but_its_final_model(tiny_text):
    train(usual := load_recipe(tiny_text, ["--run.name=usual"]))
    train(trial := load_recipe(tiny_text, ["--run.name=trial", "--checkpoint.save=false"]))
    names = {path.name for path in trial.folder.iterdir()}
    assert names == {"final", "metrics.jsonl", "recipe.yaml"}
    assert_same_weights(weights(usual.folder / "final"), weights(trial.folder / "final"))


def test_early_stopping_says_how_long_it_waits_and_what_was_best(tiny_text, capsys):
    still = ["--training.macro_batch=1", "--training.early_stopping.patience=2"]
    train(load_recipe(tiny_text, [*still, "--training.early_stopping.min_delta=100", "--training.max_steps=9"]))
    out = capsys.readouterr().out
    assert "no gain in eval/loss, 1 of 2 evaluations until the run stops" in out
    assert "no gain in eval/loss, 2 of 2 evaluations until the run stops" in out
    assert "stopped early at step 3: eval/loss gains no more, the best was" in out


@pytest.mark.parametrize(("data", "unit"), [("tiny_text", "tokens"), ("tiny_adder", "problems")])
def test_a_run_says_what_it_trains_on_how_and_at_what_cost(request, data, unit, capsys):
    train(load_recipe(request.getfixturevalue(data), ["--training.max_steps=6", "--training.batch_size=4"]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny: nanogpt with ")
    assert lines[1].startswith("data: ") and f"{unit} in train" in lines[1]
    assert lines[2].startswith("schedule: 6 steps of 4 sequences, adamw at 0.001, cosine, weight decay 0.1")
    assert lines[3].startswith(f"cost: {6 * 4 * (16 if unit == 'tokens' else 6)} tokens, ") and "FLOPs" in lines[3]


def test_several_seeds_are_runs_of_their_own_with_a_mean(tiny_text, tmp_path, capsys):
    final = train(load_recipe(tiny_text, ["--run.seeds=[1,2]"]))
    assert final == tmp_path / "outputs" / "tiny-seed2" / "final"
    table = capsys.readouterr().out
    train(load_recipe(tiny_text, ["--run.seed=1", "--run.name=one"]))
    ends = [read_metrics(tmp_path / "outputs" / name)[-1]["eval/loss"] for name in ("tiny-seed1", "tiny-seed2", "one")]
    assert ends[0] == ends[2] != ends[1]
    (mean,) = [line for line in table.splitlines() if line.startswith("mean")]
    assert f"{statistics.fmean(ends[:2]):.4f}" in mean
    train(load_recipe(tiny_text, ["--run.seeds=[1,2]"]))
    assert capsys.readouterr().out.count("is finished already") == 2


def test_without_prompts_samples_start_where_the_validation_split_does(tiny_text, text_file, capsys):
    train(load_recipe(tiny_text, ["--evaluation.prompts=null"]))
    beginning = text_file.read_text()[int(len(text_file.read_text()) * 0.9) :][:8]
    assert capsys.readouterr().out.count(beginning) >= 3  # at each boundary and at the end
    train(load_recipe(tiny_text, ["--run.name=silent"]))
    assert beginning not in capsys.readouterr().out


def test_metrics_after_the_checkpoint_are_written_anew(tiny_text):
    train(recipe := load_recipe(tiny_text, ["--checkpoint.keep_last=9"]))
    before = read_metrics(recipe.folder)
    shutil.rmtree(recipe.folder / "final")
    shutil.rmtree(list_checkpoints(recipe.folder)[-1])
    train(load_recipe(tiny_text, ["--checkpoint.keep_last=9"]))
    assert without_times(read_metrics(recipe.folder)) == without_times(before)
    elapsed = [line["elapsed_s"] for line in read_metrics(recipe.folder)]
    assert elapsed == sorted(elapsed)


def test_a_finished_run_says_so(tiny_text, capsys):
    first = train(load_recipe(tiny_text))
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert train(load_recipe(tiny_text)) == first
    assert "finished already" in capsys.readouterr().out
    assert (first / "model.safetensors").stat().st_mtime_ns == written


def test_another_recipe_in_the_same_folder_is_refused_by_key(tiny_text):
    train(load_recipe(tiny_text))
    with pytest.raises(UserError) as error:
        train(load_recipe(tiny_text, ["--optimizer.lr=0.1", "--data.block_size=8", "--tracking.log_every=2"]))
    assert {key for key, _ in error.value.problems} == {"optimizer.lr", "data.block_size"}


def test_other_text_under_the_same_name_is_refused(tiny_text, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("abcdefgh " * 100)
    mine = [f"--data.data_files={file}", "--run.name=mine"]
    train(load_recipe(tiny_text, mine))
    shutil.rmtree(tmp_path / "outputs" / "mine" / "final")
    file.write_text("hgfedcba " * 100)
    with pytest.raises(UserError, match=r"data\.fingerprint: the text, its tokenizer or its splits changed"):
        train(load_recipe(tiny_text, mine))


def test_overwrite_starts_anew_but_only_in_a_folder_of_a_run(tiny_text, tmp_path):
    train(load_recipe(tiny_text))
    train(load_recipe(tiny_text, ["--run.overwrite=true", "--optimizer.lr=0.1"]))
    assert not load_recipe(tmp_path / "outputs" / "tiny" / "recipe.yaml").run.overwrite
    other = tmp_path / "outputs" / "photos"
    other.mkdir()
    (other / "cat.png").write_text("x")
    for overwrite in ("true", "false"):
        with pytest.raises(UserError, match="holds other files"):
            train(load_recipe(tiny_text, ["--run.name=photos", f"--run.overwrite={overwrite}"]))
    assert (other / "cat.png").exists()


def test_steps_may_be_added_where_no_schedule_depends_on_them(tiny_text):
    flat = ["--schedule.lr.style=constant", "--schedule.lr.warmup_ratio=0"]
    train(load_recipe(tiny_text, flat))
    train(recipe := load_recipe(tiny_text, [*flat, "--training.max_steps=9"]))
    assert [line["step"] for line in read_metrics(recipe.folder) if "train/loss" in line] == list(range(1, 10))
    with pytest.raises(UserError, match=r"training\.max_steps"):
        train(load_recipe(tiny_text, [*flat, "--training.max_steps=6"]))


def test_a_run_that_was_made_longer_and_stopped_is_not_finished(tiny_text, monkeypatch):
    flat = ["--schedule.lr.style=constant", "--schedule.lr.warmup_ratio=0", "--training.max_steps=6"]
    train(load_recipe(tiny_text, flat))
    longer = load_recipe(tiny_text, [*flat, "--training.max_steps=12"])

    def pull_the_plug(run):
        run.saver.wait()
        raise RuntimeError("the plug is pulled")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="pulled"):
        patch.setattr("cleangpt.training.loop.finish", pull_the_plug)
        train(longer)
    assert not (longer.folder / "final").exists()
    assert train(longer).is_dir()


def test_going_on_from_a_named_checkpoint_leaves_nothing_later(tiny_text):
    options = ["--checkpoint.keep_last=2"]
    folder = train(load_recipe(tiny_text, options)).parent
    first, _ = list_checkpoints(folder)
    recipe = load_recipe(tiny_text, [*options, f"--training.resume={first}"])
    run = build_run(*find_run(recipe))
    assert run.progress.step == 3
    assert list_checkpoints(folder) == [first]
    assert not (folder / "final").exists()


def test_a_named_checkpoint_does_not_open_the_folder_of_another_run(tiny_text, tmp_path):
    first = list_checkpoints(train(load_recipe(tiny_text, ["--run.name=one"])).parent)[0]
    train(load_recipe(tiny_text, ["--run.name=two", "--optimizer.lr=0.5"]))
    (tmp_path / "outputs" / "three").mkdir()
    (tmp_path / "outputs" / "three" / "notes.txt").write_text("mine")
    for name, key in (("two", "optimizer.lr"), ("three", "run.name")):
        with pytest.raises(UserError) as refused:
            train(load_recipe(tiny_text, [f"--run.name={name}", f"--training.resume={first}"]))
        assert [problem[0] for problem in refused.value.problems] == [key]


def test_a_refused_run_leaves_the_users_empty_folder(tiny_text, tmp_path):
    for name, stays in (("empty", True), ("new", False)):
        place = tmp_path / name
        if stays:
            place.mkdir()
        with pytest.raises(UserError):
            train(load_recipe(tiny_text, [f"--run.output_dir={place}", "--training.resume=nowhere"]))
        assert place.exists() == stays


@pytest.mark.parametrize("block_size", [1, 8])
def test_short_blocks_train_to_their_end(tiny_text, block_size):
    assert train(load_recipe(tiny_text, [f"--data.block_size={block_size}"])).is_dir()


def test_early_stopping_ends_a_run_and_stays_ended(tiny_text):
    options = ["--training.early_stopping.patience=1", "--training.early_stopping.min_delta=100"]
    options += ["--training.macro_batch=1", "--training.max_steps=20"]
    train(recipe := load_recipe(tiny_text, options))
    assert read_metrics(recipe.folder)[-1]["step"] == 2
    train(load_recipe(tiny_text, options))
    assert read_metrics(recipe.folder)[-1]["step"] == 2


def test_epochs_set_the_steps(tiny_text, text_file):
    train(recipe := load_recipe(tiny_text, ["--training.max_steps=null", "--training.max_epochs=0.2"]))
    line = read_metrics(recipe.folder)[-1]
    assert line["tokens"] == line["step"] * 4 * 16
    assert 0.2 <= line["tokens"] / (0.9 * len(text_file.read_text())) < 0.22


def test_training_the_compiled_model_leaves_no_prefix(tiny_text):
    counters.clear()
    train(recipe := load_recipe(tiny_text, ["--training.compile=true", "--training.max_steps=3"]))
    assert counters["frames"]["ok"] >= 1 and counters["stats"]["calls_captured"] > 10
    train(plain := load_recipe(tiny_text, ["--run.name=plain", "--training.max_steps=3"]))
    assert weights(recipe.folder / "final").keys() == weights(plain.folder / "final").keys()
    assert losses(recipe.folder) == pytest.approx(losses(plain.folder), abs=1e-5)


def test_starting_from_saved_weights(tiny_text):
    final = train(load_recipe(tiny_text))
    recipe = load_recipe(tiny_text, ["--run.name=tuned", f"--model.init_from={final}"])
    train(recipe)
    first, last = read_metrics(recipe.folder)[0], read_metrics(final.parent)[-1]
    assert first["eval/loss"] == pytest.approx(last["eval/loss"], abs=1e-6)


@pytest.mark.parametrize(("override", "key"), [("dropuot=0.5", "model.dropuot"), ("dropout=x", "model")])
def test_a_mistake_beside_saved_weights_is_told(tiny_text, override, key):
    final = train(load_recipe(tiny_text))
    with pytest.raises(UserError) as refused:
        source = f"--model={{model_type: null, init_from: {final}}}"
        train(load_recipe(tiny_text, ["--run.name=tuned", source, f"--model.{override}"]))
    assert [problem[0] for problem in refused.value.problems] == [key]


def test_no_saved_weights_may_be_said(tiny_text):
    assert train(load_recipe(tiny_text, ["--model.init_from=null"])).is_dir()


def test_a_model_without_a_length_of_its_own_trains(tiny_text, tmp_path):
    shape = ["--model={model_type: bloom, hidden_size: 16, n_layer: 1, n_head: 2}"]
    final = train(load_recipe(tiny_text, shape))
    assert train(load_recipe(tiny_text, [*shape, "--run.name=tuned", f"--model.init_from={final}"])).is_dir()
    with pytest.raises(UserError, match=r"data\.block_size"):
        train(load_recipe(tiny_text, [*shape, "--run.name=long", "--data.block_size=null"]))


def test_every_step_and_process_has_its_own_seed():
    assert len({step_seed(42, step, process) for step in range(100) for process in range(4)}) == 400


def test_fp16_on_a_cpu_is_refused_before_anything_is_written(tiny_text, tmp_path):
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    with pytest.raises(UserError, match="fp16 needs an accelerator"):
        train(load_recipe(tiny_text, ["--training.mixed_precision=fp16"]))
    assert not (tmp_path / "outputs").exists()


def test_bf16_trains_close_to_float32(tiny_text):
    train(half := load_recipe(tiny_text, ["--training.mixed_precision=bf16", "--run.name=half"]))
    train(full := load_recipe(tiny_text, ["--training.mixed_precision=no", "--run.name=full"]))
    assert losses(half.folder) == pytest.approx(losses(full.folder), abs=0.05)
    assert losses(half.folder) != losses(full.folder)


def test_attention_is_chosen_once(tiny_text):
    final = train(load_recipe(tiny_text, ["--training.max_steps=3"]))
    assert load_recipe(final.parent / "recipe.yaml", []).model["attn_implementation"] == "eager"
    assert "attn" not in (final / "config.json").read_text()
    train(load_recipe(tiny_text, ["--training.max_steps=3"]))  # the same command: not another recipe


@pytest.mark.parametrize(
    ("model", "length", "precision", "device", "chosen"),
    [
        ({"model_type": "nanogpt"}, 16, "no", "cpu", "eager"),
        ({"model_type": "nanogpt"}, 17, "no", "cpu", None),
        ({"model_type": "nanollama"}, 256, "bf16", "cpu", "eager"),
        ({"model_type": "nanogpt"}, 16, "bf16", "cuda", None),
        ({"model_type": "qwen3"}, 16, "no", "cpu", None),
        ({"model_type": "nanogpt", "attn_implementation": "sdpa"}, 16, "no", "cpu", "sdpa"),
    ],
)
def test_attention_table(model, length, precision, device, chosen):
    assert choose_attention(model, length, precision, torch.device(device)) == chosen
