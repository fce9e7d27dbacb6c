"""A saved folder for the tests of this room."""

from pathlib import Path

from conftest import make_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast


def save_model(folder: Path) -> Path:
    """Saves a model with a tokenizer, small but for a weight file that goes to LFS; → the folder."""
    make_model("alibi").save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(97)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1", pad_token="w2")
    tokenizer.save_pretrained(folder)
    return folder
