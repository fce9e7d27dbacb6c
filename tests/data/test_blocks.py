"""Packed blocks: nothing is lost, and no token is predicted from another document."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_relpos.data.blocks import BlockCollator, longest_document, make_blocks, pack


def reference_blocks(documents, block_size):
    """Token by token: (token, document, offset in its piece) cut into blocks."""
    stream = [(token, index) for index, document in enumerate(documents) for token in document]
    for start in range(0, len(stream) - block_size + 1, block_size):
        block, positions, previous = stream[start : start + block_size], [], None
        for _, document in block:
            positions.append(positions[-1] + 1 if document == previous else 0)
            previous = document
        yield [token for token, _ in block], positions


def test_packing_loses_nothing_and_keeps_to_documents():
    rng = np.random.default_rng(0)
    documents = [rng.integers(2, 99, length).tolist() for length in (5, 1, 40, 13, 2, 2, 31)]
    packed = pack({"input_ids": documents}, 8, cross_document=False)
    expected = list(reference_blocks(documents, 8))
    assert packed["input_ids"].tolist() == [tokens for tokens, _ in expected]
    assert packed["position_ids"].tolist() == [positions for _, positions in expected]
    crossed = pack({"input_ids": documents}, 8, cross_document=True)
    assert list(crossed) == ["input_ids"] and crossed["input_ids"].tolist() == packed["input_ids"].tolist()


@pytest.mark.parametrize("block_size", [16, 5000], ids=["short blocks", "more than 1000 documents hold"])
@pytest.mark.parametrize("cross_document", [False, True])
def test_nothing_is_lost_between_batches_of_documents(block_size, cross_document):
    rng = np.random.default_rng(0)
    documents = [rng.integers(2, 99, length).tolist() for length in rng.integers(1, 8, 2500)]
    tokenized = Dataset.from_dict({"input_ids": documents})
    tokens, positions = zip(*reference_blocks(documents, block_size))
    stream = make_blocks(tokenized.to_iterable_dataset(), block_size, cross_document, "train")
    for rows in (make_blocks(tokenized, block_size, cross_document, "train"), stream, stream):
        rows = list(rows)
        assert np.array_equal([row["input_ids"] for row in rows], tokens)
        assert cross_document or np.array_equal([row["position_ids"] for row in rows], positions)


def test_no_token_is_predicted_from_another_document():
    rows = [
        {"input_ids": [5, 6, 7, 8], "position_ids": [0, 1, 0, 1]},
        {"input_ids": [1, 2, 3, 4], "position_ids": [0, 1, 2, 3]},
    ]
    batch = BlockCollator()(rows)
    assert batch["labels"].tolist() == [[-100, 6, -100, 8], [-100, 2, 3, 4]]
    assert batch["input_ids"].dtype == torch.long


def test_blocks_refuse_what_they_cannot_fill():
    tokenized = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]]})
    with pytest.raises(ValueError, match="`block_size` 6 is more than the train split holds: 5 tokens"):
        make_blocks(tokenized, 6, False, "train")
    with pytest.raises(ValueError, match="`block_size` must be at least 2, got 1"):
        make_blocks(tokenized, 1, False, "train")
    assert len(make_blocks(tokenized, 5, False, "train")) == 1


def test_the_longest_document():
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3], [4, 5, 6, 7], [8]]})
    assert longest_document(rows) == 4 and longest_document(rows.select([0, 1, 3])) == 2
    assert longest_document(rows.to_iterable_dataset()) is None
