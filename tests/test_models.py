"""NanoGPT and NanoLlama as transformers models: parity at tiny width, saving, generating, loading without cleangpt."""

import math
import sys

import pytest
import torch
from conftest import ROOT, run_command
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cleangpt import NanoGPTConfig, NanoGPTForCausalLM, NanoLlamaConfig, NanoLlamaForCausalLM
from cleangpt.models.nanogpt import generation
from cleangpt.models.nanollama import generation as nanollama_generation

TINY = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"max_position_embeddings": 32, "initializer_range": 0.2}  # wide weights, so that mistakes show


def nanogpt(**options) -> NanoGPTForCausalLM:
    torch.manual_seed(0)
    return NanoGPTForCausalLM(NanoGPTConfig(**TINY, **options)).eval()


def nanollama(**options) -> NanoLlamaForCausalLM:
    torch.manual_seed(0)
    return NanoLlamaForCausalLM(NanoLlamaConfig(**TINY, **{"num_key_value_heads": 2, **options})).eval()


MODELS = pytest.mark.parametrize("make", [nanogpt, nanollama])


ROOMY = {nanogpt: generation.RoomyLayer, nanollama: nanollama_generation.RoomyLayer}


def random_ids(rows: int = 2, time: int = 10) -> torch.Tensor:
    return torch.randint(0, TINY["vocab_size"], (rows, time), generator=torch.Generator().manual_seed(1))


def test_nanogpt_computes_what_gpt2_computes():
    ours = nanogpt(activation_function="gelu_new")
    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=32, activation_function="gelu_new")
    ).eval()
    weights = {
        name: weight.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else weight
        for name, weight in ours.state_dict().items()
    }
    theirs.load_state_dict(weights)
    torch.testing.assert_close(ours(random_ids()).logits, theirs(random_ids()).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_qk_norm", [False, True])
def test_nanollama_computes_what_llama_and_qwen3_compute(use_qk_norm):
    ours = nanollama(use_qk_norm=use_qk_norm, tie_word_embeddings=False)
    shape = {"num_key_value_heads": 2, "intermediate_size": ours.config.intermediate_size, "tie_word_embeddings": False}
    shape |= {"rms_norm_eps": ours.config.rms_norm_eps, "rope_parameters": ours.config.rope_parameters}
    if use_qk_norm:
        theirs = Qwen3ForCausalLM(Qwen3Config(**TINY, **shape, head_dim=8)).eval()
    else:
        theirs = LlamaForCausalLM(LlamaConfig(**TINY, **shape)).eval()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(random_ids()).logits, theirs(random_ids()).logits, atol=1e-5, rtol=0)


def test_weights_are_named_as_in_nanogpt_and_llama():
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.ln_1.weight", "lm_head.weight"} < set(
        nanogpt().state_dict()
    )
    assert nanogpt().transformer.h[0].attn.c_attn.weight.shape == (96, 32)
    assert {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"} < set(
        nanollama().state_dict()
    )


def test_no_bias_means_no_bias_anywhere():
    assert not [name for name in nanogpt(bias=False).state_dict() if name.endswith("bias")]


def test_nanogpt_users_find_their_names():
    config = NanoGPTConfig(n_embd=48, n_layer=3, n_head=4, block_size=64)
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (48, 3, 64)
    assert config.intermediate_size == 4 * 48
    assert config.n_positions == 64


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (NanoGPTConfig, {"num_attention_heads": 5}, "num_attention_heads"),
        (NanoGPTConfig, {"activation_function": "tanh"}, "activation_function"),
        (NanoGPTConfig, {"dropout": 1.0}, "dropout"),
        (NanoLlamaConfig, {"num_key_value_heads": 3}, "num_key_value_heads"),
        (NanoLlamaConfig, {"num_attention_heads": 32}, "even head width"),
        (NanoLlamaConfig, {"vocab_size": 0}, "vocab_size"),
    ],
)
def test_a_shape_that_no_model_can_have_is_refused(config, options, message):
    with pytest.raises(Exception, match=message):
        config(**{**TINY, **options})


@MODELS
def test_it_starts_out_as_unsure_as_nanogpt(make):
    """The tied head's logits have the variance hidden_size * range², which adds half of it to ln V."""
    model_class, losses = type(make()), []
    for seed in range(5):
        torch.manual_seed(seed)
        config = model_class.config_class(vocab_size=2000, n_embd=128, n_layer=2, n_head=4, block_size=64)
        ids = torch.randint(0, 2000, (32, 64))
        losses.append(model_class(config).eval()(ids, labels=ids).loss.item())
    assert losses == pytest.approx([math.log(2000) + 128 * 0.02**2 / 2] * 5, abs=0.02)


@MODELS
def test_the_last_layers_of_branches_start_smaller(make):
    config = make().config
    config.hidden_size, config.num_hidden_layers, config.intermediate_size = 128, 8, 512
    model = type(make())(config)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and weight.numel() >= 10_000:
            closing = name.endswith(("c_proj.weight", "o_proj.weight", "down_proj.weight"))
            assert weight.std().item() == pytest.approx(0.2 / (4 if closing else 1), rel=0.02), name


@MODELS
def test_saved_and_loaded_it_is_the_same(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    for auto in (AutoModelForCausalLM, AutoModel):
        loaded = auto.from_pretrained(tmp_path).eval()
        assert type(loaded).__module__.startswith("cleangpt")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()


@MODELS
def test_a_saved_config_names_no_attention_implementation(make, tmp_path):
    make().save_pretrained(tmp_path)
    assert "attn" not in (tmp_path / "config.json").read_text().replace("c_attn", "")


@MODELS
def test_without_cleangpt_its_own_code_loads_it_bit_for_bit(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "model")
    torch.save(model(random_ids()).logits, tmp_path / "logits.pt")
    torch.save(random_ids(), tmp_path / "ids.pt")
    code = f"""
import sys, torch
sys.modules["cleangpt"] = None  # importing it would fail
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(r"{tmp_path / "model"}", trust_remote_code=True).eval()
AutoConfig.from_pretrained(r"{tmp_path / "model"}", trust_remote_code=True)
AutoModel.from_pretrained(r"{tmp_path / "model"}", trust_remote_code=True)
assert torch.equal(model(torch.load(r"{tmp_path / "ids.pt"}")).logits, torch.load(r"{tmp_path / "logits.pt"}"))
"""
    done = run_command(sys.executable, "-P", "-c", code, PYTHONPATH="")
    assert done.returncode == 0, done.stderr


@MODELS
def test_greedy_tokens_are_the_same_with_and_without_cache(make):
    model = make(pad_token_id=0)
    options = {"max_new_tokens": 12, "do_sample": False}
    with_cache = model.generate(random_ids(), use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(random_ids(), use_cache=False, **options))


@MODELS
def test_a_cache_that_grows_in_place_gives_the_same_tokens(make, monkeypatch):
    """Greedily and with beams, which move the rows of the cache; room for 3 tokens at a time."""
    model = make(pad_token_id=0)
    monkeypatch.setattr(sys.modules[ROOMY[make].__module__], "ROOM", 3)
    for options in ({}, {"num_beams": 3}):
        options |= {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
        written = model.generate(random_ids(), **options)
        theirs = model.generate(random_ids(), past_key_values=DynamicCache(config=model.config), **options)
        assert torch.equal(written.sequences, theirs.sequences)
        assert all(type(layer) is ROOMY[make] for layer in written.past_key_values.layers)


@MODELS
def test_a_cache_that_grows_in_place_keeps_gradients(make):
    model = make()
    gradients = []
    for layers in (None, [ROOMY[make](), ROOMY[make]()]):
        model.zero_grad()
        cache = DynamicCache(config=model.config)
        cache.layers = layers or cache.layers
        with torch.no_grad():
            model(random_ids(), past_key_values=cache, use_cache=True)
        for _ in range(2):
            logits = model(random_ids(time=3), past_key_values=cache, use_cache=True).logits
        logits.square().mean().backward()
        gradients.append([weight.grad for weight in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_products_of_onednn_are_those_of_torch():
    layer = generation.Linear(512, 1024).eval()
    states = torch.randn(2, 3, 512)
    expected = layer(states)
    assert (
        torch.equal(expected, torch.nn.functional.linear(states, layer.weight, layer.bias)) and expected.requires_grad
    )
    with torch.no_grad():
        torch.testing.assert_close(layer(states), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.double()(states.double()).float(), expected, atol=1e-5, rtol=0)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.float()(states).dtype is torch.bfloat16


@MODELS
def test_a_batch_padded_on_the_left_continues_as_each_prompt_alone(make):
    model = make(pad_token_id=0)
    short, long = random_ids(1, 4)[0], random_ids(1, 9)[0]
    batch = torch.stack([torch.cat([torch.zeros(5, dtype=torch.long), short]), long])
    mask = torch.ones_like(batch)
    mask[0, :5] = 0
    together = model.generate(batch, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 9:]
    for row, prompt in zip(together, (short, long), strict=True):
        alone = model.generate(prompt[None], max_new_tokens=8, do_sample=False)[0, len(prompt) :]
        assert torch.equal(row[: len(alone)], alone)


@MODELS
def test_packed_documents_do_not_see_each_other(make):
    model = make()
    first, second = random_ids(1, 6), random_ids(1, 9)[:, 2:]
    packed = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None]
    together = model(packed, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(together[:, :6], model(first).logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(together[:, 6:], model(second).logits, atol=1e-5, rtol=0)


@MODELS
def test_eager_and_sdpa_agree(make):
    model = make()
    sdpa = model(random_ids()).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(random_ids()).logits, sdpa, atol=1e-5, rtol=0)


@MODELS
def test_eager_rows_of_padding_are_finite_in_bf16(make):
    model = make()
    model.set_attn_implementation("eager")
    mask = torch.ones(1, 9, dtype=torch.long)
    mask[:, :4] = 0
    with torch.autocast("cpu", torch.bfloat16):
        assert model(random_ids(1, 9), attention_mask=mask).logits.isfinite().all()


@MODELS
def test_flex_attention_agrees(make):
    model = make()
    sdpa = model(random_ids()).logits
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():  # it has no backward on a CPU
        torch.testing.assert_close(model(random_ids()).logits, sdpa, atol=1e-5, rtol=0)


@MODELS
def test_a_static_cache_gives_the_same_tokens(make):
    model = make(pad_token_id=0)
    options = {"max_new_tokens": 8, "do_sample": False}
    static = model.generate(random_ids(), cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, model.generate(random_ids(), **options))


@MODELS
def test_beams_find_a_text_at_least_as_likely(make):
    model, ids = make(pad_token_id=0), random_ids(1)

    def likelihood(text: torch.Tensor) -> float:
        logits = model(text).logits[0, 9:-1].log_softmax(-1)
        return logits.gather(1, text[0, 10:, None]).sum().item()

    greedy = model.generate(ids, max_new_tokens=6, do_sample=False)
    beams = model.generate(ids, max_new_tokens=6, do_sample=False, num_beams=4)
    assert likelihood(beams) >= likelihood(greedy) - 1e-5


@MODELS
def test_a_sum_over_items_can_replace_the_mean(make):
    model, ids = make(), random_ids()
    mean = model(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=6).loss, mean * 18 / 6)


@MODELS
def test_gradient_checkpointing_changes_no_gradient(make):
    gradients = []
    for checkpointing in (False, True):
        model = make().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(random_ids(), labels=random_ids(), use_cache=False).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name])


def test_a_text_longer_than_the_positions_is_refused():
    with pytest.raises(ValueError, match="position_ids: expected 0 to 31, got 0 to 32"):
        nanogpt()(random_ids(1, 33))
    with pytest.raises(ValueError, match="position_ids: expected 0 to 31, got 32 to 32"):
        nanogpt().generate(random_ids(1, 30), max_new_tokens=5, pad_token_id=0)


@MODELS
def test_ids_outside_the_vocabulary_are_refused(make):
    with pytest.raises(ValueError, match="input_ids: expected 0 to 39, got 3 to 40"):
        make()(torch.tensor([[3, 40]]))


def test_the_two_model_files_stay_aligned():
    """The same classes in the same order, so that one can be read beside the other."""
    names = []
    for name, prefix in (("nanogpt", "NanoGPT"), ("nanollama", "NanoLlama")):
        text = (ROOT / f"cleangpt/models/{name}/modeling_{name}.py").read_text()
        classes = [line.split()[1].split("(")[0].rstrip(":") for line in text.splitlines() if line.startswith("class ")]
        names.append([cls.removeprefix(prefix) for cls in classes if "Norm" not in cls and "Rotary" not in cls])
    assert names[0] == names[1]
    one, other = (ROOT / f"cleangpt/models/{name}/generation.py" for name in ("nanogpt", "nanollama"))
    assert one.read_text() == other.read_text()
