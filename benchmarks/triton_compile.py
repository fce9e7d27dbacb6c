#!/usr/bin/env python
"""Compiles the Triton kernels for cards that need not be there, and counts what they take.

python -m benchmarks.triton_compile --output_dir output/triton

Every kernel is launched as a model launches it, on a card that only pretends: it is compiled and kept. Writes
compiled.json with the shared memory, registers, spilled bytes and instructions per score of each, and compiled.md.
What the folder holds of the same code and versions is kept and not compiled again.
Fails if a kernel takes more shared memory than its card has, or spills registers on sm_90 in bf16.
"""

import hashlib
import json
import re
import subprocess
import tempfile
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from hf_relpos.cli import command, parse_arguments
from hf_relpos.environment import package_version, write_text
from hf_relpos.model import attention_triton, attention_triton_backward, attention_triton_sizes, attention_triton_tiles
from hf_relpos.model.attention_kernel import TableCall
from hf_relpos.model.attention_triton_backward import delta_kernel, key_value_kernel, query_kernel, table_kernel
from hf_relpos.model.attention_triton_sizes import SHARED_MEMORY
from hf_relpos.model.attention_triton_tiles import forward_kernel
from hf_relpos.results.result_file import markdown


HEAD_SIZES = (32, 64, 80, 96, 128, 256)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "tf32": torch.float32}
MASKS = ("causal", "masks and groups")
BATCH_SIZE, NUM_HEADS, LENGTH = 4, 16, 2048
COLUMNS = (
    *("masks", "dtype", "card", "head_size", "kernel", "queries", "keys", "warps", "stages"),
    *("shared", "available", "registers", "stack", "tensor_cores", "whole", "edge"),
)
KERNELS = (forward_kernel, delta_kernel, key_value_kernel, query_kernel, table_kernel)
TENSOR_CORES = {"HGMMA": "wgmma", "HMMA": "mma", "FFMA": None}  # instruction → what it runs on


@dataclass
class CompileArguments:
    """What is compiled."""

    output_dir: str = field(metadata={"help": "Folder for compiled.json and compiled.md."})
    cards: list[int] = field(
        default_factory=lambda: list(SHARED_MEMORY), metadata={"help": "Compute capabilities, 90 for sm_90."}
    )
    head_sizes: list[int] = field(default_factory=lambda: list(HEAD_SIZES), metadata={"help": "Head sizes."})
    dtypes: list[str] = field(
        default_factory=lambda: list(DTYPES),
        metadata={"help": f"Some of {', '.join(DTYPES)}; tf32 is float32 where torch may use tensor cores for it."},
    )
    masks: list[str] = field(
        default_factory=lambda: list(MASKS),
        metadata={"help": "causal alone, or masks and groups: padding, documents, a window and grouped queries too."},
    )

    def __post_init__(self) -> None:
        for name, allowed in (("cards", SHARED_MEMORY), ("dtypes", DTYPES), ("masks", MASKS)):
            unknown = [value for value in getattr(self, name) if value not in allowed]
            if unknown:
                raise ValueError(f"`{name}` must be some of {list(allowed)}, got {unknown[0]!r}.")
        if not self.head_sizes or not all(1 <= size <= 256 for size in self.head_sizes):
            raise ValueError(f"`head_sizes` must be numbers from 1 to 256, got {self.head_sizes}.")


class PretendedCard:
    """A driver of Triton for a card that is not there: what is launched is compiled and kept, not run.

    Attributes:
        kept: source, metadata, compiled code, `None` if it asks for too much shared memory, and grid of each kernel.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.kept: list[list[Any]] = []
        self.utils = self

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # what Triton compiled is kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[device]}

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        kept = [source, metadata, None, None]
        self.kept.append(kept)

        def launch(*arguments: Any) -> None:
            kept[3] = arguments[:3]

        return launch

    def load_binary(self, name: str, code: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        self.kept[-1][2] = code
        return 0, 0, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass


@contextmanager
def pretended_card(capability: int) -> Iterator[PretendedCard]:
    """Triton compiles for a card of this capability, and our kernels take the tiles that it has room for."""
    from triton.runtime import driver

    card, before = PretendedCard(capability), driver._active
    with patch.object(attention_triton, "shared_memory", lambda device: SHARED_MEMORY[capability]):
        driver.set_active(card)
        try:
            yield card
        finally:
            driver._active = before


def compile_kernels(capability: int, head_size: int, dtype: str, masks: str) -> list[dict[str, Any]]:
    """Forward and backward, deterministic and fast, on tensors without content.

    Returns:
        a record for each kernel: `shared` bytes that it asks for, `available` on the card and, if it fits, the rest.
    """
    where = {"device": "meta", "dtype": DTYPES[dtype]}
    num_groups = NUM_HEADS if masks == "causal" else NUM_HEADS // 2
    query, key, value, grad_out = (
        torch.empty(BATCH_SIZE, LENGTH, num_heads, head_size, **where).transpose(1, 2)
        for num_heads in (NUM_HEADS, num_groups, num_groups, NUM_HEADS)
    )
    table = torch.empty(NUM_HEADS, LENGTH, device="meta")
    call = TableCall(0.1)
    if masks != "causal":
        rows = torch.empty(BATCH_SIZE, LENGTH, device="meta")
        call = TableCall(0.1, key_mask=rows.bool(), documents=rows.long(), window=500)
    arguments = (query, key, value, table, call)
    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        with pretended_card(capability) as card:
            for kernel in KERNELS:
                kernel.device_caches.clear()  # one that another call compiled too counts here as well
            out, lse = attention_triton.triton_forward(*arguments)
            for is_deterministic in (True, False):
                attention_triton.triton_backward(grad_out, query, key, value, out, lse, table, call, is_deterministic)
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision
    about = {"masks": masks, "dtype": dtype, "card": capability, "head_size": head_size}
    return [{**about, **_count(*kept), "available": SHARED_MEMORY[capability]} for kept in card.kept]


def source_hash() -> str:
    """Of what is counted: the code of the kernels and the sizes of their tiles, without comments and docstrings."""
    digest, kept = hashlib.sha256(), (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
    for module in (attention_triton_tiles, attention_triton_backward, attention_triton_sizes):
        begins = True  # whether the next token is the first of a statement
        with open(module.__file__, "rb") as file:
            for token in tokenize.tokenize(file.readline):
                if token.type in kept and not (begins and token.type == tokenize.STRING):
                    digest.update(f"{token.string}\n".encode())
                if token.type not in (tokenize.COMMENT, tokenize.NL):
                    begins = token.type not in kept
    return digest.hexdigest()[:16]


# --- the file


def read_compiled(path: Path) -> dict[str, Any]:
    """compiled.json: `versions`, `sources` and `records`, which stand there as rows of numbers, one for each kernel."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    rows = (zip(stored["columns"], row, strict=True) for row in stored["rows"])
    records = [{name: value for name, value in row if value is not None} for row in rows]
    return {"versions": stored["versions"], "sources": stored["sources"], "records": records}


def write_compiled(path: Path, result: dict[str, Any]) -> None:
    """What `read_compiled` reads, with a line for each kernel."""
    head = {"versions": result["versions"], "sources": result["sources"], "columns": COLUMNS}
    rows = [[record.get(name) for name in COLUMNS] for record in result["records"]]
    rows = [json.dumps(row, separators=(",", ":")) for row in rows]
    write_text(path, json.dumps(head)[:-1] + ', "rows": [\n' + ",\n".join(rows) + "\n]}\n")


def compile_all(args: CompileArguments, path: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Compiles what the file at `path` does not hold yet, and stores after each head size.

    Args:
        about: `versions` and `sources`; a file of others is replaced.

    Returns:
        all records of the file.
    """
    result = {**about, "records": []}
    if path.exists() and about.items() <= (stored := read_compiled(path)).items():
        result = stored
    names = ("masks", "dtype", "card", "head_size")
    done = {tuple(record[name] for name in names) for record in result["records"]}
    for masks, dtype, card, head_size in product(args.masks, args.dtypes, args.cards, args.head_sizes):
        if (masks, dtype, card, head_size) in done:
            continue
        records = compile_kernels(card, head_size, dtype, masks)
        result["records"] += records
        write_compiled(path, result)
        print(f"{masks}, {dtype}, sm_{card}, head size {head_size}: {len(records)} kernels", flush=True)
    return result["records"]


# --- counting


def _count(source: Any, metadata: Any, code: bytes | None, grid: tuple[int, int, int] | None) -> dict[str, Any]:
    names = [parameter.name for parameter in source.fn.params]
    constants = {names[path[0]]: value for path, value in source.constants.items()}
    name = source.fn.__name__
    queries = constants.get("BLOCK_Q", constants.get("BLOCK"))
    keys = constants.get("BLOCK_K", constants.get("BLOCK"))
    kernel = name.removesuffix("_kernel") + (" and table" if constants.get("ADD_TABLE") else "")
    record = {"kernel": kernel, "queries": queries, "keys": keys, "warps": metadata.num_warps}
    record |= {"stages": metadata.num_stages, "shared": metadata.shared, "grid": grid}
    if code is None:
        return record
    usage, instructions, loops = _disassemble(code)
    record |= {"registers": int(re.search(r"REG:(\d+)", usage)[1]), "stack": int(re.search(r"STACK:(\d+)", usage)[1])}
    used = [instruction for instruction in TENSOR_CORES if instruction in set(map(_operation, instructions))]
    if keys is None or not used:
        return record
    record["tensor_cores"] = TENSOR_CORES[used[0]]
    counts = [len(loop) for loop in loops if used[0] in map(_operation, loop) and len(loop) > 40]
    per_thread = queries * keys / (32 * metadata.num_warps)  # scores of a tile
    if counts:
        # loops with masks and bounds are longer than those without
        record |= {"whole": round(min(counts) / per_thread, 1), "edge": round(max(counts) / per_thread, 1)}
    return record


def _disassemble(code: bytes) -> tuple[str, list[str], list[list[str]]]:
    """→ what the kernel uses, its instructions, and those of its innermost loops."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        listing = _output(knobs.nvidia.nvdisasm.path, "-c", file.name)
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1].strip())
    spans = []
    for index, instruction in enumerate(instructions):
        target = re.search(r"BRA\S*\s.*?`\((\.L\w+)\)", instruction)
        if target and labels[target[1]] <= index:
            spans.append((labels[target[1]], index))
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return usage, instructions, [instructions[first : last + 1] for first, last in inner]


def _output(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def _operation(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


def faults(records: list[dict[str, Any]]) -> list[str]:
    """What must not be, a line for each: too much shared memory, spills on sm_90 in bf16."""
    found = []
    for record in records:
        what = " ".join(f"{name} {record[name]}" for name in ("kernel", "card", "head_size", "dtype", "masks"))
        if record["shared"] > record["available"]:
            found.append(f"{what}: {record['shared']} bytes of shared memory of {record['available']}")
        elif record["card"] == 90 and record["dtype"] == "bfloat16" and record["stack"]:
            found.append(f"{what}: {record['stack']} bytes of registers spilled")
    return found


# --- tables


def count_table(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    """Markdown: instructions per score of one thread in the longest loop of each kernel, sm_90 in bf16, causal."""
    head = ["kernel", "head size", "before", "whole tiles", "other tiles", "tensor cores", "registers", "shared memory"]
    rows, fields = [head], {"card": 90, "dtype": "bfloat16", "masks": "causal"}
    for old in before:
        wanted = fields | {name: old[name] for name in ("kernel", "head_size")}
        for new in (record for record in after if wanted.items() <= record.items()):
            cores = f"{old['tensor_cores']} → {new['tensor_cores']}"
            counts = [old["whole"], new["whole"], new["edge"], cores, new["registers"], f"{new['shared']:,}"]
            rows.append([str(cell) for cell in (new["kernel"].replace("_", " and "), new["head_size"], *counts)])
    return markdown(rows)


def size_table(records: list[dict[str, Any]]) -> str:
    """Markdown: the most shared memory, registers and spilled bytes of any kernel, by card and dtype."""
    head = ["card", "dtype", "head sizes", "kernels", "shared memory", "of", "registers", "spilled bytes"]
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["card"], record["dtype"]), []).append(record)
    rows = [head]
    for card, dtype in sorted(groups, key=lambda group: (group[0], list(DTYPES).index(group[1]))):
        found = groups[card, dtype]
        sizes = ", ".join(map(str, sorted({record["head_size"] for record in found})))
        most = [max(record.get(name, 0) for record in found) for name in ("shared", "available", "registers", "stack")]
        rows.append([f"sm_{card}", dtype, sizes, str(len(found)), *(f"{number:,}" for number in most)])
    return markdown(rows)


@command
def main() -> None:
    (args,) = parse_arguments((CompileArguments,), __doc__)
    torch.set_num_threads(1)
    if attention_triton.triton is None or attention_triton.triton.knobs.runtime.interpret:
        raise ValueError("This needs Triton, without its interpreter: pip install triton, and TRITON_INTERPRET unset.")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"versions": {name: package_version(name) for name in ("torch", "triton")}, "sources": source_hash()}
    records = compile_all(args, folder / "compiled.json", about)
    text = size_table(records)
    (folder / "compiled.md").write_text(f"{text}\n", encoding="utf-8")
    print(text)
    if found := faults(records):
        raise ValueError(f"{len(found)} kernels do not fit; the first: {found[0]}.")


if __name__ == "__main__":
    main()
