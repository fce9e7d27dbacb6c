"""What changes or adds weights: adapters, quantisers, merges."""

import json
import shutil
from functools import partial

import torch
from clients.harness import CLOSE, Subject, client


def train(model, tokens, steps: int = 4) -> None:
    optimizer, losses = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], f"losses do not fall: {losses}"


def check_adapter(subject: Subject, kind: str, merges: bool = True, **options) -> None:
    """Trains, saves, loads and merges an adapter."""
    import peft

    tokens = subject.tokens(4, 16)
    model = peft.get_peft_model(subject.load(), getattr(peft, kind)(task_type="CAUSAL_LM", **options)).train()
    train(model, tokens)
    logits = model.eval()(input_ids=tokens).logits
    model.save_pretrained(subject.out / kind)
    loaded = peft.PeftModel.from_pretrained(subject.load(), subject.out / kind).eval()
    torch.testing.assert_close(loaded(input_ids=tokens).logits, logits, **CLOSE)
    expected = model.generate(input_ids=tokens, max_new_tokens=4, do_sample=False)
    assert torch.equal(loaded.generate(input_ids=tokens, max_new_tokens=4, do_sample=False), expected)
    assert torch.equal(expected[:, tokens.shape[1]], logits[:, -1].argmax(-1)), "`generate` leaves the adapter out"
    if merges:
        torch.testing.assert_close(loaded.merge_and_unload()(tokens).logits, logits, rtol=1e-3, atol=1e-3)


@client("PEFT, adapters", "peft", seconds=400)
def run_adapters(subject: Subject):
    """Each kind of adapter: trained, saved, loaded, generated with and merged, with the same logits."""
    targets = {"target_modules": ["q_proj", "v_proj"]}
    feed_forward = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    named = {
        "LoRA": ("LoraConfig", {"target_modules": "all-linear"}),
        "LoRA by default": ("LoraConfig", {}),
        "DoRA": ("LoraConfig", targets | {"use_dora": True}),
        "IA3": ("IA3Config", feed_forward),
        "IA3 by default": ("IA3Config", {}),
        "AdaLoRA": ("AdaLoraConfig", targets | {"total_step": 8}),
        "LoHa": ("LoHaConfig", targets),
        "LoKr": ("LoKrConfig", targets),
        "OFT": ("OFTConfig", targets | {"oft_block_size": 8}),
        "BOFT": ("BOFTConfig", targets | {"boft_block_size": 8}),
        "VeRA": ("VeraConfig", targets),
        "HRA": ("HRAConfig", targets),
        "FourierFT": ("FourierFTConfig", targets | {"n_frequency": 50}),
        "LN tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
    }
    return {name: partial(check_adapter, subject, kind, **options) for name, (kind, options) in named.items()}


@client("PEFT, prompts", "peft")
def run_prompts(subject: Subject):
    """Virtual tokens, as embeddings or as a prefix in the cache: trained, saved, loaded, generated with."""
    kinds = {
        "prompt tuning": "PromptTuningConfig",
        "P-tuning": "PromptEncoderConfig",
        "prefix tuning": "PrefixTuningConfig",
    }
    check = partial(check_adapter, subject, merges=False, num_virtual_tokens=4)
    return {
        name: partial(check, kind, **({"encoder_hidden_size": 32} if name == "P-tuning" else {}))
        for name, kind in kinds.items()
    }


def check_quantized(subject: Subject, quantize, tolerance: float) -> str:
    """Logits are near those of whole weights, and text is generated."""
    tokens = subject.tokens()
    expected, model = subject.load()(tokens).logits, quantize()
    error = ((model(tokens).logits.float() - expected).norm() / expected.norm()).item()
    assert 0 < error < tolerance, f"relative error {error:.3f} of the logits, at most {tolerance} expected"
    assert model.generate(tokens, max_new_tokens=4, do_sample=False).shape == (2, 20)
    return f"relative error {error:.3f}"


@client("torchao", "torchao")
def run_torchao(subject: Subject):
    """int8 weights by `TorchAoConfig` and by `quantize_`: logits within 5 %."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from transformers import TorchAoConfig

    def in_place():
        model = subject.load()
        quantize_(model, Int8WeightOnlyConfig())
        return model

    loading = lambda: subject.load(quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))  # noqa: E731
    return {
        "on loading": partial(check_quantized, subject, loading, 0.05),
        "in place": partial(check_quantized, subject, in_place, 0.05),
    }


@client("quanto", "optimum-quanto")
def run_quanto(subject: Subject):
    """int8 and int4 weights by `QuantoConfig`: logits within 5 and 60 %."""
    from transformers import QuantoConfig

    def quantize(bits: int):
        return subject.load(quantization_config=QuantoConfig(weights=f"int{bits}"))

    limits = {8: 0.05, 4: 0.6}
    return {f"int{bits}": partial(check_quantized, subject, partial(quantize, bits), limits[bits]) for bits in limits}


@client("HQQ", "hqq")
def run_hqq(subject: Subject):
    """8-bit weights by `HqqConfig`: logits within 5 %."""
    from transformers import HqqConfig

    config = HqqConfig(nbits=8, group_size=64)
    return check_quantized(subject, partial(subject.load, quantization_config=config, device_map="cpu"), 0.05)


@client("bitsandbytes", "bitsandbytes")
def run_bitsandbytes(subject: Subject):
    """int8 and NF4 weights by `BitsAndBytesConfig`, on CPUs: logits within 10 and 60 %."""
    from transformers import BitsAndBytesConfig

    def check(limit: float, **options) -> str:
        config = BitsAndBytesConfig(**options)
        return check_quantized(subject, partial(subject.load, quantization_config=config, device_map="cpu"), limit)

    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return {"int8": partial(check, 0.1, load_in_8bit=True), "NF4": partial(check, 0.6, **nf4)}


@client("mergekit", "mergekit")
def run_mergekit(subject: Subject):
    """A linear merge of the model with one whose weights are half as large: three quarters of each weight. It copies no
    custom code: the files beside the model are put into the folder that it wrote."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    half = subject.load()
    with torch.no_grad():
        for parameter in half.parameters():
            parameter.mul_(0.5)
    half.save_pretrained(subject.out / "half")
    subject.tokenizer.save_pretrained(subject.out / "half")
    models = [
        {"model": str(folder), "parameters": {"weight": 1.0}} for folder in (subject.folder, subject.out / "half")
    ]
    config = MergeConfiguration.model_validate({"models": models, "merge_method": "linear", "dtype": "float32"})
    run_merge(config, str(subject.out / "merged"), MergeOptions(trust_remote_code=True, write_model_card=False))
    for file in subject.folder.glob("*.py"):
        shutil.copy(file, subject.out / "merged")
    whole = subject.load().state_dict()
    made = type(subject)(subject.out / "merged", subject.scheme, subject.out)
    assert (made.folder / "config.json").is_file(), json.dumps([path.name for path in made.folder.iterdir()])
    for name, weight in made.load().state_dict().items():
        torch.testing.assert_close(weight, 0.75 * whole[name])
