"""The special tokens of tokenizers made here, and how a document begins and ends."""

from typing import Any


START, END, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"
SPECIAL_TOKENS = {"bos_token": START, "eos_token": END, "pad_token": PAD}
# what begins and ends documents in the pretraining of published models; tokenizers for chats name tokens of turns
# instead, such as <|im_start|> and <|im_end|> or <|eot_id|>
DOCUMENT_ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>", "<EOS_TOKEN>")
DOCUMENT_STARTS = (START, "<|begin_of_text|>", "<s>", "<bos>", "<|begin▁of▁sentence|>", "<BOS_TOKEN>", *DOCUMENT_ENDS)


def document_end(tokenizer: Any) -> int | None:
    """The id of the token that ends a document: the end-of-sequence token, or, where that is not known to end documents
    and the vocabulary has one that is, as in tokenizers for chats, that one; `None` without an end-of-sequence token.
    """
    end = getattr(tokenizer, "eos_token_id", None)
    if end is None or getattr(tokenizer, "eos_token", None) in DOCUMENT_ENDS:
        return end
    vocabulary = tokenizer.get_vocab()
    return next((vocabulary[name] for name in DOCUMENT_ENDS if name in vocabulary), end)


def document_start(tokenizer: Any) -> list[int]:
    """The id of the token that opens a document: the beginning-of-sequence token, or the end of a document for a
    tokenizer without one, as evaluation harnesses do, or with one that begins turns; empty if it has neither."""
    start, end = getattr(tokenizer, "bos_token_id", None), document_end(tokenizer)
    is_for_chats = end != getattr(tokenizer, "eos_token_id", None)
    if start is None or (is_for_chats and tokenizer.bos_token not in DOCUMENT_STARTS):
        start = end
    return [] if start is None else [start]
