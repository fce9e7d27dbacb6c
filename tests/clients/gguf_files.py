"""GGUF: a file for llama.cpp, which knows models by the names of their kind."""

import json
from pathlib import Path

import torch
from clients.exporting import to_arcee
from clients.generation import NEW_TOKENS, greedy_text
from clients.harness import CONTROL, Subject, client
from gguf_writing import finish_gguf, gguf_writer


BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(path: Path, model, tokenizer) -> None:
    """Writes a Llama or an Arcee of transformers', in fp32."""
    config, writer = model.config, gguf_writer(path, model.config)
    writer.add_rope_dimension_count(config.head_dim)
    add_tokenizer(writer, tokenizer)
    for name, weight in model.state_dict().items():
        name = name.removesuffix(".weight")
        if name.endswith(("q_proj", "k_proj")):  # pairs of channels beside each other
            weight = weight.view(-1, 2, config.head_dim // 2, config.hidden_size).transpose(1, 2).reshape(weight.shape)
        if name.startswith("model.layers."):
            _, _, index, rest = name.split(".", 3)
            name = f"blk.{index}.{BLOCK_NAMES[rest]}"
        writer.add_tensor(f"{NAMES.get(name, name)}.weight", weight.numpy())
    finish_gguf(writer)


def add_tokenizer(writer, tokenizer) -> None:
    import gguf

    saved = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special, kinds = {*tokenizer.all_special_tokens}, gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.CONTROL if token in special else kinds.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in saved["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)


@client("llama.cpp (GGUF)", "xllamacpp", "gguf", schemes=("rotary",))
def run_llama_cpp(subject: Subject):
    """A GGUF file by `gguf` of the model in the form of `ArceeForCausalLM`, of Llama as it is: the greedy text
    of llama.cpp is that of `generate`."""
    import xllamacpp

    model = subject.load() if subject.scheme == CONTROL else to_arcee(subject)
    with torch.no_grad():
        write_gguf(subject.out / "model.gguf", model, subject.tokenizer)
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.warmup = str(subject.out / "model.gguf"), 256, False
    parameters.n_parallel = 1
    server = xllamacpp.Server(parameters)
    for prompt in subject.texts(3):
        request = {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
        text = server.handle_completions(request)
        text = text["choices"][0]["text"] if "choices" in text else text["content"]
        expected = greedy_text(subject, subject.load(), prompt)
        assert text == expected, f"llama.cpp writes {text!r}, generate {expected!r}"
