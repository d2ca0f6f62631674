"""transformers' Trainer, PEFT and TRL train our models unchanged."""

import pytest
import torch
from conftest import needs
from datasets import Dataset
from transformers import Trainer, TrainingArguments, default_data_collator

from cleangpt import NanoGPTConfig, NanoGPTForCausalLM, NanoLlamaConfig, NanoLlamaForCausalLM
from cleangpt.data.tokenization import bpe_tokenizer

TEXTS = ["The quick brown fox jumps over the lazy dog."] * 32
TOKENIZER = bpe_tokenizer(TEXTS, 280)
SHAPE = {"vocab_size": 280, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SHAPE |= {"max_position_embeddings": 64, "eos_token_id": TOKENIZER.eos_token_id, "pad_token_id": TOKENIZER.pad_token_id}

MODELS = pytest.mark.parametrize(
    "make",
    [lambda: NanoGPTForCausalLM(NanoGPTConfig(**SHAPE)), lambda: NanoLlamaForCausalLM(NanoLlamaConfig(**SHAPE))],
    ids=["nanogpt", "nanollama"],
)


def arguments(folder, **options) -> dict:
    shared = {"output_dir": str(folder), "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 0.01}
    return {**shared, "report_to": "none", "logging_steps": 1, "use_cpu": True, "save_strategy": "no", **options}


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@MODELS
def test_the_trainer_of_transformers(make, tmp_path):
    ids = [TOKENIZER(text)["input_ids"] for text in TEXTS]
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    settings = TrainingArguments(**arguments(tmp_path, gradient_accumulation_steps=2))
    trainer = Trainer(make(), settings, train_dataset=data, data_collator=default_data_collator)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(5.6, abs=0.2)
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5


@MODELS
@needs("peft")
def test_lora_of_peft(make, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=4))
    frozen = [weight.clone() for weight in model.parameters() if not weight.requires_grad]
    ids = torch.tensor([TOKENIZER(text)["input_ids"] for text in TEXTS[:4]])
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.05)
    first = last = model(ids, labels=ids).loss
    for _ in range(20):
        last = model(ids, labels=ids).loss
        last.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert last < first - 0.1
    for before, weight in zip(frozen, (w for w in model.parameters() if not w.requires_grad), strict=True):
        assert torch.equal(before, weight)
    merged = model.merge_and_unload().eval()
    assert merged.generate(ids[:1, :4], max_new_tokens=3, pad_token_id=0).shape == (1, 7)


@MODELS
@needs("trl")
def test_sft_of_trl(make, tmp_path):
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(**arguments(tmp_path, max_length=32, bf16=False))
    data = Dataset.from_dict({"text": TEXTS})
    trainer = SFTTrainer(make(), args=settings, train_dataset=data, processing_class=TOKENIZER)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


@MODELS
@needs("trl")
def test_dpo_of_trl(make, tmp_path):
    from trl import DPOConfig, DPOTrainer

    settings = DPOConfig(**arguments(tmp_path, max_length=32, bf16=False))
    data = Dataset.from_dict({"prompt": ["The"] * 32, "chosen": [" quick"] * 32, "rejected": [" lazy"] * 32})
    model, reference = make(), make()
    reference.load_state_dict(model.state_dict())
    trainer = DPOTrainer(model, reference, args=settings, train_dataset=data, processing_class=TOKENIZER)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.693, abs=0.01)  # ln 2: it prefers neither
    assert losses(trainer)[-1] < 0.6


@MODELS
@needs("trl")
def test_grpo_of_trl(make, tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions, **columns):
        return [float(completion.count("e")) for completion in completions]

    options = {"num_generations": 4, "max_completion_length": 8, "bf16": False, "max_steps": 3}
    settings = GRPOConfig(**arguments(tmp_path, **options))
    data = Dataset.from_dict({"prompt": ["The quick"] * 32})
    model = make()
    before = [weight.clone() for weight in model.parameters()]
    trainer = GRPOTrainer(model, reward, args=settings, train_dataset=data, processing_class=TOKENIZER)
    trainer.train()
    assert losses(trainer) and any(
        not torch.equal(old, new.cpu()) for old, new in zip(before, model.parameters(), strict=True)
    )
