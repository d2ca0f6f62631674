"""From a recipe's model section to a model, new or started from saved weights."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
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
        given = load_config(model).max_position_embeddings
    if block_size is not None and given is not None and block_size > given:
        raise UserError(("data.block_size", f"expected at most max_position_embeddings {given}, got {block_size}"))
    recipe.data.block_size = block_size or given


def build_model(model: dict, tokenizer, split, seed: int) -> PreTrainedModel:
    """The model of a recipe's `model` section, in float32.

    Args:
        model: the section. tokenizer: gives vocabulary size and special ids where the section does not.
        split: to be trained on; its rows' length sets the positions where the section does not. seed: of new weights.

    Raises:
        UserError: for weights that cannot be loaded, or a vocabulary smaller than the tokenizer's.
    """
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    attention = model.get("attn_implementation")
    torch.manual_seed(seed)
    if "init_from" in model:
        config = load_config(model, **special)
        source = model["init_from"]
        network = _from_pretrained(source, "model.init_from", config=config, attn_implementation=attention)
    else:
        sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": split.sequence_length}
        config = load_config(model, **sizes, **special)
        try:
            network = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
        except (ValueError, ImportError) as error:
            raise UserError(("model", str(error))) from error
    for name, least in (("vocab_size", len(tokenizer)), ("max_position_embeddings", split.sequence_length)):
        if getattr(config, name) < least:
            what = {"vocab_size": "the tokenizer's ids", "max_position_embeddings": "a sequence's tokens"}[name]
            raise UserError((f"model.{name}", f"expected at least {least}, {what}, got {getattr(config, name)}"))
    # Left to itself, generate writes an arithmetic answer, or as much text as the model has positions.
    answer = getattr(split, "answer_width", None)
    length = {"max_new_tokens": answer} if answer else {"max_length": config.max_position_embeddings}
    network.generation_config = GenerationConfig(**special, **length)
    return network


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
    """The configuration of a recipe's `model` section.

    Args:
        model: the section. defaults: keys that the section may override.

    Raises:
        UserError: when there is nothing at `init_from`, or a model of another type than the section names.
    """
    ours = ("model_type", "init_from", "attn_implementation")
    options = {**defaults, **{key: value for key, value in model.items() if key not in ours}}
    if "init_from" not in model:
        return AutoConfig.for_model(model["model_type"], **options)
    try:
        config = AutoConfig.from_pretrained(model["init_from"], **options)
    except (OSError, ValueError) as error:
        raise UserError(
            ("model.init_from", f"expected a model's folder or Hub id, got {model['init_from']!r}")
        ) from error
    if model.get("model_type", config.model_type) != config.model_type:
        raise UserError(("model.model_type", f"expected {config.model_type} of init_from, got {model['model_type']!r}"))
    return config
