"""What a client of the matrix is, the models that it is given, and what became of it."""

import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any


CONTROL = "Llama"
SCHEMES = ("rotary", "linear_cpb", "alibi", "fox", "none")
WORDS = "the state of union and people in congress a government peace war with law to will our year country".split()
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
# what the tokenizer below has; weights large enough that positions matter
SIZES |= {"max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": 1, "initializer_range": 0.15}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # fp32 logits of magnitude 1 to 10, summed in another order


@dataclass(frozen=True)
class Client:
    """One row of the table.

    Attributes:
        name: the row's title.
        packages: PyPI names of what must be installed; the first one's version is the row's.
        run: Subject → a note or `None` where it works, or several uses: a dictionary, name → a call without arguments.
            An error says that it does not work.
        schemes: the schemes that it is given.
        seconds: the time limit of the process.
        python: the variable of the environment that names the Python which has the packages; "" for this one.
    """

    name: str
    packages: tuple[str, ...]
    run: Callable[["Subject"], Any]
    schemes: tuple[str, ...]
    seconds: int
    python: str = ""


class Refused(Exception):
    """The model refused, in a program that says so in its own words: the message is the model's."""


CLIENTS: dict[str, Client] = {}


def client(name: str, *packages: str, schemes: tuple[str, ...] = SCHEMES, seconds: int = 240, **options) -> Callable:
    """Decorator: the function becomes a row of the table, its docstring says what is run."""

    def register(run: Callable) -> Callable:
        CLIENTS[name] = Client(name, packages, run, schemes, seconds, **options)
        return run

    return register


@dataclass(frozen=True)
class Subject:
    """A saved model, as a client gets it: a folder, loaded by the code in it.

    Attributes:
        folder: the model and its tokenizer.
        scheme: `CONTROL`, or the position scheme.
        out: an empty folder, the current one.
    """

    folder: Path
    scheme: str
    out: Path

    def load(self, **options: Any) -> Any:
        """→ the model, in evaluation mode."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, trust_remote_code=True, **options).eval()

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=True)

    def tokens(self, rows: int = 2, length: int = 16) -> Any:
        """→ (rows, length) token ids, the same in each call."""
        import torch

        generator = torch.Generator().manual_seed(rows * 1000 + length)
        return torch.randint(2, len(self.tokenizer), (rows, length), generator=generator)

    def texts(self, number: int = 8) -> list[str]:
        import random

        return [" ".join(random.Random(seed).choices(WORDS, k=5 + 3 * seed % 11)) for seed in range(number)]


def save_subjects(folder: Path, schemes: tuple[str, ...] = (CONTROL, *SCHEMES)) -> None:
    """Saves the models, of one size and with one tokenizer, each in the folder of its name."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_relpos import RelPosConfig, RelPosForCausalLM

    tokenizer = make_tokenizer()
    for scheme in schemes:
        torch.manual_seed(0)
        sizes = SIZES | {"vocab_size": len(tokenizer)}
        if scheme == CONTROL:
            model = LlamaForCausalLM(LlamaConfig(**sizes))
        else:
            model = RelPosForCausalLM(RelPosConfig(**sizes, pos_embedding_type=scheme, hidden_dropout=0.0))
        model.save_pretrained(folder / scheme)
        tokenizer.save_pretrained(folder / scheme)


def make_tokenizer() -> Any:
    """→ a byte-level BPE with an entry for each byte and some for words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    options = {"special_tokens": ["<|pad|>", "<|eos|>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    backend.train_from_iterator([" ".join(WORDS)], trainers.BpeTrainer(vocab_size=300, **options))
    names = {"pad_token": "<|pad|>", "eos_token": "<|eos|>", "model_max_length": SIZES["max_position_embeddings"]}
    names["model_input_names"] = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT, **names)


def run_client(name: str, subject: Subject, result: Path) -> None:
    """Runs a client and writes {use: {outcome, note or error, refused}} to the file; a client of one use has use ""."""
    found: dict[str, dict] = {}

    def attempt(use: str, call: Callable) -> Any:
        try:
            made = call()
        except Exception as error:  # of any library: the table says which
            traceback.print_exc()
            found[use] = {"outcome": "failed", **describe(error)}
            return None
        found[use] = {"outcome": "works", **({"note": made} if isinstance(made, str) else {})}
        return made

    uses = attempt("", lambda: CLIENTS[name].run(subject))
    if isinstance(uses, dict):
        del found[""]
        for use, call in uses.items():
            attempt(use, call)
    result.write_text(json.dumps(found))


def describe(error: BaseException) -> dict[str, Any]:
    """→ the error in one line, and whether it is a refusal of the model's: a `ValueError` of one line from its code."""
    if isinstance(error, Refused):
        return {"refused": True, "error": str(error)}
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for cause in chain:
        frames = traceback.extract_tb(cause.__traceback__)
        file = frames[-1].filename if frames else ""
        ours = "transformers_modules" in file or "/hf_relpos/" in file
        if ours and isinstance(cause, ValueError) and "\n" not in str(cause):
            return {"refused": True, "error": str(cause)}
    text = " ".join(str(chain[0]).split())
    return {"refused": False, "error": f"{type(chain[0]).__name__}: {text}"[:300]}


def losses_fall(losses: list[float]) -> str:
    """→ a note; raises `AssertionError` unless they fall."""
    assert len(losses) > 2 and losses[-1] < losses[0], f"losses do not fall: {losses}"
    return f"loss {losses[0]:.2f} → {losses[-1]:.2f}"
