"""Models to and from the architectures that every client knows, each conversion proven on both models' outputs.

NanoGPT   <──> gpt2                 (GPT-2's `Conv1D` weights are transposed; a missing bias is a zero bias)
NanoLlama <──> llama, or qwen3 with QK-norm
nanoGPT's ckpt.pt ──> NanoGPT
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import AutoConfig, AutoModelForCausalLM

from ..data.tokenization import load_tokenizer
from ..errors import UserError
from ..files import write_folder
from .build import load_model, quiet

TOLERANCE = 1e-5  # largest difference between two logits
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
SHARED: tuple[str, ...] = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
SHARED += ("max_position_embeddings", "intermediate_size", "attention_dropout", "initializer_range")
SHARED += ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
NANOGPT = (*SHARED, "activation_function", "layer_norm_epsilon", "dropout")
NANOLLAMA = (*SHARED, "num_key_value_heads", "rope_parameters", "rms_norm_eps")
GPT2 = {"intermediate_size": "n_inner", "dropout": "resid_pdrop", "attention_dropout": "attn_pdrop"}  # else the same
METADATA = ModelCardData(library_name="transformers", pipeline_tag="text-generation")


def to_native(model: PreTrainedModel) -> PreTrainedModel:
    """The same function as a plain `gpt2`, `llama` or `qwen3`, in float32; a UserError for any other model."""
    config, weights = model.config, model.state_dict()
    if config.model_type == "nanogpt":
        native = _gpt2(config, weights)
    elif config.model_type == "nanollama":
        options = {name: getattr(config, name) for name in NANOLLAMA}
        options["head_dim"] = config.hidden_size // config.num_attention_heads
        native = _build("model", "qwen3" if config.use_qk_norm else "llama", weights, **options)
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
    return _build("model", "gpt2", _transpose(zeros | weights), **options)


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
        ours = _build("source", "nanogpt", weights, **options, bias=bias)
    elif config.model_type in ("llama", "qwen3"):
        is_qwen = config.model_type == "qwen3"
        plain = {"layer_types": ["full_attention"] * config.num_hidden_layers} if is_qwen else {"mlp_bias": False}
        plain["head_dim"] = config.hidden_size // config.num_attention_heads
        _require(config, hidden_act="silu", attention_bias=False, **plain)
        options = {name: getattr(config, name) for name in NANOLLAMA}
        ours = _build("source", "nanollama", weights, **options, use_qk_norm=is_qwen)
    else:
        raise UserError(("source", f"expected gpt2, llama, qwen3 or nanoGPT's ckpt.pt, got {config.model_type}"))
    ours.generation_config = model.generation_config
    return ours


def from_nanogpt_checkpoint(path: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model in nanoGPT's `ckpt.pt`, and a GPT-2 of the same weights to compare it with; else a UserError.

    Nothing in the file is executed (`weights_only=True`).
    """
    expected = "expected a ckpt.pt with model and model_args, as nanoGPT writes it"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        arguments = checkpoint["model_args"]
        weights = {name.removeprefix("_orig_mod."): weight.float() for name, weight in checkpoint["model"].items()}
        shape = {name: arguments[name] for name in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")}
        shape["tie_word_embeddings"] = torch.equal(weights["transformer.wte.weight"], weights["lm_head.weight"])
    except Exception as error:  # a file can hold anything
        raise UserError((str(path), f"{expected}, got {type(error).__name__}: {error}")) from error
    weights = {name: weight for name, weight in weights.items() if not name.endswith(".attn.bias")}  # a mask
    model = _build(str(path), "nanogpt", weights, **shape, dropout=arguments.get("dropout", 0.0))
    return model, _gpt2(model.config, weights)


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
    """Compares two models of one vocabulary and length on random input, padded input and greedy generation.

    The weights are compared in float64, where rounding plays no part: the norm of a narrow model can magnify float32's
    a thousandfold. Buffers keep their type, as Llama computes rotary angles in float32.
    """
    positions, generator = one.config.max_position_embeddings, torch.Generator().manual_seed(0)
    ids = torch.randint(one.config.vocab_size, (4, min(positions, 64)), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, : ids.shape[1] // 2] = 0  # padded on the left
    mask[2, -(ids.shape[1] // 3) :] = 0  # padded on the right
    prompt = ids[:1, : min(8, max(1, positions - 64))]
    new_tokens = min(64, positions - prompt.shape[1])
    options = GenerationConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    answers = []
    for model in (one, other):
        dtype = model.dtype
        for weight in model.parameters():
            weight.data = weight.double()
        whole, padded = model(ids).logits, model(ids, attention_mask=mask).logits  # (4, time, vocab)
        text = model.generate(prompt, generation_config=options)[0, prompt.shape[1] :]  # type: ignore[operator]
        for weight in model.parameters():
            weight.data = weight.to(dtype)
        answers.append((torch.cat([whole.flatten(0, 1), padded[mask.bool()]]), text))
    (logits, text), (other_logits, other_text) = answers
    same_tokens = int((text == other_text).long().cumprod(0).sum())
    return Proof((logits - other_logits).abs().max().item(), new_tokens, same_tokens)


def export_folder(source: str | Path, out: Path) -> Proof:
    """Writes a saved model as a plain `gpt2`, `llama` or `qwen3` folder.

    Raises:
        UserError: before anything is written, if there is no model, `out` is taken, or the two models differ.
    """
    _require_free(out)
    model, tokenizer = load_model(source).eval(), load_tokenizer(source, "model")
    if tokenizer.unk_token is None:
        tokenizer.unk_token = tokenizer.eos_token  # as in GPT-2; some converters need one
    tokenizer.model_max_length = model.config.max_position_embeddings
    native = to_native(model)
    metadata, card = METADATA, Path(source, "README.md")
    if card.is_file():
        metadata = ModelCard.load(card, ignore_metadata_errors=True).data
        ours, native_type = ("nanogpt", "nanollama"), native.config.model_type
        metadata.tags = [native_type if tag in ours else tag for tag in metadata.tags or []]
    return _write_if_equal(out, model, native, tokenizer, metadata.to_yaml())


def import_folder(source: str | Path, out: Path, tokenizer_path: str | None = None) -> Proof:
    """Writes a NanoGPT or NanoLlama folder from a GPT-2, Llama or Qwen3 folder or id, or nanoGPT's `ckpt.pt`.

    The tokenizer is by default the source's own (a `ckpt.pt` has none).

    Raises:
        UserError: if the source cannot be read or has no counterpart here, or `out` is taken.
    """
    _require_free(out)
    tokenizer = None if tokenizer_path is None else load_tokenizer(tokenizer_path, "--tokenizer")
    if Path(source).is_file():
        model, original = from_nanogpt_checkpoint(Path(source))
    else:
        original = load_model(source, key="source").eval()
        model = from_native(original)
        tokenizer = tokenizer or load_tokenizer(source, "source")
    return _write_if_equal(out, original, model, tokenizer, METADATA.to_yaml())


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
    out: Path, source: PreTrainedModel, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, metadata: str
) -> Proof:
    """Writes `model`, if it equals the `source` it was converted from, with a tokenizer and a card."""
    proof = compare_models(source, model)
    if not proof.holds:
        raise UserError(("model", f"the two are not equal, nothing is written: {proof}"))
    card = CARD.format(metadata=metadata, source=source.config.model_type, proof=proof, out=out)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")

    try:
        write_folder(out, fill)
    except OSError as error:
        raise UserError((str(out), f"cannot be written: {error.strerror}")) from error
    return proof


def _require_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError((str(out), "expected a new or empty folder"))


def _require(config: PreTrainedConfig, **expected: Any) -> None:
    for name, value in expected.items():
        if (got := getattr(config, name)) != value:
            raise UserError(("source", f"{name}: expected {value!r}, got {got!r}, which has no counterpart here"))


def _transpose(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.T.contiguous() if name.endswith(CONV1D) else weight for name, weight in weights.items()}


def _build(key: str, model_type: str, weights: dict[str, torch.Tensor], **options: Any) -> PreTrainedModel:
    """A model from its weights and the keys of its configuration; `key` is what errors are about."""
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options))
        model.load_state_dict(weights)
    except Exception as error:  # configurations raise errors of many types
        reason = " ".join(str(error.__cause__ or error).splitlines()[:4])
        raise UserError((key, f"does not fit a {model_type}: {reason}")) from error
    return model.eval()
