"""An imported model of each family says what the original says."""

import dataclasses
import json

import pytest
import torch
from helpers import run_without_the_package
from safetensors.torch import save_file
from tiny_models import CONFIGS, EAGER_ONLY, ROUNDED, make_original, padded_tokens
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MptConfig,
    Qwen3Config,
    SmolLM3Config,
)

import hf_relpos
from hf_relpos import RelPosForCausalLM
from hf_relpos.pretrained.families import FAMILIES, converters, family_of, our_name, represented_fields
from hf_relpos.pretrained.importing import import_pretrained


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def check_equal(name, actual, expected, dtype=torch.float32):
    """Bit for bit, or to the rounding of a family that computes in another order."""
    if CONFIGS[name]().model_type not in ROUNDED:
        assert torch.equal(actual, expected), float((actual - expected).abs().max())
    else:
        tolerance = 2e-5 if dtype == torch.float32 else 0.15
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def original_logits(model, tokens, mask):
    """Logits of the original, which takes positions where it does not count them itself."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    counts = model.config.model_type in ("bloom", "mpt")
    return model(tokens, attention_mask=mask, **({} if counts else {"position_ids": positions})).logits


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_logits_are_those_of_the_original(name, dtype, implementation):
    own = "eager" if CONFIGS[name]().model_type in EAGER_ONLY else implementation
    original = make_original(name, dtype, own)
    imported = hf_relpos.import_model(original, attn_implementation=implementation)
    assert imported.dtype == dtype and imported.config._attn_implementation == implementation
    tokens, mask = padded_tokens()
    check_equal(name, imported(tokens[2:]).logits, original(tokens[2:]).logits, dtype)
    real = mask.bool()
    padded = imported(tokens, attention_mask=mask).logits, original_logits(original, tokens, mask)
    check_equal(name, *(logits[real] for logits in padded), dtype)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_small_difference_is_seen(name):
    """The control of the test above: one number of one norm, off by a thousandth."""
    original = make_original(name)
    imported, (tokens, _) = hf_relpos.import_model(original), padded_tokens()
    norm = imported.model.layers[1].post_attention_layernorm.weight
    norm.data = norm.data.clone()
    norm[3] *= 1.001
    with pytest.raises(AssertionError):
        check_equal(name, imported(tokens[2:]).logits, original(tokens[2:]).logits)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_generates_the_same(name, cache):
    model_type = CONFIGS[name]().model_type
    original = make_original(name, attn_implementation="eager" if model_type in EAGER_ONLY else "sdpa")
    imported, (tokens, mask) = hf_relpos.import_model(original, attn_implementation="sdpa"), padded_tokens()
    given = dict(attention_mask=mask, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    theirs = {} if model_type in EAGER_ONLY else {"cache_implementation": cache}
    expected = original.generate(tokens, **given, **theirs)
    assert torch.equal(imported.generate(tokens, **given, cache_implementation=cache), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradients_are_the_same(name):
    original = make_original(name)
    imported, (tokens, _) = hf_relpos.import_model(original), padded_tokens()
    for model in (original, imported):
        model(tokens[2:], labels=tokens[2:]).loss.backward()
    family, ours, seen = family_of(original.config.model_type), dict(imported.named_parameters()), set()
    for theirs, parameter in original.named_parameters():
        made = converters(family, our_name(family, theirs), original.config.num_attention_heads)
        for target, convert in made.items():
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(ours[target].grad, convert(parameter.grad), rtol=1e-3, atol=2e-5 * scale)
            seen.add(target)
    assert seen == set(ours)


LOAD = """
import json, sys
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MptConfig,
    Qwen3Config,
    SmolLM3Config,
)
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    expected = load_file(f"{folder}-expected.safetensors")
    with torch.no_grad():
        logits = model.eval()(expected["tokens"]).logits
    assert torch.equal(logits, expected["logits"]), folder
    print(type(model).__module__.partition(".")[0])
"""


@torch.no_grad()
def test_saved_folders_load_by_remote_code(tmp_path, without_native):
    """Written one weight at a time, and the same without the package."""
    folders = []
    for number, name in enumerate(CONFIGS):
        original, (tokens, _) = make_original(name, attn_implementation="eager"), padded_tokens()
        original.save_pretrained(tmp_path / f"original-{number}")
        folder = tmp_path / f"imported-{number}"
        config = import_pretrained(tmp_path / f"original-{number}", folder)
        assert json.loads((folder / "config.json").read_text())["imported_from"] == config.imported_from
        imported, loading = RelPosForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not loading["missing_keys"] and not loading["unexpected_keys"]
        logits = imported.eval()(tokens[2:]).logits
        imported.set_attn_implementation("eager")
        check_equal(name, imported(tokens[2:]).logits, original(tokens[2:]).logits)
        save_file({"tokens": tokens[2:], "logits": logits}, f"{folder}-expected.safetensors")
        folders.append(folder)
    printed = run_without_the_package(LOAD, *folders, cwd=tmp_path, modules=tmp_path / "modules")
    assert printed.split() == ["transformers_modules"] * len(CONFIGS)


def test_every_family_is_tested():
    assert {make().model_type for make in CONFIGS.values()} == set(FAMILIES)


def test_another_scheme_stays(tmp_path):
    """Import → `none` → save → load: `none` still, and not what the original says."""
    make_original("llama").save_pretrained(tmp_path / "llama")
    model = hf_relpos.import_model(tmp_path / "llama")
    fields = {name: value for name, value in model.config.to_dict().items() if name != "rope_parameters"}
    without = RelPosForCausalLM(hf_relpos.RelPosConfig.from_dict({**fields, "pos_embedding_type": "none"})).eval()
    without.load_state_dict(model.state_dict())
    without.save_pretrained(tmp_path / "none")
    loaded, (tokens, _) = AutoModelForCausalLM.from_pretrained(tmp_path / "none"), padded_tokens()
    assert loaded.config.pos_embedding_type == "none" and loaded.config.imported_from["model_type"] == "llama"
    assert torch.equal(loaded(tokens).logits, without(tokens).logits)
    assert not torch.allclose(loaded(tokens).logits, model(tokens).logits, atol=1e-2)


REFUSED = {
    "mpt, slopes in another order": (MptConfig(n_heads=6, d_model=96, n_layers=1), "`n_heads` must be .*got 6"),
    "mpt, other slopes": (
        MptConfig(n_layers=1, attn_config={"alibi_bias_max": 16}),
        "`attn_config.alibi_bias_max` must be 8 .*got 16",
    ),
    "mpt, clipping": (
        MptConfig(n_layers=1, attn_config={"clip_qkv": 6.0}),
        "`attn_config.clip_qkv` must be None .*got 6.0",
    ),
    "mpt, no alibi": (MptConfig(n_layers=1, attn_config={"alibi": False}), "`attn_config.alibi` must be True"),
    "mpt, scaled logits": (MptConfig(n_layers=1, logit_scale=0.5), "`logit_scale` must be None .*got 0.5"),
    "bloom, residual after its norm": (
        BloomConfig(apply_residual_connection_post_layernorm=True),
        "`apply_residual_connection_post_layernorm` must be False .*got True",
    ),
    "gpt2, scores by layer": (
        GPT2Config(scale_attn_by_inverse_layer_idx=True),
        "`scale_attn_by_inverse_layer_idx` must be False .*got True",
    ),
    "gpt2, another model's output": (GPT2Config(add_cross_attention=True), "`add_cross_attention` must be False"),
    "qwen3, half of the channels": (
        Qwen3Config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        "`rope_parameters.partial_rotary_factor` must be 1.0 .*got 0.5",
    ),
}


@pytest.mark.parametrize("config, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_represented_is_refused(config, message):
    with pytest.raises(ValueError, match=message) as refused:
        represented_fields(config)
    assert "\n" not in str(refused.value)


def test_a_field_that_no_entry_speaks_of_must_have_its_default(monkeypatch):
    """What a later version of transformers may add to a family."""
    same = tuple(name for name in FAMILIES["llama"].same if name != "mlp_bias")
    monkeypatch.setitem(FAMILIES, "llama", dataclasses.replace(FAMILIES["llama"], same=same))
    assert represented_fields(LlamaConfig())[0]["use_gated_mlp"]
    with pytest.raises(ValueError, match="`mlp_bias` must be False for a model that is imported, got True"):
        represented_fields(LlamaConfig(mlp_bias=True))


def test_dropout_comes_along_and_what_has_no_place_is_said():
    fields, changes = represented_fields(GPT2Config(resid_pdrop=0.1, attn_pdrop=0.2, embd_pdrop=0.3))
    assert (fields["hidden_dropout"], fields["attention_dropout"]) == (0.1, 0.2)
    assert changes == {"embd_pdrop": [0.3, 0.1]}


def test_the_schemes_of_layers_are_their_shortest_pattern():
    for pattern, expected in (([1, 1, 1, 0] * 2, "rotary/rotary/rotary/none"), ([1, 1], "rotary"), ([0, 0], "none")):
        fields, _ = represented_fields(SmolLM3Config(num_hidden_layers=len(pattern), no_rope_layers=pattern))
        assert fields["pos_embedding_type"] == expected and ("rope_parameters" in fields) == (expected != "none")
