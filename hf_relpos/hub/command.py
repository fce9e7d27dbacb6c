"""`hf-relpos push`: its flags, and what it prints. The rest is imported when the flags were read, so that `--help` does
not wait for it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cli import command, parse_arguments, say_next
from ..file_reading import read_json
from ..messages import say_command, this_command
from ..results.training_record import TRAINING_RECORD


DESCRIPTION = """\
Publishes a saved model of the family: weights, code, tokenizer, results and card, in one commit.

hf-relpos push output/alibi alice/relpos-alibi
"""


@dataclass
class PushArguments:
    """Where it is pushed, and how."""

    results: list[str] = field(
        default_factory=list, metadata={"help": "Result files of `hf-relpos evaluate` besides those in the folder."}
    )
    base_model: str | None = field(
        default=None,
        metadata={"help": "The repository of the model that it was finetuned from; none: it was never on the Hub."},
    )
    license: str | None = field(
        default=None,
        metadata={
            "help": "Licence of the weights, by the Hub's name; by default that of an imported model, or apache-2.0."
        },
    )
    private: bool = field(default=False, metadata={"help": "Make the repository private."})
    revision: str | None = field(default=None, metadata={"help": "A branch, made if it is not there."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request."})
    commit_message: str = field(default="Upload model", metadata={"help": "Message of the commit."})
    overwrite: bool = field(default=False, metadata={"help": "Replace another model of this name."})
    dry_run: bool = field(
        default=False, metadata={"help": "Send nothing: write the repository to --output_dir and list its files."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder of a dry run; hub/REPO by default."})


@command
def main() -> None:
    """The command line of scripts/push_to_hub.py."""
    args, words = parse_arguments((PushArguments,), DESCRIPTION, positional="DIR REPO")
    if len(words) != 2:
        raise ValueError(f"two words are needed, the folder and the repository, got {words}.")
    push(args, *words)


def push(args: PushArguments, folder: str, repo_id: str) -> None:
    """Publishes a saved folder, or shows what would be published."""
    from huggingface_hub.utils import validate_repo_id

    from .model_card import CARD, origin_of
    from .push import full_name, publish
    from .repository import check_loads, check_weights, repository_files

    validate_repo_id(repo_id)
    if not args.dry_run:
        repo_id = full_name(repo_id)
    files = repository_files(folder, repo_id, args.results, args.base_model, args.license)
    check_loads(folder)
    check_weights(files)
    if isinstance(files[CARD], bytes):  # else the card that is there says it
        _, license = origin_of(read_json(Path(folder) / "config.json"), args.base_model, args.license)
        print(f"licence of the weights: {license}" + ("" if args.license else ", by default (--license)"))
    if args.dry_run:
        _show(files, args.output_dir or f"hub/{repo_id}")  # beside the model it would be one more result to collect
        return
    commit = publish(
        files,
        repo_id,
        private=args.private or None,
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.commit_message,
        overwrite=args.overwrite,
    )
    print(f"pushed {repo_id}, {_trained_on(files)}: {commit.pr_url or commit.commit_url}")
    if not (args.revision or args.create_pr):
        say_next("generate", model_name_or_path=repo_id, prompt=_corpus(files).get("opening") or "The")


def _show(files: dict[str, Path | bytes], folder: str) -> None:
    """Writes a repository to a folder and lists its files."""
    from .repository import write_files

    write_files(files, folder)
    for name, content in sorted(files.items()):
        size = len(content) if isinstance(content, bytes) else Path(content).stat().st_size
        print(f"{size:>12,} {name}")
    print(f"wrote {folder}, {_trained_on(files)}; nothing was sent")
    say_command(this_command(["--dry_run", "--output_dir"]))


def _trained_on(files: dict[str, Path | bytes]) -> str:
    """What a repository tells of the text that its model was trained on."""
    corpus = _corpus(files)
    return f"trained on {corpus['name']}" if corpus else "whose corpus is not recorded"


def _corpus(files: dict[str, Path | bytes]) -> dict[str, Any]:
    record = read_json(files[TRAINING_RECORD]) if TRAINING_RECORD in files else {}
    return record.get("corpus") or {}
