"""Imported models in training, evaluation, reports and publishing."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer
from helpers import finetuning_flags, refusal, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, LlamaConfig

from hf_relpos import RelPosConfig
from hf_relpos.hub.model_card import model_card, origin_of
from hf_relpos.hub.repository import repository_files
from hf_relpos.model.modeling_relpos import RelPosForCausalLM
from hf_relpos.pretrained.importing import import_pretrained
from hf_relpos.results.comparable import ARCHITECTURE
from hf_relpos.results.groups import group_results
from hf_relpos.training.scheme_change import copy_weights


SIZES = dict(vocab_size=310, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
SIZES |= dict(max_position_embeddings=64, pad_token_id=0, eos_token_id=1)


def save_original(folder: Path, config) -> Path:
    """→ the folder, with a tokenizer of fewer entries than the model has rows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = [1, 5]
    model.save_pretrained(folder)
    make_tokenizer("{{ messages }}").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_original(tmp_path_factory.mktemp("llama") / "llama", LlamaConfig(**SIZES, tie_word_embeddings=True))


def test_finetuning_imports_first_and_says_so(llama, data_flags, tmp_path, run_script, capsys):
    rope = '{"rope_type": "yarn", "factor": 2}'
    flags = finetuning_flags(data_flags, llama, tmp_path / "yarn", max_steps=2, rope_parameters=rope, block_size=96)
    run_script("finetune", *flags)
    assert f"imported {llama}: model_type llama, pos_embedding_type rotary" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "yarn")
    assert model.config.imported_from["model_type"] == "llama" and model.config.embedding_multiplier == 1
    assert model.config.rope_parameters["original_max_position_embeddings"] == 64
    assert model.generation_config.eos_token_id == [1, 5]
    assert AutoTokenizer.from_pretrained(tmp_path / "yarn").chat_template == "{{ messages }}"
    record = json.loads((tmp_path / "yarn" / "training.json").read_text())
    assert (record["base_model"], record["base_train_length"]) == ("llama", 64)
    assert record["changes"]["fields"].keys() <= {"rope_parameters", "train_length", "max_position_embeddings", "dtype"}
    run_script("export_model", tmp_path / "yarn", tmp_path / "exported")
    exported, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / "exported"), torch.arange(90)[None] + 5
    assert exported.config.model_type == "llama" and torch.equal(exported(tokens).logits, model(tokens).logits)


def test_finetuning_starts_where_the_original_ended(llama, data_flags, tmp_path, run_script):
    import_pretrained(llama, tmp_path / "imported")
    for name, source in (("direct", llama), ("folder", tmp_path / "imported")):
        run_script("finetune", *finetuning_flags(data_flags, source, tmp_path / name, max_steps=2))
    first, second = weights(tmp_path / "direct"), weights(tmp_path / "folder")
    assert all(torch.equal(first[name], second[name]) for name in first) and first.keys() == second.keys()
    run_script("finetune", *finetuning_flags(data_flags, llama, tmp_path / "still", max_steps=1, learning_rate=0))
    assert torch.equal(
        weights(tmp_path / "still")["model.layers.0.mlp.gate_proj.weight"],
        weights(llama)["model.layers.0.mlp.gate_proj.weight"],
    )


def test_drope_of_a_pythia(data_flags, tmp_path, run_script):
    neox = save_original(tmp_path / "neox", GPTNeoXConfig(**SIZES))
    flags = finetuning_flags(data_flags, neox, tmp_path / "drope", max_steps=1, pos_embedding_type="none")
    run_script("finetune", *flags)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "drope")
    assert model.config.pos_embedding_type == "none" and model.config.norm_type == "layer_norm"


def test_finetuning_refuses_what_cannot_be_imported(llama, data_flags, tmp_path, run_script, capsys):
    flags = finetuning_flags(data_flags, llama, tmp_path / "x", pos_embedding_type="alibi")
    message = "`pos_embedding_type` of the imported model is 'rotary', got 'alibi'"
    assert message in refusal(run_script, capsys, "train", flags)
    edited = save_original(tmp_path / "edited", LlamaConfig(**SIZES, final_logit_softcapping=30.0))
    flags = finetuning_flags(data_flags, edited, tmp_path / "x")
    assert "`final_logit_softcapping` must be None" in refusal(run_script, capsys, "finetune", flags)
    assert not (tmp_path / "x").exists()


def test_evaluation_takes_both_alike(llama, data_flags, tmp_path, run_script):
    import_pretrained(llama, tmp_path / "imported")
    results = []
    for name, model in (("theirs", llama), ("ours", tmp_path / "imported")):
        flags = ["--model_name_or_path", model, "--output_dir", tmp_path / name, "--eval_lengths", 32, 64, 128]
        run_script("evaluate", *flags, *data_flags, "--attn_implementation", "eager")
        results.append(json.loads((tmp_path / name / "results.json").read_text()))
    for key in ("lengths", "loss_by_position", "in_context_score", "slope", "train_length"):
        assert results[0][key] == results[1][key], key


# --- records, reports and cards


ORIGIN = {"base_model": "meta/llama", "revision": "0a1b", "license": "llama3.2", "model_type": "llama"}
ORIGIN |= {"changes": {"pad_token_id": [-1, None]}}


def card_of(**origin):
    config = RelPosConfig(imported_from=ORIGIN | origin).to_dict() | {"architectures": ["RelPosForCausalLM"]}
    return model_card(config, "name")


def test_a_card_says_where_a_model_comes_from():
    card = card_of()
    assert card.data.license == "llama3.2" and card.data.base_model == "meta/llama"
    said = "Converted from `meta/llama` at revision `0a1b` (`model_type` `llama`), which changed pad_token_id from -1"
    assert said in card.text and "`llama3.2`; code: Apache 2.0" in card.text


def test_a_card_of_a_converted_model_tells_nothing_that_is_not_known(llama, tmp_path):
    """Its own options, no training that nobody recorded, and a prompt as its tokenizer writes one."""
    fields = {"rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"}, "train_length": 8192}
    config = {
        "pos_embedding_type": "rotary",
        "imported_from": ORIGIN | {"base_model": None, "revision": None},
        **fields,
    }
    text = model_card(config, "name", base_model="meta/llama", has_chat_template=True).text
    assert "Converted from `meta/llama` (`model_type` `llama`)" in text
    assert not any(word in text for word in ("Finetuned", "Trained at", "8192", "None tokens", "rope_theta` 10000 "))
    assert "`rope_theta` 100000.0 and `partial_rotary_factor` by default 1.0" in text
    assert "inputs = tokenizer.apply_chat_template(messages, " in text and 'tokenizer("The"' not in text
    tuned = model_card({"pos_embedding_type": "alibi"}, "name", base_model="alice/base").text
    assert "Finetuned from `alice/base`." in tuned and 'tokenizer("The"' in tuned
    import_pretrained(llama, tmp_path / "imported", base_model="meta/llama", license="mit")
    for template in (True, False):
        if not template:
            (tmp_path / "imported" / "chat_template.jinja").unlink()
        card = repository_files(tmp_path / "imported")["README.md"].decode()
        assert ("apply_chat_template" in card) == template


@pytest.mark.parametrize("name", ["license", "base_model"])
def test_an_imported_model_is_not_published_without_licence_and_origin(name, llama, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}` must be given for a model that was imported .*got None"):
        card_of(**{name: None})
    known = {"license": "mit", "base_model": "meta/llama"}
    import_pretrained(llama, tmp_path / "imported", **{key: value for key, value in known.items() if key != name})
    with pytest.raises(ValueError, match=f"`{name}` must be given for a model that was imported"):
        repository_files(tmp_path / "imported")
    files = repository_files(tmp_path / "imported", **{name: known[name]})
    assert b"license: mit" in files["README.md"] and b"base_model: meta/llama" in files["README.md"]


def test_all_that_a_push_needs_is_named_at_once_and_by_the_import(llama, tmp_path, run_script, capsys):
    run_script("import_model", llama, tmp_path / "imported")
    needs = "--license NAME and --base_model OWNER/NAME (none: never on the Hub)"
    assert f"\na push of it will need {needs}\n" in capsys.readouterr().out
    with pytest.raises(ValueError) as error:
        repository_files(tmp_path / "imported")
    assert str(error.value).startswith("`license` and `base_model` must be given") and needs in str(error.value)


def test_a_model_that_was_never_on_the_hub_is_published_without_a_base_model(llama, tmp_path, run_script, capsys):
    import_pretrained(llama, tmp_path / "imported", license="mit")
    run_script("import_model", llama, tmp_path / "said", "--base_model", "none", "--license", "mit")
    assert "a push of it will need" not in capsys.readouterr().out
    for folder, flags in (("imported", {"base_model": "none"}), ("said", {})):
        card = repository_files(tmp_path / folder, **flags)["README.md"].decode()
        assert "base_model" not in card and "`none`" not in card and "Converted (`model_type` `llama`)" in card


def test_a_model_of_ones_own_is_apache():
    assert origin_of(RelPosConfig().to_dict()) == (None, "apache-2.0")
    assert origin_of({}, license="mit") == (None, "mit")


def test_a_run_that_would_be_published_is_refused_before_it_begins(llama, data_flags, tmp_path, run_script, capsys):
    flags = finetuning_flags(data_flags, llama, tmp_path / "x", push_to_hub="true", hub_model_id="alice/x")
    assert "`license` and `base_model` must be given" in refusal(
        run_script, capsys, "finetune", [*flags, "--hub_token", "hf_x"]
    )
    assert not (tmp_path / "x" / "model.safetensors").exists()


def test_the_commands_of_a_card_begin_with_the_import(llama, data_flags, tmp_path, run_script):
    import_pretrained(llama, tmp_path / "imported", base_model="meta/llama", license="mit")
    run_script("finetune", *finetuning_flags(data_flags, tmp_path / "imported", tmp_path / "tuned", max_steps=1))
    text = (tmp_path / "tuned" / "README.md").read_text()
    first, second = (text.index(f"hf-relpos {name}") for name in ("import meta/llama output/imported", "finetune"))
    assert first < second and "license: mit" in text and "base_model: meta/llama" in text


def test_tied_weights_are_counted_once():
    model = make_tied()
    size = sum(parameter.numel() for parameter in model.parameters())
    assert copy_weights(model, make_tied())["copied"].endswith(f"tensors of {size:,} numbers")


def make_tied():
    return RelPosForCausalLM(RelPosConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, tie_word_embeddings=True))


def result_of(config, seed):
    training = {"seed": seed, "recipe": {}, "config": config, "shape": None}
    base = {"pos_embedding_type": "rotary", "seed": seed, "train_length": 32, "corpus": {"name": "x"}}
    return base | {"lengths": {"32": {"loss": 1.0, "perplexity": 2.7}}, "training": training}


def test_reports_compare_the_architecture():
    """A record of before these fields has their defaults."""
    default = RelPosConfig()
    plain, gated = default.to_dict(), RelPosConfig(use_gated_mlp=True).to_dict()
    old = {name: value for name, value in plain.items() if name not in ARCHITECTURE}
    assert len(group_results([result_of(plain, 1), result_of(old, 2)])) == 1
    with pytest.raises(ValueError, match="`config.use_gated_mlp` is False and True"):
        group_results([result_of(plain, 1), result_of(gated, 2)])
    varied = group_results([result_of(plain, 1), result_of(gated, 2)], ["config.use_gated_mlp"])
    assert [group.label for group in varied] == ["rotary use_gated_mlp False", "rotary use_gated_mlp True"]
    assert ARCHITECTURE == {name: getattr(default, name) for name in ARCHITECTURE}
