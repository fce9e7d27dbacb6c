"""The cache of tokenised documents and trained tokenizers: files named by a hash of all that they depend on."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any


CACHE_VERSION = 1  # raise it when data/corpus.py or data/tokens.py change what they make


def digest(*parts: Any) -> str:
    """A hash of JSON values."""
    return hashlib.sha256(json.dumps([CACHE_VERSION, *parts], sort_keys=True).encode()).hexdigest()


def cache_root() -> Path:
    """The folder of this package in the cache of `datasets`."""
    import datasets  # takes a second, and hashes alone do not need it

    root = Path(datasets.config.HF_DATASETS_CACHE) / "hf_relpos"
    root.mkdir(parents=True, exist_ok=True)
    return root


def cache_path(kind: str, *parts: Any) -> Path:
    """Where something of a kind lies that depends on `parts`, JSON values."""
    return cache_root() / f"{kind}-{digest(kind, *parts)[:24]}"


def store(folder: Path, target: Path) -> None:
    """Moves a finished folder to its place in the cache; another process may have been first."""
    staged = folder.with_name(folder.name + "-done")
    shutil.copytree(folder, staged)
    try:
        os.replace(staged, target)
    except OSError:
        shutil.rmtree(staged)
