"""The special tokens of tokenizers made here, and how a document begins."""

from typing import Any


START, END, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"
SPECIAL_TOKENS = {"bos_token": START, "eos_token": END, "pad_token": PAD}


def document_start(tokenizer: Any) -> list[int]:
    """The id of the token that opens a document: the beginning-of-sequence token, or the end-of-sequence token of a
    tokenizer without one, as evaluation harnesses do; empty if it has neither."""
    start = getattr(tokenizer, "bos_token_id", None)
    start = getattr(tokenizer, "eos_token_id", None) if start is None else start
    return [] if start is None else [start]
