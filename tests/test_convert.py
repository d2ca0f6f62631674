"""Exports and imports are exact for any configuration, prove it before they write, and refuse what they cannot do."""

import json
import sys

import pytest
import torch
from conftest import run_command, run_python
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cleangpt import (
    NanoGPTConfig,
    NanoGPTForCausalLM,
    NanoLlamaConfig,
    NanoLlamaForCausalLM,
    UserError,
    load_recipe,
    train,
)
from cleangpt.data.tokenization import arithmetic_tokenizer, bpe_tokenizer, character_tokenizer
from cleangpt.models import checkpoints, convert
from cleangpt.models.checkpoints import read_checkpoint
from cleangpt.models.convert import (
    compare_models,
    compare_with_forward,
    export_folder,
    from_native,
    import_folder,
    to_native,
)


def randomize(model, seed: int = 0):
    """Random values in every weight, biases and norms included, so that each matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2 + (1.0 if weight.ndim == 1 else 0.0))
    return model.eval()


SHAPES = {
    "vocab_size": st.integers(2, 70),
    "heads": st.integers(1, 4),
    "head_dim": st.sampled_from([2, 4, 6, 8]),
    "num_hidden_layers": st.integers(1, 3),
    "max_position_embeddings": st.integers(2, 80),
    "tie_word_embeddings": st.booleans(),
}


def assert_round_trip(model):
    native = to_native(model)
    proof = compare_models(model, native)
    assert proof.holds, proof
    again = from_native(native)
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    **SHAPES,
    intermediate_size=st.none() | st.integers(1, 40),
    activation_function=st.sampled_from(["gelu", "gelu_new"]),
    bias=st.booleans(),
    dropout=st.sampled_from([0.0, 0.1]),
    attention_dropout=st.sampled_from([None, 0.3]),
)
def test_every_nanogpt_goes_to_gpt2_and_back(heads, head_dim, **options):
    model = NanoGPTForCausalLM(NanoGPTConfig(hidden_size=heads * head_dim, num_attention_heads=heads, **options))
    assert_round_trip(randomize(model))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    **SHAPES,
    groups=st.integers(1, 3),
    intermediate_size=st.none() | st.integers(1, 40),
    use_qk_norm=st.booleans(),
    attention_dropout=st.sampled_from([0.0, 0.1]),
    rms_norm_eps=st.sampled_from([1e-6, 1e-5]),
    rope_theta=st.sampled_from([100.0, 10_000.0, 1e6]),
)
def test_every_nanollama_goes_to_llama_or_qwen3_and_back(heads, head_dim, groups, rope_theta, **options):
    config = NanoLlamaConfig(
        hidden_size=heads * groups * head_dim,
        num_attention_heads=heads * groups,
        num_key_value_heads=heads,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        **options,
    )
    assert_round_trip(randomize(NanoLlamaForCausalLM(config)))


def test_rounding_in_a_narrow_model_is_no_difference():
    """LayerNorm over two nearly equal values makes 1e-4 of a rounding error in float32."""
    options = {"vocab_size": 2, "n_embd": 2, "n_head": 1, "n_layer": 2, "block_size": 64, "tie_word_embeddings": False}
    for seed in range(20):
        model = randomize(NanoGPTForCausalLM(NanoGPTConfig(**options)), seed)
        assert compare_models(model, to_native(model)).difference < 1e-9
        assert model.dtype == torch.float32


def test_rotary_angles_are_rounded_alike():
    """Llama computes them in float32; in float64 the logits of this model differ by 5e-5."""
    shape = {"vocab_size": 500, "n_embd": 128, "n_head": 4, "n_layer": 4, "block_size": 1024, "initializer_range": 0.2}
    model = randomize(NanoLlamaForCausalLM(NanoLlamaConfig(**shape)))
    assert compare_models(model, to_native(model)).holds


def test_the_proof_sees_a_wrong_weight():
    model = randomize(NanoGPTForCausalLM(NanoGPTConfig(vocab_size=20, n_embd=16, n_layer=1, n_head=2, block_size=80)))
    native = to_native(model)
    assert compare_models(model, native).holds
    with torch.no_grad():
        native.transformer.h[0].mlp.c_fc.weight[0, 0] += 0.01
    assert not compare_models(model, native).holds


def test_an_export_that_is_not_equal_is_not_written(tmp_path, monkeypatch):
    model = NanoGPTForCausalLM(NanoGPTConfig(vocab_size=15, n_embd=16, n_layer=1, n_head=2, block_size=20))
    model.save_pretrained(tmp_path / "model")
    arithmetic_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(convert, "to_native", lambda model: randomize(to_native(model)))
    with pytest.raises(UserError, match="not equal, nothing is written"):
        export_folder(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "native"), [("nanogpt", "gpt2"), ("nanollama", "llama"), ("qk_norm", "qwen3")])
def test_an_exported_folder_loads_with_plain_transformers(tiny_text, tmp_path, kind, native):
    options = ["--model.model_type=nanollama"] if kind != "nanogpt" else []
    final = train(load_recipe(tiny_text, [*options, *(["--model.use_qk_norm=true"] if kind == "qk_norm" else [])]))
    done = run_python("scripts/export.py", final, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "greedy tokens the same" in done.stdout
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == native
    assert "auto_map" not in config
    assert native != "gpt2" or config["n_ctx"] == 16
    assert not list((tmp_path / "out").glob("*.py"))
    ids = torch.arange(10)[None]
    torch.save(AutoModelForCausalLM.from_pretrained(final)(ids).logits, tmp_path / "logits.pt")
    code = f"""
import sys, torch
sys.modules["cleangpt"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (auto.from_pretrained(r"{tmp_path / "out"}") for auto in (AutoModelForCausalLM, AutoTokenizer))
assert (model(torch.arange(10)[None]).logits - torch.load(r"{tmp_path / "logits.pt"}")).abs().max() < 1e-5
assert tokenizer.unk_token is not None and tokenizer.decode(tokenizer("The fox")["input_ids"]) == "The fox"
"""
    done = run_command(sys.executable, "-P", "-c", code, PYTHONPATH="")
    assert done.returncode == 0, done.stderr


TINY = {"vocab_size": 15, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
NATIVE = {
    "gpt2": GPT2LMHeadModel(GPT2Config(**TINY)),
    "llama": LlamaForCausalLM(LlamaConfig(**TINY, intermediate_size=32)),
    "qwen3": Qwen3ForCausalLM(Qwen3Config(**TINY, intermediate_size=32, num_key_value_heads=1, head_dim=8)),
}


@pytest.mark.parametrize("kind", NATIVE)
def test_a_native_model_is_imported_and_fine_tuned(kind, tiny_adder, tmp_path):
    randomize(NATIVE[kind]).save_pretrained(tmp_path / "source")
    arithmetic_tokenizer().save_pretrained(tmp_path / "source")
    done = run_python("scripts/import_checkpoint.py", tmp_path / "source", tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert ours.config.model_type in ("nanogpt", "nanollama")
    assert compare_models(NATIVE[kind], ours.eval()).holds
    shape = [f"--model.{key}=null" for key in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")]
    final = train(load_recipe(tiny_adder, [*shape, f"--model.init_from={tmp_path / 'ours'}"]))
    assert AutoTokenizer.from_pretrained(final).decode([1, 10, 2]) == "1+2"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (GPT2LMHeadModel(GPT2Config(**TINY, scale_attn_by_inverse_layer_idx=True)), "scale_attn_by_inverse_layer_idx"),
        (GPT2LMHeadModel(GPT2Config(**TINY, activation_function="relu")), "activation_function"),
        (LlamaForCausalLM(LlamaConfig(**TINY, attention_bias=True)), "attention_bias: expected False, got True"),
        (LlamaForCausalLM(LlamaConfig(**TINY, head_dim=4)), "head_dim: expected 8, got 4"),
    ],
)
def test_a_variant_that_ours_cannot_be_is_refused(model, message):
    with pytest.raises(UserError, match=message):
        from_native(model)


def nanogpt_checkpoint(path, bias: bool = False, tied: bool = True, **changes):
    """Writes a file as nanoGPT's train.py does, of a compiled model, which it returns."""
    arguments = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "block_size": 80,
        "bias": bias,
        "vocab_size": 20,
        "dropout": 0.1,
    }
    model = randomize(NanoGPTForCausalLM(NanoGPTConfig(**arguments, tie_word_embeddings=tied)))
    weights = {f"_orig_mod.{name}": weight for name, weight in model.state_dict().items()}
    weights["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(80, 80).tril()[None, None]  # slow attention's mask
    torch.save({"model": weights, "model_args": arguments, "iter_num": 5, "config": {"dataset": "x"}, **changes}, path)
    return model


@pytest.mark.parametrize(("bias", "tied"), [(False, True), (True, True), (True, False)])
def test_a_checkpoint_of_nanogpt_is_imported(tmp_path, bias, tied):
    expected = nanogpt_checkpoint(tmp_path / "ckpt.pt", bias, tied)
    model, forward = read_checkpoint(tmp_path / "ckpt.pt")
    assert torch.equal(model(torch.arange(9)[None]).logits, expected(torch.arange(9)[None]).logits)
    assert compare_with_forward(forward, model).holds
    assert (model.config.dropout, model.config.tie_word_embeddings) == (0.1, tied)
    import_folder(tmp_path / "ckpt.pt", tmp_path / "out")
    assert compare_models(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), expected).holds


def test_the_proof_sees_what_the_conversion_gets_wrong(tmp_path, monkeypatch):
    """A head that is not tied, read as if it were: once imported in silence, off by 9.0."""
    nanogpt_checkpoint(tmp_path / "ckpt.pt", tied=False)
    shape = checkpoints._gpt_shape
    monkeypatch.setattr(checkpoints, "_gpt_shape", lambda *read: {**shape(*read), "tie_word_embeddings": True})
    with pytest.raises(UserError, match="not equal, nothing is written"):
        import_folder(tmp_path / "ckpt.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def seed_run(folder, kind: str, tied: bool, bias: bool = False):
    """Writes `best/*.pt` and config.json as wxc971231/CleanGPT does, of a compiled model, which it returns."""
    settings = {"model": kind, "dataset": "shakespeare_char", "save_strategy": "best", "seed": [42]}
    settings |= {"n_position": 80, "n_layer": 2, "n_embed": 16, "vocab_size": 20, "weight_tying": tied}
    settings |= {"dropout_attn": 0.2, "add_bias": bias}
    shape = {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "block_size": 80, "tie_word_embeddings": tied}
    if kind == "NanoGPT":
        settings |= {"n_head": 2, "dropout": 0.1}
        model = NanoGPTForCausalLM(NanoGPTConfig(**shape, n_head=2, bias=bias))
    else:
        settings |= {"n_q_head": 4, "n_kv_head": 2, "rms_norm_eps": 1e-5}
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=20,
                hidden_size=16,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=80,
                rms_norm_eps=1e-5,
                tie_word_embeddings=tied,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    (folder / "best").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    weights = {f"_orig_mod.{name}": weight for name, weight in randomize(model).state_dict().items()}
    torch.save(weights, folder / "best" / "1.473_seed42_mb12.pt")
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "bias"), [("NanoGPT", True), ("NanoGPT", False), ("llama", False)])
def test_a_file_of_the_first_cleangpt_is_imported(tmp_path, kind, bias, tied):
    expected = seed_run(tmp_path / "run", kind, tied, bias)
    proof = import_folder(tmp_path / "run" / "best" / "1.473_seed42_mb12.pt", tmp_path / "out")
    assert proof.holds and proof.tokens == 64
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert ours.config.model_type == ("nanogpt" if kind == "NanoGPT" else "nanollama")
    assert (ours.config.attention_dropout, ours.config.tie_word_embeddings) == (0.2, tied)
    assert compare_models(ours, expected).holds


def test_a_file_without_its_config_is_refused(tmp_path):
    seed_run(tmp_path / "run", "llama", True)
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json"):
        import_folder(tmp_path / "run" / "best" / "1.473_seed42_mb12.pt", tmp_path / "out")


@pytest.mark.parametrize("has_room", [True, False], ids=["with rows for special ids", "without"])
def test_a_tokenizer_gives_its_special_ids(tmp_path, has_room):
    """nanoGPT's and the first CleanGPT's character models have a row for each character and none for special ids."""
    tokenizer = character_tokenizer("abcdefghijklmnopqr" if has_room else "abcdefghijklmnopqrst")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    nanogpt_checkpoint(tmp_path / "ckpt.pt")
    import_folder(tmp_path / "ckpt.pt", tmp_path / "out", str(tmp_path / "tokenizer"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for ids in (model.config, model.generation_config, tokenizer):
        assert (ids.eos_token_id, ids.bos_token_id, ids.pad_token_id) == (19 if has_room else None,) * 3
    assert model.generate(**tokenizer("abc", return_tensors="pt")).shape[1] <= 43
    done = run_python("scripts/generate.py", tmp_path / "out", "--prompt=abc", "--max_new_tokens=5")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("size", [21, 400])
def test_a_tokenizer_for_another_vocabulary_is_refused(tmp_path, size):
    if size == 21:
        tokenizer = character_tokenizer("abcdefghijklmnopqrstu")
        nanogpt_checkpoint(tmp_path / "ckpt.pt")
    else:
        tokenizer = bpe_tokenizer(["abc"], 257)
        model = randomize(GPT2LMHeadModel(GPT2Config(**{**TINY, "vocab_size": 400})))
        model.save_pretrained(tmp_path / "ckpt.pt")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="--tokenizer: expected one for the model's"):
        import_folder(tmp_path / "ckpt.pt", tmp_path / "out", str(tmp_path / "tokenizer"))
    assert not (tmp_path / "out").exists()


class Malice:
    def __reduce__(self):
        return (print, ("executed",))


def test_files_that_are_no_checkpoint_are_refused_and_not_executed(tmp_path, capsys):
    path = tmp_path / "ckpt.pt"
    nanogpt_checkpoint(path)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"expected nanoGPT's ckpt\.pt"):
            read_checkpoint(path)
    for changes in ({"model_args": {}}, {"model": 3}, {"model": {}}, {"optimizer": Malice()}):
        nanogpt_checkpoint(path, **changes)
        with pytest.raises(UserError, match=r"expected nanoGPT's ckpt\.pt"):
            read_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match=r"expected nanoGPT's ckpt\.pt"):
        read_checkpoint(path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["truncated", "missing", "other shape"])
def test_a_damaged_model_is_refused_not_reinitialised(tmp_path, damage):
    folder = tmp_path / "model"
    NATIVE["gpt2"].save_pretrained(folder)
    arithmetic_tokenizer().save_pretrained(folder)
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        config = json.loads((folder / "config.json").read_text())
        config |= {"n_layer": 2} if damage == "missing" else {"vocab_size": 16}
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="source"):
        import_folder(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_taken_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    for write in (export_folder, import_folder):
        with pytest.raises(UserError, match="expected a new or empty folder"):
            write(tmp_path, tmp_path / "out")
