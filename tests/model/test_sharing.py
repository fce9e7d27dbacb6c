"""Saved folders carry their code: they load where torch and transformers are installed and the package is not."""

import json
import os

import forked
import torch
from conftest import ROOT, SCHEMES, make_config, make_model, make_tokens
from helpers import run_without_the_package

from hf_relpos import PositionEmbedding, RelPosForCausalLM, register_position_embedding
from hf_relpos.model.saved_code import AUTO_MAP, code_files
from hf_relpos.model.scheme_base import POSITION_EMBEDDINGS


LOAD = """
import json, torch, transformers
from pathlib import Path
root = Path(sys.argv[1])
tokens = torch.load(root / "tokens.pt")
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    expected = torch.load(folder / "expected.pt")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(model(tokens).logits, expected["logits"]), folder
    assert model.generate(tokens, max_new_tokens=5, do_sample=False).tolist() == expected["generated"].tolist()
    base = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(base(tokens).last_hidden_state, expected["hidden"]), folder
    model.save_pretrained(folder / "again")  # from the loaded code
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "again", trust_remote_code=True)
    assert torch.equal(again(tokens).logits, expected["logits"]), folder
for name in json.loads(sys.argv[2]):
    if name != "AutoConfig":
        loaded = getattr(transformers, name).from_pretrained(folder / "again", trust_remote_code=True)
        print(type(loaded).__name__, type(loaded).__module__.partition(".")[0])
"""


def test_every_scheme_loads_without_the_package_bit_for_bit(tmp_path, without_native):
    tokens, root = make_tokens(2, 9), tmp_path / "models"
    root.mkdir()
    torch.save(tokens, root / "tokens.pt")
    for scheme in SCHEMES:
        model = make_model(scheme)
        folder = root / scheme.replace("/", "-")
        model.save_pretrained(folder)
        expected = {"logits": model(tokens).logits, "hidden": model.model(tokens).last_hidden_state}
        expected["generated"] = model.generate(tokens, max_new_tokens=5, do_sample=False)
        torch.save(expected, folder / "expected.pt")
    printed = run_without_the_package(LOAD, root, json.dumps(list(AUTO_MAP)), cwd=tmp_path, modules=tmp_path / "cache")
    loaded = [reference.rpartition(".")[2] for name, reference in AUTO_MAP.items() if name != "AutoConfig"]
    assert printed.split() == [word for name in loaded for word in (name, "transformers_modules")]


def test_a_folder_holds_the_code_and_names_every_class(tmp_path):
    model = make_model("alibi")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    for file in code_files():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    assert not list(tmp_path.glob("*.part"))
    for reference in AUTO_MAP.values():
        module, _, name = reference.partition(".")
        assert f"class {name}(" in (tmp_path / f"{module}.py").read_text(encoding="utf-8")


def test_a_configuration_alone_carries_its_code(tmp_path):
    make_config("alibi").save_pretrained(tmp_path / "config")
    code = (
        "from transformers import AutoConfig\n"
        "config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(config.pos_embedding_type, type(config).__module__)"
    )
    printed = run_without_the_package(code, tmp_path / "config", cwd=tmp_path, modules=tmp_path / "cache").split()
    assert printed[0] == "alibi" and printed[1].startswith("transformers_modules")


def test_the_class_that_saves_does_not_matter(tmp_path):
    """FSDP2 gives a model another class, in a module of torch, which transformers would save as the model's code."""
    model = make_model("rotary")
    sharded = type("FSDPRelPosForCausalLM", (type(model),), {"__module__": "torch.distributed.fsdp._fully_shard"})
    model.__class__ = sharded
    model.register_for_auto_class("AutoModelForCausalLM")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP and config["architectures"] == ["RelPosForCausalLM"]
    assert {path.name for path in tmp_path.glob("*.py")} == {file.name for file in code_files()}
    assert type(RelPosForCausalLM.from_pretrained(tmp_path)) is RelPosForCausalLM


def test_a_scheme_from_elsewhere_is_not_saved_without_a_word(tmp_path, caplog):
    @register_position_embedding("test_elsewhere")
    class Elsewhere(PositionEmbedding):
        def distance_bias(self, distance):
            return -distance.float().expand(6, -1)

    try:
        with caplog.at_level("WARNING", logger="transformers"):
            make_model("test_elsewhere").save_pretrained(tmp_path)
    finally:
        del POSITION_EMBEDDINGS["test_elsewhere"]
    assert "'test_elsewhere' is defined in 'test_sharing', which is not saved" in caplog.text


FSDP = """
import sys, torch
from pathlib import Path
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import hf_relpos
from transformers import AutoModelForCausalLM

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(folder / "model")
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
assert type(model).__name__ == "FSDPRelPosForCausalLM"
tokens = torch.load(folder / "tokens.pt")
model(tokens, labels=tokens).loss.backward()
state = {name: value.full_tensor() for name, value in model.state_dict().items()}
model.save_pretrained(folder / "saved", state_dict=state, is_main_process=rank == 0)
dist.barrier()
dist.destroy_process_group()
"""


def test_what_fsdp2_saves_loads_without_the_package(tmp_path, without_native):
    model, tokens = make_model("linear_cpb"), make_tokens(2, 9)
    model.save_pretrained(tmp_path / "model")
    torch.save(tokens, tmp_path / "tokens.pt")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ranks = [forked.start(["-c", FSDP, tmp_path, rank], env=environment) for rank in (0, 1)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    code = (
        "import torch\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/saved', trust_remote_code=True)\n"
        "torch.save(model(torch.load(sys.argv[1] + '/tokens.pt')).logits, sys.argv[1] + '/logits.pt')"
    )
    run_without_the_package(code, tmp_path, cwd=tmp_path, modules=tmp_path / "cache")
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(tokens).logits)


def test_label_smoothing_shifts_for_code_from_a_folder_too(tmp_path):
    """The Trainer finds causal language models by name: the Hub files enter theirs."""
    make_model("none").save_pretrained(tmp_path / "model")
    code = (
        "from transformers import AutoModelForCausalLM\n"
        "from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(model._get_name() in names.values())"
    )
    printed = run_without_the_package(code, tmp_path / "model", cwd=tmp_path, modules=tmp_path / "cache")
    assert printed.split() == ["True"]


def test_arguments_of_saving_may_come_in_their_order(tmp_path):
    model = make_model("none")
    model.save_pretrained(tmp_path, True, {name: 2 * weight for name, weight in model.state_dict().items()})
    assert torch.equal(RelPosForCausalLM.from_pretrained(tmp_path).lm_head.weight, 2 * model.lm_head.weight)
