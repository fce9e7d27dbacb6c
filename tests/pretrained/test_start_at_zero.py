"""A scheme that is laid over trained weights changes nothing at first, and learns."""

import json

import pytest
import torch
from conftest import make_model, make_tokenizer, make_tokens
from helpers import finetuning_flags, run_without_the_package, weights
from tiny_models import make_original, padded_tokens
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_relpos
from hf_relpos import RelPosConfig, RelPosForCausalLM, list_position_embeddings
from hf_relpos.model.scheme_base import POSITION_EMBEDDINGS, StartGate
from hf_relpos.training.model_setup import new_model
from hf_relpos.training.scheme_change import ChangeArguments, changed_config, copy_weights


GATED = [name for name in list_position_embeddings() if StartGate.fits(POSITION_EMBEDDINGS[name])]
ADDED = [name for name in list_position_embeddings() if POSITION_EMBEDDINGS[name].hooks & StartGate.hooks]


def lay_over(model: RelPosForCausalLM, scheme: str, **changes) -> RelPosForCausalLM:
    changed = new_model(changed_config(model.config, ChangeArguments(pos_embedding_type=scheme, **changes), 128), 0)
    copy_weights(model, changed)
    return changed.eval()


@pytest.fixture(scope="module")
def rotary():
    return hf_relpos.import_model(make_original("llama"), attn_implementation="sdpa")


@pytest.mark.parametrize("name", ADDED)
def test_the_first_logits_are_those_of_rotary_alone_and_all_parameters_learn(rotary, name):
    model, (tokens, mask) = lay_over(rotary, f"rotary+{name}"), padded_tokens()
    assert model.config.position_gates == ([name] if name in GATED else None)
    with torch.no_grad():
        for given in ({}, {"attention_mask": mask}):
            real = mask.bool() if given else torch.ones_like(mask).bool()
            found, expected = (each(tokens, **given).logits[real] for each in (model, rotary))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    before = {key: value.clone() for key, value in model.named_parameters() if "position_embeddings" in key}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(3):
        model(tokens[2:], labels=tokens[2:]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    still = [key for key, value in model.named_parameters() if key in before and torch.equal(value, before[key])]
    assert before and not still, still


@pytest.mark.parametrize("name", ["linear_cpb", "alibi", "kerple_log", "fox"])
@torch.no_grad()
def test_without_the_gate_they_differ(rotary, name):
    """The control of the test above."""
    model, (tokens, _) = lay_over(rotary, f"rotary+{name}", start_at_zero=False), padded_tokens()
    assert model.config.position_gates is None
    assert float((model(tokens).logits - rotary(tokens).logits).abs().max()) > 1e-2


@pytest.mark.parametrize("name", GATED)
@torch.no_grad()
def test_a_gate_of_one_is_no_gate(name):
    """In all paths: whole rows, padding, and from the cache."""
    plain, gated = make_model(f"rotary+{name}"), make_model(f"rotary+{name}", position_gates=[name])
    for key, parameter in gated.named_parameters():
        parameter.data = torch.ones_like(parameter) if "start_gate" in key else plain.state_dict()[key].clone()
    tokens, mask = make_tokens(2, 23), torch.ones(2, 23).long()
    mask[0, :5] = 0
    expected = plain(tokens, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(gated(tokens, attention_mask=mask).logits[mask.bool()], expected)
    given = dict(attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(gated.generate(tokens, **given), plain.generate(tokens, **given))
    for key, parameter in gated.named_parameters():
        if "start_gate" in key:
            parameter.mul_(0.5)
    halved = gated(tokens, attention_mask=mask).logits[mask.bool()]
    assert not torch.allclose(halved, expected, atol=1e-4)


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
gate = model.model.layers[1].self_attn.position_embeddings["linear_cpb"].start_gate
print(model.config.position_gates, gate.weight.sum().item())
"""


def test_gates_are_saved(tmp_path):
    model = make_model("rotary+linear_cpb", position_gates=["linear_cpb"])
    model.model.layers[1].self_attn.position_embeddings["linear_cpb"].start_gate.weight.data.fill_(0.5)
    model.save_pretrained(tmp_path / "model")
    printed = run_without_the_package(LOAD, tmp_path / "model", cwd=tmp_path, modules=tmp_path / "modules")
    assert printed.split()[-2:] == ["['linear_cpb']", "3.0"]


def test_which_changes_start_at_zero(rotary):
    def gates(model, scheme, **changes):
        config = changed_config(model.config, ChangeArguments(pos_embedding_type=scheme, **changes), 64)
        return config.position_gates

    assert gates(rotary, "rotary+alibi+temperature") == ["alibi"]
    assert gates(rotary, "alibi") is None and gates(rotary, "alibi", start_at_zero=True) == ["alibi"]
    assert gates(rotary, "none") is None and gates(rotary, "rotary") is None
    own = make_model("rotary")
    assert gates(own, "rotary+alibi") is None and gates(own, "rotary+alibi", start_at_zero=True) == ["alibi"]
    gated = lay_over(rotary, "rotary+alibi")
    assert gates(gated, "rotary+alibi+t5") == ["alibi", "t5"] and gates(gated, "rotary") is None


@pytest.mark.parametrize("gates", [[], ["rotary"], ["alibi", "alibi"], ["t5"], "alibi"])
def test_gates_of_what_adds_nothing_are_refused(gates):
    with pytest.raises(ValueError, match=r"`position_gates` must be None or list some of \['alibi'\].*got"):
        RelPosConfig(pos_embedding_type="rotary+alibi", position_gates=gates)


def test_finetuning_lays_over(data_flags, tmp_path, run_script):
    sizes = dict(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes, max_position_embeddings=64)).save_pretrained(tmp_path / "l")
    make_tokenizer().save_pretrained(tmp_path / "l")
    flags = dict(pos_embedding_type="rotary+alibi", max_steps=2)
    run_script("finetune", *finetuning_flags(data_flags, tmp_path / "l", tmp_path / "over", **flags))
    record = json.loads((tmp_path / "over" / "training.json").read_text())
    assert record["position_gates"] == ["alibi"] and record["changes"]["fields"]["position_gates"] == [None, ["alibi"]]
    (name,) = [name for name in record["changes"]["reinitialized"] if "start_gate" in name]
    assert weights(tmp_path / "over")[name].any()
    flags |= {"start_at_zero": "false"}
    run_script("finetune", *finetuning_flags(data_flags, tmp_path / "l", tmp_path / "at_once", **flags))
    assert json.loads((tmp_path / "at_once" / "training.json").read_text())["position_gates"] is None
