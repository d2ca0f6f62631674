"""Configuration of NanoGPT: the shape of nanoGPT's GPT-2."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class NanoGPTConfig(PreTrainedConfig):
    r"""Every key can be exported to a plain `gpt2`; nanoGPT's names (`n_embd`, `n_layer`, `n_head`, `n_positions`,
    `block_size`, `n_inner`) are accepted too.

    Attributes:
        vocab_size (int): number of token ids.
        hidden_size (int): width of the residual stream, a multiple of `num_attention_heads`.
        num_hidden_layers (int): number of blocks.
        num_attention_heads (int): attention heads in a block.
        intermediate_size (int | None): width inside the MLP; by default 4 x `hidden_size`.
        max_position_embeddings (int): the longest sequence, in tokens; each position has a learned vector.
        activation_function (str): `gelu` (exact, as in nanoGPT) or `gelu_new` (tanh approximation, as in GPT-2).
        bias (bool): biases in every linear layer and LayerNorm, as in GPT-2; a little faster and better without.
        dropout (float): rate (0 to below 1) after the embeddings and on both residual branches.
        attention_dropout (float | None): rate (0 to below 1) on the attention weights; by default that of `dropout`.
        layer_norm_epsilon (float): added to the variance in LayerNorm.
        initializer_range (float): standard deviation of the initial weights, see `NanoGPTPreTrainedModel`.
        tie_word_embeddings (bool): the head shares the token embedding's matrix, as in GPT-2.

    ```python
    >>> model = NanoGPTForCausalLM(NanoGPTConfig(vocab_size=65, n_layer=4, n_head=4, n_embd=128, block_size=64))
    ```
    """

    model_type = "nanogpt"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "n_positions": "max_position_embeddings",
        "block_size": "max_position_embeddings",
    }
    # Only the MLP is split: columns of c_attn belong to queries, keys and values, which have to stay together.
    base_model_tp_plan = {"h.*.mlp.c_fc": "colwise", "h.*.mlp.c_proj": "rowwise"}
    base_model_fsdp_plan = {"wte": "free_full_weight", "h.*": "free_full_weight", "ln_f": "keep_full_weight"}
    base_model_pp_plan = {
        "wte": (["input_ids"], ["inputs_embeds"]),
        "h": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "ln_f": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    max_position_embeddings: int = 1024
    activation_function: Literal["gelu", "gelu_new"] = "gelu"
    bias: bool = True
    dropout: float | int = 0.0
    attention_dropout: float | int | None = None
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.attention_dropout is None:
            self.attention_dropout = self.dropout

    def validate_architecture(self):
        """Called by `@strict`: rejects impossible shapes."""
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"num_attention_heads: expected a divisor of hidden_size {self.hidden_size}, "
                f"got {self.num_attention_heads}"
            )
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number from 0 to below 1, got {getattr(self, name)}")


# Classes of a saved folder's own code, which transformers' Auto classes load with `trust_remote_code=True`.
AUTO_MAP = {
    "AutoConfig": "configuration_nanogpt.NanoGPTConfig",
    "AutoModel": "modeling_nanogpt.NanoGPTModel",
    "AutoModelForCausalLM": "modeling_nanogpt.NanoGPTForCausalLM",
    "AutoModelForSequenceClassification": "modeling_nanogpt.NanoGPTForSequenceClassification",
}

__all__ = ["NanoGPTConfig"]
