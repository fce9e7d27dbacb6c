"""The interface of a position scheme, and the registry that holds the schemes.

Shape letters: B batch, H heads, Q query length, K key length, D head size, C hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


POSITION_EMBEDDINGS: dict[str, type["PositionEmbedding"]] = {}


@dataclass
class Positions:
    """Where the queries and the keys of one forward stand: integers counted over real tokens, never tensor indices.

    Attributes:
        query: (B or 1, Q) int64, the position of each query token.
        key: (B or 1, K) int64, the position of each cached or current key token. Layers with a window may cache other
            keys than layers without: slots and positions here are those of some layers.
        distance: (B or 1, Q, K) int64, query − key, 0 where the key lies ahead (the causal mask hides it); `None` if
            no scheme asks for pairs or if `offset` says it all. The first dimension is 1 wherever all rows agree.
        span: exclusive upper bound of the distances.
        offset: the key slot of the first query, if the distance of any query to any key that it sees is that of their
            slots, so that a table of the distances is all that the attention needs; else `None`.
        key_mask: (B, K) boolean, False on padding, or `None`.
        documents: (B or 1, K) document indices, or `None`.
        visible: (B or 1, 1, Q, K) boolean, the keys that each query sees; beside `distance`.
        tail: beside `offset`, the last queries, if a table does not serve these, with `distance` and `visible`; else
            `None`.
        window: a query sees the keys at slots less than this many before its own; `None` for all.
        reversed_tables: layer index → (H, n) table from the longest distance down to 0, kept as long as the cache of
            keys that the forward goes on from; `None` where tables must not be kept.
        rotations: for each scheme that transforms q and k, its `rotate` function and what it computed once from
            `query`; filled in by the model.
        mesh: the device mesh whose ranks share the heads out among them (tensor parallelism), or `None`.
    """

    query: torch.Tensor
    key: torch.Tensor
    distance: torch.Tensor | None
    span: int
    offset: int | None = None
    key_mask: torch.Tensor | None = None
    documents: torch.Tensor | None = None
    visible: torch.Tensor | None = None
    tail: "Positions | None" = None
    window: int | None = None
    reversed_tables: dict[int, torch.Tensor] | None = None
    rotations: tuple[tuple[Callable, Any], ...] = ()
    mesh: Any = None

    def kept_table(self, layer_idx: int) -> torch.Tensor | None:
        """→ (H, n) table from distance n − 1 down to 0 that a step before left, if it reaches as far as this one."""
        table = None if self.reversed_tables is None else self.reversed_tables.get(layer_idx)
        return table if table is not None and table.shape[1] >= self.num_seen else None

    @property
    def num_seen(self) -> int:
        """The number of keys that the first query sees, by `offset` and `window`."""
        return min(self.offset + 1, self.window or self.offset + 1)

    def local_heads(self, values: torch.Tensor) -> torch.Tensor:
        """(H, ..) values of all heads → (H / ranks, ..), those of this rank. The gradient is that of all heads."""
        return values if self.mesh is None else _LocalHeads.apply(values, self.mesh)


class _LocalHeads(torch.autograd.Function):
    """Forward: a rank's slice of the first dimension. Backward: the slices of all ranks, so that parameters that every
    rank holds whole get the same whole gradient everywhere."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, mesh: Any) -> torch.Tensor:
        ctx.mesh = mesh
        return values.tensor_split(mesh.size())[mesh.get_local_rank()].clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gathered = [torch.empty_like(gradient) for _ in range(ctx.mesh.size())]
        torch.distributed.all_gather(gathered, gradient.contiguous(), group=ctx.mesh.get_group())
        return torch.cat(gathered), None


class SelfInitialized:
    """Marks a module with parameters that `reset_parameters` initialises, in place of the rule for its kind of layer.

    transformers skips modules without parameters of their own, so the mark belongs on the module that holds them.
    """


class PositionEmbedding(SelfInitialized, nn.Module):
    """Base class of all schemes. Every hook is the identity, so that the base class itself is NoPE.

    A scheme overrides the hooks it needs and nothing else. Constants are computed from Python numbers in the hook that
    uses them and never stored as buffers: a buffer is cast by `model.to(dtype)` and left uninitialised by
    `from_pretrained`.

    Class attributes:
        defaults: option name → default value; the only keys that `pos_embedding_kwargs` may hold for the scheme.
        shared_across_layers: one module for the whole model (True) or one per layer (False). `embed` and `rotation`
            act before the layers and are only called on shared schemes.
        has_position_limit: whether only `max_position_embeddings` positions can be served.
        extrapolates: what happens past the training length, in a few words; the README's table shows it.
        kind: "absolute" (goes by the positions themselves), "relative" (by distances alone) or "none".
        uses_rope_parameters: whether `config.rope_parameters` is for it.

    Args:
        config: a `RelPosConfig`.
        **options: the scheme's `defaults`, overridden by `config.pos_embedding_kwargs`.
    """

    defaults: dict[str, Any] = {}
    shared_across_layers: bool = True
    has_position_limit: bool = False
    kind: str = "none"
    extrapolates: str = ""
    uses_rope_parameters: bool = False

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__()

    @classmethod
    def configure(cls, config: Any, options: dict[str, Any]) -> dict[str, Any]:
        """Checks the options that were given against `config` (raises `ValueError`); returns those to keep."""
        return options

    def reset_parameters(self) -> None:
        """Initialises the scheme's own parameters, through `transformers.initialization` only."""

    def embed(self, inputs_embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(B, Q, C) token embeddings and (B or 1, Q) positions → (B, Q, C)."""
        return inputs_embeds

    def rotation(self, positions: torch.Tensor, dtype: torch.dtype) -> Any:
        """(B or 1, Q) positions → whatever `rotate` needs, computed once per forward; `None` for no rotation."""
        return None

    @staticmethod
    def rotate(query: torch.Tensor, key: torch.Tensor, rotation: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, H, Q, D) query and key, after the projection and before the cache → the same shapes."""
        return query, key

    def distance_bias(self, distance: torch.Tensor) -> torch.Tensor | None:
        """(n,) integer distances → (H, n) fp32, what the attention adds to the scaled scores at each distance."""
        return None

    def bias(self, positions: Positions) -> torch.Tensor | None:
        """→ (B or 1, H, Q, K) fp32, added to the scaled scores; `None` for no bias.

        The default evaluates `distance_bias` once on the distances 0..span−1 and looks the values up; it only serves
        what the attention cannot serve from the table itself. A scheme that overrides it is always served from here,
        unless it says by `table_limit` how far the table goes, and returns the heads that `positions.local_heads`
        leaves.
        """
        if not self.has_distance_bias():
            return None
        table = positions.local_heads(self.table(positions.span, positions.query.device))
        return table[:, positions.distance].movedim(0, 1)

    def table_limit(self) -> torch.Tensor | None:
        """→ () the largest position, counted from the first token, of a query whose whole bias is `distance_bias`;
        `None`: there is no limit. A scheme that has one gives each layer a module of its own."""
        return None

    def key_state(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """(B, Q, C) input of an attention layer → (B, H, Q) fp32, cached with the keys: the bias between a query and a
        key is the sum of what the tokens behind the key say, up to the query. Only called on schemes of a layer."""
        return None

    def score_bias(
        self, scores: torch.Tensor, bias: torch.Tensor | None, query: torch.Tensor, positions: Positions
    ) -> torch.Tensor | None:
        """(B, H, Q, K) fp32 scaled scores, all other biases of them or `None`, (B, H, Q, D) query → a further bias,
        (B, H, Q, K) fp32. Only called on schemes of a layer; takes matrices of pairs in every forward."""
        return None

    @classmethod
    def needs_whole_rows(cls, config: Any) -> bool:
        """Whether it must see each sequence in a row of its own, which servers that lay requests end to end break."""
        return False

    @classmethod
    def serves_windows(cls) -> bool:
        """Whether a layer with it may hide the keys that lie far behind, and drop them from its cache."""
        return not cls.has_other_bias() and cls.table_limit is PositionEmbedding.table_limit

    @classmethod
    def has_distance_bias(cls) -> bool:
        return cls.distance_bias is not PositionEmbedding.distance_bias

    @classmethod
    def has_other_bias(cls) -> bool:
        """Whether its bias is more than a table of the distances, for queries at any position."""
        return cls.bias is not PositionEmbedding.bias and cls.table_limit is PositionEmbedding.table_limit

    @classmethod
    def has_key_state(cls) -> bool:
        return cls.key_state is not PositionEmbedding.key_state

    @classmethod
    def has_score_bias(cls) -> bool:
        return cls.score_bias is not PositionEmbedding.score_bias

    @classmethod
    def has_bias(cls) -> bool:
        return cls.has_distance_bias() or cls.has_other_bias() or cls.has_key_state() or cls.has_score_bias()

    def table(self, length: int, device: torch.device) -> torch.Tensor:
        """→ (H, length) fp32: `distance_bias` on 0..length−1, outside of autocast."""
        with torch.autocast(device.type, enabled=False):
            return self.distance_bias(torch.arange(length, device=device))


def register_position_embedding(name: str) -> Callable[[type[PositionEmbedding]], type[PositionEmbedding]]:
    """Class decorator: makes a scheme selectable as `pos_embedding_type=name`."""

    def register(cls: type[PositionEmbedding]) -> type[PositionEmbedding]:
        if name in POSITION_EMBEDDINGS or {*name} & {*"+/"}:
            raise ValueError(f"position embedding name must be new and without '+' and '/', got {name!r}")
        POSITION_EMBEDDINGS[name] = cls
        return cls

    return register


@register_position_embedding("none")
class NoPositionEmbedding(PositionEmbedding):
    """No position embedding (NoPE): the causal mask alone tells positions apart.

    score[i, j] = q_i · k_j / sqrt(D)

    Parameters: none. Past the training length: no limit; attention spreads thinner over more keys.
    Paper: Kazemnejad et al. 2023, arXiv 2305.19466.
    """

    extrapolates = "no limit; degrades gradually"
