"""What must not leave the machine: files from elsewhere that a folder links to, keys, and paths of users' folders."""

import json
import os
import re
from contextlib import suppress
from pathlib import Path

from huggingface_hub import get_token
from safetensors import SafetensorError, safe_open


# kind → what its keys look like, as their vendors document the prefixes
SECRETS = {
    "a token of the Hub": r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "an Anthropic key": r"(?<![A-Za-z0-9])sk-ant-[\w-]{20,}",
    "an OpenAI key": r"(?<![A-Za-z0-9])sk-(?!ant-)(?=[\w-]*\d)[\w-]{20,}",
    "an AWS key": r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])",
    "a GitHub token": r"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,})",
    "a GitLab token": r"(?<![A-Za-z0-9])glpat-[\w-]{20,}",
    "a Google key": r"(?<![A-Za-z0-9])(?:AIza[\w-]{35}|GOCSPX-[\w-]{28}|ya29\.[\w-]{20,})",
    "a Slack token": r"(?<![A-Za-z0-9])xox[abeoprs]-[A-Za-z0-9-]{10,}",
    "a Stripe key": r"(?<![A-Za-z0-9])[rs]k_(?:live|test)_[A-Za-z0-9]{16,}",
    "a token of a package index": r"(?<![A-Za-z0-9])(?:npm_[A-Za-z0-9]{36}|pypi-[\w-]{50,})",
    "a Weights & Biases key": r"(?i:wandb_api_key)\W{1,6}[0-9a-f]{40}",
    "a private key": r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----",
    "a password in an address": r"[a-z][a-z0-9+.-]{0,15}://[^\s/:@\"'<>]+:[^\s/:@\"'<>]+@",
}
# folders of users under Linux, macOS and Windows; an address on the web may have such parts too
USER_PATHS = (
    r"(?:file:/*|(?<![\w.~/-])(?!//))(?:/[\w.+-]+)*/(?:home|homes|Users)/[^/\s\"'`<>|\\]+",
    r"(?:file:/*|(?<![\w.~/-]))/root/",
    r"(?i:(?<![a-z])[a-z]:[\\/]{1,4}(?:Users|Documents and Settings)[\\/]{1,4}[^\\/\s\"'`<>|]+)",
)
# entries of vocabularies look like anything
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")


def check_texts(files: dict[str, Path | bytes], folder: Path) -> None:
    """Refuses a text file that holds a key of somebody, or a path of this machine or of any user's folder.

    Args:
        files: path in the repository → file, or content.
        folder: where they come from, whose own path must not be told either.

    Raises:
        ValueError: naming the file and the kind of what it holds, never the thing itself.
    """
    home = os.path.expanduser("~")  # "~" for a user without one
    own_token, places = get_token(), {str(folder.resolve()), home} - {"/", "~"}
    for name, content in files.items():
        if name.endswith(".png"):
            continue
        text = _text(name, content)
        kinds = [kind for kind, pattern in SECRETS.items() if re.search(pattern, text)]
        if own_token and own_token in text:
            kinds.insert(0, "a token of the Hub")
        if kinds:
            raise ValueError(f"{name!r} holds {kinds[0]}: take it out, and revoke it.")
        if name in VOCABULARIES:
            continue
        if any(re.search(_place_pattern(place), text) for place in places):
            raise ValueError(f"{name!r} holds a path of this machine: take it out.")
        if any(re.search(pattern, text) for pattern in USER_PATHS):
            raise ValueError(f"{name!r} holds an absolute path of a user's folder: take it out.")


def _place_pattern(place: str) -> str:
    """→ what finds a folder in a text, alone or with what lies in it, and not as a part of an address or a longer
    name."""
    return rf"(?:file:/*|(?<![\w.~/#<-])){re.escape(place)}(?![\w-])"


def _text(name: str, content: Path | bytes) -> str:
    """→ the text of a file: of weights what stands beside the tensors, of JSON also as it reads without its escapes."""
    if name.endswith(".safetensors"):
        with suppress(SafetensorError), safe_open(content, "pt") as tensors:  # cut off: found by who reads the tensors
            return json.dumps(tensors.metadata(), ensure_ascii=False)
        return ""
    text = (content if isinstance(content, bytes) else content.read_bytes()).decode("utf-8", errors="replace")
    if name.endswith(".json") and "\\" in text:
        with suppress(ValueError):  # no JSON: found by who reads it
            text += "\n" + json.dumps(json.loads(text), ensure_ascii=False)
    return text


def check_inside(path: Path, folder: Path) -> None:
    """Refuses a file that lies outside of a folder once its links are followed.

    A snapshot of the Hub's cache links to the blobs beside it: they count as inside.

    Args:
        path: in the folder.
        folder: of a saved model.

    Raises:
        ValueError: naming the file.
    """
    root, target = folder.resolve(), path.resolve()
    roots = [root]
    if root.parent.name == "snapshots" and (blobs := root.parent.parent / "blobs").is_dir():
        roots.append(blobs.resolve())
    if not any(target.is_relative_to(each) for each in roots):
        raise ValueError(
            f"{str(path.relative_to(folder))!r} is a link to a file outside of the folder: put a copy in its place, or "
            "take it out."
        )
