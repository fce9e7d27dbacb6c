"""The state of the double, and who may do what."""

import os
import secrets
from dataclasses import dataclass, field

from . import api, transfers  # noqa: F401  they fill the tables of routes
from .repos import GITATTRIBUTES, Commit, File, Repo, is_lfs
from .routes import CDN_ROUTES, HUB_ROUTES, dispatch
from .server import Answer, HubError, Request, Server


TOKEN, READ_ONLY_TOKEN, OTHER_TOKEN = "hf_alice", "hf_alice_reads", "hf_bob"
USERS_SETTINGS = ("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_OFFLINE", "TRANSFORMERS_CACHE")


@dataclass
class Upload:
    """What an upload URL of the CDN permits."""

    repo: Repo
    oid: str
    size: int
    parts: dict[int, bytes] = field(default_factory=dict)


class HubDouble(Server):
    """The Hub. Its attributes may be changed at any time.

    tokens: token → user; those in `read_only` may not write. repos: (kind, id) → Repo, kind is model, dataset or space.
    lfs_size: larger files go to LFS. multipart_size, chunk_size: larger LFS files are uploaded in parts of that size.
    page_size: rows of one answer of a listing. Sizes in bytes.
    """

    def __init__(self):
        super().__init__()
        self.tokens = {TOKEN: "alice", READ_ONLY_TOKEN: "alice", OTHER_TOKEN: "bob"}
        self.read_only = {READ_ONLY_TOKEN}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}  # the CDN's content by sha256
        self.uploads: dict[str, Upload] = {}
        self.lfs_size, self.multipart_size, self.chunk_size, self.page_size = 10 * 2**20, 20 * 2**20, 8 * 2**20, 1000

    def start(self) -> None:
        self.url = self.listen(lambda request: dispatch(self, request, HUB_ROUTES))
        # another host, as on the Hub: older clients send their token to any port of the same one
        self.cdn_url = self.listen(self.answer_cdn).replace("127.0.0.1", "localhost")

    def environment(self, folder: os.PathLike | str, token: str | None = TOKEN) -> dict[str, str]:
        """→ the environment of a client: this Hub, nothing of the user's own settings, caches in the folder."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(USERS_SETTINGS)}
        kept |= {"HF_ENDPOINT": self.url, "HF_HOME": str(folder), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
        kept["HF_HUB_DISABLE_UPDATE_CHECK"] = "1"
        return kept | ({"HF_TOKEN": token} if token else {})

    def create(self, id: str, files: dict[str, bytes] | None = None, kind: str = "model", **settings: object) -> Repo:
        """→ a new repository with these files, without any client. `settings`: private, gated, sdk."""
        with self.lock:
            repo = self.repos[kind, id] = Repo(kind, id, **settings)
            tree = {".gitattributes": File(GITATTRIBUTES.encode())}
            repo.commit("refs/heads/main", tree, "initial commit", "", repo.owner)
            for path, data in (files or {}).items():
                lfs = is_lfs(path, len(data), data[:512], GITATTRIBUTES, self.lfs_size)
                tree = tree | {path: self.store(repo, data) if lfs else File(data)}
            if files:
                repo.commit("refs/heads/main", tree, "add files", "", repo.owner)
            return repo

    def store(self, repo: Repo, data: bytes) -> File:
        """→ the data as an LFS file, uploaded."""
        file = File(data, lfs=True)
        self.blobs[file.sha256] = data
        repo.lfs.add(file.sha256)
        return file

    def permit_upload(self, repo: Repo, oid: str, size: int) -> str:
        """→ the key of a new upload URL."""
        key = secrets.token_hex(8)
        self.uploads[key] = Upload(repo, oid, size)
        return key

    def files(self, id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """→ the content of each path, LFS or not, .gitattributes too."""
        with self.lock:
            return {path: file.data for path, file in self.repos[kind, id].find(revision).tree.items()}

    def commits(self, id: str, revision: str = "main", kind: str = "model") -> list[Commit]:
        """The newest first; the oldest is the one that created the repository."""
        with self.lock:
            return list(self.repos[kind, id].find(revision).history())

    def answer_cdn(self, request: Request) -> Answer:
        if request.token is not None:
            raise HubError(400, "Only one auth mechanism allowed: the URL is its own permission")
        return dispatch(self, request, CDN_ROUTES)

    # --- who may do what

    def user(self, request: Request) -> str | None:
        """→ None without a token."""
        if request.token is None:
            return None
        if request.token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.tokens[request.token]

    def writer(self, request: Request, owner: str | None = None) -> str:
        """→ the user, who may write to what belongs to the owner, or, without one, to something of their own."""
        user = self.user(request)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if request.token in self.read_only:
            raise HubError(403, "This token may only read: use one with the write role")
        if owner not in (None, user):
            raise HubError(403, f"You don't have the rights to write to the namespace {owner}")
        return user

    def find_repo(self, request: Request, kind: str, id: str) -> Repo:
        """→ the repository if the user may see it."""
        user, repo = self.user(request), self.repos.get((kind, id))
        if repo is None or (repo.private and user != repo.owner):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def check_gate(self, request: Request, repo: Repo) -> None:
        user = self.user(request)
        if repo.gated and user != repo.owner:
            raise HubError(403 if user else 401, f"Access to {repo.kind} {repo.id} is restricted.", "GatedRepo")
