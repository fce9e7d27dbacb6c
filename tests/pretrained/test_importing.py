"""What an import brings along, what it costs, and what it refuses."""

import json
import subprocess
import sys

import forked
import pytest
import torch
from conftest import ROOT, make_tokenizer
from gguf_writing import finish_gguf, gguf_writer
from helpers import refusal
from safetensors.torch import load_file, save_file
from tiny_models import make_original, padded_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, LlamaConfig, MixtralConfig

import hf_relpos
from hf_relpos.pretrained.importing import import_pretrained, is_foreign


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CARD = "---\nlicense: llama3.2\n---\n# A model\n"


@pytest.fixture
def llama(tmp_path):
    """→ a folder with all that a repository of a Llama has."""
    folder = tmp_path / "llama"
    make_original("llama").save_pretrained(folder)
    make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}").save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    return folder


def edit(folder, name, **values):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | values))


def test_all_comes_along(llama, tmp_path, run_script, capsys):
    edit(llama, "generation_config.json", temperature=0.6, do_sample=True, eos_token_id=[2, 7])
    run_script("import_model", llama, tmp_path / "out", "--base_model", "meta/llama")
    printed = capsys.readouterr().out
    assert "model_type llama, pos_embedding_type rotary, base_model meta/llama, license llama3.2" in printed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.temperature == 0.6 and model.generation_config.eos_token_id == [2, 7]
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (llama, tmp_path / "out")]
    messages = [{"role": "user", "content": "the state of union"}]
    first, second = (each.apply_chat_template(messages, tokenize=True)["input_ids"] for each in tokenizers)
    assert first == second and tokenizers[0].eos_token_id == tokenizers[1].eos_token_id
    expected = {"base_model": "meta/llama", "revision": None, "license": "llama3.2", "model_type": "llama"}
    assert model.config.imported_from == expected | {"changes": {}}
    assert (model.config.embedding_multiplier, model.config.train_length) == (1.0, 256)


def test_what_the_cache_of_the_hub_holds_is_named(llama, tmp_path):
    snapshot = tmp_path / "models--meta--llama-1b" / "snapshots" / ("0a" * 20)
    snapshot.parent.mkdir(parents=True)
    llama.rename(snapshot)
    found = hf_relpos.import_model(snapshot).config.imported_from
    assert (found["base_model"], found["revision"]) == ("meta/llama-1b", "0a" * 20)


def test_several_files_and_other_dtypes(tmp_path):
    original, (tokens, _) = make_original("llama", torch.bfloat16), padded_tokens()
    original.save_pretrained(tmp_path / "llama", max_shard_size="60KB")
    assert (tmp_path / "llama" / INDEX).is_file()
    import_pretrained(tmp_path / "llama", tmp_path / "out")
    assert {weight.dtype for weight in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert model.dtype == torch.bfloat16 and torch.equal(model(tokens).logits, original(tokens).logits)


def test_a_padding_token_outside_the_vocabulary_is_left_out_and_said(llama):
    edit(llama, "config.json", pad_token_id=-1)
    config = hf_relpos.import_model(llama).config
    assert config.pad_token_id is None and config.imported_from["changes"] == {"pad_token_id": [-1, None]}


def test_embeddings_that_differ_are_not_tied(llama):
    """As transformers decides: the configuration says tied, the files hold two."""
    edit(llama, "config.json", tie_word_embeddings=True)
    model, original = hf_relpos.import_model(llama), AutoModelForCausalLM.from_pretrained(llama)
    tokens, _ = padded_tokens()
    assert torch.equal(model(tokens).logits, original(tokens).logits)
    assert model.config.imported_from["changes"] == {"tie_word_embeddings": [True, False]}
    weights = load_file(llama / WEIGHTS)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, llama / WEIGHTS)
    assert hf_relpos.import_model(llama).config.tie_word_embeddings


def test_files_of_a_base_model_and_old_buffers(llama):
    weights = load_file(llama / WEIGHTS)
    base = {name.removeprefix("model."): weight for name, weight in weights.items()}
    base["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tokens, _ = padded_tokens()
    expected = hf_relpos.import_model(llama)(tokens).logits
    save_file(base, llama / WEIGHTS)
    assert torch.equal(hf_relpos.import_model(llama)(tokens).logits, expected)


# --- memory


MEASURE = """
import sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import hf_relpos
from hf_relpos.pretrained.importing import import_pretrained
with torch.device("meta"):
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=1))
source, folder = map(Path, sys.argv[1:3])
def resident(name):
    return int(Path("/proc/self/status").read_text().partition(name + ":")[2].split()[0]) * 1024
if sys.argv[3] == "gguf":
    import gguf
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before, size = resident("VmRSS"), (source / "model.safetensors").stat().st_size
if sys.argv[3] == "folder":
    import_pretrained(source, folder)
elif sys.argv[3] == "gguf":
    model = hf_relpos.import_model(source.with_suffix(".gguf"))
elif sys.argv[3] == "memory":
    model = hf_relpos.import_model(source)
else:  # the control: what loads a model and saves it
    model = hf_relpos.import_model(LlamaForCausalLM.from_pretrained(source))
    copies = {name: weight.clone() for name, weight in model.state_dict().items()}
print((resident("VmHWM") - before) / size)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """→ a Llama of 160 MB."""
    folder = tmp_path_factory.mktemp("large") / "llama"
    sizes = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=8)
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=8000)).save_pretrained(folder)
    assert (folder / WEIGHTS).stat().st_size > 150e6
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the peak of a part of a process")
@pytest.mark.parametrize(
    "how, least, most", [("folder", 0, 0.5), ("memory", 0.9, 1.15), ("gguf", 0.9, 1.3), ("control", 1.5, 9)]
)
def test_an_import_holds_one_copy_of_the_weights(large, how, least, most, tmp_path):
    if how == "gguf" and not large.with_suffix(".gguf").exists():
        write_gguf(large, large.with_suffix(".gguf"), "Q8_0")
    done = forked.run(["-c", MEASURE, large, tmp_path / "out", how], cwd=ROOT, check=True)
    assert least <= float(done.stdout.split()[-1]) <= most, done.stdout


# --- refusals


def without(folder, *names):
    weights = load_file(folder / WEIGHTS)
    save_file({name: weight for name, weight in weights.items() if name not in names}, folder / WEIGHTS)


def with_weight(folder, name, weight):
    save_file(load_file(folder / WEIGHTS) | {name: weight}, folder / WEIGHTS)


def lose_a_shard(folder):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="60KB")
    (lost,) = folder.glob("model-00002-of-*.safetensors")
    lost.unlink()


def cut(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def pickled(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def other_family(config):
    def spoil(folder):
        config.save_pretrained(folder)

    return spoil


def remote_code(folder):
    edit(folder, "config.json", model_type="mymodel", auto_map={"AutoConfig": "c.C"})


GATE = "model.layers.1.mlp.gate_proj.weight"
SPOILT = {
    "soft-capping": (
        lambda folder: edit(folder, "config.json", attn_logit_softcapping=30.0),
        "`attn_logit_softcapping` must be None for a model that is imported, got 30.0",
    ),
    "soft-capping of another family": (
        other_family(Gemma2Config()),
        "softcapping` must be None for a model that is imported, got ",
    ),
    "experts": (
        other_family(MixtralConfig()),
        "`num_experts_per_tok` must be None for a model that is imported, got 2",
    ),
    "clipping": (
        lambda folder: edit(folder, "config.json", clip_qkv=8),
        "`clip_qkv` must be None for a model that is imported, got 8",
    ),
    "a scale of the logits": (
        lambda folder: edit(folder, "config.json", logit_scale=0.0625),
        "`logit_scale` must be None for a model that is imported, got 0.0625",
    ),
    "both directions": (
        lambda folder: edit(folder, "config.json", is_causal=False),
        "`is_causal` must be None for a model that is imported, got False",
    ),
    "quantised": (
        lambda folder: edit(folder, "config.json", quantization_config={"quant_method": "gptq"}),
        "`quantization_config` must be None for a model that is imported",
    ),
    "remote code": (remote_code, "`model_type` must be one of ['"),
    "an unknown rotation": (
        lambda folder: edit(folder, "config.json", rope_parameters={"rope_type": "su", "rope_theta": 1e4}),
        "`rope_parameters` 'rope_type' must be one of",
    ),
    "a partial rotation": (
        lambda folder: edit(
            folder,
            "config.json",
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        ),
        "`rope_parameters.partial_rotary_factor` must be 1.0 for a model that is imported, got 0.5",
    ),
    "a missing weight": (lambda folder: without(folder, GATE), f"lacks the weight '{GATE}'"),
    "a weight too many": (
        lambda folder: with_weight(folder, "model.layers.0.self_attn.q_norm.weight", torch.ones(16)),
        "holds a weight that its configuration has no place for: 'model.layers.0.self_attn.q_norm.weight'",
    ),
    "a weight of another shape": (
        lambda folder: with_weight(folder, GATE, torch.ones(96, 63)),
        f"holds '{GATE}' in shape (96, 63), its configuration says (96, 64)",
    ),
    "a weight of another kind": (
        lambda folder: with_weight(folder, GATE, torch.ones(96, 64, dtype=torch.int8)),
        f"holds '{GATE}' in a dtype that cannot be imported",
    ),
    "a missing shard": (lose_a_shard, "is not whole: 'model-00002-of-"),
    "cut weights": (cut, "'model.safetensors' cannot be read"),
    "pickled weights": (pickled, "holds no weights as safetensors: 'model.safetensors' is missing"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "a damaged configuration": (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
    "a damaged tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "the tokenizer of"),
}


@pytest.mark.parametrize("spoil, message", SPOILT.values(), ids=SPOILT)
def test_what_cannot_be_imported_is_refused_and_nothing_is_written(spoil, message, llama, tmp_path, run_script, capsys):
    spoil(llama)
    assert message in refusal(run_script, capsys, "import_model", [llama, tmp_path / "out"])
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_wrong_words_are_refused(llama, tmp_path, run_script, capsys):
    for words, message in (
        ([llama], "two words are needed"),
        ([llama, llama], "exists: choose another folder"),
        ([tmp_path / "no", tmp_path / "x"], "is not a folder"),
        (["a/b/c", tmp_path / "x"], "is not a folder"),
        (["some/model", tmp_path / "x"], "`model` 'some/model' is no folder, and "),
        ([llama, tmp_path / "x", "--revision", "main"], "`revision` is for repositories of the Hub"),
        ([llama / "config.json", tmp_path / "x"], "must be a folder, a GGUF file or a repository of the Hub"),
    ):
        assert message in refusal(run_script, capsys, "import_model", words), words
        assert not (tmp_path / "x").exists()


def test_foreign_models_are_told_from_those_of_the_family(llama, tmp_path):
    import_pretrained(llama, tmp_path / "out")
    assert is_foreign(str(llama)) and not is_foreign(str(tmp_path / "out")) and not is_foreign(str(tmp_path))
    with pytest.raises(ValueError, match="`model_type` must be one of .*got 'relpos'"):
        import_pretrained(tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_head_stays_what_it_is(is_tied):
    original = make_original("llama, biases, tied" if is_tied else "llama")
    with pytest.raises(
        ValueError, match=f"`tie_word_embeddings` of the imported model is {is_tied}, got {not is_tied}"
    ):
        hf_relpos.import_model(original, tie_word_embeddings=not is_tied)


@pytest.mark.parametrize("given", [{"dtype": torch.bfloat16}, {"torch_dtype": "bfloat16"}, {"device_map": "auto"}])
def test_keywords_of_loading_that_an_import_does_not_follow_are_refused(given, llama):
    with pytest.raises(ValueError, match=f"`{[*given][0]}` must be None: a model is imported in the dtype"):
        hf_relpos.import_model(llama, **given)


def test_weights_of_several_dtypes_become_one_as_in_transformers(llama, tmp_path):
    original = make_original("llama", torch.bfloat16)
    original.model.norm.float()
    original.save_pretrained(llama)
    (tokens, _), theirs = padded_tokens(), AutoModelForCausalLM.from_pretrained(llama, attn_implementation="eager")
    model = hf_relpos.import_model(llama, attn_implementation="eager")
    assert {weight.dtype for weight in model.parameters()} == {theirs.dtype} == {torch.bfloat16}
    assert torch.equal(model(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_another_rotation_keeps_the_base_that_the_weights_are_for(name, llama):
    edit(llama, "config.json", rope_parameters={"rope_type": "default", "rope_theta": 7000.0})
    found = hf_relpos.import_model(llama, **{name: {"rope_type": "linear", "factor": 2.0}}).config.rope_parameters
    expected = {"rope_type": "linear", "factor": 2.0, "rope_theta": 7000.0, "partial_rotary_factor": 1.0}
    assert found == expected


def test_what_is_no_model_of_transformers_is_named_by_its_type():
    with pytest.raises(ValueError, match="`model` must be a PreTrainedModel or the name of one, got Sequential"):
        hf_relpos.import_model(torch.nn.Sequential(make_original("llama")))


def test_fields_may_be_given_but_not_another_scheme(llama):
    assert hf_relpos.import_model(llama, position_sampling="pose").config.position_sampling == "pose"
    with pytest.raises(ValueError, match="`pos_embedding_type` of the imported model is 'rotary', got 'alibi'"):
        hf_relpos.import_model(llama, pos_embedding_type="alibi", rope_parameters=None)


def write_gguf(folder, path, kind):
    """Writes a Llama as llama.cpp's converter does: the rows of queries and keys in another order, some quantised."""
    gguf = pytest.importorskip("gguf", reason="GGUF files")
    weights, config = load_file(folder / WEIGHTS), LlamaConfig.from_pretrained(folder)
    writer = gguf_writer(path, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in weights.items():
        if ".q_proj." in name or ".k_proj." in name:
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        type_ = gguf.GGMLQuantizationType[kind if weight.ndim == 2 else "F32"]
        data = gguf.quantize(weight.contiguous().numpy(), type_)
        writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=type_)
    finish_gguf(writer)
    return path


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_a_gguf_file_gives_the_weights_that_transformers_reads_from_it(kind, llama, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_relpos.pretrained.gguf_weights.ROWS_AT_A_TIME", 1000)
    path = write_gguf(llama, tmp_path / "model.gguf", kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    made = hf_relpos.import_model(path)
    (tokens, _), exact = padded_tokens(), AutoModelForCausalLM.from_pretrained(llama)
    assert torch.equal(made(tokens).logits, theirs(tokens).logits)
    assert torch.allclose(made(tokens).logits, exact(tokens).logits) == (kind == "F32")
    monkeypatch.setattr("hf_relpos.pretrained.importing.write_tokenizer", lambda *args: None)  # the file has none
    (tmp_path / "generation_config.json").write_text('{"temperature": 7.0}')  # that of something else beside the file
    import_pretrained(path, tmp_path / "out")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(weight, made.state_dict()[name]) for name, weight in saved.state_dict().items())
    assert saved.generation_config.temperature != 7.0


def test_a_gguf_file_that_ends_early_is_refused(llama, tmp_path):
    path = write_gguf(llama, tmp_path / "model.gguf", "Q8_0")
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="model.gguf.* cannot be read"):
        import_pretrained(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantised_gguf_file_needs_its_library(tmp_path, run_script, capsys):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    message = refusal(run_script, capsys, "import_model", [tmp_path / "model.gguf", tmp_path / "out"])
    assert "model.gguf' cannot be read" in message and not (tmp_path / "out").exists()


# --- the Hub


IMPORTS = """
import json, sys
from hf_relpos.pretrained.importing import import_pretrained
for name, revision, folder in json.loads(sys.argv[1]):
    try:
        print(json.dumps(import_pretrained(name, folder, revision).imported_from))
    except ValueError as error:
        print(json.dumps(str(error)))
"""


def test_repositories_are_imported_by_name_or_refused_by_it(hub, llama, tmp_path):
    files = {path.name: path.read_bytes() for path in llama.iterdir()}
    repo = hub.create("meta/llama", files)
    first = hub.commits("meta/llama")[0].oid
    hub.create("meta/gated", files, gated="manual")
    hub.create("meta/secret", files, private=True)
    hub.create("meta/pickled", {"config.json": files["config.json"], "pytorch_model.bin": b"0"})
    asked = [["meta/llama", None, "whole"], ["meta/llama", first, "again"], ["meta/llama", "no", "x"]]
    asked += [[f"meta/{name}", None, "x"] for name in ("gated", "secret", "absent", "pickled")]
    environment = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-c", IMPORTS, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line[:1] in '{"']
    origin = {"base_model": "meta/llama", "revision": first, "license": "llama3.2", "model_type": "llama"}
    assert repo and found[:2] == [origin | {"changes": {}}] * 2
    assert found[2] == "`revision`: 'meta/llama' has no such branch, tag or commit."
    assert found[3].startswith("`model` 'meta/gated' is gated: accept its conditions")
    for name, message in zip(("secret", "absent"), found[4:]):
        assert message == f"`model` 'meta/{name}' is no folder and no repository of the Hub that you may see."
    assert "holds no weights as safetensors" in found[6] and not (tmp_path / "x").exists()
    tokens, _ = padded_tokens()
    expected = AutoModelForCausalLM.from_pretrained(llama)(tokens).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")(tokens).logits, expected)
