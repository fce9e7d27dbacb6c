"""An imported model of each family says what the original says."""

import json

import pytest
import torch
from helpers import run_without_the_package
from safetensors.torch import save_file
from tiny_models import CONFIGS, EAGER_ONLY, ROUNDED, make_original, padded_tokens
from transformers import AutoModelForCausalLM

import hf_relpos
from hf_relpos import RelPosForCausalLM
from hf_relpos.pretrained.families import FAMILIES, converters, family_of, our_name
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
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    expected = load_file(f"{folder}-expected.safetensors")
    with torch.no_grad():
        logits = model.eval()(expected["tokens"]).logits
    assert torch.equal(logits, expected["logits"]), folder
    print(type(model).__module__.partition(".")[0])
"""


@torch.no_grad()
def test_saved_folders_load_by_remote_code(tmp_path):
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
