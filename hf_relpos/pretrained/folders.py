"""Writing a folder of a model: as a whole or not at all, and one weight after the other."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import AutoTokenizer

from ..environment import writing
from ..file_reading import TOKENIZER_FILES, reading
from .sources import INDEX, Source


DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
GENERATION_CONFIG = "generation_config.json"


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """→ a folder to write to, which becomes `folder` at the end, or is deleted after an error.

    Raises:
        ValueError: if `folder` exists.
    """
    folder = Path(folder).absolute()
    if folder.exists():
        raise ValueError(f"{str(folder)!r} exists: choose another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    where = writing("the folder", folder)
    with where, tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as parent:
        part = Path(parent) / folder.name
        part.mkdir()
        yield part
        part.rename(folder)


def copy_generation_config(source: Source, folder: Path) -> None:
    """Copies the file, if there is one."""
    if (source.folder / GENERATION_CONFIG).is_file():
        shutil.copyfile(source.folder / GENERATION_CONFIG, folder / GENERATION_CONFIG)


def write_tokenizer(source: Source, folder: Path) -> None:
    """Writes the tokenizer and its chat template, if there is one, as one that needs no configuration of its model.

    Raises:
        ValueError: if it cannot be loaded.
    """
    if source.gguf_file is None and not any((source.folder / name).is_file() for name in TOKENIZER_FILES):
        return
    kwargs = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    with reading(f"the tokenizer of {source.name!r} cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(source.folder, **kwargs)
    tokenizer.save_pretrained(folder)


def write_weights(folder: Path, weights: dict[str, torch.Tensor], read: Callable[[str], torch.Tensor]) -> None:
    """Writes `model.safetensors`, or several files and their index, as transformers does.

    safetensors' own `save_file` needs all weights of a file in memory at once.

    Args:
        folder: where to.
        weights: name → a tensor on the meta device, for shape and dtype.
        read: name → the weight; called once for each.
    """
    split = split_torch_state_dict_into_shards(
        weights, max_shard_size="50GB", filename_pattern="model{suffix}.safetensors"
    )
    for name, names in split.filename_to_tensors.items():
        _write_file(folder / name, {each: weights[each] for each in names}, read)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, weights: dict[str, torch.Tensor], read: Callable[[str], torch.Tensor]) -> None:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    names = sorted(weights, key=lambda name: -weights[name].element_size())  # so that each begins at a multiple of it
    for name in names:
        start, end = end, end + weights[name].nbytes
        shape, dtype = list(weights[name].shape), DTYPE_NAMES[weights[name].dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(read(name).contiguous().view(-1).view(torch.uint8).numpy().data)
