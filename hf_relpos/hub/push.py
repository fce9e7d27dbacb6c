"""Publishing: a saved model, or one in training, is pushed to the Hub whole, in one commit."""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from ..environment import writing
from ..file_reading import parse_json, read_json, read_text_file
from ..results.training_record import TRAINING_RECORD
from .leaks import check_inside
from .model_card import CARD, is_generated
from .repository import (
    FILES,
    INDEX,
    PICKLES,
    WEIGHTS,
    check_weights,
    folder_results,
    repository_files,
)


logger = logging.getLogger(__name__)

# files that a push deletes from the repository if it does not bring them
REPLACED_FILES = (WEIGHTS, "*.index.json", "*_relpos.py", "position*.py", "scheme_*.py", "attention_*.py", *PICKLES)
REASONS = {
    401: "the token is not valid; `hf auth login` stores one",
    403: "the token has no right to write there",
    404: "there is no such repository, or the token may not see it",
    409: "the name is taken",
    412: "somebody else wrote to it in the meantime",
    413: "a file is too large",
    429: "too many requests",
    507: "there is no space left",
}
TRANSIENT_STATUS = (408, 412, 429)
# fields of its record that tell one run from another
RUN_IDENTITY = (
    "seed",
    "data_seed",
    "shape",
    "corpus",  # of which the name and the fingerprint
    "base_model",
    "position_start_augmentation",
    "position_sampling",
)


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turns whatever the Hub or the way to it can do into a `ValueError` of one line, without signed addresses."""
    hub_logger = logging.getLogger("huggingface_hub")
    level = hub_logger.level
    hub_logger.setLevel(logging.ERROR)  # its warnings hold such addresses
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ValueError(f"{repo_id!r} cannot be reached: HF_HUB_OFFLINE is set.") from error
    except (HTTPError, ConnectionError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise ValueError(f"the push to {repo_id!r} was not completed: {_reason(cause)}") from error
    finally:
        hub_logger.setLevel(level)


def _reason(error: BaseException) -> str:
    if not isinstance(error, HfHubHTTPError):
        return f"the connection failed ({type(error).__name__}). The same command continues."
    status = error.response.status_code
    said = f": {error.server_message}" if error.server_message else ""
    reason = REASONS.get(status, "the Hub failed" if status >= 500 else "the Hub refused") + f" (HTTP {status}{said})"
    return reason + (". The same command continues." if status in TRANSIENT_STATUS or status >= 500 else ".")


def full_name(repo_id: str, token: str | bool | None = None) -> str:
    """ "name" → "user/name"; raises `ValueError` for an invalid name, or without a token."""
    validate_repo_id(repo_id)
    check_token(token)
    if "/" in repo_id:
        return repo_id
    with hub_errors(repo_id):
        return f"{HfApi(token=token).whoami()['name']}/{repo_id}"


def check_token(token: str | bool | None) -> None:
    """Raises `ValueError` if there is none, given or stored."""
    if token in (None, True) and get_token() is None:
        raise ValueError("there is no token of the Hub: `hf auth login` stores one, or set HF_TOKEN.")


def publish(
    files: dict[str, Path | bytes],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    overwrite: bool = False,
) -> CommitInfo:
    """Puts the files into a repository of the Hub in one commit; what is there already is not sent again.

    Weights and code that an earlier push left there and this one does not bring are deleted in the same commit.

    Args:
        files: as `repository_files` gives them.
        repo_id: "name" or "namespace/name"; made if it is not there.
        private: whether to make it private; refused for one that is public.
        revision: a branch, made if it is not there; main by default.
        create_pr: open a pull request instead of a commit to main.
        token: instead of the stored one.
        commit_message, commit_description: of the commit.
        overwrite: whether to replace a model of another kind or scheme that is there.

    Raises:
        ValueError: if there is no token, no right to write, another model under that name, or if the Hub or the
            connection fails; nothing is committed then, and the same call completes it.
    """
    if create_pr and revision:
        raise ValueError("`create_pr` and `revision` exclude each other, got both.")
    check_token(token)
    api = HfApi(token=token)
    with hub_errors(repo_id):
        repo_id, head = _prepare(api, repo_id, private, revision)
        there = api.list_repo_files(repo_id, revision=head)
        files = _compare(api, repo_id, head, there, files, overwrite)
        commit = api.create_commit(
            repo_id,
            _operations(files, there),
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=None if create_pr else head,  # what was looked at is what is written to
        )
        there = api.list_repo_files(repo_id, revision=commit.oid)
    if missing := sorted(set(files) - set(there)):
        raise ValueError(f"{repo_id!r} lacks {missing} after the push.")
    if commit.oid == head:
        print(f"{repo_id} holds all of this already: nothing was sent")
    return commit


def _prepare(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> tuple[str, str]:
    """Makes the repository and the branch where they are missing; → its full name and the last commit."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.repo_info(repo_id).private:
        raise ValueError(
            f"{repo_id!r} exists and is public: make it private in its settings, or leave "
            "--private (--hub_private_repo in training)."
        )
    if revision and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id, api.repo_info(repo_id, revision=revision).sha


def _compare(
    api: HfApi, repo_id: str, head: str, there: Sequence[str], files: dict[str, Path | bytes], overwrite: bool
) -> dict[str, Path | bytes]:
    """→ the files to send: without the card if it was edited there. Refuses to replace another model."""
    if not overwrite:
        record = files.get(TRAINING_RECORD)
        record = read_json(record) if record else {}
        check_not_taken(api, repo_id, head, there, json.loads(files["config.json"]), record)
    if CARD in there and isinstance(files[CARD], bytes) and not is_generated(_read(api, repo_id, CARD, head)):
        print(f"the card of {repo_id} was edited there: it stays")
        return {name: content for name, content in files.items() if name != CARD}
    return files


def _operations(
    files: dict[str, Path | bytes], there: Sequence[str]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What a commit does: adds the files, and deletes weights and code of an earlier push that they do not replace."""
    # no push puts them into folders: what lies there is somebody's own
    own = [name for name in there if "/" not in name and any(fnmatch(name, x) for x in REPLACED_FILES)]
    stale = [name for name in own if name not in files]
    return [*(CommitOperationAdd(*item) for item in files.items()), *map(CommitOperationDelete, stale)]


def _read(api: HfApi, repo_id: str, name: str, revision: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = api.hf_hub_download(repo_id, name, revision=revision, local_dir=folder)
        return read_text_file(path, f"{name!r} of {repo_id!r}:")


def _read_fields(api: HfApi, repo_id: str, name: str, revision: str) -> dict[str, Any]:
    where = f"{name!r} of {repo_id!r}"
    content = parse_json(_read(api, repo_id, name, revision), where)
    if not isinstance(content, dict):
        raise ValueError(f"{where} must hold a dictionary: it is no model's.")
    return content


def check_not_taken(
    api: HfApi, repo_id: str, revision: str, there: Sequence[str], config: dict[str, Any], record: dict[str, Any]
) -> None:
    """Refuses a repository that holds something else than a model of the family, scheme and run that comes."""
    if set(there) <= {".gitattributes", CARD}:
        return
    theirs = _read_fields(api, repo_id, "config.json", revision) if "config.json" in there else {}
    pairs = {name: (theirs.get(name), config[name]) for name in ("model_type", "pos_embedding_type")}
    if TRAINING_RECORD in there:
        theirs = _read_fields(api, repo_id, TRAINING_RECORD, revision)
        pairs |= {
            name: (_identity(theirs[name]), _identity(record[name]))
            for name in RUN_IDENTITY
            if name in theirs and name in record
        }
    for name, (existing, new) in pairs.items():
        if existing != new:
            raise ValueError(
                f"the name is taken: {repo_id!r} holds another model (`{name}` is {existing!r}, not {new!r}); choose "
                "another name, or give --overwrite true (--hub_overwrite true in training)."
            )


def _identity(value: Any) -> Any:
    """→ of a corpus its name and fingerprint; versions differ in what else they record of it."""
    is_corpus = isinstance(value, dict) and "fingerprint" in value
    return {name: value.get(name) for name in ("name", "fingerprint")} if is_corpus else value


def push_folder(folder: str | Path, repo_id: str, *, results: Sequence[str] = (), **kwargs: Any) -> CommitInfo:
    """Publishes a saved folder: `repository_files` and `publish` with their arguments."""
    about = {name: kwargs.pop(name) for name in ("base_model", "license", "tags") if name in kwargs}
    repo_id = full_name(repo_id, kwargs.get("token"))
    files = repository_files(folder, repo_id, results, **about)
    check_weights(files)
    return publish(files, repo_id, **kwargs)


def push_model(model: Any, repo_id: str, *, max_shard_size: int | str = "50GB", **kwargs: Any) -> CommitInfo:
    """Publishes a model in memory, with the tokenizer of the folder that it was loaded from, if there is one.

    The result files and the record of that folder go along if its weights are those of the model.
    """
    source = Path(model.name_or_path or "/nowhere")
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / repo_id.rpartition("/")[2]
        with writing("the folder", folder):
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        for name in set(FILES) - {TRAINING_RECORD, INDEX}:
            if (source / name).is_file() and not (folder / name).exists():
                check_inside(source / name, source)
                shutil.copyfile(source / name, folder / name)
        results: list[str] = []
        if (source / TRAINING_RECORD).is_file() and _same_weights(folder, source):
            results = [str(path) for path in folder_results(source)]
            for path in (source / TRAINING_RECORD, *map(Path, results)):
                check_inside(path, source)
            shutil.copyfile(source / TRAINING_RECORD, folder / TRAINING_RECORD)
        return push_folder(folder, repo_id, results=results, **kwargs)


def _same_weights(first: Path, second: Path) -> bool:
    """Whether two folders hold the same weight files, byte for byte."""
    names = {path.name for folder in (first, second) for path in folder.glob(WEIGHTS)}
    return all(
        (first / name).is_file()
        and (second / name).is_file()
        and (first / name).read_bytes() == (second / name).read_bytes()
        for name in names
    )
