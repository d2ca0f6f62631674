"""Configuration of NanoLlama: the shape of a Llama, or with QK-norm of a Qwen3."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters


@strict
class NanoLlamaConfig(PreTrainedConfig):
    r"""Every key can be exported to a plain `llama` (`qwen3` with `use_qk_norm`); nanoGPT's names (`n_embd`, `n_layer`,
    `n_head`, `n_positions`, `block_size`, `n_inner`) are accepted too.

    Attributes:
        vocab_size (int): number of token ids.
        hidden_size (int): width of the residual stream, a multiple of `num_attention_heads`.
        num_hidden_layers (int): number of blocks.
        num_attention_heads (int): query heads in a block.
        num_key_value_heads (int | None): key and value heads, each shared by a group of query heads
            (grouped-query attention, arXiv 2305.13245); by default `num_attention_heads`.
        intermediate_size (int | None): width inside the SwiGLU; by default 8/3 x `hidden_size`, rounded up to a
            multiple of 64, which gives its three matrices as many weights as the two of a GPT-2.
        max_position_embeddings (int): the longest sequence trained on, in tokens.
        rope_parameters (dict | None): rotary embedding (arXiv 2104.09864); by default `rope_theta` is 10,000.
        use_qk_norm (bool): RMSNorm on each head's queries and keys, as in Qwen3; more stable at high learning rates.
        coupled_digits (list | None): `[[ids of digits], id of the equals sign]`, to give digits of one place the same
            position (see `couple_positions`), so that sums longer than those learned can be added; no export has that.
        attention_dropout (float): rate (0 to below 1) on the attention weights.
        rms_norm_eps (float): added to the mean square in RMSNorm.
        initializer_range (float): standard deviation of the initial weights, see `NanoLlamaPreTrainedModel`.
        tie_word_embeddings (bool): the head shares the token embedding's matrix.

    ```python
    >>> model = NanoLlamaForCausalLM(NanoLlamaConfig(vocab_size=65, n_layer=4, n_head=4, n_embd=128, block_size=64))
    ```
    """

    model_type = "nanollama"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "n_positions": "max_position_embeddings",
        "block_size": "max_position_embeddings",
    }
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    max_position_embeddings: int = 1024
    rope_parameters: RopeParameters | dict | None = None
    use_qk_norm: bool = False
    coupled_digits: list | None = None
    attention_dropout: float | int = 0.0
    rms_norm_eps: float = 1e-6
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
            self.intermediate_size = -(-8 * self.hidden_size // (3 * 64)) * 64
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads

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
        if self.hidden_size % self.num_attention_heads != 0 or self.hidden_size // self.num_attention_heads % 2 != 0:
            raise ValueError(
                f"num_attention_heads: expected a divisor of hidden_size {self.hidden_size} that leaves an even head "
                f"width for the rotary embedding, got {self.num_attention_heads}"
            )
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"num_key_value_heads: expected a divisor of num_attention_heads {self.num_attention_heads}, "
                f"got {self.num_key_value_heads}"
            )
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout: expected a number from 0 to below 1, got {self.attention_dropout}")


# Classes of a saved folder's own code, which transformers' Auto classes load with `trust_remote_code=True`.
AUTO_MAP = {
    "AutoConfig": "configuration_nanollama.NanoLlamaConfig",
    "AutoModel": "modeling_nanollama.NanoLlamaModel",
    "AutoModelForCausalLM": "modeling_nanollama.NanoLlamaForCausalLM",
    "AutoModelForSequenceClassification": "modeling_nanollama.NanoLlamaForSequenceClassification",
}

__all__ = ["NanoLlamaConfig"]
