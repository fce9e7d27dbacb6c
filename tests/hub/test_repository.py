"""Which files the repository of a saved model has, and what is refused, without a Hub."""

import errno
import json
import re
import shutil

import pytest
import torch
from conftest import ROOT, make_model, make_tokens
from hub_double import TOKEN
from saved_model import save_model

import hf_relpos.hub.repository
from hf_relpos import PositionEmbedding, RelPosForCausalLM, register_position_embedding
from hf_relpos.hub.model_card import is_generated
from hf_relpos.hub.repository import check_weights, repository_files, write_files
from hf_relpos.model.scheme_base import POSITION_EMBEDDINGS
from hf_relpos.results.result_file import RESULTS, read_results


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("saved") / "alibi")


def test_a_dry_run_writes_the_repository(saved, tmp_path, run_script, capsys):
    run_script("push_to_hub", saved, "alice/m", "--dry_run", "true", "--output_dir", tmp_path / "out")
    printed = capsys.readouterr().out
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == set(repository_files(saved, "alice/m")) and all(name in printed for name in written)
    loaded = RelPosForCausalLM.from_pretrained(tmp_path / "out")
    tokens = make_tokens(1, 5)
    assert torch.equal(loaded(tokens).logits, RelPosForCausalLM.from_pretrained(saved)(tokens).logits)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert is_generated(card) and "alice/m" in card


def refusal(run_script, capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        run_script("push_to_hub", *words, "--dry_run", "true")
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    return line


def spoil(folder, kind):
    if kind == "pickle":
        torch.save({}, folder / "pytorch_model.bin")
        return "'pytorch_model.bin' is pickled"
    if kind == "only pickle":
        (folder / "model.safetensors").unlink()
        torch.save({}, folder / "weights.pt")
        return "'weights.pt' is pickled"
    if kind == "cut weights":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
        return "cannot be loaded"
    if kind == "no weights":
        (folder / "model.safetensors").unlink()
        return "cannot be loaded"
    if kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
        return "holds no tokenizer"
    if kind == "another family":
        (folder / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
        return "must hold a model of the family"
    if kind == "another's result":
        *_, result = read_results(ROOT / "docs" / "results" / "sotu" / RESULTS)
        (folder / "evaluation").mkdir()
        (folder / "evaluation" / "results.json").write_text(json.dumps(result))
        return "is the result of another model: its `pos_embedding_type` is 'rotary', not 'alibi'"
    if kind == "a token":
        (folder / "generation_config.json").write_text(json.dumps({"made_by": "hf_" + "a" * 34}))
        return "'generation_config.json' holds a token of the Hub"
    if kind == "a path":
        config = json.loads((folder / "generation_config.json").read_text()) | {"made_in": str(folder)}
        (folder / "generation_config.json").write_text(json.dumps(config))
        return "'generation_config.json' holds a path of this machine"
    if kind == "nothing":
        shutil.rmtree(folder)
        return "is not a saved model"
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    ["pickle", "only pickle", "cut weights", "no weights", "no tokenizer", "another family", "another's result"]
    + ["a token", "a path", "nothing"],
)
def test_what_is_not_published(kind, saved, tmp_path, run_script, capsys):
    folder = shutil.copytree(saved, tmp_path / "model")
    expected = spoil(folder, kind)
    assert expected in refusal(run_script, capsys, folder, "alice/m")
    assert not (tmp_path / "model-hub").exists()


def test_a_scheme_from_elsewhere_is_not_published(tmp_path):
    try:

        @register_position_embedding("elsewhere")
        class Elsewhere(PositionEmbedding):
            """Defined in a test."""

            def distance_bias(self, distance):
                return -distance.float().expand(6, -1)

        make_model("elsewhere").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="'elsewhere' is defined in 'test_repository', outside of it"):
            repository_files(tmp_path)
    finally:
        POSITION_EMBEDDINGS.pop("elsewhere", None)


def test_a_shard_too_few(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    RelPosForCausalLM.from_pretrained(saved).save_pretrained(folder, max_shard_size="40KB")
    check_weights(repository_files(folder))
    sorted(folder.glob("model-*.safetensors"))[-1].unlink()
    with pytest.raises(ValueError, match="the weights are not whole: 'model-.*' is missing"):
        check_weights(repository_files(folder))


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--license", "My Licence"], "`license` must be one of the Hub's names"),
        (["--base_model", "/tmp/base"], "Repo id must"),
    ],
    ids=["license", "base"],
)
def test_what_no_card_may_say(flags, expected, saved, run_script, capsys):
    assert expected in refusal(run_script, capsys, saved, "alice/m", *flags)


def test_one_word_too_few(run_script, capsys, saved):
    assert "two words are needed" in refusal(run_script, capsys, saved)


def test_a_full_disk_leaves_nothing(saved, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hf_relpos.hub.repository.shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        write_files(repository_files(saved, "alice/m"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_pickled_weights_are_not_loaded(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save(RelPosForCausalLM.from_pretrained(saved).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        RelPosForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="`use_safetensors` must be True"):
        RelPosForCausalLM.from_pretrained(saved, use_safetensors=False)


def test_what_is_pickled_beside_a_checkpoint_holds_no_token(tmp_path):
    from hf_relpos.training.arguments import RelPosTrainingArguments

    args = RelPosTrainingArguments(output_dir=str(tmp_path), hub_token=TOKEN, use_cpu=True)
    torch.save(args, tmp_path / "training_args.bin")
    assert args.hub_token == TOKEN
    assert not re.search(TOKEN.encode(), (tmp_path / "training_args.bin").read_bytes())
