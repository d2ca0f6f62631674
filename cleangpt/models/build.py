"""From a recipe's model section to a model, new or started from saved weights."""

from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from ..errors import UserError
from ..recipe import ARITHMETIC

disable_progress_bar()  # of loading and saving, which take a moment


def resolve_block_size(recipe) -> None:
    """Sets `data.block_size` of a recipe on text: as given, else the model's `max_position_embeddings`.

    Raises:
        UserError: when a sequence would be longer than the model's positions.
    """
    model, block_size = recipe.model, recipe.data.block_size
    if recipe.data.path in ARITHMETIC:
        return  # one problem a sequence
    given = model.get("max_position_embeddings")
    if given is None and (block_size is None or "init_from" in model):
        given = getattr(load_config(model), "max_position_embeddings", None)
    if block_size is not None and given is not None and block_size > given:
        raise UserError(("data.block_size", f"expected at most max_position_embeddings {given}, got {block_size}"))
    if block_size is None and given is None:
        raise UserError(
            ("data.block_size", "expected a whole number from 1: this kind of model has no length of its own")
        )
    recipe.data.block_size = block_size or given


def build_model(model: dict, tokenizer, split, seed: int) -> PreTrainedModel:
    """The model of a recipe's `model` section, in float32.

    Args:
        model: the section. tokenizer: gives vocabulary size and special ids where the section does not.
        split: to be trained on; its rows' length sets the positions where the section does not. seed: of new weights.

    Raises:
        UserError: for weights that cannot be loaded, or a vocabulary smaller than the tokenizer's.
    """
    attention = model.get("attn_implementation")
    config = config_for(model, tokenizer, split.sequence_length)
    torch.manual_seed(seed)
    if "init_from" in model:
        source = model["init_from"]
        network = _from_pretrained(source, "model.init_from", config=config, attn_implementation=attention)
    else:
        try:
            network = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
        except (ValueError, ImportError) as error:
            raise UserError(("model", str(error))) from error
    # Left to itself, generate writes an arithmetic answer, or as much text as the model has positions.
    answer = getattr(split, "answer_width", None)
    length = {"max_new_tokens": answer} if answer else {"max_length": config.max_position_embeddings}
    network.generation_config = GenerationConfig(**special_ids(tokenizer), **length)
    return network


def config_for(model: dict, tokenizer, length: int) -> PreTrainedConfig:
    """The configuration of a recipe's `model` section for a tokenizer and for sequences of `length` tokens.

    Both give what the section leaves out. A kind without a limit to its positions (Bloom) gets `length` as one, which
    is what it will have seen.

    Raises:
        UserError: as `load_config`, and for less ids than the tokenizer has, or less positions than `length`.
    """
    sizes = {} if "init_from" in model else {"vocab_size": len(tokenizer), "max_position_embeddings": length}
    config = load_config(model, **sizes, **special_ids(tokenizer))
    if not hasattr(config, "max_position_embeddings"):
        config.max_position_embeddings = length
    needed = {
        "vocab_size": (len(tokenizer), "the tokenizer's ids"),
        "max_position_embeddings": (length, "a sequence's tokens"),
    }
    mistakes = [
        (f"model.{name}", f"expected at least {least}, {what}, got {getattr(config, name)}")
        for name, (least, what) in needed.items()
        if getattr(config, name) < least
    ]
    if mistakes:
        raise UserError(*mistakes)
    return config


def special_ids(tokenizer) -> dict[str, int | None]:
    """The tokenizer's special ids under the names that a configuration has for them."""
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def choose_attention(model: dict, length: int, mixed_precision: str, device: torch.device) -> str | None:
    """The attention of a run whose recipe names none, from a fixed table, so that a resumed run chooses the same.

    | hardware | sequences of | chosen |
    |---|---|---|
    | CPU, float32 | at most 16 tokens | `eager`: a step of `recipes/adder.yaml` takes 0.8 of the time |
    | CPU, bf16 | at most 256 tokens | `eager`: 0.6 of the time of attention alone, with AMX |
    | any other | | what transformers chooses, `sdpa` |

    Args:
        model: the recipe's section. length: tokens of a sequence. mixed_precision: `no`, `bf16` or `fp16`.
    """
    if "attn_implementation" in model or model.get("model_type") not in ("nanogpt", "nanollama"):
        return model.get("attn_implementation")
    short = length <= (256 if mixed_precision == "bf16" else 16)
    return "eager" if device.type == "cpu" and short else None


def load_model(folder: str | Path, attention: str | None = None, key: str = "model") -> PreTrainedModel:
    """A saved model in float32, under the attention implementation `attention`.

    Raises:
        UserError: under the name `key`, when there is no model to load.
    """
    return _from_pretrained(folder, key, attn_implementation=attention)


def _from_pretrained(source: str | Path, key: str, **options) -> PreTrainedModel:
    """`from_pretrained` in float32 that refuses what it would only warn of: weights that are missing or do not fit."""
    try:
        network, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:  # the loader raises whatever a broken file makes it raise
        message = f"expected a model's folder or Hub id, got {str(source)!r}: {type(error).__name__}: {error}"
        raise UserError((key, message)) from error
    if wrong := sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]):
        raise UserError((key, f"the weights in {str(source)!r} are not those of its config: {', '.join(wrong[:5])}"))
    return network


def load_config(model: dict, **defaults) -> PreTrainedConfig:
    """The configuration of a recipe's `model` section. Where nothing is said of keys and values, each head has its own.

    Args:
        model: the section. defaults: keys that the section may override.

    Raises:
        UserError: when there is nothing at `init_from`, a model of another type than the section names, or one that
            lacks a key of the section or cannot have its value.
    """
    ours = ("model_type", "init_from", "attn_implementation")
    given = {key: value for key, value in model.items() if key not in ours}
    if "init_from" not in model:
        if "num_attention_heads" in given and hasattr(CONFIG_MAPPING[model["model_type"]], "num_key_value_heads"):
            defaults["num_key_value_heads"] = given["num_attention_heads"]
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
