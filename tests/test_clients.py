"""Other libraries on models of the family, each with real input. What is not installed is skipped."""

import json
import math
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from conftest import make_model, make_text, make_tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_relpos.evaluation import evaluate_lengths


KINDS = ["none", "learned", "alibi", "linear_cpb", "rotary"]
CLOSE = {"rtol": 1e-4, "atol": 2e-5}  # fp32 logits of magnitude 1..10, computed in another order
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE of 320 entries."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|pad|>", "<|eos|>"]
    backend.train_from_iterator(
        [make_text(300, 0)], trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    options = {"pad_token": "<|pad|>", "eos_token": "<|eos|>", "model_input_names": ["input_ids", "attention_mask"]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT, **options)


@pytest.fixture
def saved(tokenizer, tmp_path):
    """→ a function that saves a model of a scheme with its tokenizer."""

    def save(scheme):
        model = make_model(scheme, vocab_size=len(tokenizer))
        model.save_pretrained(tmp_path / scheme)
        tokenizer.save_pretrained(tmp_path / scheme)
        return model, tmp_path / scheme

    return save


@pytest.mark.parametrize("scheme", KINDS)
def test_pipeline(scheme, saved):
    model, folder = saved(scheme)
    generate = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    options = {"max_new_tokens": 6, "do_sample": False}
    text = "the people of the state"
    tokens = generate.tokenizer(text, return_tensors="pt")
    expected = generate.tokenizer.decode(model.generate(**tokens, **options)[0], skip_special_tokens=True)
    assert generate(text, **options)[0]["generated_text"] == expected
    batch = generate([text, "war and law in congress with our will"], batch_size=2, **options)
    assert batch[0][0]["generated_text"] == expected  # the shorter prompt, padded
    (chat,) = generate([{"role": "user", "content": "the state"}], **options)
    assert chat["generated_text"][-1]["role"] == "assistant"


@pytest.mark.parametrize("scheme", KINDS)
def test_peft_lora(scheme, tmp_path):
    """Train, save, load, merge. A learned bias is left as it is: its few weights are no layer to adapt."""
    peft = pytest.importorskip("peft")
    base, tokens = make_model(scheme), make_tokens(4, 24)
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules="all-linear", r=4, lora_alpha=16, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).train()
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    moved = [name for name, parameter in model.named_parameters() if "lora_B" in name and parameter.any()]
    assert any("q_proj" in name for name in moved) and not any("position_embeddings" in name for name in moved)
    logits = model.eval()(tokens).logits
    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert_close(loaded(tokens).logits, logits, **CLOSE)
    merged = loaded.merge_and_unload()
    # one product in place of two; 8 steps leave logits of magnitude 10
    assert_close(merged(tokens).logits, logits, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(again(tokens).logits, merged(tokens).logits, **CLOSE)


@pytest.mark.parametrize("scheme", KINDS)
def test_torchao_int8_weights(scheme, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    model, tokens = make_model(scheme, hidden_size=96, initializer_range=0.08), make_tokens(2, 20)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig())
    )
    logits = loaded(tokens).logits
    # 8 bits: a relative error of at most 1/254 of the largest weight in each of the 13 products in a row
    assert 0 < (logits - expected).norm() < 0.05 * expected.norm()
    assert loaded.generate(tokens, max_new_tokens=4, do_sample=False).shape == (2, 24)


@pytest.mark.parametrize("scheme", KINDS)
def test_label_smoothing_of_the_trainer_shifts(scheme, tmp_path):
    """The Trainer shifts the labels only for classes that it knows by name."""
    model, tokens = make_model(scheme), make_tokens(2, 12)
    args = TrainingArguments(output_dir=str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to="none")
    loss = Trainer(model=model, args=args).compute_loss(model, {"input_ids": tokens, "labels": tokens.clone()})
    logits = model(tokens).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), label_smoothing=0.1)
    assert_close(loss, expected)


@pytest.mark.parametrize("scheme", KINDS)
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_trl_computes_our_loss(scheme, packing, saved, tokenizer, tmp_path):
    """TRL takes the hidden states of the base model and computes the loss itself."""
    trl = pytest.importorskip("trl")
    model, folder = saved(scheme)
    texts = [{"text": make_text(length, length)} for length in (5, 9, 14, 7)]
    options = {"output_dir": str(tmp_path / "sft"), "max_length": 64, "per_device_train_batch_size": 4, "max_steps": 2}
    options |= {"packing": packing, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=trl.SFTConfig(logging_steps=1, learning_rate=1e-3, **options),
        train_dataset=datasets.Dataset.from_list(texts),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    names = ("input_ids", "attention_mask", "position_ids", "labels")
    ours = model(**{name: batch[name] for name in names if name in batch}).loss
    assert_close(loss.detach(), ours.detach(), rtol=1e-5, atol=1e-6)
    trainer.train()
    trainer.save_model()
    assert "modeling_relpos.RelPosForCausalLM" in (tmp_path / "sft" / "config.json").read_text()
    AutoModelForCausalLM.from_pretrained(tmp_path / "sft", trust_remote_code=True)


def test_trl_command(saved, tmp_path):
    pytest.importorskip("trl")
    _, folder = saved("linear_cpb")
    (tmp_path / "data").mkdir()
    rows = [json.dumps({"text": make_text(12, index)}) for index in range(8)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows))
    flags = ["--model_name_or_path", folder, "--trust_remote_code", "--dataset_name", tmp_path / "data", "--use_cpu"]
    flags += ["--max_length", 64, "--packing", "--bf16", "false", "--report_to", "none", "--max_steps", 2]
    flags += ["--output_dir", tmp_path / "out"]
    command = [Path(sys.executable).with_name("trl"), "sft"]
    done = subprocess.run([*command, *map(str, flags)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "modeling_relpos.py").is_file()


TASK = """
task: sentences
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: byte_perplexity
"""


@pytest.mark.parametrize("scheme", KINDS)
def test_lm_eval_gives_our_perplexity_by_length(scheme, tokenizer, tmp_path):
    """Its window of n tokens is predicted from the token before it, the first from that which ends documents: the same
    as our block of n + 1, whose first token is no target."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = make_model(scheme, vocab_size=len(tokenizer))
    ids = tokenizer(make_text(60, 4))["input_ids"][:64]
    text = tokenizer.decode(ids)
    assert tokenizer(text)["input_ids"] == ids
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": text}))
    (tmp_path / "sentences.yaml").write_text(TASK % (tmp_path / "test.jsonl"))
    tasks, document = TaskManager(include_path=str(tmp_path)), [tokenizer.eos_token_id, *ids]
    for length in (16, 32, 64):
        scorer = HFLM(pretrained=model, tokenizer=tokenizer, max_length=length, device="cpu")
        result = lm_eval.simple_evaluate(scorer, tasks=["sentences"], task_manager=tasks, bootstrap_iters=0)
        theirs = math.log(result["results"]["sentences"]["byte_perplexity,none"]) * len(text.encode())
        windows = [document[start : start + length + 1] for start in range(0, 64, length)]
        ours = evaluate_lengths(model, windows, [length + 1])["lengths"][str(length + 1)]
        assert ours["num_tokens"] == 64
        assert theirs == pytest.approx(64 * ours["loss"], rel=1e-5), length


@pytest.mark.parametrize("scheme", KINDS)
def test_torch_export_with_dynamic_shapes(scheme, tmp_path):
    exporters = pytest.importorskip("transformers.exporters")
    model, tokens = make_model(scheme), make_tokens(2, 16)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    exported = exporters.DynamoExporter().export(model, dict(inputs), exporters.DynamoConfig(dynamic=True))
    longer, mask = make_tokens(3, 29), torch.ones(3, 29, dtype=torch.long)
    mask[1, :7] = 0
    output = exported(input_ids=longer, attention_mask=mask)
    expected = model(longer, attention_mask=mask).logits
    assert_close(output["logits"][mask.bool()], expected[mask.bool()], **CLOSE)


@pytest.mark.parametrize("scheme", KINDS)
def test_onnx_prefill_and_decode(scheme, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    exporters = pytest.importorskip("transformers.exporters")
    model, tokens = make_model(scheme), make_tokens(2, 16)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    exported = exporters.OnnxExporter().export(model, dict(inputs), exporters.OnnxConfig(dynamic=True))
    exported.save_pretrained(tmp_path)
    loaded = exporters.ExportedModel.from_pretrained(tmp_path)
    longer = make_tokens(3, 29)
    output = loaded(input_ids=longer, attention_mask=torch.ones_like(longer))
    assert_close(torch.as_tensor(output["logits"]), model(longer).logits, **CLOSE)
