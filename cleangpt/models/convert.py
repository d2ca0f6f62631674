"""Models to and from the architectures that every client knows, each time with a proof that both compute the same.

NanoGPT   <──> gpt2                 (GPT-2's `Conv1D` weights are transposed; a missing bias is a zero bias)
NanoLlama <──> llama, or qwen3 with QK-norm
nanoGPT's ckpt.pt ──> NanoGPT
"""

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ..errors import UserError
from ..files import write_folder
from ..tokenization import load_tokenizer
from .build import load_model
from .nanogpt.configuration_nanogpt import NanoGPTConfig
from .nanogpt.modeling_nanogpt import NanoGPTForCausalLM
from .nanollama.configuration_nanollama import NanoLlamaConfig
from .nanollama.modeling_nanollama import NanoLlamaForCausalLM

TOLERANCE = 1e-5  # largest difference of two logits
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
SHARED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
SHARED += ("initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
LLAMA = (*SHARED, "num_key_value_heads", "intermediate_size", "rope_parameters", "rms_norm_eps", "attention_dropout")


def to_native(model: PreTrainedModel) -> PreTrainedModel:
    """The same function as a plain `gpt2`, `llama` or `qwen3`, in float32.

    Raises:
        UserError: for a model that is neither NanoGPT nor NanoLlama.
    """
    config = model.config
    if config.model_type == "nanogpt":
        return _gpt2(config, model.state_dict(), model.generation_config)
    if config.model_type != "nanollama":
        raise UserError(("model", f"expected a nanogpt or nanollama, got a {config.model_type}: it needs no export"))
    options = {name: getattr(config, name) for name in LLAMA}
    if config.use_qk_norm:
        head_dim = config.hidden_size // config.num_attention_heads
        native = Qwen3ForCausalLM(Qwen3Config(**options, head_dim=head_dim))
    else:
        native = LlamaForCausalLM(LlamaConfig(**options))
    _load(native, model.state_dict(), "model")
    native.generation_config = model.generation_config
    return native.eval()


def _gpt2(config: NanoGPTConfig, weights: dict[str, torch.Tensor], generation: GenerationConfig) -> GPT2LMHeadModel:
    """A GPT-2 from weights under nanoGPT's names."""
    native = GPT2LMHeadModel(
        GPT2Config(
            **{name: getattr(config, name) for name in SHARED},
            n_inner=config.intermediate_size,
            n_ctx=config.max_position_embeddings,  # some converters read no other name
            activation_function=config.activation_function,
            layer_norm_epsilon=config.layer_norm_epsilon,
            embd_pdrop=config.dropout,
            resid_pdrop=config.dropout,
            attn_pdrop=config.attention_dropout,
        )
    )
    weights = _transpose(weights)
    for name, weight in native.state_dict().items():
        if name not in weights and name.endswith(".bias"):
            weights[name] = torch.zeros_like(weight)
    _load(native, weights, "model")
    native.generation_config = generation
    return native.eval()


def from_native(model: PreTrainedModel) -> PreTrainedModel:
    """The same function as a NanoGPT or NanoLlama, in float32.

    Raises:
        UserError: for another architecture, or a variant of these that ours do not have.
    """
    config = model.config
    if config.model_type == "gpt2":
        _require(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
        _require(config, embd_pdrop=config.resid_pdrop)
        weights = _transpose(model.state_dict())
        biases = [name for name in weights if name.endswith(".bias")]
        bias = any(weights[name].any() for name in biases)  # exported without biases, they are all zero
        if not bias:
            weights = {name: weight for name, weight in weights.items() if name not in biases}
        ours = _build(
            NanoGPTForCausalLM,
            NanoGPTConfig,
            **{name: getattr(config, name) for name in SHARED},
            intermediate_size=config.n_inner,
            activation_function=config.activation_function,
            layer_norm_epsilon=config.layer_norm_epsilon,
            dropout=config.resid_pdrop,
            attention_dropout=config.attn_pdrop,
            bias=bias,
        )
    elif config.model_type in ("llama", "qwen3"):
        _require(
            config, hidden_act="silu", attention_bias=False, head_dim=config.hidden_size // config.num_attention_heads
        )
        if config.model_type == "llama":
            _require(config, mlp_bias=False)
        else:
            _require(config, layer_types=["full_attention"] * config.num_hidden_layers)
        options = {name: getattr(config, name) for name in LLAMA}
        weights = model.state_dict()
        ours = _build(NanoLlamaForCausalLM, NanoLlamaConfig, **options, use_qk_norm=config.model_type == "qwen3")
    else:
        raise UserError(("source", f"expected gpt2, llama, qwen3 or nanoGPT's ckpt.pt, got {config.model_type}"))
    _load(ours, weights, "source")
    ours.generation_config = model.generation_config
    return ours.eval()


def from_nanogpt_checkpoint(path: Path) -> tuple[NanoGPTForCausalLM, GPT2LMHeadModel]:
    """The model in a `ckpt.pt` that nanoGPT's `train.py` wrote, and a GPT-2 of the same weights to compare it with.

    Nothing in the file is executed: it is read with `weights_only=True`.

    Raises:
        UserError: for a file that is no such checkpoint.
    """
    expected = "expected a ckpt.pt with model and model_args, as nanoGPT writes it"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        arguments = checkpoint["model_args"]
        weights = {name.removeprefix("_orig_mod."): weight for name, weight in checkpoint["model"].items()}
        shape = {name: arguments[name] for name in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")}
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError((str(path), f"{expected}: {error}")) from error
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError((str(path), f"{expected}, got {type(error).__name__} {error}")) from error
    weights = {name: weight.float() for name, weight in weights.items() if not name.endswith(".attn.bias")}  # a mask
    model = _build(NanoGPTForCausalLM, NanoGPTConfig, **shape, dropout=arguments.get("dropout", 0.0))
    _load(model, weights, str(path))
    return model.eval(), _gpt2(model.config, weights, model.generation_config)


@dataclass
class Proof:
    """How alike two models are."""

    difference: float
    """Largest difference of two logits, on random and on padded input, in float64."""
    tokens: int
    """Greedy tokens compared."""
    same_tokens: int
    """Greedy tokens that are the same, up to the first that is not."""

    @property
    def holds(self) -> bool:
        """Whether that counts as equal."""
        return self.difference <= TOLERANCE and self.same_tokens == self.tokens

    def __str__(self) -> str:
        return (
            f"largest difference of logits {self.difference:.1e} (at most {TOLERANCE:.0e}), "
            f"{self.same_tokens} of {self.tokens} greedy tokens the same"
        )


@torch.no_grad()
def compare(one: PreTrainedModel, other: PreTrainedModel) -> Proof:
    """Compares two models of the same vocabulary and positions on random input, padded input and greedy generation.

    In float64, where a difference is one of the weights and not of rounding: a norm of a narrow model can make a
    thousand times as much of the order in which float32 adds up.
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
        model.double()
        whole, padded = model(ids).logits, model(ids, attention_mask=mask).logits  # (4, time, vocab)
        text = model.generate(prompt, generation_config=options)[0, prompt.shape[1] :]
        model.to(dtype)
        answers.append((torch.cat([whole.flatten(0, 1), padded[mask.bool()]]), text))
    (logits, text), (other_logits, other_text) = answers
    same = int((text == other_text).long().cumprod(0).sum())
    return Proof((logits - other_logits).abs().max().item(), new_tokens, same)


def export_folder(source: str, out: Path) -> Proof:
    """Writes the native-architecture folder of a saved model, once it is proved equal.

    Raises:
        UserError: when there is no model, `out` is taken, or the two are not equal; nothing is written then.
    """
    _require_free(out)
    model = load_model(source).eval()
    tokenizer = load_tokenizer(source, "model")
    native = to_native(model)
    proof = _prove(model, native)
    if tokenizer.unk_token is None:
        tokenizer.unk_token = tokenizer.eos_token  # as GPT-2 has it; some converters cannot do without
    tokenizer.model_max_length = model.config.max_position_embeddings
    _write(out, native, tokenizer, f"Exported from a {model.config.model_type} of CleanGPT.", proof, Path(source))
    return proof


def import_folder(source: str, out: Path, tokenizer_path: str | None = None) -> Proof:
    """Writes a NanoGPT or NanoLlama folder from a GPT-2, Llama or Qwen3 folder or id, or nanoGPT's `ckpt.pt`.

    Args:
        tokenizer_path: the tokenizer to put beside it; None takes the source's own, where it has one.

    Raises:
        UserError: when the source cannot be read or has no counterpart here, or `out` is taken.
    """
    _require_free(out)
    if Path(source).is_file():
        model, original = from_nanogpt_checkpoint(Path(source))
        tokenizer = None
    else:
        original = load_model(source, key="source").eval()
        model = from_native(original)
        tokenizer = load_tokenizer(source, "source") if tokenizer_path is None else None
    if tokenizer_path is not None:
        tokenizer = load_tokenizer(tokenizer_path, "--tokenizer")
    proof = _prove(original, model)
    _write(out, model, tokenizer, f"Imported from a {original.config.model_type}.", proof, None)
    return proof


def _prove(one: PreTrainedModel, other: PreTrainedModel) -> Proof:
    proof = compare(one, other)
    if not proof.holds:
        raise UserError(("model", f"the two are not equal, nothing is written: {proof}"))
    return proof


def _write(out: Path, model: PreTrainedModel, tokenizer, what: str, proof: Proof, source: Path | None) -> None:
    """Writes model, tokenizer and a card to the folder `out`, with the metadata of the card of `source`."""

    def fill(folder: Path):
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(_card(out, model, what, proof, source), encoding="utf-8")

    try:
        write_folder(out, fill)
    except OSError as error:
        raise UserError((str(out), f"cannot be written: {error.strerror}")) from error


CARD = """---
{metadata}
---

{what} Compared with it: {proof}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{out}")
tokenizer = AutoTokenizer.from_pretrained("{out}")
```
"""


def _card(out: Path, model: PreTrainedModel, what: str, proof: Proof, source: Path | None) -> str:
    metadata = ModelCardData(library_name="transformers", pipeline_tag="text-generation")
    if source is not None and (source / "README.md").is_file():
        metadata = ModelCard.load(source / "README.md", ignore_metadata_errors=True).data
        metadata.tags = [
            model.config.model_type if tag in ("nanogpt", "nanollama") else tag for tag in metadata.tags or []
        ]
    return CARD.format(metadata=metadata.to_yaml(), what=what, proof=proof, out=out)


def _require_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError((str(out), "expected a new or empty folder"))


def _require(config, **expected) -> None:
    for name, value in expected.items():
        if getattr(config, name) != value:
            message = f"{name}: expected {value!r}, got {getattr(config, name)!r}, which ours cannot be"
            raise UserError(("source", message))


def _transpose(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.T.contiguous() if name.endswith(CONV1D) else weight for name, weight in weights.items()}


def _build(model_class: type, config_class: type, **options) -> PreTrainedModel:
    try:
        return model_class(config_class(**options))
    except Exception as error:  # a configuration says in its own kinds what it cannot be
        raise UserError(("source", str(error.__cause__ or error))) from error


def _load(model: PreTrainedModel, weights: dict[str, torch.Tensor], key: str) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:4]]
        raise UserError((key, f"weights do not fit the model: {' '.join(lines)}")) from error
