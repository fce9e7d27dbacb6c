"""Where a pretrained model lies, a folder, a repository of the Hub or a GGUF file, and its weights, read one by one."""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, constants, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from ..file_reading import no_model, reading


WHOLE, INDEX, CARD = "model.safetensors", "model.safetensors.index.json", "README.md"
# what is downloaded; nothing among it runs code when it is read
DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", CARD]
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Source:
    """A pretrained model.

    Attributes:
        name: what the user called it.
        folder: where its files lie.
        gguf_file: the name of its GGUF file in the folder, if it is one.
        base_model: its repository on the Hub, where that is known.
        revision: the commit of the repository, where that is known.
        license: as its card states it.
    """

    name: str
    folder: Path
    gguf_file: str | None = None
    base_model: str | None = None
    revision: str | None = None
    license: str | None = None


def find_source(name: str | Path, revision: str | None = None) -> Source:
    """The pretrained model of a name; a repository of the Hub is downloaded to its cache.

    Args:
        name: of a folder, of a GGUF file, or of a repository, "owner/name".
        revision: branch, tag or commit of a repository.

    Raises:
        ValueError: if there is none, or if it cannot be downloaded.
    """
    name, path = str(name), Path(name)
    if revision is not None and path.exists():
        raise ValueError(f"`revision` is for repositories of the Hub, got {revision!r} with the path {name!r}.")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"`model` {name!r} must be a folder, a GGUF file or a repository of the Hub.")
        return Source(name, path.parent, path.name)
    if not path.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ValueError(f"`model` {name!r} is not a folder.")
        if not constants.HF_HUB_OFFLINE:
            print(f"{name} is no folder here: asking the Hub for it", file=sys.stderr, flush=True)
        with hub_errors(name):
            path = Path(snapshot_download(name, revision=revision, allow_patterns=DOWNLOADED))
    elif not (path / "config.json").is_file():
        files = sorted(file.name for file in path.glob("*.gguf"))
        if len(files) == 1:
            return Source(name, path, files[0])
    if not (path / "config.json").is_file():
        raise ValueError(f"`model` {name!r} is {no_model(path)}.")
    cached = re.search(r"models--(.+)/snapshots/([0-9a-f]{40})$", str(path.absolute()))
    base_model, commit = (cached[1].replace("--", "/", 1), cached[2]) if cached else (None, None)
    return Source(name, path, None, base_model, commit, _license(path))


def read_config(source: Source) -> dict[str, Any]:
    """config.json of a folder; raises `ValueError` if it cannot be read."""
    with reading(f"`model` {source.name!r} cannot be read"):
        return dict(PreTrainedConfig.get_config_dict(source.folder)[0])


def _license(folder: Path) -> str | None:
    if not (folder / CARD).is_file():
        return None
    try:
        found = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data.license
    except ValueError:
        return None
    return found if isinstance(found, str) else None


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turns what the Hub and the way to it can do into a `ValueError` of one line."""
    try:
        yield
    except GatedRepoError as error:
        raise ValueError(
            f"`model` {name!r} is gated: accept its conditions on its page, and log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"`revision`: {name!r} has no such branch, tag or commit.") from error
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        if not isinstance(error, LocalEntryNotFoundError):
            raise ValueError(f"`model` {name!r} is no folder and no repository of the Hub that you may see.") from error
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached for it"
        raise ValueError(f"`model` {name!r} is no folder, and {why}.") from error
    except OfflineModeIsEnabled as error:
        raise ValueError(f"`model` {name!r} is no folder, and HF_HUB_OFFLINE is set.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise ValueError(f"`model` {name!r} cannot be downloaded: the Hub answers HTTP {status}.") from error
    except (HTTPError, ConnectionError) as error:
        raise ValueError(f"`model` {name!r} cannot be downloaded: {type(error).__name__}.") from error


class SafetensorsWeights(Mapping[str, torch.Tensor]):
    """The weights of a folder. Each is read when it is asked for, so that not more than one need be in memory."""

    def __init__(self, source: Source) -> None:
        """Reads names, shapes and dtypes; raises `ValueError` if a file is missing or damaged."""
        self._source = source
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for path in _weight_files(source):
            with self._opened(path) as tensors:
                for name in tensors.keys():
                    part = tensors.get_slice(name)
                    self._files[name], self.shapes[name] = path, tuple(part.get_shape())
                    self.dtypes[name] = DTYPES.get(part.get_dtype(), torch.uint8)

    def __getitem__(self, name: str) -> torch.Tensor:
        with self._opened(self._files[name]) as tensors:  # anew for each: what a file has mapped stays in memory
            return tensors.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    @contextmanager
    def _opened(self, path: Path) -> Iterator[Any]:
        try:
            with safe_open(path, "pt") as tensors:
                yield tensors
        except SafetensorError as error:
            raise ValueError(f"`model` {self._source.name!r}: {path.name!r} cannot be read: {error}") from error


def _weight_files(source: Source) -> list[Path]:
    folder, index = source.folder, source.folder / INDEX
    if not index.is_file():
        if not (folder / WHOLE).is_file():
            raise ValueError(f"`model` {source.name!r} holds no weights as safetensors: {WHOLE!r} is missing.")
        return [folder / WHOLE]
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"`model` {source.name!r}: {INDEX!r} cannot be read: it must map weights to files.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"`model` {source.name!r} is not whole: {name!r} is missing.")
    return [folder / name for name in names]
