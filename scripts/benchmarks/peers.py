"""Others who train the same model on the same text: transformers' Trainer, and nanoGPT's `train.py` where it lies."""

import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from cleangpt.models.build import load_config
from cleangpt.recipe.keys import Recipe
from cleangpt.training.setup import load_data


class Windows(Dataset):
    """Random windows of a stream of ids, as Trainer takes them; it shifts the labels itself."""

    def __init__(self, ids: torch.Tensor, length: int):
        self.ids, self.length = ids, length

    def __len__(self) -> int:
        return len(self.ids) - self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.ids[index : index + self.length]
        return {"input_ids": window, "labels": window}


class Clock(TrainerCallback):
    """When the first and the last step ended."""

    def on_step_end(self, arguments, state, control, **_):
        self.last = time.perf_counter()
        if state.global_step == 1:
            self.first = self.last


def trainer(recipe: Recipe) -> float:
    """Milliseconds a step of transformers' Trainer, as it comes, with GPT-2 or Llama of the recipe's shape."""
    data, clock = load_data(recipe)[1], Clock()
    ids = torch.from_numpy(np.concatenate([*data.splits["train"].stream]).astype(np.int64))
    arguments = TrainingArguments(
        output_dir=str(recipe.folder),
        max_steps=recipe.training.max_steps,
        per_device_train_batch_size=recipe.training.batch_size,
        logging_steps=recipe.training.max_steps,
        bf16=recipe.training.mixed_precision == "bf16",
        use_cpu=not torch.accelerator.is_available(),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        learning_rate=recipe.optimizer.lr,
        weight_decay=recipe.optimizer.weight_decay,
    )
    model = transformers_model(recipe, recipe.model.get("vocab_size", len(data.tokenizer))).train()
    Trainer(model, arguments, train_dataset=Windows(ids, recipe.data.block_size + 1), callbacks=[clock]).train()
    return 1000 * (clock.last - clock.first) / (recipe.training.max_steps - 1)


def transformers_model(recipe: Recipe, vocab_size: int):
    """GPT-2 or Llama in the shape of the recipe's NanoGPT or NanoLlama, without dropout."""
    model, positions = recipe.model, recipe.data.block_size + 1
    if model["model_type"] == "nanogpt":
        config = GPT2Config(
            vocab_size=vocab_size,
            n_positions=positions,
            n_embd=model["hidden_size"],
            n_layer=model["num_hidden_layers"],
            n_head=model["num_attention_heads"],
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        )
        return GPT2LMHeadModel(config)
    shared = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    shape = {key: getattr(load_config(model), key) for key in shared}
    config = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=positions, tie_word_embeddings=True, **shape)
    return LlamaForCausalLM(config)


def nanogpt(recipe: Recipe, source: Path) -> float:
    """Milliseconds a step of nanoGPT's `train.py`, the median of its own times."""
    data = load_data(recipe)[1]
    folder = recipe.folder / "nanogpt"
    copy_nanogpt(source, folder, data.splits)
    shape = recipe.model
    lines = run_nanogpt(
        folder,
        vocab_size=shape.get("vocab_size", len(data.tokenizer)),
        n_layer=shape["num_hidden_layers"],
        n_head=shape["num_attention_heads"],
        n_embd=shape["hidden_size"],
        block_size=recipe.data.block_size,
        batch_size=recipe.training.batch_size,
        max_iters=recipe.training.max_steps,
        log_interval=1,
        eval_iters=1,
        eval_interval=10**6,
        always_save_checkpoint=False,
    )
    times = [float(found[1]) for found in re.finditer(r"^iter .*time ([\d.]+)ms", lines, re.MULTILINE)]
    return statistics.median(times[1:])


def copy_nanogpt(source: Path, folder: Path, splits: dict, seed: int = 1337) -> None:
    """A working copy of nanoGPT with our ids as its data, and another seed than its own 1337."""
    folder.mkdir(parents=True)
    for file in ("train.py", "model.py", "configurator.py"):
        code = (source / file).read_text()
        (folder / file).write_text(code.replace("manual_seed(1337 +", f"manual_seed({seed} +"))
    (folder / "data/ours").mkdir(parents=True)
    for name, split in (("train", splits["train"]), ("val", splits["validation"])):
        np.concatenate([*split.stream]).astype(np.uint16).tofile(folder / "data/ours" / f"{name}.bin")


def run_nanogpt(folder: Path, vocab_size: int, **options) -> str:
    """What nanoGPT's `train.py` prints."""
    import pickle  # nanoGPT reads its vocabulary's size from a pickle

    (folder / "data/ours/meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"dataset": "ours", "device": device, "compile": device == "cuda", "dropout": 0.0, **options}
    options.setdefault("gradient_accumulation_steps", 1)
    command = [sys.executable, "train.py", *(f"--{key}={value}" for key, value in options.items())]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
