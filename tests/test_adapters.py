"""PEFT without `target_modules`, and TRL's trainers that load a reference model for themselves."""

import datasets
import pytest
import torch
from conftest import make_model, make_text, make_tokens
from helpers import run_without_the_package
from test_clients import KINDS, save_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


peft = pytest.importorskip("peft", reason="adapters")
METHODS = {
    "LoraConfig": {"r": 4},
    "IA3Config": {},
    "AdaLoraConfig": {"total_step": 10, "target_r": 2, "init_r": 4},
    "LoHaConfig": {"r": 4},
    "LoKrConfig": {"r": 4},
    "OFTConfig": {"oft_block_size": 4, "r": 0},
    "BOFTConfig": {"boft_block_size": 4},
    "VeraConfig": {"r": 4},
    "LNTuningConfig": {},
    "HRAConfig": {"r": 4},
    "VBLoRAConfig": {"num_vectors": 8, "vector_length": 4, "r": 2},
    "FourierFTConfig": {"n_frequency": 16},
    "RandLoraConfig": {"r": 4},
    "OSFConfig": {},
}


def adapted(model, method: str) -> set[str]:
    """→ the modules that a method adapts by default, below the layers."""
    config = getattr(peft, method)(task_type="CAUSAL_LM", **METHODS[method])
    model = peft.get_peft_model(model, config)
    names = {name.rpartition(".")[2] for name in model.targeted_module_names}
    assert any(parameter.requires_grad for parameter in model.parameters())
    return names


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", ["linear_cpb", "rotary"])
def test_adapters_go_where_those_of_llama_go(scheme, method):
    sizes = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=64))
    assert adapted(make_model(scheme), method) == adapted(llama, method) - {"gate_proj"}


@pytest.mark.parametrize("method", ["LoraConfig", "IA3Config"])
@pytest.mark.parametrize("scheme", KINDS)
def test_defaults_train_and_load(scheme, method, tmp_path):
    base, tokens = make_model(scheme), make_tokens(4, 24)
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, getattr(peft, method)(task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    assert_close(loaded(tokens).logits, model.eval()(tokens).logits)


ALONE = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
import peft  # after the model
for config in (peft.LoraConfig(), peft.IA3Config()):
    print(sorted(peft.get_peft_model(model, config).targeted_module_names)[:1])
"""


def test_defaults_of_a_saved_folder(tmp_path):
    make_model("alibi").save_pretrained(tmp_path / "model")
    options = {"cwd": tmp_path, "modules": tmp_path / "modules", "blocked": ("hf_relpos",)}
    printed = run_without_the_package(ALONE, tmp_path / "model", **options)
    assert printed.split() == ["['model.layers.0.self_attn.q_proj']", "['model.layers.0.mlp.down_proj']"]


# --- TRL


def preference_trainer(trl, name: str, folder, out, **options):
    """A trainer of TRL on a model object, which loads its reference model from the folder of the model."""
    options |= {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-3, "use_cpu": True, "bf16": False}
    options |= {"report_to": "none", "save_strategy": "no", "beta": 0.1, "logging_steps": 1}
    rows = [{"prompt": make_text(4, n)} for n in range(8)]
    given = {}
    if name == "DPO":
        rows = [row | {"chosen": make_text(5, n), "rejected": make_text(6, n + 9)} for n, row in enumerate(rows)]
    else:
        options |= {"num_generations": 2, "max_completion_length": 6}
        given["reward_funcs"] = lambda completions, **_: [float(len(set(each))) for each in completions]
    arguments = getattr(trl, f"{name}Config")(str(out), **options)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = datasets.Dataset.from_list(rows)
    return getattr(trl, f"{name}Trainer")(
        model, args=arguments, train_dataset=data, processing_class=tokenizer, **given
    )


@pytest.mark.parametrize("name", ["DPO", "RLOO", "GRPO"])
def test_trl_loads_the_reference_of_a_model_object(name, tmp_path):
    trl = pytest.importorskip("trl", reason="preference trainers")
    saved = save_model(tmp_path / "model", "linear_cpb")
    trainer = preference_trainer(trl, name, tmp_path / "model", tmp_path / "out")
    assert type(trainer.ref_model) is type(saved)
    trainer.train()
    tokens = make_tokens(2, 8, vocab_size=saved.config.vocab_size)
    with torch.no_grad():
        assert_close(trainer.ref_model(tokens).logits, saved(tokens).logits)
        assert not torch.equal(trainer.model(tokens).logits, saved(tokens).logits)


ALONE_WITH_TRL = """
import sys, trl, datasets
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
args = trl.DPOConfig("out", max_steps=1, use_cpu=True, bf16=False, report_to="none", trust_remote_code=True)
rows = datasets.Dataset.from_list([{"prompt": "the", "chosen": "state", "rejected": "law"}] * 8)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
trainer = trl.DPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
print(type(trainer.ref_model).__name__)
"""


def test_trl_loads_the_reference_from_a_saved_folder(tmp_path):
    pytest.importorskip("trl", reason="preference trainers")
    save_model(tmp_path / "model", "alibi")
    options = {"cwd": tmp_path, "modules": tmp_path / "modules", "blocked": ("hf_relpos",)}
    assert run_without_the_package(ALONE_WITH_TRL, tmp_path / "model", **options).split()[-1] == "RelPosForCausalLM"
