"""NanoGPT: nanoGPT's GPT-2 (learned positions, pre-LayerNorm, GELU), with weights named and oriented as there."""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_nanogpt import NanoGPTConfig
from .generation import Linear, RoomyGenerationMixin


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
    weights = torch.matmul(query * scaling, key.transpose(2, 3))  # (batch, heads, time, keys)
    if attention_mask is not None:
        lowest = torch.finfo(weights.dtype).min  # float32's is -inf in bf16, which makes a row of padding nan
        weights = weights + attention_mask.clamp(min=lowest).to(weights.dtype)
    weights = nn.functional.softmax(weights, dim=-1).to(query.dtype)  # computed in float32 for any input
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    output = torch.matmul(weights, value).transpose(1, 2).contiguous()  # (batch, time, heads, head_dim)
    return output, weights


class NanoGPTAttention(nn.Module):
    """Causal self-attention, with one projection for the queries, keys and values of all heads."""

    def __init__(self, config: NanoGPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.c_attn = Linear(config.hidden_size, 3 * config.hidden_size, bias=config.bias)
        self.c_attn.parts = 3  # matrices, for optimizers that tell them apart
        self.c_proj = Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.c_proj.ends_branch = True
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (batch, time, hidden)
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        query, key, value = self.c_attn(hidden_states).chunk(3, dim=-1)  # each (batch, time, hidden)
        query = query.view(*input_shape, -1, self.head_dim).transpose(1, 2)  # (batch, heads, time, head_dim)
        key = key.view(*input_shape, -1, self.head_dim).transpose(1, 2)  # (batch, heads, time, head_dim)
        value = value.view(*input_shape, -1, self.head_dim).transpose(1, 2)  # (batch, heads, time, head_dim)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (batch, heads, past + time, head_dim)

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        output = output.reshape(*input_shape, -1).contiguous()  # (batch, time, hidden)
        return self.resid_dropout(self.c_proj(output)), weights


class NanoGPTMLP(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, config: NanoGPTConfig):
        super().__init__()
        self.c_fc = Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.c_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.bias)
        self.c_proj.ends_branch = True
        self.act = ACT2FN[config.activation_function]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))


class NanoGPTBlock(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: NanoGPTConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon, bias=config.bias)
        self.attn = NanoGPTAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon, bias=config.bias)
        self.mlp = NanoGPTMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (batch, time, hidden)
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attention_output, _ = self.attn(
            self.ln_1(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = hidden_states + attention_output
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class NanoGPTPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about NanoGPT, and its initial weights, those of nanoGPT.

    Their standard deviation is `initializer_range`, of `c_proj` at the end of a residual branch that / sqrt(2 x
    `num_hidden_layers`). Biases are 0, LayerNorm scales 1.
    """

    config: NanoGPTConfig
    config_class = NanoGPTConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanoGPTBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": NanoGPTBlock, "attentions": NanoGPTAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if getattr(module, "ends_branch", False):
            # Each layer adds 2 branches to the residual stream; this keeps its variance independent of depth (GPT-2).
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=std)


class NanoGPTModel(NanoGPTPreTrainedModel):
    """Token ids to final hidden states (batch, time, hidden)."""

    def __init__(self, config: NanoGPTConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([NanoGPTBlock(config, i) for i in range(config.num_hidden_layers)])
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon, bias=config.bias)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding):
        self.wte = value

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
            check_range("input_ids", input_ids, self.wte.num_embeddings)
            inputs_embeds = self.wte(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        time = inputs_embeds.shape[1]
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(time, device=inputs_embeds.device) + past).unsqueeze(0)  # (1, time)
        check_range("position_ids", position_ids, self.config.max_position_embeddings)
        causal_mask = create_causal_mask(
            self.config, inputs_embeds, attention_mask, past_key_values=past_key_values, position_ids=position_ids
        )

        hidden_states = self.drop(inputs_embeds + self.wpe(position_ids))  # (batch, time, hidden)
        for block in self.h:
            hidden_states = block(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        hidden_states = self.ln_f(hidden_states)
        past_key_values = past_key_values if use_cache else None
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)


class NanoGPTForCausalLM(NanoGPTPreTrainedModel, RoomyGenerationMixin):
    """NanoGPT with a language modelling head."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: NanoGPTConfig):
        super().__init__(config)
        self.transformer = NanoGPTModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
        outputs = self.transformer(
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


class NanoGPTForSequenceClassification(GenericForSequenceClassification, NanoGPTPreTrainedModel):
    """NanoGPT with a linear classifier on the last token."""

    base_model_prefix = "transformer"  # the generic class has another name for it


__all__ = ["NanoGPTForCausalLM", "NanoGPTForSequenceClassification", "NanoGPTModel", "NanoGPTPreTrainedModel"]
