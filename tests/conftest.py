"""What all tests share: small models, a small corpus, and memory that is never zero by luck."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for a hub
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import importlib.util  # noqa: E402
import random  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import datasets  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hub_double import HubDouble  # noqa: E402


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, which the models do

from hf_relpos import RelPosConfig, RelPosForCausalLM, list_position_embeddings  # noqa: E402


ROOT = Path(__file__).parent.parent
COMBINATIONS = ["sinusoidal+linear_cpb", "learned+alibi", "scaled_sinusoidal+rotary", "rotary+log_cpb"]
COMBINATIONS += ["rotary+temperature", "alibi+fire", "rotary+fox"]
SCHEMES = [*list_position_embeddings(), *COMBINATIONS]


def make_config(pos_embedding_type: str, **overrides) -> RelPosConfig:
    """Odd sizes, and weights large enough that every part of the model matters."""
    fields = dict(
        vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, max_position_embeddings=160
    )
    fields |= dict(initializer_range=0.15, hidden_dropout=0.0, pad_token_id=0, eos_token_id=1, train_length=8)
    return RelPosConfig(pos_embedding_type=pos_embedding_type, **{**fields, **overrides})


def make_model(pos_embedding_type: str, **overrides) -> RelPosForCausalLM:
    torch.manual_seed(0)
    return RelPosForCausalLM(make_config(pos_embedding_type, **overrides)).eval()


def make_tokens(*shape: int, seed: int = 0, vocab_size: int = 97) -> torch.Tensor:
    """Random token ids other than the special ones."""
    return torch.randint(2, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def load_script(name: str):
    """A script as a module, to call its `main` in this process."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_script(monkeypatch):
    """→ a function that runs a script in this process as its command line would."""

    def run(name: str, *flags: object) -> None:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        load_script(name).main()

    return run


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """All caches of the session in one temporary folder."""
    folder = tmp_path_factory.mktemp("cache")
    datasets.config.HF_DATASETS_CACHE = folder
    return folder


@pytest.fixture
def hub():
    """A Hub of this test alone; clients run in other processes with `hub.environment(folder)`."""
    hub = HubDouble()
    hub.start()
    yield hub
    hub.stop()
    assert not hub.errors, hub.errors[0]


@pytest.fixture
def poisoned_memory(monkeypatch):
    """`torch.empty` and its kin return NaN in floating point: what is not initialised shows."""

    def poison(function):
        def poisoned(*args, **kwargs):
            made = function(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() and not made.is_meta else made

        return poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poison(getattr(torch.Tensor, name)))


WORDS = "the state of union and people in congress a government peace war with law to will our year country".split()


def make_text(num_words: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(num_words))


@pytest.fixture(scope="session")
def corpus_files(tmp_path_factory):
    """→ a training folder of 12 text files and a validation file, small enough for seconds."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "train").mkdir()
    for index in range(12):
        (folder / "train" / f"{index:02}.txt").write_text(make_text(400, index), encoding="utf-8")
    (folder / "valid.txt").write_text(make_text(1500, 99), encoding="utf-8")
    return folder
