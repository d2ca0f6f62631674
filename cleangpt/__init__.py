"""CleanGPT: train small GPTs from scratch with code you can read, and get models the Hugging Face ecosystem loads.

Importing this package registers the models, so that `AutoModelForCausalLM.from_pretrained` loads any saved folder.
"""

import importlib
from collections.abc import Callable

import transformers

from .errors import Stopped, UserError
from .models.nanogpt.configuration_nanogpt import NanoGPTConfig
from .models.nanogpt.modeling_nanogpt import NanoGPTForCausalLM, NanoGPTForSequenceClassification, NanoGPTModel
from .models.nanollama.configuration_nanollama import NanoLlamaConfig
from .models.nanollama.modeling_nanollama import (
    NanoLlamaForCausalLM,
    NanoLlamaForSequenceClassification,
    NanoLlamaModel,
)

__version__ = "0.2.0"

for _config, _model, _causal, _classifier in (
    (NanoGPTConfig, NanoGPTModel, NanoGPTForCausalLM, NanoGPTForSequenceClassification),
    (NanoLlamaConfig, NanoLlamaModel, NanoLlamaForCausalLM, NanoLlamaForSequenceClassification),
):
    transformers.AutoConfig.register(_config.model_type, _config)
    transformers.AutoModel.register(_config, _model)
    transformers.AutoModelForCausalLM.register(_config, _causal)
    transformers.AutoModelForSequenceClassification.register(_config, _classifier)
    transformers.AutoTokenizer.register(_config, fast_tokenizer_class=transformers.PreTrainedTokenizerFast)
    # Saved folders carry the model's code, for `trust_remote_code=True` where cleangpt is not installed.
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")
    _causal.register_for_auto_class("AutoModelForCausalLM")
    _classifier.register_for_auto_class("AutoModelForSequenceClassification")


def __getattr__(name: str) -> Callable:
    """Imports the trainer on demand: loading a model needs neither datasets nor accelerate."""
    modules = {"load_recipe": ".recipe.reading", "train": ".training.loop"}
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(modules[name], __name__), name)


__all__ = ["NanoGPTConfig", "NanoGPTForCausalLM", "NanoGPTModel", "NanoLlamaConfig", "NanoLlamaForCausalLM"]
__all__ += ["NanoLlamaModel", "Stopped", "UserError", "load_recipe", "train"]
