"""From a recipe's `model` section to a model, new or from saved weights."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from ..data.arithmetic import ArithmeticSplit
from ..data.conversations import end_of_turn
from ..data.splits import Split
from ..errors import UserError
from ..files import hint_at_model
from ..recipe.keys import ARITHMETIC, Data


def block_size(data: Data, model: Mapping[str, Any]) -> int | None:
    """`data.block_size`, by default the model's `max_position_embeddings`; None for arithmetic, one problem a sequence.

    Raises:
        UserError: if neither is known, or a sequence has more tokens than the model has positions.
    """
    if data.path in ARITHMETIC:
        return None
    positions = model.get("max_position_embeddings")
    if positions is None and (data.block_size is None or "init_from" in model):
        positions = getattr(load_config(model), "max_position_embeddings", None)
    length = data.block_size or positions
    if length is None:
        raise UserError(("data.block_size", "expected a whole number from 1: this model type has no length of its own"))
    if positions is not None and length > positions:
        raise UserError(("data.block_size", f"expected at most max_position_embeddings {positions}, got {length}"))
    return length


def build_model(
    model: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, split: Split, seed: int
) -> PreTrainedModel:
    """The model of a recipe's `model` section, in float32; `seed` is of new weights, the rest as in `config_for`.

    Raises:
        UserError: for weights that cannot be loaded, or a configuration too small for tokenizer or split.
    """
    attention = model.get("attn_implementation")
    config = config_for(model, tokenizer, split.sequence_length)
    torch.manual_seed(seed)
    if "init_from" in model:
        network = load_model(model["init_from"], attention, "model.init_from", config=config)
    else:
        try:
            network = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
        except (ValueError, ImportError) as error:
            raise UserError(("model", str(error))) from error
    new_tokens = max(1, config.max_position_embeddings // 2)
    if isinstance(split, ArithmeticSplit):
        new_tokens = split.answer_width
    network.generation_config = generation_config(tokenizer, new_tokens)
    return network


def config_for(model: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, length: int) -> PreTrainedConfig:
    """The configuration of a recipe's `model` section; a tokenizer and sequences of `length` tokens set what it omits.

    Raises:
        UserError: as `load_config`, and for fewer ids than the tokenizer has, or fewer positions than `length`.
    """
    needed = {"vocab_size": len(tokenizer), "max_position_embeddings": length}
    config = load_config(model, **({} if "init_from" in model else needed), **special_ids(tokenizer))
    if not hasattr(config, "max_position_embeddings"):
        config.max_position_embeddings = length  # unlimited positions (Bloom): those seen in training
    if too_small := [name for name, least in needed.items() if getattr(config, name) < least]:
        message = "expected at least {}, for tokenizer and sequences, got {}"
        raise UserError(*((f"model.{name}", message.format(needed[name], getattr(config, name))) for name in too_small))
    return config


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer's special ids, under their names in a configuration."""
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def generation_config(tokenizer: PreTrainedTokenizerBase, new_tokens: int) -> GenerationConfig:
    """How many tokens `generate` writes by default, and where it stops."""
    special = special_ids(tokenizer)
    ends = dict.fromkeys(end for end in (special["eos_token_id"], end_of_turn(tokenizer)) if end is not None)
    if len(ends) > 1:  # a document's and a turn's
        special["eos_token_id"] = list(ends)
    return GenerationConfig(**special, max_new_tokens=new_tokens)


def choose_attention(model: Mapping[str, Any], length: int, mixed_precision: str, device: torch.device) -> str | None:
    """The attention implementation for a run, from its recipe or from fixed limits, so that resuming agrees.

    On a CPU, `eager` up to a `length` of 16 tokens in float32 (0.8 of the time of a step of `recipes/adder.yaml`), of
    256 in bf16 (0.6 of the time of attention alone, with AMX); elsewhere transformers' choice, `sdpa`.
    """
    if "attn_implementation" in model or model.get("model_type") not in ("nanogpt", "nanollama"):
        return model.get("attn_implementation")
    is_short = length <= (256 if mixed_precision == "bf16" else 16)
    return "eager" if device.type == "cpu" and is_short else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' progress bars and warnings about loading and saving out of the output."""
    hook = logging.set_tqdm_hook(lambda factory, args, kwargs: logging.EmptyTqdm(*args, **kwargs))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.set_tqdm_hook(hook)


@quiet()
def load_model(source: str | Path, attention: str | None = None, key: str = "model", **options: Any) -> PreTrainedModel:
    """A saved model in float32, with the attention implementation `attention`.

    Raises:
        UserError: about `key`, if it cannot be loaded, or lacks weights or has others (transformers only warns).
    """
    options |= {"dtype": torch.float32, "attn_implementation": attention, "use_safetensors": True}
    options |= {"ignore_mismatched_sizes": True}  # `info` names them
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    except Exception as error:  # a broken file can raise anything
        reason = hint_at_model(source) or f": {type(error).__name__}: {error}"
        message = f"expected a model's folder or Hub id, got {str(source)!r}{reason}"
        raise UserError((key, message)) from error
    network, info = loaded
    if wrong := sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]):
        raise UserError((key, f"the weights in {str(source)!r} are not those of its config: {', '.join(wrong[:5])}"))
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise UserError((key, f"expected {name} of shape {list(expected)}, got {list(found)} in {str(source)!r}"))
    return network


def load_config(model: Mapping[str, Any], **defaults: Any) -> PreTrainedConfig:
    """The configuration of a recipe's `model` section, and of `defaults` for keys that it omits.

    Raises:
        UserError: if `init_from` has no model, one of another type, or one without a key of the section or its value.
    """
    ours = ("model_type", "init_from", "attn_implementation")
    given = {key: value for key, value in model.items() if key not in ours}
    if "init_from" not in model:
        if "num_attention_heads" in given and hasattr(CONFIG_MAPPING[model["model_type"]], "num_key_value_heads"):
            defaults["num_key_value_heads"] = given["num_attention_heads"]  # by default, keys and values for each head
        return AutoConfig.for_model(model["model_type"], **{**defaults, **given})
    source = model["init_from"]
    try:
        config, unknown = AutoConfig.from_pretrained(source, return_unused_kwargs=True, **{**defaults, **given})
    except StrictDataclassError as error:
        raise UserError(("model", f"not as the model in {source!r} can be: {error.__cause__ or error}")) from error
    except (OSError, ValueError) as error:
        raise UserError(("model.init_from", f"expected a model's folder or Hub id, got {source!r}")) from error
    if mistakes := [(f"model.{key}", f"unknown key of the model in {source!r}") for key in unknown if key in given]:
        raise UserError(*mistakes)
    if model.get("model_type", config.model_type) != config.model_type:
        raise UserError(("model.model_type", f"expected {config.model_type} of init_from, got {model['model_type']!r}"))
    return config


def assemble(key: str, model_type: str, weights: dict[str, torch.Tensor], **options: Any) -> PreTrainedModel:
    """A model from its weights and the keys of its configuration; `key` is what errors are about."""
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options))
        model.load_state_dict(weights)
    except Exception as error:  # configurations raise errors of many types
        reason = " ".join(str(error.__cause__ or error).splitlines()[:4])
        raise UserError((key, f"does not fit a {model_type}: {reason}")) from error
    return model.eval()
