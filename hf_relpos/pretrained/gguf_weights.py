"""The weights of a GGUF file, dequantised one by one: names and order of rows as transformers has them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers import modeling_gguf_pytorch_utils as gguf_files

from ..file_reading import reading
from .sources import Source


ROWS_AT_A_TIME = 2**22  # numbers of a tensor that are dequantised together


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in the file; unlike the reader's own description it keeps nothing else of the file.

    Attributes:
        name: as the file has it.
        kind: how its numbers are quantised.
        shape: of what is made of it.
        offset: its first byte.
        dtype, row_size: what is stored, and how many of it make a row.
    """

    name: str
    kind: Any
    shape: tuple[int, ...]
    offset: int
    dtype: np.dtype
    row_size: int


class GgufWeights(Mapping[str, torch.Tensor]):
    """The weights of a GGUF file in fp32. Each is read when it is asked for, so that not more than one need be in
    memory; transformers itself holds all of them twice."""

    def __init__(self, source: Source) -> None:
        """Reads configuration, names and shapes; raises `ValueError` if the file cannot be read."""
        self._source, self._path = source, source.folder / source.gguf_file
        with reading(f"`model` {source.name!r} cannot be read"):
            self.config: PreTrainedConfig = AutoConfig.from_pretrained(source.folder, gguf_file=source.gguf_file)
            from gguf import GGUFReader

            reader = GGUFReader(self._path)
            (architecture,) = gguf_files.read_field(reader, "general.architecture")
            parsed = gguf_files.load_gguf_checkpoint(str(self._path))["config"]
            processor = gguf_files.TENSOR_PROCESSORS.get(architecture, gguf_files.TensorProcessor)
            self._processor = processor(config=parsed)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(self.config)
            self._names = gguf_files.get_gguf_hf_weights_map(model, self._processor)
            self._tensors: dict[str, StoredTensor] = {}
            self.shapes: dict[str, tuple[int, ...]] = {}
            for each in reader.tensors:
                shape, offset = tuple(map(int, each.shape[::-1])), int(each.data_offset)
                tensor = StoredTensor(each.name, each.tensor_type, shape, offset, each.data.dtype, each.data.shape[-1])
                # memory that is not touched: only the shape is asked for
                made = self._processed(tensor, np.empty(shape, np.float32))
                if made is not None:
                    self._tensors[made[0]], self.shapes[made[0]] = tensor, made[1].shape
        self.dtypes = dict.fromkeys(self._tensors, torch.float32)

    def _processed(self, tensor: StoredTensor, weights: np.ndarray) -> tuple[str, np.ndarray] | None:
        """→ name and weight as transformers has them; `None` for what it leaves out."""
        result = self._processor.process(
            weights=weights, name=tensor.name, tensor_key_mapping=self._names, parsed_parameters={"tensors": {}}
        )
        return (self._names[result.name], result.weights) if result.name in self._names else None

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        with reading(f"`model` {self._source.name!r}: {tensor.name!r} cannot be read"):
            _, weights = self._processed(tensor, self._dequantised(tensor))
            return torch.from_numpy(np.ascontiguousarray(weights))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _dequantised(self, tensor: StoredTensor) -> np.ndarray:
        """The numbers of a tensor, some rows at a time, and not through a map of the file, which stays in memory."""
        from gguf import dequantize

        made = np.empty(tensor.shape, np.float32)
        flat = made.reshape(-1, tensor.shape[-1])
        step = max(1, ROWS_AT_A_TIME // flat.shape[1])
        with self._path.open("rb") as file:
            file.seek(tensor.offset)
            for start in range(0, len(flat), step):
                size = min(step, len(flat) - start) * tensor.row_size
                part = np.fromfile(file, tensor.dtype, size).reshape(-1, tensor.row_size)
                flat[start : start + step] = dequantize(part, tensor.kind)
        return made
