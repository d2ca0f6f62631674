"""NanoLlama: Llama (rotary positions, RMSNorm, SwiGLU, grouped-query attention), optionally with Qwen3's QK-norm.

Weights are named and oriented as in transformers' `llama` and `qwen3`.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_nanollama import NanoLlamaConfig
from .generation import Linear, RoomyGenerationMixin
from .positions import couple_positions, find_positions


class NanoLlamaRMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight, in float32 for any input (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = (hidden_states * torch.rsqrt(variance + self.eps)).to(input_dtype)
        return (self.weight * hidden_states).to(input_dtype)  # autocast leaves the weight in float32


class NanoLlamaRotaryEmbedding(nn.Module):
    """Position ids to the angles of `rotate` (arXiv 2104.09864), as (cos, cos) and (-sin, sin)."""

    def __init__(self, config: NanoLlamaConfig):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        init_function = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = init_function(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: NanoLlamaConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """theta ** (-2i / head_dim) for each pair i, and the factor on cosine and sine, 1."""
        head_dim = config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(hidden_states.device)  # (batch, time, head_dim / 2)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)  # (batch, time, head_dim)
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates each pair (i, i + head_dim / 2) of `states` (batch, heads, time, head_dim) by its angle."""
    # (batch, 1, time, head_dim), in bf16 if autocast made the states bf16: twice as fast
    cos, sin = cos.unsqueeze(1).to(states.dtype), sin.unsqueeze(1).to(states.dtype)
    return states * cos + states.roll(states.shape[-1] // 2, dims=-1) * sin


def check_range(name: str, ids: torch.Tensor, size: int) -> None:
    """Rejects ids that an embedding of `size` rows lacks; only on a CPU, since a GPU would have to synchronise."""
    if type(ids) is torch.Tensor and ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        smallest, largest = (bound.item() for bound in ids.aminmax())
        if smallest < 0 or largest >= size:
            raise ValueError(f"{name}: expected 0 to {size - 1}, got {smallest} to {largest}")


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(Q K^T / sqrt(head_dim) + mask) V, written out ("Attention Is All You Need", equation 1)."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)  # (batch, heads, keys, head_dim)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)  # (batch, heads, keys, head_dim)
    weights = torch.matmul(query * scaling, key.transpose(2, 3))  # (batch, heads, time, keys)
    if attention_mask is not None:
        lowest = torch.finfo(weights.dtype).min  # float32's is -inf in bf16, which makes a row of padding nan
        weights = weights + attention_mask.clamp(min=lowest).to(weights.dtype)
    weights = nn.functional.softmax(weights, dim=-1).to(query.dtype)  # computed in float32 for any input
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    output = torch.matmul(weights, value).transpose(1, 2).contiguous()  # (batch, time, heads, head_dim)
    return output, weights


class NanoLlamaAttention(nn.Module):
    """Causal self-attention with rotated queries and keys; a group of query heads shares a key and value head."""

    def __init__(self, config: NanoLlamaConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.q_proj = Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)
        self.o_proj.ends_branch = True
        self.q_norm = NanoLlamaRMSNorm(self.head_dim, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()
        self.k_norm = NanoLlamaRMSNorm(self.head_dim, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,  # (batch, time, hidden)
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        heads_shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads_shape)  # (batch, time, heads, head_dim)
        key = self.k_proj(hidden_states).view(heads_shape)  # (batch, time, kv, head_dim)
        value = self.v_proj(hidden_states).view(heads_shape).transpose(1, 2)  # (batch, kv, time, head_dim)
        query, key = self.q_norm(query).transpose(1, 2), self.k_norm(key).transpose(1, 2)  # time after heads
        query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (batch, kv, past + time, head_dim)

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.reshape(*input_shape, -1).contiguous()), weights


class NanoLlamaMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: NanoLlamaConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.down_proj.ends_branch = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class NanoLlamaBlock(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: NanoLlamaConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = NanoLlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = NanoLlamaAttention(config, layer_idx)
        self.post_attention_layernorm = NanoLlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = NanoLlamaMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (batch, time, hidden)
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attention_output, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = hidden_states + attention_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class NanoLlamaPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about NanoLlama, and its initial weights, scaled as in nanoGPT.

    Their standard deviation is `initializer_range`, of `o_proj` and `down_proj` at the end of a residual branch that /
    sqrt(2 x `num_hidden_layers`). RMSNorm scales are 1.
    """

    config: NanoLlamaConfig
    config_class = NanoLlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanoLlamaBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": NanoLlamaBlock, "attentions": NanoLlamaAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if getattr(module, "ends_branch", False):
            # Each layer adds 2 branches to the residual stream; this keeps its variance independent of depth (GPT-2).
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=std)


class NanoLlamaModel(NanoLlamaPreTrainedModel):
    """Token ids to final hidden states (batch, time, hidden)."""

    def __init__(self, config: NanoLlamaConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([NanoLlamaBlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm = NanoLlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = NanoLlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,  # (batch, time)
        attention_mask: torch.Tensor | None = None,  # (batch, past + time), 1 for a token, 0 for padding
        position_ids: torch.LongTensor | None = None,  # (batch, time)
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,  # (batch, time, hidden)
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            check_range("input_ids", input_ids, self.embed_tokens.num_embeddings)
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = find_positions(self.config, input_ids, inputs_embeds, past_key_values)
        # Coupled ones go back, which would tell of a new document.
        mask_positions = position_ids if self.config.coupled_digits is None else None
        causal_mask = create_causal_mask(
            self.config, inputs_embeds, attention_mask, past_key_values=past_key_values, position_ids=mask_positions
        )

        hidden_states = inputs_embeds  # (batch, time, hidden)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for block in self.layers:
            hidden_states = block(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        hidden_states = self.norm(hidden_states)
        past_key_values = past_key_values if use_cache else None
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)


class NanoLlamaForCausalLM(NanoLlamaPreTrainedModel, RoomyGenerationMixin):
    """NanoLlama with a language modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: NanoLlamaConfig):
        super().__init__(config)
        self.model = NanoLlamaModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def prepare_inputs_for_generation(self, input_ids: torch.LongTensor, *args, **kwargs) -> dict:
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if self.config.coupled_digits is not None:  # a digit's place follows from all that is written
            positions = couple_positions(input_ids, *self.config.coupled_digits)
            inputs["position_ids"] = positions[:, -inputs["input_ids"].shape[1] :]
        return inputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""labels (`torch.LongTensor` of shape `(batch, time)`): usually `input_ids`, shifted by one here; -100: none.
            The loss in nats is the sum over targets, divided by `num_items_in_batch` if given, else by their number.
        logits_to_keep (`int` or index tensor): number or indices of the last positions to get logits; 0 means all.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = self.lm_head(hidden_states)  # (batch, time, vocab)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        cache, hidden_states, attentions = outputs.past_key_values, outputs.hidden_states, outputs.attentions
        return CausalLMOutputWithPast(loss, logits, cache, hidden_states, attentions)


class NanoLlamaForSequenceClassification(GenericForSequenceClassification, NanoLlamaPreTrainedModel):
    """NanoLlama with a linear classifier on the last token."""


__all__ = ["NanoLlamaForCausalLM", "NanoLlamaForSequenceClassification", "NanoLlamaModel", "NanoLlamaPreTrainedModel"]
