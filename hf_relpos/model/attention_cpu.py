"""Attention on CPUs: torch's own kernel with a mask, what is fast on a processor, and threads for work in short pieces.

Shape letters: B batch, H query heads, G key and value heads, N tokens of a row, D head size, L length of a table.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils.import_utils import is_tracing

from .attention_kernel import TableCall, TableKernel


# private, but the one kernel of torch on CPUs that takes a mask and gives the logarithms that the backward pass needs
CPU_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


@functools.cache
def cpu_has_fast_bf16() -> bool:
    """Whether this CPU has matrix units for bf16 (AMX); without them products in bf16 take longer than in fp32."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def is_fast_on_cpu(query: torch.Tensor) -> bool:
    """Whether torch's kernel on this CPU is at its fastest in the dtype of `query`, which is not fp32."""
    is_bf16 = query.device.type == "cpu" and query.dtype == torch.bfloat16
    return is_bf16 and CPU_FLASH is not None and cpu_has_fast_bf16()


def is_line(bias_table: torch.Tensor) -> bool:
    """Whether an (H, L) table is a fixed −m · d in each head, so that the bias can be a value per key."""
    if bias_table.requires_grad or bias_table.shape[1] < 2:
        return False
    distance = torch.arange(bias_table.shape[1], device=bias_table.device, dtype=bias_table.dtype)
    return torch.equal(bias_table, bias_table[:, 1:2] * distance)


class KeyBiasKernel(TableKernel):
    """Causal attention with a table that `is_line`, on a CPU, by one call of torch's kernel without a bias per pair.

    −m · (N − 1 − j) for key j differs from −m · (i − j) by what all keys of query i share, which the softmax takes out.
    It grows with the position instead of the distance, and so does its rounding in fp32: m · N · 2^−24, far below that
    of bf16 inputs, but above that of fp32 ones.
    """

    name = "key_bias"
    is_operator = False

    @staticmethod
    def supports(query: torch.Tensor, key: torch.Tensor, bias_table: torch.Tensor, call: TableCall) -> bool:
        is_plain = call.is_causal and call.documents is None and call.window is None
        is_square = is_plain and query.shape[2] == key.shape[2]  # and so begins at slot 0
        return is_square and is_fast_on_cpu(query) and not is_tracing(query) and is_line(bias_table)

    @staticmethod
    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias_table: torch.Tensor, call: TableCall
    ) -> torch.Tensor:
        length, repeats = key.shape[2], query.shape[1] // key.shape[1]
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        mask = bias_table[:, :length].flip(1)[None, :, None]
        if call.key_mask is not None:
            mask = mask.masked_fill(~call.key_mask[:, None, None], -math.inf)
        mask = mask.expand(-1, -1, length, -1)
        return CPU_FLASH(query, key, value, 0.0, True, attn_mask=mask, scale=call.scaling)[0]


# --- threads


def num_workers(query: torch.Tensor) -> int:
    """How many threads share a pass: on a CPU as many as torch may use."""
    return torch.get_num_threads() if query.device.type == "cpu" else 1


def run_in_threads(function: Callable[[Any], Any], shares: Sequence[Any], device: torch.device) -> list[Any]:
    """→ `function` of each share, on a CPU each in a thread of its own, in the order of the shares.

    The threads are Python's, not those inside of each operation: an operation on a block is too short to be shared.
    """
    if device.type != "cpu" or len(shares) == 1:
        with torch.no_grad(), _flushed_denormals():
            return [function(share) for share in shares]
    is_inference = torch.is_inference_mode_enabled()

    def run(share: Any) -> Any:
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        with torch.inference_mode(is_inference), torch.no_grad():  # modes are a thread's own
            return function(share)

    num_threads = torch.get_num_threads()
    try:
        return list(_thread_pool(len(shares)).map(run, shares))
    finally:
        torch.set_num_threads(num_threads)  # what a thread sets holds for others too


# A pool is kept: the first products of matrices in a new thread take milliseconds
@functools.cache
def _thread_pool(num_workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_workers, thread_name_prefix="distance_bias")


if hasattr(os, "register_at_fork"):  # a forked process has none of its parent's threads
    os.register_at_fork(after_in_child=_thread_pool.cache_clear)


@contextmanager
def _flushed_denormals() -> Iterator[None]:
    """Numbers below 2^−126 are 0 in this thread: processors may take a hundred times as long for them, and the weights
    of many keys under a steep bias are such numbers."""
    were_flushed = float(torch.tensor(2.0**-140).mul_(1.0)) == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(were_flushed)
