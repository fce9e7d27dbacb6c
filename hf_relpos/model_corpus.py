"""The corpus of a saved model: recorded with it, found again where no data is named, and checked.

`training.json` holds which text it was, by names and hashes alone, since it is published. Where that text lies on this
machine stands beside it in `_local_corpus.json`, which is not.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from .data.arguments import BUILT_IN, READING_DEFAULTS, SOURCE_FLAGS
from .data.cache import digest, say
from .data.files import content_hash
from .environment import place_name, write_json, write_text
from .file_reading import read_json
from .results.training_record import non_default_fields, read_record
from .tasks.arguments import DataArguments


# transformers' own Trainer never pushes a file whose name begins so
LOCAL_RECORD = "_local_corpus.json"
NAME_IT = "name the data with --train_file, --validation_file, --test_file, --dataset_name or --task"
PLAIN_WORD = re.compile(r"[^/\\@=_<>{}]{1,24}")
OPENING = 48  # characters of a document that its record holds
MAX_FILES = 1000  # of a folder, whose hashes are kept one by one
RECORDED_FLAGS = ("task", "dataset_config_name", *SOURCE_FLAGS, *READING_DEFAULTS, "held_out_ends")
# flags that decide what the documents are; `streaming` decides only how they are read
TEXT_FLAGS = ("text_column", "document_separator", "validation_split_percentage")


def opening(splits: dict[str, Any]) -> str | None:
    """The first words of a document that is held out, or else of one to train on: a prompt that fits the corpus.

    Returns:
        at most `OPENING` characters of whole words on one line, up to the first that is no plain one, as a path, an
        address or a key; `None` where a document begins with no plain word.
    """
    split = next((splits[name] for name in ("validation", "test", "train") if name in splits), ())
    text = next((row["text"] for row in split), "")[: 4 * OPENING]
    words = (word for word in text.split() if word.isprintable())
    line = " ".join(takewhile(PLAIN_WORD.fullmatch, words))[: OPENING + 1]
    return (line if len(line) <= OPENING else line.rpartition(" ")[0]) or None


@dataclass(frozen=True)
class UsedCorpus:
    """A corpus or a task that was loaded.

    Attributes:
        record: what is published of it: `name`, `fingerprint` and that of each of its `splits`, `flags` with the names
            of files, `files` with a hash for each flag, what was `read`, and the `opening` of a document.
        places: flag → absolute path.
        files: flag → file → hash of its bytes.
    """

    record: dict[str, Any]
    places: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, corpus: Any, args: DataArguments) -> "UsedCorpus":
        """From a `Corpus` and the filled flags that it was loaded with."""
        places = {flag: os.path.abspath(os.path.expanduser(getattr(args, flag))) for flag in corpus.files}
        flags = {name: value for name in RECORDED_FLAGS if (value := getattr(args, name)) is not None}
        flags |= {flag: place_name(place) for flag, place in places.items()}
        record = {"name": corpus.name, "fingerprint": corpus.fingerprint, "splits": corpus.split_fingerprints}
        hashes = {flag: digest(list(files.items())) for flag, files in corpus.files.items()}
        hashes |= {flag: next(iter(files.values())) for flag, files in corpus.files.items() if len(files) == 1}
        record |= {"flags": flags, "files": hashes, "read": corpus.read.to_dict(), "opening": opening(corpus.splits)}
        return cls(record, places, corpus.files)

    @classmethod
    def of_task(cls, name: str, fingerprint: str) -> "UsedCorpus":
        """From the name of a synthetic task and the fingerprint of its rows."""
        return cls({"name": f"task {name}", "fingerprint": fingerprint, "flags": {"task": name}, "read": {}})

    def save(self, folder: str | Path) -> None:
        """Writes, to a model's folder, where the text lies on this machine, and a `.gitignore` that keeps it there.

        The Hub heeds that file when a whole folder is uploaded, as git does.
        """
        root = Path(os.path.abspath(folder))
        places = {flag: [place, os.path.relpath(place, root)] for flag, place in self.places.items()}
        files = {flag: files for flag, files in self.files.items() if len(files) <= MAX_FILES}
        ignored = root / ".gitignore"
        lines = ignored.read_text(encoding="utf-8").splitlines() if ignored.is_file() else []
        if LOCAL_RECORD not in lines:
            write_text(ignored, "\n".join([*lines, LOCAL_RECORD, ""]))
        write_json(root / LOCAL_RECORD, {"corpus": self.record, "places": places, "files": files})


@dataclass(frozen=True)
class ModelCorpus:
    """What a saved model tells of the corpus that it was trained on.

    Attributes:
        model: its folder or its name on the Hub; `None` for one that is trained from scratch.
        record: as in `UsedCorpus`; empty if there is none.
        places: flag → paths on this machine; empty for a model that comes from elsewhere.
        files: as in `UsedCorpus`.
        crosses: of a record of version 0.1.0, which has no flags of the corpus, whether attention crosses documents.
    """

    model: str | None
    record: dict[str, Any] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    crosses: bool | None = None

    @classmethod
    def read(cls, model: str | None) -> "ModelCorpus":
        """Of a saved model, a checkpoint or a model of the Hub."""
        if model is None:
            return cls(None)
        training, root = read_record(model), os.path.abspath(model)
        record = dict(training.get("corpus") or {})
        # a damaged file of places tells nothing: the data must be named then
        with suppress(OSError, ValueError, LookupError, AttributeError, TypeError):
            local = read_json(Path(model) / LOCAL_RECORD)
            corpus, files = dict(local["corpus"]), {flag: dict(files) for flag, files in local["files"].items()}
            places = {flag: [os.path.join(root, path) for path in paths] for flag, paths in local["places"].items()}
            if not record or record.get("fingerprint") == corpus["fingerprint"]:
                return cls(model, record or corpus, places, files)
        return cls(model, record, crosses=(training.get("flags") or {}).get("cross_document_attention"))

    @property
    def name(self) -> str | None:
        return self.record.get("name")

    def fill(self, args: DataArguments) -> DataArguments:
        """→ the flags with what is not named: where no flag names the data, it is that of the model.

        `given` of the copy holds what was named.

        Raises:
            ValueError: if it is not named, and the model's is not here.
        """
        given = args.given if args.given is not None else non_default_fields(args)
        flags = {} if _is_named(given) else self._flags()
        # how attention goes over documents belongs to the model, whatever it reads
        crosses = (self.record.get("flags") or {}).get("cross_document_attention", self.crosses)
        flags |= {} if crosses is None else {"cross_document_attention": crosses}
        filled = replace(args, **{**flags, **given}).filled()
        filled.given = given
        return filled

    def load(self, args: DataArguments) -> tuple[Any, UsedCorpus]:
        """The corpus that filled flags name.

        Returns:
            a `Corpus`, and what to record of it.

        Raises:
            ValueError: as `load_corpus`; if it is the model's own, also where it is not what it was, naming the file.
        """
        from .data.corpus import load_corpus  # the data libraries take a second

        try:
            corpus = load_corpus(args)
        except ValueError as error:
            if not self.files or _is_named(args.given or {}):
                raise
            places = {flag: getattr(args, flag) for flag in self.files}
            raise self._changed(next(self._differences(self._hash_again(places), places), str(error))) from error
        used = UsedCorpus.of(corpus, args)
        self.check(used, args)
        return corpus, used

    def check(self, used: UsedCorpus, args: DataArguments) -> None:
        """Raises `ValueError`, naming the file, if the model's corpus was not named and is not what it was."""
        expected, found = self.record.get("fingerprint"), used.record["fingerprint"]
        if _is_named(args.given or {}) or not self.record or (expected and found == expected):
            return
        if not expected:
            say(f"the corpus {self.name!r} of {self.model!r} is streamed: nothing tells whether it is as it was")
            return
        if used.record.get("files"):
            if used.record["files"] == self.record.get("files"):
                return  # read in another way, as was asked for
        elif not found or not self._reads_alike(used):
            return  # a stream, or other columns of a data set that cannot be told from another
        unknown = f"its fingerprint is {found[:12]}, expected {expected[:12]}"
        raise self._changed(next(self._differences(used.files, used.places), unknown))

    def _changed(self, reason: str) -> ValueError:
        return ValueError(
            f"the corpus {self.name!r} of {self.model!r} has changed since the training: {reason.rstrip('.')}; restore "
            f"it, or {NAME_IT}."
        )

    def is_same(self, used: UsedCorpus, split: str) -> bool:
        """Whether a split of a corpus is that of the corpus that the model was trained on, as far as both tell."""
        ours, theirs = self.record, used.record
        prints = [(record.get("splits") or {}).get(split) for record in (ours, theirs)]
        if all(prints):
            same = prints[0] == prints[1]
        else:
            same = bool(ours.get("fingerprint")) and ours["fingerprint"] == theirs["fingerprint"]
        if same or not ours.get("flags"):
            return same
        if theirs.get("files"):
            return theirs["files"] == ours.get("files") and self._reads_alike(used)
        return not theirs["fingerprint"] and theirs["name"] == ours["name"] and theirs["flags"] == ours["flags"]

    def _reads_alike(self, used: UsedCorpus) -> bool:
        flags = self.record.get("flags")
        return flags is None or all(flags.get(name) == used.record["flags"].get(name) for name in TEXT_FLAGS)

    def _flags(self) -> dict[str, Any]:
        """→ the flags that read the model's corpus again."""
        if self.model is None:
            return {}
        if not self.record:
            say(f"{self.model!r} has no record of its corpus: the built-in corpus {BUILT_IN} is used, as another one")
            return {}
        flags = {name: value for name, value in (self.record.get("flags") or {}).items() if name in RECORDED_FLAGS}
        if "flags" not in self.record:
            if self.name != BUILT_IN and not str(self.name).startswith("task "):
                raise self._not_here()
            return {"task": self.name.removeprefix("task ")} if self.name != BUILT_IN else {}
        return flags | {flag: self._find(flag) for flag in self.record.get("files", {})}

    def _find(self, flag: str) -> str:
        """→ where the file or folder of a flag lies; a folder with text and model may have been moved."""
        places = list(dict.fromkeys(map(os.path.normpath, self.places.get(flag, []))))
        if not places:
            raise self._not_here()
        found = [place for place in places if os.path.exists(place)]
        if not found:
            expected = self.record["files"][flag][:12]
            raise ValueError(
                f"the corpus {self.name!r} of {self.model!r} is gone: `{flag}` {places[0]!r} does not exist (expected "
                f"content {expected}); put it back, or {NAME_IT}."
            )
        return next((place for place in found if len(found) == 1 or self._is_whole(flag, place)), found[0])

    def _is_whole(self, flag: str, place: str) -> bool:
        return self._hash_again({flag: place})[flag] == self.files.get(flag, {})

    def _hash_again(self, places: dict[str, str]) -> dict[str, dict[str, str]]:
        """→ the hashes now of the files that were read in training, without those that are gone."""
        paths = {
            flag: {name: _file(place, name) for name in self.files.get(flag, {})} for flag, place in places.items()
        }
        return {
            flag: {name: content_hash(path) for name, path in named.items() if path.is_file()}
            for flag, named in paths.items()
        }

    def _differences(self, files: dict[str, dict[str, str]], places: dict[str, str]) -> Iterator[str]:
        """Says of each file what is not as it was."""
        for flag, known in self.files.items():
            found = files.get(flag, {})
            for name in sorted({*known, *found}):
                path = str(_file(places.get(flag, ""), name))
                if name not in known:
                    yield f"`{flag}` holds a new file, {path!r}"
                elif name not in found:
                    yield f"`{flag}` lacks {path!r} (expected sha256 {known[name][:12]})"
                elif known[name] != found[name]:
                    yield f"`{flag}` {path!r} has sha256 {found[name][:12]}, expected {known[name][:12]}"

    def _not_here(self) -> ValueError:
        files = ", ".join(f"{flag} {self.record['flags'][flag]!r}" for flag in self.record.get("files", {}))
        return ValueError(
            f"{self.model!r} was trained on {self.name!r}{f' ({files})' if files else ''}, and its record does not say "
            f"where that lies on this machine: {NAME_IT}."
        )


def _file(place: str, name: str) -> Path:
    """→ a file of a folder, or the file that was named itself."""
    return Path(place, name) if os.path.isdir(place) else Path(place)


def _is_named(given: dict[str, Any]) -> bool:
    return any(name in given for name in ("task", "dataset_config_name", *SOURCE_FLAGS))
