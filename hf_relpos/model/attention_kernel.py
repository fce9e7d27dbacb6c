"""The interface of a kernel for attention with a table of the distances. Adding one takes one class.

Shape letters: B batch, H query heads, G key and value heads, Q query length, K key length, D head size, L length of a
table.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch


TABLE_KERNELS: dict[str, type["TableKernel"]] = {}


@dataclass(frozen=True)
class TableCall:
    """The arguments of a kernel other than its tensors; checked by `distance_bias_attention`.

    Attributes:
        scaling: factor of q · k.
        is_causal: whether keys after the query are hidden.
        offset: key slot of the first query; query i stands at slot `offset` + i.
        key_mask: (B, K) boolean, False on padding, or `None`.
        documents: (B or 1, K) integers: a query sees the keys of its own document only; or `None`.
        window: a query sees the keys at distances below it only; `None` for all.
    """

    scaling: float
    is_causal: bool = True
    offset: int = 0
    key_mask: torch.Tensor | None = None
    documents: torch.Tensor | None = None
    window: int | None = None


class TableKernel:
    """A way to compute attention with an (H, L) table of the distances. Subclasses are registered by their `name`.

    Class attributes:
        name: what `attention_path` says after "distance_bias:".
        is_fallback: whether it is only taken where no other kernel supports a call.
        is_operator: whether it has `forward` and `backward`, from which a differentiable operator is made that
            `torch.compile` and exporters know; else it overrides `attend`.
    """

    name: ClassVar[str]
    is_fallback: ClassVar[bool] = False
    is_operator: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls) or cls.name in TABLE_KERNELS:
            raise TypeError(
                f"kernel {cls.__name__!r} must have a `name` that is new, got {getattr(cls, 'name', None)!r}."
            )
        TABLE_KERNELS[cls.name] = cls

    @staticmethod
    def supports(query: torch.Tensor, key: torch.Tensor, bias_table: torch.Tensor, call: TableCall) -> bool:
        """Whether it can compute this call exactly, judged by shapes, device, dtypes and the table."""
        raise NotImplementedError

    @staticmethod
    def forward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias_table: torch.Tensor, call: TableCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, H, Q, D), (B, G, K, D) twice, (H, L) → (B, H, Q, D) output in the dtype of `query`, and the (B, H, Q)
        logarithm of the sum of exponentials of each row in that of `bias_table`; output 0 for a query without keys."""
        raise NotImplementedError

    @staticmethod
    def backward(
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        bias_table: torch.Tensor,
        call: TableCall,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """→ the gradients of query, key, value and `bias_table`, each in its dtype."""
        raise NotImplementedError

    @staticmethod
    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias_table: torch.Tensor, call: TableCall
    ) -> torch.Tensor:
        """→ (B, H, Q, D): the whole computation, differentiable, for kernels that are not operators."""
        raise NotImplementedError


def select_kernel(
    query: torch.Tensor, key: torch.Tensor, bias_table: torch.Tensor, call: TableCall
) -> type[TableKernel]:
    """The kernel that was registered last of those that support a call, fallbacks last."""
    kernels = sorted(reversed(TABLE_KERNELS.values()), key=lambda kernel: kernel.is_fallback)
    return next(kernel for kernel in kernels if kernel.supports(query, key, bias_table, call))
