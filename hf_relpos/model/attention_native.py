"""Attention with a table of the distances in C++, which the package `hf_relpos` brings along: a saved folder uses it
where the package is installed, and computes in operations of torch elsewhere.
"""

import functools
import importlib
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

import torch
from transformers.utils import logging

from .attention_kernel import TableCall, TableKernel
from .attention_torch import block_backward, block_forward
from .fused_dropout import check_dropout, has_dropout
from .fused_norm import check_norm, has_norm


logger = logging.get_logger(__name__)

PACKAGE, PART = "hf_relpos", "native"
INTERFACE = 1  # of `hf_relpos.native`, whose version may be another than that of this file
SWITCH = "HF_RELPOS_NATIVE"


class NativeKernel(TableKernel):
    """Causal attention on CPUs in fp32 and bf16, forward and backward, by `hf_relpos.native`."""

    name = "native"

    @staticmethod
    def supports(query: torch.Tensor, key: torch.Tensor, bias_table: torch.Tensor, call: TableCall) -> bool:
        if query.device.type != "cpu" or query.dtype not in (torch.float32, torch.bfloat16) or not call.is_causal:
            return False
        return native_is_ready()

    @staticmethod
    def forward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias_table: torch.Tensor, call: TableCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        library = native_library()
        # a graph that was traced elsewhere may ask for it
        run = block_forward if library is None else functools.partial(_forward, library)
        return run(query, key, value, bias_table, call)

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
        library = native_library()
        run = block_backward if library is None else functools.partial(_backward, library)
        return run(grad_out, query, key, value, out, lse, bias_table, call)


def _options(call: TableCall) -> dict[str, Any]:
    names = ("scaling", "offset", "window", "key_mask", "documents")
    return {name: getattr(call, name) for name in names}


def _forward(library: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *tensors, call = arguments
    return library.forward(*tensors, **_options(call))


def _backward(library: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    *tensors, call = arguments
    return library.backward(*tensors, **_options(call))


# --- the library


@torch.compiler.assume_constant_result
def native_is_ready() -> bool:
    """Whether this process has the native kernel; builds it where that has not been done."""
    return native_library() is not None


@functools.cache
def native_library() -> Any | None:
    """→ `hf_relpos.native.Library`, or `None` where there is none; if that is no choice of the user's, says why."""
    if os.environ.get(SWITCH) == "0" or sys.platform != "linux":
        return None
    native = _native_module()
    if native is None:
        return None
    try:
        library = native.load()
        _check(library)
    except (native.NativeError, RuntimeError) as error:
        logger.warning(
            "No native attention, norm and dropout, which are faster than operations of torch: "
            f"{error}. {SWITCH}=0 skips them."
        )
        return None
    return library


def _native_module() -> ModuleType | None:
    """→ `hf_relpos.native`, without importing the package itself, which registers its models; `None` if it is not
    installed, or another version of it."""
    name = f"{PACKAGE}.{PART}"
    try:
        native = importlib.import_module(name) if {PACKAGE, name} & sys.modules.keys() else _native_beside(name)
    except ImportError:
        return None
    return native if native is not None and native.INTERFACE == INTERFACE else None


def _native_beside(name: str) -> ModuleType | None:
    """→ the module out of the folder of the package, which stays as it is."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations or () if spec is not None else ()
    for folder in (os.path.join(folder, PART) for folder in folders):
        file = os.path.join(folder, "__init__.py")
        if os.path.isfile(file):
            spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[folder])
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    return None


def _check(library: Any) -> None:
    """Compares what is native with operations of torch, on small inputs with all that a call can have.

    Raises:
        RuntimeError: if it fails, or if they differ by more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    query, grad_out = torch.randn(2, 2, 4, 70, 24, generator=generator)
    key, value = torch.randn(2, 2, 2, 90, 24, generator=generator)
    table, key_mask = torch.randn(4, 60, generator=generator), torch.rand(2, 90, generator=generator) > 0.2
    documents = (torch.arange(90) > 40).long().expand(2, -1)
    for call in (TableCall(0.2, True, 15, key_mask, documents, 60), TableCall(0.2, True, 15, None, None, 60)):
        inputs = query, key, value, table
        out, lse = block_forward(*inputs, call)
        expected = out, lse, *block_backward(grad_out, query, key, value, out, lse, table, call)
        for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
            cast = [x.to(dtype) for x in (query, key, value)]
            out, lse = _forward(library, *cast, table, call)
            found = out, lse, *_backward(library, grad_out.to(dtype), *cast, out, lse, table, call)
            worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected))
            if not worst < bound:
                raise RuntimeError(f"it is off by {worst:.1e} in {dtype}")
    if has_norm(library):  # a package that is older has none
        check_norm(library)
    if has_dropout(library):
        check_dropout(library)
