"""Which files the repository of a saved model has, and what is refused, without a Hub."""

import errno
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_model, make_tokens
from hub_double import TOKEN
from safetensors.torch import load_file, save_file
from saved_model import save_model

import hf_relpos.hub.repository
from hf_relpos import PositionEmbedding, RelPosForCausalLM, register_position_embedding
from hf_relpos.hub.leaks import check_texts
from hf_relpos.hub.model_card import is_generated
from hf_relpos.hub.push import _operations
from hf_relpos.hub.repository import INDEX, check_weights, repository_files, write_card, write_files
from hf_relpos.model.scheme_base import POSITION_EMBEDDINGS
from hf_relpos.results.result_file import read_results


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
        return "no tokenizer in "
    if kind == "another family":
        (folder / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
        return "must hold a model of the family"
    if kind == "another's result":
        *_, result = read_results(ROOT / "tests" / "hub" / "results_0_1_0.jsonl")
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
    if kind == "NaN":
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"][3] = float("nan")
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return "the weights are not finite: 'model.norm.weight' holds NaN or infinity"
    if kind == "an index beside whole weights":
        (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "model-1-of-1.safetensors"}}))
        return "are both there, with other weights"
    if kind == "an index that leads elsewhere":
        (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "../other.safetensors"}}))
        return "must name safetensors files of its folder, got '../other.safetensors'"
    if kind == "an index of something else":
        (folder / INDEX).write_text("[]")
        return f"{INDEX}' must hold a dictionary, got a list"
    if kind == "nothing":
        shutil.rmtree(folder)
        return "is not a saved model"
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    ["pickle", "only pickle", "cut weights", "no weights", "no tokenizer", "another family", "another's result"]
    + ["a token", "a path", "nothing", "NaN", "an index beside whole weights", "an index that leads elsewhere"]
    + ["an index of something else"],
)
def test_what_is_not_published(kind, saved, tmp_path, run_script, capsys):
    folder = shutil.copytree(saved, tmp_path / "model")
    expected = spoil(folder, kind)
    assert expected in refusal(run_script, capsys, folder, "alice/m")
    assert not (tmp_path / "model-hub").exists()


@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "config.json", "training.json", "README.md", "tokenizer.json", "model.safetensors"]
    + ["evaluation/results.json"],
)
@pytest.mark.parametrize("through", ["file", "folder", "chain"])
def test_a_link_to_somewhere_else_is_not_followed(name, through, saved, tmp_path):
    """A file that is a link, a folder that is one, a link to a link: all end outside."""
    folder = shutil.copytree(saved, tmp_path / "model")
    path, secret = folder / name, tmp_path / "elsewhere" / Path(name).name
    secret.parent.mkdir()
    secret.write_bytes(path.read_bytes() if path.exists() else b"{}")
    path.unlink(missing_ok=True)
    if through == "folder" and "/" in name:
        path.parent.symlink_to(secret.parent)
    else:
        path.parent.mkdir(exist_ok=True)
        (tmp_path / "between").symlink_to(secret)
        path.symlink_to(tmp_path / "between" if through == "chain" else secret)
    with pytest.raises(ValueError, match=f"'{name}' is a link to a file outside of the folder"):
        repository_files(folder, "alice/m")


def test_links_within_the_folder_and_to_the_cache_of_the_hub_are_followed(saved, tmp_path):
    """A snapshot links to the blobs beside it, and to those of no other repository."""
    snapshot, blobs = tmp_path / "models--a--m" / "snapshots" / "sha", tmp_path / "models--a--m" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in saved.iterdir():
        if path.is_file():
            shutil.copyfile(path, blobs / path.name)
            (snapshot / path.name).symlink_to(blobs / path.name)
    assert set(repository_files(snapshot, "alice/m")) == set(repository_files(saved, "alice/m"))
    shutil.copytree(blobs, tmp_path / "models--a--other" / "blobs")
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(tmp_path / "models--a--other" / "blobs" / "tokenizer.json")
    with pytest.raises(ValueError, match="'tokenizer.json' is a link"):
        repository_files(snapshot, "alice/m")
    folder = shutil.copytree(saved, tmp_path / "linked" / "model")
    (tmp_path / "alias").symlink_to(folder)
    (folder / "config.json").rename(folder / "first.json")
    (folder / "config.json").symlink_to(folder / "first.json")
    assert "config.json" in repository_files(tmp_path / "alias", "alice/m")


def test_only_weights_of_the_index_are_published(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    save_file({"x": torch.ones(1)}, folder / "adapter.safetensors")
    assert "adapter.safetensors" not in repository_files(folder, "alice/m")


# assembled here, so that no scanner takes this file for a leak
KEYS = {
    "an OpenAI key": "sk-" + "proj-" + "Ab3" * 12,
    "an Anthropic key": "sk-" + "ant-api03-" + "Ab3" * 12,
    "an AWS key": "AKIA" + "IOSFODNN7EXAMPLE",
    "a GitHub token": "ghp" + "_" + "aB3" * 12,
    "a Google key": "AIza" + "SyA-1234567" + "aB3" * 8,
    "a Slack token": "xoxb" + "-123456789012-abcdef",
    "a private key": "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIE",
    "a password in an address": "https://alice:" + "geheim@example.org/x",
}


@pytest.mark.parametrize(
    "name", ["generation_config.json", "README.md", "tokenizer_config.json", "chat_template.jinja"]
)
@pytest.mark.parametrize("kind", KEYS)
def test_keys_are_not_published(kind, name, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    key = KEYS[kind]
    text = json.dumps({"made_with": key}) if name.endswith(".json") else f"made with {key} by hand"
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=f"'{name}' holds {kind}: take it out, and revoke it") as error:
        repository_files(folder, "alice/m")
    assert key not in str(error.value)


def test_the_header_of_the_weights_is_read_too(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    for text, kind in ((KEYS["a GitHub token"], "a GitHub token"), ("/home/alice/x", "an absolute path of a user's")):
        save_file(weights, folder / "model.safetensors", {"format": "pt", "made": text})
        with pytest.raises(ValueError, match=f"'model.safetensors' holds {kind}"):
            repository_files(folder, "alice/m")


PATHS = ["/home/alice/data", "/Users/alice/data", "C:\\Users\\alice\\data", "c:/users/alice", "file:///home/alice/x"]
PATHS += ["/export/home/alice/x", "/mnt/c/Users/alice", "/root/data/x", "PYTHONPATH=/usr/lib:/home/alice/lib"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["generation_config.json", "README.md"])
def test_paths_of_users_are_not_published(path, name, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    text = json.dumps({"made_in": path}).replace("/", "\\/") if name.endswith(".json") else f"made in `{path}`."
    (folder / name).write_text(text)
    with pytest.raises(
        ValueError, match=f"'{name}' holds an? (absolute path of a user's folder|path of this machine)"
    ) as error:
        repository_files(folder, "alice/m")
    assert "alice/" not in str(error.value)


@pytest.mark.parametrize("text", ["cd {}\n", "`{}`", "in {}.", "in '{}'", "{}/x", '"{}"', "file://{}"])
def test_the_folder_itself_is_not_told(text, tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(ValueError, match="'README.md' holds a path of this machine"):
        check_texts({"README.md": text.format(folder).encode()}, folder)
    for other in (f"{folder}2", f"https://example.org{folder}", f"{folder}-chat"):
        check_texts({"README.md": other.encode()}, folder)
    check_texts({"README.md": b'from_pretrained("alice/model")'}, Path("/model"))  # as in a container


def test_a_card_that_is_no_text_is_named(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "README.md").write_bytes("# Modèle".encode("latin-1"))
    with pytest.raises(ValueError, match="the card '.*README.md' cannot be read: 'utf-8' codec"):
        repository_files(folder, "alice/m")


def test_a_result_that_is_named_and_lies_in_the_folder_is_published_once(tmp_path, monkeypatch):
    for name in ("read_result", "_check_result"):
        monkeypatch.setattr(hf_relpos.hub.repository, name, lambda path, *_: {"path": path})
    for place in ("model/evaluation", "other"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "results.json").write_text("{}")
    named = [str(tmp_path / place / "results.json") for place in ("model/evaluation", "other", "model/../other")]
    found = hf_relpos.hub.repository._find_results(tmp_path / "model", named, {}, {})
    assert [*found] == ["evaluation/results.json", "other/results.json"]


def test_a_push_deletes_nothing_in_folders():
    there = ["model.safetensors", "pytorch_model.bin", "adapters/adapter_model.safetensors", "onnx/model.bin"]
    deleted = [operation.path_in_repo for operation in _operations({}, there)]
    assert deleted == ["model.safetensors", "pytorch_model.bin"]


def test_what_resembles_a_key_or_a_path_is_published(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    words = "See https://example.org/home/alice, docs/home/x, ~/home, task-specific-tokenizers-2024, mask-2-something."
    (folder / "README.md").write_text(f"{words} AKIAB sk-short https://huggingface.co/Users/x hf_relpos")
    assert repository_files(folder, "alice/m")["README.md"] == folder / "README.md"


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


def test_an_adapter_is_no_model_and_says_what_to_do(tmp_path, run_script, capsys):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    line = refusal(run_script, capsys, tmp_path / "lora", "alice/m")
    assert "not a model but an adapter of PEFT: merge it" in line and "config.json" not in line


def test_a_push_names_the_licence_that_it_writes(saved, tmp_path, run_script, capsys):
    run_script("push_to_hub", saved, "alice/m", "--dry_run", "true", "--output_dir", tmp_path / "one")
    assert "licence of the weights: apache-2.0, by default (--license)" in capsys.readouterr().out
    flags = ("--license", "mit", "--dry_run", "true", "--output_dir", tmp_path / "two")
    run_script("push_to_hub", saved, "alice/m", *flags)
    assert "licence of the weights: mit\n" in capsys.readouterr().out


def test_the_card_of_a_push_loads_from_the_repository_and_that_of_a_folder_from_it(saved, tmp_path, run_script):
    folder = shutil.copytree(saved, tmp_path / "rot")
    write_card(folder)
    assert 'from_pretrained("rot"' in (folder / "README.md").read_text()
    run_script("push_to_hub", folder, "alice/m", "--dry_run", "true", "--output_dir", tmp_path / "sent")
    card = (tmp_path / "sent" / "README.md").read_text()
    assert card.count('from_pretrained("alice/m"') == 3 and '"rot"' not in card
