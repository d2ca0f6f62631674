"""Models to and from the architectures that every client knows, each conversion proven on both models' outputs.

NanoGPT   <──> gpt2                 (GPT-2's `Conv1D` weights are transposed; a missing bias is a zero bias)
NanoLlama <──> llama, or qwen3 with QK-norm
.pt files ──> NanoGPT or NanoLlama (see checkpoints.py)
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.tokenization import BASE_TEMPLATE, load_tokenizer
from ..errors import UserError
from ..files import write_folder
from .build import assemble, generation_config, load_model, quiet, special_ids
from .checkpoints import Forward, read_checkpoint

TOLERANCE = 1e-5  # largest difference between two logits
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
SHARED: tuple[str, ...] = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
SHARED += ("max_position_embeddings", "intermediate_size", "attention_dropout", "initializer_range")
SHARED += ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
NANOGPT = (*SHARED, "activation_function", "layer_norm_epsilon", "dropout")
NANOLLAMA = (*SHARED, "num_key_value_heads", "rope_parameters", "rms_norm_eps")
GPT2 = {"intermediate_size": "n_inner", "dropout": "resid_pdrop", "attention_dropout": "attn_pdrop"}  # else the same
# `transformers serve` would look for chat marks in what a qwen3 writes, and repeat the prompt where there are none.
WHOLE_ANSWER = {"defaults": {"role": "assistant"}, "start_anchor_pattern": r"[\s\S]+"}  # begins where the prompt ends
METADATA = ModelCardData(library_name="transformers", pipeline_tag="text-generation")


def to_native(model: PreTrainedModel) -> PreTrainedModel:
    """The same function as a plain `gpt2`, `llama` or `qwen3`, in float32; a UserError for any other model."""
    config, weights = model.config, model.state_dict()
    if config.model_type == "nanogpt":
        native = _gpt2(config, weights)
    elif config.model_type == "nanollama":
        if config.coupled_digits is not None:
            raise UserError(("model", "no plain architecture has the positions of its coupled_digits"))
        options = {name: getattr(config, name) for name in NANOLLAMA}
        options["head_dim"] = config.hidden_size // config.num_attention_heads
        native = assemble("model", "qwen3" if config.use_qk_norm else "llama", weights, **options)
    else:
        raise UserError(("model", f"expected a nanogpt or nanollama, got a {config.model_type}: it needs no export"))
    native.generation_config = model.generation_config
    return native


def _gpt2(config: PreTrainedConfig, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A GPT-2 from a NanoGPT's configuration and weights."""
    options = {GPT2.get(name, name): getattr(config, name) for name in NANOGPT}
    options |= {"embd_pdrop": config.dropout, "n_ctx": config.max_position_embeddings}  # some converters need n_ctx
    biased = [name for name in weights if name.endswith(".weight") and (".h." in name or ".ln_f." in name)]
    zeros = {f"{name.removesuffix('weight')}bias": weights[name].new_zeros(len(weights[name])) for name in biased}
    return assemble("model", "gpt2", _transpose(zeros | weights), **options)


def from_native(model: PreTrainedModel) -> PreTrainedModel:
    """The same function as a NanoGPT or NanoLlama, in float32; a UserError if neither can compute it."""
    config, weights = model.config, model.state_dict()
    if config.model_type == "gpt2":
        _require(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
        _require(config, embd_pdrop=config.resid_pdrop)
        options = {name: getattr(config, GPT2.get(name, name)) for name in NANOGPT}
        biases = {name: weight for name, weight in weights.items() if name.endswith(".bias")}
        bias = any(weight.any() for weight in biases.values())  # all zero if exported from a model without biases
        weights = {name: weight for name, weight in _transpose(weights).items() if bias or name not in biases}
        ours = assemble("source", "nanogpt", weights, **options, bias=bias)
    elif config.model_type in ("llama", "qwen3"):
        is_qwen = config.model_type == "qwen3"
        plain = {"layer_types": ["full_attention"] * config.num_hidden_layers} if is_qwen else {"mlp_bias": False}
        plain["head_dim"] = config.hidden_size // config.num_attention_heads
        _require(config, hidden_act="silu", attention_bias=False, **plain)
        options = {name: getattr(config, name) for name in NANOLLAMA}
        ours = assemble("source", "nanollama", weights, **options, use_qk_norm=is_qwen)
    else:
        raise UserError(("source", f"expected gpt2, llama, qwen3 or a .pt file, got {config.model_type}"))
    ours.generation_config = model.generation_config
    return ours


@dataclass(frozen=True)
class Proof:
    """How far two models agree."""

    difference: float  # the largest between two logits in float64, on random and on padded input
    tokens: int  # compared, written greedily
    same_tokens: int  # of these, before the first that differs

    @property
    def holds(self) -> bool:
        return self.difference <= TOLERANCE and self.same_tokens == self.tokens

    def __str__(self) -> str:
        difference = f"largest difference of logits {self.difference:.1e} (at most {TOLERANCE:.0e})"
        return f"{difference}, {self.same_tokens} of {self.tokens} greedy tokens the same"


@torch.no_grad()
def compare_models(one: PreTrainedModel, other: PreTrainedModel) -> Proof:
    """Compares two models of one vocabulary and length on random input, padded input and greedy generation."""
    ids, new_tokens = _questions(one.config)
    mask = torch.ones_like(ids)
    mask[1, : ids.shape[1] // 2] = 0  # padded on the left
    mask[2, -(ids.shape[1] // 3) :] = 0  # padded on the right
    answers = []
    for model in (one, other):
        with _float64(model):
            padded = model(ids, attention_mask=mask).logits[mask.bool()]  # (tokens, vocab)
            answers.append((torch.cat([model(ids).logits.flatten(0, 1), padded]), _write(model, ids, new_tokens)))
    return _proof(answers[0], answers[1])


@torch.no_grad()
def compare_with_forward(forward: Forward, model: PreTrainedModel) -> Proof:
    """Compares a model with a forward pass, which knows neither padding nor a cache."""
    ids, new_tokens = _questions(model.config)
    with _float64(model):
        answer = model(ids).logits.flatten(0, 1), _write(model, ids, new_tokens)
    text = ids[:1, : _prompt_length(model.config)]
    for _ in range(new_tokens):
        text = torch.cat([text, forward(text)[:, -1:].argmax(-1)], 1)
    return _proof((forward(ids).flatten(0, 1), text[0, -new_tokens:]), answer)


def _prompt_length(config: PreTrainedConfig) -> int:
    return min(8, max(1, config.max_position_embeddings - 64))


def _questions(config: PreTrainedConfig) -> tuple[torch.Tensor, int]:
    """Random ids (4, time), the first of which start a text, and the number of tokens to continue it by."""
    positions, generator = config.max_position_embeddings, torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (4, min(positions, 64)), generator=generator)
    return ids, min(64, positions - _prompt_length(config))


@contextmanager
def _float64(model: PreTrainedModel) -> Iterator[None]:
    """Weights in float64, where rounding plays no part: a narrow model's norm can magnify float32's a thousandfold.

    Buffers keep their type, as Llama computes rotary angles in float32.
    """
    dtype = model.dtype
    for weight in model.parameters():
        weight.data = weight.double()
    yield
    for weight in model.parameters():
        weight.data = weight.to(dtype)


def _write(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    prompt = ids[:1, : _prompt_length(model.config)]
    options = GenerationConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=options)  # type: ignore[operator]
    return written[0, prompt.shape[1] :]


def _proof(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> Proof:
    (logits, text), (other_logits, other_text) = one, other
    same_tokens = int((text == other_text).long().cumprod(0).sum())
    return Proof((logits - other_logits).abs().max().item(), len(text), same_tokens)


def export_folder(source: str | Path, out: Path) -> Proof:
    """Writes a saved model as a plain `gpt2`, `llama` or `qwen3` folder.

    Raises:
        UserError: before anything is written, if there is no model, `out` is taken, or the two models differ.
    """
    _require_free(out)
    model, tokenizer = load_model(source).eval(), load_tokenizer(source, "model")
    if tokenizer.unk_token is None:
        tokenizer.unk_token = tokenizer.eos_token  # as in GPT-2; some converters need one
    tokenizer.model_max_length = positions = model.config.max_position_embeddings
    tokenizer.chat_template = tokenizer.chat_template or BASE_TEMPLATE
    native = to_native(model)
    if native.config.model_type == "gpt2" and tokenizer.chat_template == BASE_TEMPLATE:
        # Learned positions end: of a long chat the last characters, at least as many as tokens, leave room to answer.
        tokenizer.chat_template = f"{{{{ ({BASE_TEMPLATE.strip('{ }')})[-{positions // 2}:] }}}}"
    if native.config.model_type == "qwen3" and "<|im_start|>assistant" not in tokenizer.chat_template:
        content = {"close": tokenizer.eos_token, "content": "text"}
        tokenizer.response_template = WHOLE_ANSWER | {"fields": {"content": content}}
    metadata, card = METADATA, Path(source, "README.md")
    if card.is_file():
        metadata = ModelCard.load(card, ignore_metadata_errors=True).data
        ours, native_type = ("nanogpt", "nanollama"), native.config.model_type
        metadata.tags = [native_type if tag in ours else tag for tag in metadata.tags or []]
    text = CARD.format(metadata=metadata.to_yaml(), source=f"`{model.config.model_type}`", proof="{proof}", out=out)
    return _write_if_equal(out, native, compare_models(model, native), tokenizer, text)


def import_folder(source: str | Path, out: Path, tokenizer_path: str | None = None) -> Proof:
    """Writes a NanoGPT or NanoLlama folder from a GPT-2, Llama or Qwen3 folder or id, or a `.pt` file.

    The tokenizer is by default the source's own (a `.pt` file has none).

    Raises:
        UserError: if the source cannot be read or has no counterpart here, the tokenizer is not for it, or `out` is
            taken.
    """
    _require_free(out)
    if Path(source).is_file():
        model, forward = read_checkpoint(Path(source))
        proof, source_name, tokenizer = compare_with_forward(forward, model), f"`{Path(source).name}`", None
    else:
        original = load_model(source, key="source").eval()
        model = from_native(original)
        proof, source_name = compare_models(original, model), f"`{original.config.model_type}`"
        tokenizer = None if tokenizer_path else load_tokenizer(source, "source")
    if tokenizer_path:
        tokenizer = load_tokenizer(tokenizer_path, "--tokenizer")
        _give_tokenizer(model, tokenizer)
    text = CARD.format(metadata=METADATA.to_yaml(), source=source_name, proof="{proof}", out=out)
    return _write_if_equal(out, model, proof, tokenizer, text)


def _give_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives a model the special ids of a tokenizer that is not its own; those that it has no row for are dropped.

    Vocabularies are often padded to a multiple of 64 or 128, so a tokenizer may have that many ids fewer.
    """
    size, special = model.config.vocab_size, set(tokenizer.all_special_ids)
    needed = 1 + max(index for index in tokenizer.get_vocab().values() if index < size or index not in special)
    if not size - 128 < needed <= size:
        raise UserError(("--tokenizer", f"expected one for the model's {size} ids, got {needed} in use"))
    for name in ("bos_token", "eos_token", "pad_token"):
        if (getattr(tokenizer, f"{name}_id") or 0) >= size:
            setattr(tokenizer, name, None)
    for name, index in special_ids(tokenizer).items():
        setattr(model.config, name, index)
    model.generation_config = generation_config(tokenizer, max(1, model.config.max_position_embeddings // 2))


CARD = """---
{metadata}
---

Converted by CleanGPT from a {source}. Compared with it: {proof}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{out}")
tokenizer = AutoTokenizer.from_pretrained("{out}")
```
"""


@quiet()
def _write_if_equal(
    out: Path, model: PreTrainedModel, proof: Proof, tokenizer: PreTrainedTokenizerBase | None, card: str
) -> Proof:
    """Writes a converted model with a tokenizer and a card, if its proof holds."""
    if not proof.holds:
        raise UserError(("model", f"the two are not equal, nothing is written: {proof}"))

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card.replace("{proof}", str(proof)), encoding="utf-8")
        _tell_older_clients(folder)

    try:
        write_folder(out, fill)
    except OSError as error:
        raise UserError((str(out), f"cannot be written: {error.strerror}")) from error
    return proof


def _tell_older_clients(folder: Path) -> None:
    """Adds what transformers 4 reads, and with it optimum: it knows neither `TokenizersBackend` nor `rope_parameters`.

    By default it would also give `token_type_ids` to models that take none.
    """

    def add(name: str, **keys: Any) -> None:
        if (file := folder / name).is_file():
            file.write_text(json.dumps(json.loads(file.read_text()) | keys, indent=2, ensure_ascii=False) + "\n")

    names = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    add("tokenizer_config.json", **names)
    if rope := json.loads((folder / "config.json").read_text()).get("rope_parameters"):
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        is_scaled = rope.get("rope_type", "default") != "default"
        add("config.json", rope_theta=rope["rope_theta"], rope_scaling=scaling if is_scaled else None)


def _require_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError((str(out), "expected a new or empty folder"))


def _require(config: PreTrainedConfig, **expected: Any) -> None:
    for name, value in expected.items():
        if (got := getattr(config, name)) != value:
            raise UserError(("source", f"{name}: expected {value!r}, got {got!r}, which has no counterpart here"))


def _transpose(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.T.contiguous() if name.endswith(CONV1D) else weight for name, weight in weights.items()}
