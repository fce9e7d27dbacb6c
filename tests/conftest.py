"""What all tests share: small models, a small corpus, and memory that is never zero by luck."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for a hub
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import gc  # noqa: E402
import importlib.util  # noqa: E402
import random  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import datasets  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hub_double import HubDouble  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, which the models do

from hf_relpos import RelPosConfig, RelPosForCausalLM, list_position_embeddings  # noqa: E402
from hf_relpos.model import attention_native  # noqa: E402


if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup: tests send it to processes that they start
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).parent.parent
COMBINATIONS = ["sinusoidal+linear_cpb", "learned+alibi", "scaled_sinusoidal+rotary", "rotary+log_cpb"]
COMBINATIONS += ["rotary+temperature", "alibi+fire", "rotary+fox"]
# by layers in turn → the window of the layers that slide, and what the layers are
MIXES = {
    "rotary/none": (7, "sliding_attention", "full_attention"),
    "none/alibi+rotary": (None,),
    "linear_cpb/log_cpb": (6, "full_attention", "sliding_attention"),
    "fox/alibi": (None,),
}
SCHEMES = [*list_position_embeddings(), *COMBINATIONS, *MIXES]


def make_config(pos_embedding_type: str, **overrides) -> RelPosConfig:
    """Odd sizes, and weights large enough that every part of the model matters."""
    fields = dict(
        vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, max_position_embeddings=160
    )
    fields |= dict(initializer_range=0.15, embedding_multiplier=2.0, hidden_dropout=0.0, train_length=8)
    fields |= dict(pad_token_id=0, eos_token_id=1)
    window, *kinds = MIXES.get(pos_embedding_type, (None,))
    if window is not None:
        num_layers = overrides.get("num_hidden_layers", fields["num_hidden_layers"])
        fields |= dict(sliding_window=window, layer_types=[kinds[i % len(kinds)] for i in range(num_layers)])
    return RelPosConfig(pos_embedding_type=pos_embedding_type, **{**fields, **overrides})


def schemes_of(pos_embedding_type: str) -> list[str]:
    """The names of the schemes that it is made of."""
    return pos_embedding_type.replace("/", "+").split("+")


def make_model(pos_embedding_type: str, **overrides) -> RelPosForCausalLM:
    torch.manual_seed(0)
    model = RelPosForCausalLM(make_config(pos_embedding_type, **overrides)).eval()
    for name, parameter in model.named_parameters():
        if "position_embeddings" in name and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.5)  # what starts at 0 must matter too
    return model


def make_tokens(*shape: int, seed: int = 0, vocab_size: int = 97) -> torch.Tensor:
    """Random token ids other than the special ones."""
    return torch.randint(2, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def table_path() -> str:
    """What `attention_path` says of a table of the distances here: the native kernel needs a compiler."""
    return "distance_bias:native" if attention_native.native_is_ready() else "distance_bias:blocks"


@pytest.fixture
def without_native(monkeypatch):
    """As where there is no compiler, or not the package: in this process alone."""
    monkeypatch.setattr(attention_native, "native_is_ready", lambda: False)


@pytest.fixture(params=["native", "blocks"])
def cpu_kernel(request):
    """Each kernel for a table of the distances on CPUs, in turn."""
    if request.param == "blocks":
        request.getfixturevalue("without_native")
    elif not attention_native.native_is_ready():
        pytest.skip("no native kernel here")
    return request.param


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


def pytest_collection_finish():
    """Every training collects garbage: what was imported until here need not be looked through each time."""
    gc.freeze()


def pytest_sessionfinish():
    """Some libraries report what is alive at the end."""
    gc.unfreeze()


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


def make_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with one entry for each byte and some for the words of the tests."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|pad|>", "<|eos|>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet)
    backend.train_from_iterator([" ".join(WORDS)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|eos|>",
        chat_template=chat_template,
        model_input_names=["input_ids", "attention_mask"],
    )


def save_with_tokenizer(folder, scheme: str, chat_template: str | None = None, **overrides) -> RelPosForCausalLM:
    """→ the model that was saved, whose greedy text has nothing that cannot be decoded token by token."""
    tokenizer = make_tokenizer(chat_template)
    model = make_model(scheme, vocab_size=len(tokenizer), **overrides)
    printable = {token: index for token, index in tokenizer.get_vocab().items() if token.isascii()}
    rows = [index for index in range(len(tokenizer)) if index not in printable.values() or index < 2]
    model.lm_head.weight.data[rows] = 0.0  # a logit of 0 is never the highest
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def data_flags(corpus_files):
    return ["--train_file", corpus_files / "train", "--validation_file", corpus_files / "valid.txt"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory, data_flags):
    """→ a folder with a model of each of four kinds, trained for 6 steps."""
    from helpers import training_flags  # which imports this file

    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        for scheme in ("none", "linear_cpb", "learned", "rotary"):
            flags = training_flags(data_flags, folder / scheme, pos_embedding_type=scheme)
            patch.setattr(sys, "argv", ["train.py", *map(str, flags)])
            load_script("train").main()
    return folder
