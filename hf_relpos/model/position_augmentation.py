"""Positions drawn at random in training: positions and distances occur that no training sequence is long enough for.

Shape letters: B batch, Q query length.
"""

from collections.abc import Callable

import torch


def sample_positions(
    sampling: str,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    batch_size: int,
    max_positions: int,
) -> torch.Tensor:
    """Gives each document of each row new positions, which increase from token to token and leave numbers out.

    Args:
        sampling: a key of `SAMPLINGS`.
        position_ids: (B or 1, Q); padding keeps its own.
        attention_mask: (B, Q), 0 on padding, or `None`.
        documents: (B or 1, Q) or `None`, from `find_documents`.
        batch_size: B.
        max_positions: exclusive upper bound of the positions given out.

    Returns:
        (B, Q).

    Raises:
        ValueError: if the sequence is longer than `max_positions`, or if the mask has other dimensions.
    """
    length = position_ids.shape[1]
    if length > max_positions:
        raise ValueError(
            f"`position_sampling` needs sequences of at most `max_position_embeddings`={max_positions} tokens, "
            f"got {length}."
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            "`attention_mask` must have 2 dimensions in training with `position_sampling`, "
            f"got {tuple(attention_mask.shape)}."
        )
    shape, device = (batch_size, length), position_ids.device
    real = torch.ones(shape, dtype=torch.bool, device=device) if attention_mask is None else attention_mask.bool()
    documents = torch.zeros(shape, dtype=torch.long, device=device) if documents is None else documents.expand(shape)
    return torch.where(real, SAMPLINGS[sampling](real, documents, max_positions), position_ids)


def randomized_positions(real: torch.Tensor, documents: torch.Tensor, max_positions: int) -> torch.Tensor:
    """Randomized positions: the n tokens of a document get n distinct integers of [0, max_positions), sorted.

    Every set of n integers is equally likely. The documents of a row draw from one shuffle: no two share a position,
    which none of them sees.

    Source: Ruoss et al. 2023, arXiv 2305.16843, section 3.

    Args:
        real: (B, Q) boolean, False on padding.
        documents: (B, Q) integers that do not decrease.
        max_positions: at least Q.

    Returns:
        (B, Q); anything on padding.
    """
    shuffled = torch.rand(len(real), max_positions, device=real.device).argsort(-1)[:, : real.shape[1]]
    # real tokens first, by document, then by position; the i-th of them is the i-th real token of the row
    group = torch.where(real, documents, documents.shape[1])
    ordered = (group * max_positions + shuffled).sort(-1).values % max_positions
    return ordered.gather(1, (real.long().cumsum(-1) - 1).clamp(min=0))


def skipping_positions(real: torch.Tensor, documents: torch.Tensor, max_positions: int) -> torch.Tensor:
    """PoSE, positional skip-wise training: a document of n tokens is cut in two; the first part stands at 0, 1, ..,
    the second goes on after a skip u.

    The first part has U{1 .. (n + 1) // 2} tokens and u ~ U{0 .. max_positions − n}, as in the authors' code.
    Differs: the text goes on from one part to the other, v = 0 in the paper's terms.

    Source: Zhu et al. 2023, arXiv 2309.10400, section 3.2. Arguments and result as in `randomized_positions`.
    """
    size = torch.zeros_like(documents).scatter_add_(1, documents, real.long())  # tokens of each document
    before = (size.cumsum(-1) - size).gather(1, documents)
    rank = real.long().cumsum(-1) - 1 - before
    size = size.gather(1, documents)

    def draw(bound: torch.Tensor) -> torch.Tensor:
        """An integer of 0 .. bound − 1 for each document; the bias of the remainder is below bound / 2^53."""
        return torch.randint(2**53, real.shape, device=real.device).gather(1, documents) % bound

    first, skip = 1 + draw((size + 1).clamp(min=2) // 2), draw(max_positions - size + 1)
    return rank + torch.where(rank >= first, skip, 0)


SAMPLINGS: dict[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "randomized": randomized_positions,
    "pose": skipping_positions,
}


def augment_starts(
    position_ids: torch.Tensor, documents: torch.Tensor | None, batch_size: int, max_positions: int
) -> torch.Tensor:
    """Position-start augmentation: each document of each row starts at k ~ U{0 .. max_positions − length}.

    Args:
        position_ids: (B or 1, Q).
        documents: (B or 1, Q) or `None`, from `find_documents`.
        batch_size: B.
        max_positions: exclusive upper bound of the positions given out; length is Q, whatever the documents' lengths.

    Returns:
        (B, Q).

    Raises:
        ValueError: if the sequence is longer than `max_positions`.
    """
    length = position_ids.shape[1]
    if length > max_positions:
        raise ValueError(
            f"`position_start_augmentation` needs sequences of at most `max_position_embeddings`={max_positions} "
            f"tokens, got {length}."
        )
    starts = torch.randint(max_positions - length + 1, (batch_size, length), device=position_ids.device)
    if documents is None:
        starts = starts[:, :1]
    else:
        starts = starts.gather(1, documents.expand(batch_size, -1))
    return position_ids + starts
