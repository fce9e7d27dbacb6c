"""Tokens → packed blocks, and blocks → batches."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset

from .cache import cached_rows


def pack(batch: dict[str, list[list[int]]], block_size: int, cross_document: bool) -> dict[str, np.ndarray]:
    """Tokenised documents → blocks of `block_size` tokens, one after the other; what is left at the end is dropped.

    Unless `cross_document`, the blocks come with `position_ids` that start again with each document, by which the model
    keeps attention within documents.
    """
    tokens = np.concatenate([np.asarray(ids, dtype=np.int32) for ids in batch["input_ids"]])
    document = np.repeat(np.arange(len(batch["input_ids"])), [len(ids) for ids in batch["input_ids"]])
    num_blocks = len(tokens) // block_size
    tokens, document = (
        array[: num_blocks * block_size].reshape(num_blocks, block_size) for array in (tokens, document)
    )
    if cross_document:
        return {"input_ids": tokens}
    column = np.arange(block_size, dtype=np.int32)
    starts = np.zeros_like(tokens)
    starts[:, 1:] = np.where(document[:, 1:] != document[:, :-1], column[1:], 0)
    return {"input_ids": tokens, "position_ids": column - np.maximum.accumulate(starts, axis=1)}


class Packer:
    """`pack` for `map`, batch after batch of one split: what fills no block is carried into the next batch.

    Args:
        block_size, cross_document: as `pack` takes them.
    """

    def __init__(self, block_size: int, cross_document: bool) -> None:
        self.block_size, self.cross_document = block_size, cross_document
        self.rest: list[np.ndarray] = []

    def __call__(self, batch: dict[str, list[list[int]]], indices: list[int]) -> dict[str, np.ndarray]:
        rest = self.rest if indices[0] else []  # a stream is read from its start again in each pass
        documents = [*rest, *(np.asarray(ids, dtype=np.int32) for ids in batch["input_ids"])]
        left, self.rest = sum(map(len, documents)) % self.block_size, []
        for document in reversed(documents):
            if left <= 0:
                break
            self.rest.insert(0, document[-left:].copy())
            left -= len(document)
        return pack({"input_ids": documents}, self.block_size, self.cross_document)


def make_blocks(
    tokenized: Dataset | IterableDataset, block_size: int, cross_document: bool, split: str
) -> Dataset | IterableDataset:
    """Tokenised documents → packed blocks, see `pack`.

    Raises:
        ValueError: if `block_size` is below 2 or the documents do not fill one block.
    """
    if block_size < 2:
        raise ValueError(f"`block_size` must be at least 2, got {block_size}.")
    packer = Packer(block_size, cross_document)
    options = {"batched": True, "batch_size": 1000, "with_indices": True, "remove_columns": ["input_ids"]}
    if isinstance(tokenized, IterableDataset):
        blocks = tokenized.map(packer, **options)
        if next(iter(blocks), None) is None:
            raise ValueError(f"`block_size` {block_size} is more than the {split} split holds, or it is empty.")
        return blocks
    # one process, so that the cuts do not depend on the number of cores
    arrays = tokenized.with_format("numpy")
    options["desc"] = f"Packing blocks of {block_size}"

    def make(folder: Path) -> None:
        arrays.map(packer, cache_file_name=str(folder / "blocks.arrow"), **options)

    if tokenized.cache_files:
        blocks, _ = cached_rows("blocks", [tokenized._fingerprint, block_size, cross_document], make)
    else:
        blocks = arrays.map(packer, **options)
    if not len(blocks):
        num_tokens = sum(len(ids) for ids in tokenized.with_format("numpy")["input_ids"])
        raise ValueError(f"`block_size` {block_size} is more than the {split} split holds: {num_tokens} tokens.")
    return blocks.with_format(None)


def longest_document(tokenized: Dataset | IterableDataset) -> int | None:
    """→ the tokens of the longest document; `None` for a stream."""
    if isinstance(tokenized, IterableDataset):
        return None
    tables = tokenized.with_format("arrow").iter(batch_size=100_000)
    return max((pc.max(pc.list_value_length(table["input_ids"])).as_py() for table in tables), default=0)


class BlockCollator:
    """Blocks → a batch with labels: no token is predicted from another document. Labels that the rows have are kept."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {name: torch.tensor(np.array([row[name] for row in rows]), dtype=torch.long) for name in rows[0]}
        batch.setdefault("labels", batch["input_ids"].clone())
        if "position_ids" in batch:
            batch["labels"][batch["position_ids"] == 0] = -100
        return batch
