"""The repositories of the double of the Hub: files, commits, references, in memory."""

import fnmatch
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property

import yaml


LFS_SUFFIXES = "arrow bin ckpt gguf gz h5 model msgpack npy npz onnx parquet pickle pkl pt pth safetensors tar zip"
GITATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES.split())
GITATTRIBUTES += "*tfevents* filter=lfs diff=lfs merge=lfs -text\n"


@dataclass(frozen=True)
class File:
    data: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def stored(self) -> bytes:
        """What git keeps: the bytes, or the pointer to them."""
        if not self.lfs:
            return self.data
        head = "version https://git-lfs.github.com/spec/v1"
        return f"{head}\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @cached_property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.stored) + self.stored).hexdigest()


Tree = dict[str, File]


@dataclass(frozen=True, eq=False)
class Commit:
    oid: str
    parent: "Commit | None"
    tree: Tree
    title: str
    message: str
    author: str
    date: str

    def history(self) -> Iterator["Commit"]:
        """This commit and those before it, the newest first."""
        commit = self
        while commit is not None:
            yield commit
            commit = commit.parent


@dataclass
class Discussion:
    num: int
    title: str
    author: str
    is_pull_request: bool
    date: str
    status: str = "open"
    merge_commit: str | None = None


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


@dataclass
class Repo:
    kind: str  # model, dataset or space
    id: str
    private: bool = False
    gated: str | bool = False
    sdk: str | None = None
    created: str = field(default_factory=now)
    refs: dict[str, Commit] = field(default_factory=dict)  # by full name: refs/heads/main
    commits: dict[str, Commit] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)  # sha256 of what was uploaded to this repository
    discussions: list[Discussion] = field(default_factory=list)

    @property
    def owner(self) -> str:
        return self.id.partition("/")[0]

    @property
    def prefix(self) -> str:
        """What stands before the id in a URL of a page or file."""
        return "" if self.kind == "model" else f"{self.kind}s/"

    def commit(self, ref: str, tree: Tree, title: str, message: str, author: str) -> Commit:
        """→ the new head of a reference."""
        parent = self.refs.get(ref)
        content = [self.kind, self.id, len(self.commits), parent and parent.oid, title, message, author]
        content += [(path, file.oid) for path, file in sorted(tree.items())]
        oid = hashlib.sha1(repr(content).encode()).hexdigest()
        self.refs[ref] = self.commits[oid] = Commit(oid, parent, tree, title, message, author, now())
        return self.refs[ref]

    def find(self, revision: str) -> Commit | None:
        """A branch, a tag, a full name or a commit, of which seven digits are enough."""
        revision = "main" if revision == "HEAD" else revision
        for prefix in ("", "refs/heads/", "refs/tags/"):
            if prefix + revision in self.refs:
                return self.refs[prefix + revision]
        matching = [oid for oid in self.commits if oid.startswith(revision)]
        return self.commits[matching[0]] if len(revision) >= 7 and len(matching) == 1 else None

    def writable_ref(self, revision: str) -> str | None:
        """→ the full name of the branch or pull request."""
        names = (revision, f"refs/heads/{revision}")
        return next((name for name in names if name in self.refs and not name.startswith("refs/tags/")), None)

    def new_discussion(self, title: str, author: str, is_pull_request: bool, base: Commit | None = None) -> Discussion:
        """A pull request gets a reference, which begins at `base`, or at main."""
        discussion = Discussion(len(self.discussions) + 1, title, author, is_pull_request, now())
        self.discussions.append(discussion)
        if is_pull_request:
            self.refs[f"refs/pr/{discussion.num}"] = base or self.find("main")
        return discussion


def is_folder(tree: Tree, path: str) -> bool:
    return any(name.startswith(f"{path}/") for name in tree)


def describe(commit: Commit, path: str, expand: bool = False) -> dict:
    """→ the row of a file or folder in the Hub's listings."""
    if path in commit.tree:
        file = commit.tree[path]
        row = {"type": "file", "oid": file.oid, "size": len(file.data), "path": path}
        if file.lfs:
            row["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": len(file.stored)}
    else:
        row = {"type": "directory", "oid": content_of(commit, path), "size": 0, "path": path}
    if expand:
        last = commit
        for last in commit.history():
            if last.parent is None or content_of(last.parent, path) != content_of(commit, path):
                break
        row["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
    return row


def content_of(commit: Commit, path: str) -> str:
    """→ a hash that changes with the file or with anything in the folder."""
    if path in commit.tree:
        return commit.tree[path].oid
    inside = [(name, file.oid) for name, file in sorted(commit.tree.items()) if name.startswith(f"{path}/")]
    return hashlib.sha1(repr(inside).encode()).hexdigest()


def list_paths(tree: Tree, folder: str, recursive: bool) -> list[str]:
    """→ the files and folders in a folder, "" for the top, in the order of their names."""
    start, found = f"{folder}/" if folder else "", set()
    for path in tree:
        if path.startswith(start):
            parts = path[len(start) :].split("/")
            depth = len(parts) if recursive else 1
            found |= {start + "/".join(parts[:length]) for length in range(1, depth + 1)}
    return sorted(found)


def is_lfs(path: str, size: int, sample: bytes, gitattributes: str, lfs_size: int) -> bool:
    patterns = [line.split()[0] for line in gitattributes.splitlines() if "filter=lfs" in line.split()]
    return size > lfs_size or b"\0" in sample or any(matches(path, pattern) for pattern in patterns)


def is_ignored(path: str, gitignore: str) -> bool:
    """The last line that matches the path, or a folder that it is in, decides. `*` also matches "/"."""
    ignored = False
    for line in filter(None, (line.strip() for line in gitignore.splitlines())):
        if not line.startswith("#"):
            pattern = line.removeprefix("!")
            parents = [path[: match.start()] for match in re.finditer("/", path)]
            whole = [] if pattern.endswith("/") else [path]
            if any(matches(name, pattern.removesuffix("/")) for name in parents + whole):
                ignored = not line.startswith("!")
    return ignored


def matches(path: str, pattern: str) -> bool:
    """A pattern without "/" is for names in all folders, another for paths."""
    if "/" in pattern:
        return fnmatch.fnmatchcase(path, pattern.removeprefix("/"))
    return fnmatch.fnmatchcase(path.rpartition("/")[2], pattern)


def read_card(text: str) -> tuple[dict | None, str | None]:
    """→ (metadata of a README, what is wrong with it); (None, None) without metadata."""
    match = re.match(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    if not match:
        return None, None
    try:
        card = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return None, f"YAML error: {error}"
    if not isinstance(card, dict):
        return None, "the metadata must be a mapping"
    if not isinstance(card.get("license", ""), str | list):
        return None, '"license" must be a string'
    if not isinstance(card.get("model-index", []), list):
        return None, '"model-index" must be an array'
    return card, None


def card_of(tree: Tree) -> dict:
    """→ the metadata of a repository's README, {} if there is none."""
    readme = tree.get("README.md")
    return (readme and read_card(readme.data.decode(errors="replace"))[0]) or {}
