#!/usr/bin/env python
"""Publishes a saved model of the family: weights, code, tokenizer, results and card, in one commit.

python scripts/push_to_hub.py output/alibi alice/relpos-alibi
"""

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub.utils import validate_repo_id

from hf_relpos.cli import command, parse_arguments
from hf_relpos.hub.push import full_name, publish
from hf_relpos.hub.repository import check_loads, repository_files, write_files


@dataclass
class PushArguments:
    """Where it goes, and how."""

    results: list[str] = field(
        default_factory=list, metadata={"help": "Result files of scripts/evaluate.py besides those in the folder."}
    )
    base_model: str | None = field(
        default=None, metadata={"help": "The repository of the model that it was finetuned from."}
    )
    license: str = field(default="apache-2.0", metadata={"help": "Licence of the weights, by the Hub's name for it."})
    private: bool = field(default=False, metadata={"help": "Make the repository private."})
    revision: str | None = field(default=None, metadata={"help": "A branch, made if it is not there."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request."})
    commit_message: str = field(default="Upload model", metadata={"help": "Message of the commit."})
    overwrite: bool = field(default=False, metadata={"help": "Replace another model that lies under the name."})
    dry_run: bool = field(
        default=False, metadata={"help": "Send nothing: write the repository to --output_dir and list its files."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder of a dry run; DIR-hub by default."})


@command
def main() -> None:
    args, words = parse_arguments((PushArguments,), __doc__, positional="DIR REPO")
    if len(words) != 2:
        raise ValueError(f"two words are needed, the folder and the repository, got {words}.")
    folder, repo_id = words
    validate_repo_id(repo_id)
    if not args.dry_run:
        repo_id = full_name(repo_id)
    files = repository_files(folder, repo_id, args.results, args.base_model, args.license)
    check_loads(folder)
    if args.dry_run:
        written = args.output_dir or f"{folder.rstrip('/')}-hub"
        write_files(files, written)
        for name, content in sorted(files.items()):
            size = len(content) if isinstance(content, bytes) else Path(content).stat().st_size
            print(f"{size:>12,} {name}")
        print(f"wrote {written}; nothing was sent")
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
    print(commit.pr_url or commit.commit_url)


if __name__ == "__main__":
    main()
