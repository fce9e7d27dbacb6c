"""The library as Python calls it.

Shape letters: B batch, H query heads, G key and value heads, Q query length, K key length, D head size, L length of the
table.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch

from .build import load_whole


# what the models that call `Library` must agree with: a saved folder carries its models, and may be older or newer
INTERFACE = 1
# room for the message of an error
MESSAGE_BYTES = 1024


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "row"))]


_TENSORS = ("query", "key", "value", "out", "grad_out", "grad_query", "grad_key", "grad_value")
_POINTERS = ("lse", "table", "table_sums", "key_mask", "documents")
_NUMBERS = ("key_mask_stride", "documents_stride", "batch_size", "num_heads", "num_groups", "num_queries", "num_keys")
_NUMBERS += ("head_dim", "table_length", "offset", "window")


class _Call(ctypes.Structure):
    """`Call` in call.h, field by field."""

    _fields_ = [
        *((name, _Tensor) for name in _TENSORS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("scaling", ctypes.c_double),
    ]


class Library:
    """The functions of a library that was built.

    Attributes:
        norm_interface: `INTERFACE` of the norm's functions, which came later.
        dropout_interface: that of dropout's.
        multiplies_bf16: whether bf16 inputs are multiplied in bf16, as is fast on CPUs with instructions for it; else
            in fp32.
    """

    norm_interface = 1
    dropout_interface = 1

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        library.relpos_call_size.restype = ctypes.c_int64
        if library.relpos_call_size() != ctypes.sizeof(_Call):
            raise OSError(f"{path} has another interface")
        flags, message = (ctypes.c_int, ctypes.c_int), (ctypes.c_char_p, ctypes.c_int64)
        self._functions = {name: getattr(library, f"relpos_{name}") for name in ("forward", "backward")}
        for function in self._functions.values():
            function.argtypes = (ctypes.POINTER(_Call), *flags, *message)
        numbers = (ctypes.c_int64, ctypes.c_int64)
        for name, num_tensors in (("norm_forward", 4), ("norm_backward", 6)):
            function = self._functions[name] = getattr(library, f"relpos_{name}")
            function.argtypes = (*(ctypes.c_void_p,) * num_tensors, *numbers, *flags, *message)
        factors = (ctypes.c_int64, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_float, ctypes.c_int)
        function = self._functions["dropout"] = library.relpos_dropout
        function.argtypes = (*(ctypes.c_void_p,) * 2, *factors, *message)
        capabilities = torch.cpu.get_capabilities()
        has_bf16 = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
        self.multiplies_bf16 = bool(has_bf16 and library.relpos_has_bf16_products())

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias_table: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Causal attention.

        Args:
            query: (B, H, Q, D), fp32 or bf16.
            key, value: (B, G, K, D) in the same dtype.
            bias_table: (H, L) fp32.
            **options: `scaling`, `offset`, `window`, `key_mask`, `documents`, as `distance_bias_attention` takes them.

        Returns:
            (B, H, Q, D) output in the dtype of `query`, and the (B, H, Q) fp32 logarithm of the sum of exponentials;
            both 0 for a query without keys.

        Raises:
            RuntimeError: where it fails, with the reason.
        """
        out, lse = _like_layers(query), query.new_empty(query.shape[:3], dtype=torch.float32)
        tensors = {"query": query, "key": key, "value": value, "out": out}
        self._run("forward", tensors, {"lse": lse, "table": bias_table}, **options)
        return out, lse

    def backward(
        self,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        bias_table: torch.Tensor,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """→ the gradients of query, key, value and `bias_table`, each in its dtype. Arguments as in `forward`, and what
        that returned."""
        gradients = [_like_layers(x) for x in (query, key, value)]
        for gradient in gradients[1:]:  # no query sees the keys after the last one
            gradient[:, :, options["offset"] + query.shape[2] :] = 0
        sums = bias_table.new_empty(query.shape[0], *bias_table.shape)
        tensors = {"query": query, "key": key, "value": value, "out": out, "grad_out": grad_out}
        tensors |= dict(zip(("grad_query", "grad_key", "grad_value"), gradients))
        self._run("backward", tensors, {"lse": lse, "table": bias_table, "table_sums": sums}, **options)
        return *gradients, sums.sum(0)

    def norm_forward(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        """RMSNorm: weight · (x / sqrt(mean(x²) + eps), in the dtype of `x`), with the bits of operations of torch.

        Args:
            x: (..., C), contiguous, fp32 or bf16, not empty.
            weight: (C,), contiguous, fp32 or bf16.
            eps: a small number.

        Returns:
            (..., C) in the wider dtype of the two, and the (..., 1) fp32 factors of the rows.

        Raises:
            RuntimeError: where it fails, with the reason.
        """
        floats = x.float()
        squares = floats * floats if floats is x else floats.mul_(floats)
        rstd = torch.rsqrt(squares.mean(-1, keepdim=True) + eps)  # in the order in which torch adds
        dtype = torch.promote_types(x.dtype, weight.dtype)
        out = squares if dtype == torch.float32 else torch.empty_like(x)
        self._run_norm("norm_forward", (x, weight, rstd, out), x, weight)
        return out, rstd

    def norm_backward(
        self,
        grad_out: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        rstd: torch.Tensor,
        needs_x: bool = True,
        needs_weight: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """→ the gradients of `x` and `weight`, each in its dtype, or `None` where it is not needed. `grad_out` is
        contiguous; the other arguments as in `norm_forward`, and what that returned."""
        grad_out, rstd = grad_out.to(torch.promote_types(x.dtype, weight.dtype)), rstd.float()
        grad_x = torch.empty_like(x) if needs_x else None
        grad_weight = torch.empty_like(weight, dtype=torch.float32) if needs_weight else None
        self._run_norm("norm_backward", (grad_out, x, weight, rstd, grad_x, grad_weight), x, weight)
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype)

    def _run_norm(self, name: str, tensors: tuple, x: torch.Tensor, weight: torch.Tensor) -> None:
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        width = weight.numel()
        are_bf16 = (x.dtype == torch.bfloat16, weight.dtype == torch.bfloat16)
        self._call(name, *pointers, x.numel() // width, width, *are_bf16)

    def dropout(self, x: torch.Tensor, seed: int, threshold: int, scale: float) -> torch.Tensor:
        """→ each number times `scale`, or times 0 where its random word is below `threshold`.

        The words are those of Philox 4x32-10 under the key `seed`. Each 64 numbers take 16 counters, which begin at 0
        and go on by 1: first the first word of each counter, then the second of each, the third and the fourth.

        Args:
            x: contiguous, fp32 or bf16, not empty.
            seed: its last 64 bits count.
            threshold: from 0 to 2^32 - 1.
            scale: a number that the dtype of `x` holds.

        Raises:
            RuntimeError: where it fails, with the reason.
        """
        out = torch.empty_like(x)
        pointers = x.data_ptr(), out.data_ptr()
        self._call("dropout", *pointers, x.numel(), seed, threshold, scale, x.dtype == torch.bfloat16)
        return out

    def _run(
        self,
        name: str,
        tensors: dict[str, torch.Tensor],
        floats: dict[str, torch.Tensor],
        *,
        scaling: float,
        offset: int,
        window: int | None,
        key_mask: torch.Tensor | None,
        documents: torch.Tensor | None,
    ) -> None:
        query, key = tensors["query"], tensors["key"]
        slots = offset + query.shape[2]
        kept = {name: x if x.stride(-1) == 1 else x.contiguous() for name, x in tensors.items()}
        kept |= {name: x.contiguous() for name, x in floats.items()}
        if key_mask is not None:
            kept["key_mask"] = key_mask[:, :slots].contiguous()
        if documents is not None:
            kept["documents"] = _as_int32(documents[:, :slots]).contiguous()
        call = _Call(
            batch_size=query.shape[0],
            num_heads=query.shape[1],
            num_groups=key.shape[1],
            num_queries=query.shape[2],
            num_keys=slots,
            head_dim=query.shape[3],
            table_length=floats["table"].shape[1],
            key_mask_stride=slots,
            documents_stride=slots if documents is not None and documents.shape[0] > 1 else 0,
            offset=offset,
            window=slots if window is None else window,
            scaling=scaling,
        )
        for field, x in kept.items():
            setattr(call, field, _Tensor(x.data_ptr(), *x.stride()[:3]) if field in _TENSORS else x.data_ptr())
        is_bf16 = query.dtype == torch.bfloat16
        multiplies_bf16 = self.multiplies_bf16 and torch.backends.mkldnn.enabled  # torch has them in oneDNN alone
        self._call(name, call, is_bf16, multiplies_bf16)

    def _call(self, name: str, *arguments: Any) -> None:
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        if self._functions[name](*arguments, message, MESSAGE_BYTES):
            raise RuntimeError(message.value.decode(errors="replace"))


def load(folder: Path | None = None) -> Library:
    """→ the library, built first where it is not in the folder, `cache_folder()` of `build.py` by default.

    Raises:
        NativeError: where it cannot be built or loaded, with the reason.
    """
    return load_whole(Library, folder)


def _like_layers(x: torch.Tensor) -> torch.Tensor:
    """(B, H, N, D) laid out as the layers do, the heads of a token beside each other."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _as_int32(documents: torch.Tensor) -> torch.Tensor:
    """Numbers that are equal where those of the documents are."""
    if documents.dtype == torch.int32:
        return documents
    kept = documents.to(torch.int32)
    if torch.equal(kept.to(documents.dtype), documents):
        return kept
    return documents.unique(return_inverse=True)[1].to(torch.int32)
