"""Other libraries on models of the family, against what the model itself says. What is not installed is skipped."""

import json
import logging
import os
import subprocess
import sys

import datasets
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, WORDS, make_model, make_text, make_tokens
from helpers import run_without_the_package
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_relpos.model.transformers_versions import CACHE_NAME


KINDS = ["none", "learned", "alibi", "linear_cpb", "rotary"]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # fp32 logits of magnitude 1 to 30: sums in another order, other alignment
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}assistant"
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token per word: any run of tokens is a text that tokenises to them again."""
    entries = ["<|pad|>", "<|eos|>", "<|unk|>", "user", "assistant", *sorted(set(WORDS))]
    backend = Tokenizer(models.WordLevel({entry: index for index, entry in enumerate(entries)}, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<|pad|>", "eos_token": "<|eos|>", "unk_token": "<|unk|>"}
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, chat_template=CHAT, **special)


def save_model(folder, scheme: str, **overrides):
    """→ the model that was saved, with its tokenizer."""
    tokenizer = make_tokenizer()
    model = make_model(scheme, vocab_size=len(tokenizer), **overrides)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def run_alone(code: str, *arguments: object, cwd) -> str:
    """→ what `code` prints where the package cannot be imported and all that clients need can."""
    return run_without_the_package(code, *arguments, cwd=cwd, modules=cwd / "modules", blocked=("hf_relpos",))


# --- transformers: pipeline, Trainer


@pytest.mark.parametrize("scheme", KINDS)
def test_pipeline(scheme, tmp_path):
    model = save_model(tmp_path, scheme)
    generate = pipeline("text-generation", model=str(tmp_path), trust_remote_code=True)

    def expected(prompt):
        tokens = generate.tokenizer(prompt, return_tensors="pt")
        new_tokens = model.generate(**tokens, **GREEDY)[0, tokens["input_ids"].shape[1] :]
        return generate.tokenizer.decode(new_tokens, skip_special_tokens=True)

    prompts = ["the people of the state", "war and law in congress with our will to year"]
    assert generate(prompts[0], **GREEDY)[0]["generated_text"] == prompts[0] + expected(prompts[0])
    together = generate(prompts, batch_size=2, **GREEDY)  # the shorter one is padded
    assert [row["generated_text"] for (row,) in together] == [prompt + expected(prompt) for prompt in prompts]
    (chat,) = generate([{"role": "user", "content": "the state"}], **GREEDY)
    assert chat["generated_text"][0] == {"role": "user", "content": "the state"}
    answer = expected("user the state assistant")
    assert chat["generated_text"][1] == {"role": "assistant", "content": answer}


LABEL_SMOOTHING = """
import sys, torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
tokens = torch.tensor(eval(sys.argv[2]))
args = TrainingArguments(output_dir="out", label_smoothing_factor=0.1, use_cpu=True, report_to="none")
print(repr(Trainer(model=model, args=args).compute_loss(model, {"input_ids": tokens, "labels": tokens.clone()}).item()))
"""


@pytest.mark.parametrize("scheme, alone", [(KINDS[0], False), (KINDS[-1], True)], ids=["package", "saved code"])
def test_label_smoothing_shifts_the_labels(scheme, alone, tmp_path):
    """The Trainer shifts labels only for classes that it knows by name."""
    if alone and scheme not in ("linear_cpb", "rotary"):
        pytest.skip("the class is the same for all schemes, and a process takes seconds")
    model, tokens = make_model(scheme), make_tokens(2, 12)
    if alone:
        model.save_pretrained(tmp_path / "model")
        loss = float(run_alone(LABEL_SMOOTHING, tmp_path / "model", tokens.tolist(), cwd=tmp_path))
    else:
        args = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to="none")
        inputs = {"input_ids": tokens, "labels": tokens.clone()}
        loss = Trainer(model=model, args=args).compute_loss(model, inputs).item()
    log_probs = model(tokens).logits[:, :-1].log_softmax(-1)
    target = log_probs.gather(-1, tokens[:, 1:, None]).mean()
    assert loss == pytest.approx(-(0.9 * target + 0.1 * log_probs.mean()).item(), rel=1e-5)


# --- PEFT


def train_briefly(model, tokens, steps: int = 8) -> list[float]:
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def reload_adapter(peft, model, folder):
    """→ the adapter, saved and put on the base model that lies beside it."""
    model.save_pretrained(folder / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    return peft.PeftModel.from_pretrained(base, folder / "adapter").eval()


@pytest.mark.parametrize("scheme", KINDS)
def test_peft_lora(scheme, tmp_path):
    peft = pytest.importorskip("peft", reason="LoRA adapters")
    base, tokens = make_model(scheme), make_tokens(4, 24)
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules="all-linear", r=4, lora_alpha=16, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).train()
    losses = train_briefly(model, tokens)
    assert losses[-1] < 0.9 * losses[0]
    adapters = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    assert all(p.any() for p in adapters.values())  # they start at zero: each had a gradient
    assert len(adapters) == 2 * 6  # q, k, v, o, up and down in each layer, and nothing of a bias
    logits = model.eval()(tokens).logits
    loaded = reload_adapter(peft, model, tmp_path)
    assert_close(loaded(tokens).logits, logits, **CLOSE)
    merged = loaded.merge_and_unload()
    # one product of W + B·A in place of two products: rounding differs, 2⁻²⁴ relative, over 2 layers
    assert_close(merged(tokens).logits, logits, **CLOSE)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(again(tokens).logits, merged(tokens).logits, **CLOSE)


def test_peft_trains_a_position_bias_whole(tmp_path):
    """`modules_to_save` trains and saves the few weights of a learned bias beside the adapters."""
    peft = pytest.importorskip("peft", reason="LoRA adapters")
    base, tokens = make_model("linear_cpb"), make_tokens(4, 24)
    base.save_pretrained(tmp_path / "base")
    before = base.model.distance_bias(24).detach()
    config = peft.LoraConfig(target_modules="all-linear", r=4, modules_to_save=["linear_cpb"])
    model = peft.get_peft_model(base, config).train()
    losses = train_briefly(model, tokens)
    assert losses[-1] < losses[0]
    table = base.model.distance_bias(24).detach()
    assert (table - before).abs().amax(dim=(1, 2)).min() > 0.01  # in each layer
    logits = model.eval()(tokens).logits
    loaded = reload_adapter(peft, model, tmp_path)
    assert_close(loaded(tokens).logits, logits, **CLOSE)
    merged = loaded.merge_and_unload()
    assert_close(merged.model.distance_bias(24), table)
    assert_close(merged(tokens).logits, logits, **CLOSE)


@pytest.mark.parametrize("scheme", [*KINDS, "fire", "fox", "cope", "pope", "rotary/none", "fox/alibi"])
def test_peft_prefix_tuning(scheme, tmp_path):
    """The prefix is a cache of keys and values that the model did not compute."""
    peft = pytest.importorskip("peft", reason="prefix tuning")
    base, tokens = make_model(scheme), make_tokens(4, 24)
    base.save_pretrained(tmp_path / "base")
    without = base(tokens).logits
    config = peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM", num_layers=2, token_dim=48)
    model = peft.get_peft_model(base, config).train()
    losses = train_briefly(model, tokens)
    assert losses[-1] < losses[0]
    logits = model.eval()(tokens, attention_mask=torch.ones_like(tokens)).logits
    assert (logits - without).abs().max() > 1e-3
    loaded = reload_adapter(peft, model, tmp_path)
    assert_close(loaded(tokens, attention_mask=torch.ones_like(tokens)).logits, logits, **CLOSE)
    # steps of a generation over the prefix see what one forward over all tokens sees
    with torch.no_grad():
        given, pieces = {"past_key_values": model.get_prompt(4)}, []
        for start, stop in ((0, 8), *((step, step + 1) for step in range(8, 24))):
            chunk, mask = tokens[:, start:stop], torch.ones(4, 5 + stop, dtype=torch.long)
            output = base(chunk, attention_mask=mask, **given)
            given = {"past_key_values": output.past_key_values}
            pieces.append(output.logits)
    assert_close(torch.cat(pieces, dim=1), logits, **CLOSE)
    prompt = {"input_ids": tokens[:, :8], "attention_mask": torch.ones(4, 8, dtype=torch.long)}
    if CACHE_NAME == "cache":  # PEFT gives its prefix by the old name beside the empty cache of `generate`
        with pytest.raises(ValueError, match="`cache` and `past_key_values` are two names of one argument"):
            model.generate(**prompt, **GREEDY)
    else:
        generated = model.generate(**prompt, **GREEDY)
        whole = model(generated, attention_mask=torch.ones_like(generated)).logits[:, 7:-1].argmax(-1)
        assert torch.equal(generated[:, 8:], whole)


# --- torchao


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scheme", KINDS)
def test_torchao_int8_weights(scheme, dtype, tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="int8 weights")
    model, tokens = make_model(scheme, hidden_size=96, initializer_range=0.08), make_tokens(2, 20)
    model.save_pretrained(tmp_path)
    config = quantization.Int8WeightOnlyConfig()
    options = {"dtype": dtype, "quantization_config": TorchAoConfig(config)}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    expected = model.to(dtype)(tokens).logits.float()
    in_place = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    quantization.quantize_(in_place, config)
    for quantized in (loaded, in_place):
        weight = quantized.model.layers[0].self_attn.q_proj.weight
        assert type(weight) is not torch.nn.Parameter  # it was quantised at all
        error = quantized(tokens).logits.float() - expected
        # a weight is off by at most 1/254 of the largest in its row: each of the 13 products in a row by about 0.4 %
        assert 0 < error.norm() < 0.05 * expected.norm()
        assert quantized.generate(tokens, **GREEDY).shape == (2, 26)


@pytest.mark.parametrize("scheme", ["linear_cpb", "log_cpb"])
def test_torchao_leaves_a_position_bias_alone(scheme):
    quantization = pytest.importorskip("torchao.quantization", reason="int8 weights")
    model = make_model(scheme)
    expected = model.model.distance_bias(2048)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert type(model.model.layers[0].self_attn.q_proj.weight) is not torch.nn.Parameter
    assert torch.equal(model.model.distance_bias(2048), expected)


# --- export


def make_batch(rows: int, length: int, padding: int) -> dict[str, torch.Tensor]:
    """Token ids and a mask; the first row is padded on the left."""
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, :padding] = 0
    return {"input_ids": make_tokens(rows, length, seed=length), "attention_mask": mask}


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def greedy_logits(prefill, decode, batch: dict, config, steps: int = 5) -> list[torch.Tensor]:
    """The logits of a prefill and of `steps` decoded tokens, each the best one of the logits before it."""
    mask, outputs = batch["attention_mask"], []
    inputs = {**batch, "position_ids": positions_of(mask), CACHE_NAME: DynamicCache(config=config)}
    result = prefill(**inputs)
    for _ in range(steps):
        outputs.append(result.logits[:, -1])
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=-1)
        inputs = {"input_ids": outputs[-1].argmax(-1)[:, None], "attention_mask": mask}
        inputs |= {"position_ids": positions_of(mask)[:, -1:], CACHE_NAME: getattr(result, CACHE_NAME)}
        result = decode(**inputs)
    return [*outputs, result.logits[:, -1]]


EXPORTS = {
    "dynamo": ("DynamoExporter", "DynamoConfig", ()),
    "onnx": ("OnnxExporter", "OnnxConfig", ("onnx", "onnxscript", "onnxruntime")),
}


def import_exporters():
    exporters = pytest.importorskip("transformers.exporters", reason="exporters")
    if not hasattr(exporters, "ExportedModel"):
        pytest.skip("the exporters of this transformers have another interface")
    return exporters


@pytest.mark.parametrize("scheme", ["linear_cpb", "pope+fox"])
@pytest.mark.parametrize("backend", EXPORTS)
def test_export(backend, scheme, tmp_path, monkeypatch):
    """Prefill and decode with a cache, saved and loaded, at another batch size and length than those traced."""
    exporters = import_exporters()
    exporter, config, needs = EXPORTS[backend]
    for package in needs:
        pytest.importorskip(package, reason="ONNX")
    model = make_model(scheme, num_hidden_layers=2 if scheme == "linear_cpb" else 1)  # layers share a table
    options = {"generation_config": GenerationConfig(max_new_tokens=2, eos_token_id=1, pad_token_id=0)}
    exported = getattr(exporters, exporter)().export_for_generation(
        model, make_batch(2, 16, padding=3), getattr(exporters, config)(dynamic=True), **options
    )
    assert set(exported.components) == {"prefill", "decode"}
    exported.save_pretrained(tmp_path)
    # torch warns of the cache it reads with too few arguments for its message, which pytest takes for an error
    monkeypatch.setattr(logging.getLogger("torch._export.serde.serialize"), "disabled", True)
    runners = exporters.ExportedModel.from_pretrained(tmp_path, trust_remote_code=True).runners
    for batch in (make_batch(3, 29, padding=7), make_batch(1, 5, padding=0)):
        with torch.no_grad():
            expected = greedy_logits(model, model, batch, model.config)
        actual = greedy_logits(runners["prefill"], runners["decode"], batch, model.config)
        for ours, theirs in zip(expected, actual, strict=True):
            assert_close(theirs, ours, **CLOSE)


@pytest.mark.parametrize("scheme", [*KINDS, "fire", "fox", "cope", "rotary/none", "linear_cpb/log_cpb"])
def test_export_of_a_forward(scheme):
    """One graph without a cache, traced without a mask, so also without padding."""
    exporters = import_exporters()
    model = make_model(scheme)
    inputs = {"input_ids": make_tokens(2, 16), "use_cache": False}
    exported = exporters.DynamoExporter().export(model, inputs, exporters.DynamoConfig(dynamic=True))
    longer = make_tokens(3, 150)
    assert_close(exported(input_ids=longer, use_cache=False).logits, model(longer).logits, **CLOSE)


# --- TRL


def sft_trainer(trl, folder, out, packing: bool):
    texts = [{"text": make_text(length, length)} for length in (5, 9, 14, 7, 22, 3)]
    options = {"max_length": 24, "per_device_train_batch_size": 8, "max_steps": 3, "learning_rate": 1e-2}
    options |= {"packing": packing, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    arguments = trl.SFTConfig(str(out), logging_steps=1, **options)
    return trl.SFTTrainer(model, args=arguments, train_dataset=datasets.Dataset.from_list(texts))


@pytest.mark.parametrize("scheme", KINDS)
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_trl_computes_our_loss(scheme, packing, tmp_path):
    """TRL takes the hidden states of the base model and computes the loss itself."""
    trl = pytest.importorskip("trl", reason="supervised fine-tuning")
    model = save_model(tmp_path / "model", scheme)
    trainer = sft_trainer(trl, tmp_path / "model", tmp_path / "out", packing)
    batch = next(iter(trainer.get_train_dataloader()))
    assert packing == bool((batch["position_ids"].diff(dim=-1) < 0).any() if "position_ids" in batch else False)
    loss = trainer.compute_loss(trainer.model.train(), dict(batch)).item()  # there is no dropout
    ours = model(**batch).loss.item()
    assert loss == pytest.approx(ours, rel=1e-5)
    # and both are the mean over all tokens with one before it in its document
    documents = [make_tokenizer()(text)["input_ids"] for text in (make_text(n, n) for n in (5, 9, 14, 7, 22, 3))]
    documents = [torch.tensor([[*ids, 1]]) for ids in documents]
    rows = [F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum") for ids in documents]
    assert loss == pytest.approx(sum(rows).item() / sum(ids.shape[1] - 1 for ids in documents), rel=1e-4)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(ours, rel=1e-3) and losses[-1] < losses[0]


SAVED_LOGITS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(model(torch.tensor([[5, 6, 7, 8, 9, 10]])).logits.argmax(-1).tolist(), type(model).__module__)
"""


def test_trl_command(tmp_path):
    """`trl sft` with remote code; what it saves loads where the package is not."""
    pytest.importorskip("trl", reason="supervised fine-tuning")
    save_model(tmp_path / "model", "linear_cpb")
    (tmp_path / "data").mkdir()
    rows = [json.dumps({"text": make_text(12, index)}) for index in range(8)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    flags = ["--model_name_or_path", tmp_path / "model", "--trust_remote_code", "--dataset_name", tmp_path / "data"]
    flags += ["--output_dir", tmp_path / "out", "--max_steps", 2, "--max_length", 64, "--packing", "--use_cpu"]
    flags += ["--bf16", "false", "--report_to", "none", "--save_strategy", "no"]
    command = [sys.executable, "-c", "from trl.cli import main; main()", "sft", *map(str, flags)]
    environment = {**OFFLINE, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "modeling_relpos.RelPosForCausalLM" in (tmp_path / "out" / "config.json").read_text()
    printed = run_alone(SAVED_LOGITS, tmp_path / "out", cwd=tmp_path)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    best = trained(torch.tensor([[5, 6, 7, 8, 9, 10]])).logits.argmax(-1).tolist()
    assert printed.startswith(str(best)) and "transformers_modules" in printed


# --- lm-eval

TASK = """
task: by_length
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
"""


@pytest.mark.parametrize("scheme", ["learned", "linear_cpb", "rotary"])
def test_lm_eval_gives_our_perplexity_by_length(scheme, tmp_path, run_script):
    """lm-eval's rolling perplexity reads the token that begins a document and its text in windows of n + 1 tokens that
    overlap by one; so does scripts/evaluate.py by a sliding window of n + 1 tokens that moves by n. Words are tokens
    here."""
    pytest.importorskip("lm_eval", reason="an independent judge of the perplexity")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    save_model(tmp_path / "model", scheme)
    texts = [make_text(96, seed) for seed in (4, 5)]
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    (tmp_path / "by_length.yaml").write_text(TASK % (tmp_path / "test.jsonl"), encoding="utf-8")
    perplexities = []
    for length in (8, 40, 95):
        model = HFLM(str(tmp_path / "model"), trust_remote_code=True, max_length=length, device="cpu", batch_size=2)
        tasks = {"tasks": ["by_length"], "task_manager": TaskManager(include_path=str(tmp_path))}
        result = simple_evaluate(model, bootstrap_iters=0, log_samples=False, **tasks)
        out = tmp_path / f"out-{length}"
        flags = ["--model_name_or_path", tmp_path / "model", "--validation_file", tmp_path / "test.jsonl"]
        run_script("evaluate", *flags, "--eval_lengths", length + 1, "--stride", length, "--output_dir", out)
        ours = json.loads((out / "results.json").read_text())["sliding_window"][str(length + 1)]
        assert ours["num_tokens"] == 2 * 96
        # lm-eval adds the log-probabilities up in fp32 and in other batches
        assert result["results"]["by_length"]["word_perplexity,none"] == pytest.approx(ours["perplexity"], rel=1e-4)
        perplexities.append(ours["perplexity"])
    assert len({round(perplexity, 2) for perplexity in perplexities}) == 3  # the length matters
