"""`transformers serve` answers with exported models, as docs/clients.md says."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import ROOT, needs
from transformers import AutoModelForCausalLM, AutoTokenizer

from cleangpt import NanoGPTConfig, NanoGPTForCausalLM, NanoLlamaConfig, NanoLlamaForCausalLM
from cleangpt.data.tokenization import bpe_tokenizer
from cleangpt.models.build import generation_config
from cleangpt.models.convert import export_folder

TOKENIZER = bpe_tokenizer(["The quick brown fox jumps over the lazy dog."] * 20, 280)
SHAPE = {"vocab_size": 280, "n_embd": 32, "n_layer": 2, "n_head": 2, "block_size": 64, "initializer_range": 0.2}
MODELS = {
    "gpt2": lambda: NanoGPTForCausalLM(NanoGPTConfig(**SHAPE)),
    "llama": lambda: NanoLlamaForCausalLM(NanoLlamaConfig(**SHAPE)),
    "qwen3": lambda: NanoLlamaForCausalLM(NanoLlamaConfig(**SHAPE, use_qk_norm=True)),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, Path]:
    """Exported folders of small random models with 64 positions."""
    folder = tmp_path_factory.mktemp("serve")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make()
        model.generation_config = generation_config(TOKENIZER, 32)
        model.save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)
        export_folder(folder / name, folder / f"{name}-exported")
    return {name: folder / f"{name}-exported" for name in MODELS}


@pytest.fixture(scope="module")
def server(exported):
    """The address of a `transformers serve` of this test's own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    for _ in range(1200):
        assert process.poll() is None
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            break
        except OSError:
            time.sleep(0.1)
    yield url
    process.kill()
    process.wait()


def ask(url: str, model: Path, text: str = "The quick", **options) -> str:
    body = {"model": str(model), "messages": [{"role": "user", "content": text}], "stream": False, **options}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


@needs("fastapi", "uvicorn", "openai")
@pytest.mark.parametrize("name", MODELS)
def test_serve_answers_as_the_model_does(server, exported, name):
    model, tokenizer = (auto.from_pretrained(exported[name]) for auto in (AutoModelForCausalLM, AutoTokenizer))
    inputs = tokenizer("The quick", return_tensors="pt")
    written = model.generate(**inputs, do_sample=False, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
    expected = tokenizer.decode(written, skip_special_tokens=True)
    answer = ask(server, exported[name], temperature=0, max_tokens=16)
    assert answer.strip() == expected.strip() and answer.strip()


@needs("fastapi", "uvicorn", "openai")
def test_a_chat_longer_than_the_model_still_gets_an_answer(server, exported):
    """With 64 learned positions: the last 32 characters, and 32 tokens for the answer."""
    text = "The quick brown fox jumps over the lazy dog. " * 20
    options = {"temperature": 0, "max_tokens": 32}
    assert ask(server, exported["gpt2"], text, **options) == ask(server, exported["gpt2"], text[-32:], **options)


@needs("fastapi", "uvicorn", "openai")
def test_without_max_tokens_a_request_brings_its_own_generation_config(server, exported):
    """`serve` raises the export's `max_new_tokens` to 1,024, which 64 learned positions cannot hold."""
    with pytest.raises(urllib.error.HTTPError, match="500"):
        ask(server, exported["gpt2"], temperature=0)
    own = json.dumps({"max_new_tokens": 16, "do_sample": False})
    answer = ask(server, exported["gpt2"], generation_config=own)
    assert answer and answer == ask(server, exported["gpt2"], temperature=0, max_tokens=16)


@needs("fastapi", "uvicorn", "openai")
def test_chat_talks_to_a_model_of_64_positions(server, exported):
    command = [Path(sys.executable).with_name("transformers"), "chat", exported["gpt2"], f"{server}/v1"]
    command += ["max_new_tokens=24", "do_sample=False"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}
    said = b"The quick brown fox\nN\njumps over the lazy dog\nN\n!exit\n"  # N: not to continue an answer
    done = subprocess.run(command, input=said, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert done.stdout.count(b"tok/s") == 2
