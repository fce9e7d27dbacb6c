"""Uploads, commits and downloads."""

import base64
import hashlib
import json

from .api import found
from .repos import File, Repo, Tree, is_ignored, is_lfs
from .routes import CDN_ROUTES, route
from .server import Answer, HubError, Request


# --- what a client is told before it uploads


@route("POST", "/api/{repo}/preupload/{revision}")
def choose_upload_modes(hub, request, repo, commit):
    hub.writer(request, None if request.asks("create_pr") else repo.owner)
    asked, tree = request.json(), found(commit).tree
    gitattributes = asked.get("gitAttributes") or text_of(tree, ".gitattributes")
    gitignore = asked.get("gitIgnore") or text_of(tree, ".gitignore")
    if len(asked["files"]) > 256:
        raise HubError(400, "at most 256 files at a time")
    rows = []
    for file in asked["files"]:
        path, size = file["path"], file["size"]
        lfs = is_lfs(path, size, base64.b64decode(file["sample"]), gitattributes, hub.lfs_size)
        row = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": is_ignored(path, gitignore)}
        if path in tree:
            row["oid"] = tree[path].sha256 if tree[path].lfs else tree[path].oid
        rows.append(row)
    return {"files": rows}


def text_of(tree: Tree, path: str) -> str:
    return tree[path].data.decode() if path in tree else ""


@route("POST", "/{page}.git/info/lfs/objects/batch")
def plan_uploads(hub, request, repo):
    """An object without actions is there already; large ones go in parts, all or none of one answer's."""
    hub.writer(request)
    asked = request.json()
    if asked["operation"] != "upload" or asked.get("hash_algo", "sha256") not in ("sha256", "sha_256"):
        raise HubError(400, "only uploads of objects by sha256 are known")
    multipart = "multipart" in asked["transfers"] and any(row["size"] > hub.multipart_size for row in asked["objects"])
    objects = []
    for row in asked["objects"]:
        planned = {"oid": row["oid"], "size": row["size"]}
        if row["oid"] not in repo.lfs:
            upload = plan_upload(hub, repo, row["oid"], row["size"], multipart and row["size"] > hub.multipart_size)
            verify = {"href": f"{hub.url}/{repo.prefix}{repo.id}.git/info/lfs/verify"}
            planned |= {"authenticated": True, "actions": {"upload": upload, "verify": verify}}
        objects.append(planned)
    answer = {"transfer": "multipart" if multipart else "basic", "objects": objects}
    return Answer.of(answer, headers={"Content-Type": "application/vnd.git-lfs+json"})


def plan_upload(hub, repo: Repo, oid: str, size: int, in_parts: bool) -> dict:
    key = hub.permit_upload(repo, oid, size)
    if not in_parts:
        return {"href": f"{hub.cdn_url}/upload/{key}"}
    num_parts = -(-size // hub.chunk_size)
    urls = {f"{number:05}": f"{hub.cdn_url}/upload/{key}/{number}" for number in range(1, num_parts + 1)}
    return {"href": f"{hub.url}/api/complete-multipart/{key}", "header": {"chunk_size": str(hub.chunk_size), **urls}}


# --- the content of LFS files


@route("PUT", "/upload/{key}", CDN_ROUTES)
def upload_file(hub, request, key):
    finish_upload(hub, key, request.body)
    return Answer(headers={"ETag": etag(request.body)})


@route("PUT", "/upload/{key}/{number}", CDN_ROUTES)
def upload_part(hub, request, key, number):
    upload_of(hub, key).parts[int(number)] = request.body
    return Answer(headers={"ETag": etag(request.body)})


@route("POST", "/api/complete-multipart/{key}")
def complete_upload(hub, request, key):
    """Asked without a token: the key is the permission."""
    asked, upload = request.json(), upload_of(hub, key)
    listed = {part["partNumber"]: part["etag"] for part in asked["parts"]}
    if asked["oid"] != upload.oid or listed != {number: etag(part) for number, part in upload.parts.items()}:
        raise HubError(400, "the parts or their etags are not those that were uploaded")
    finish_upload(hub, key, b"".join(upload.parts[number] for number in sorted(upload.parts)))
    return {"success": True}


def upload_of(hub, key: str):
    if key not in hub.uploads:
        raise HubError(403, "no such upload was permitted")
    return hub.uploads[key]


def finish_upload(hub, key: str, data: bytes) -> None:
    upload = upload_of(hub, key)
    if len(data) != upload.size or hashlib.sha256(data).hexdigest() != upload.oid:
        raise HubError(400, "the content does not have the size and sha256 that were announced")
    hub.store(upload.repo, data)


def etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


@route("POST", "/{page}.git/info/lfs/verify")
def verify_upload(hub, request, repo):
    hub.writer(request)
    asked = request.json()
    if asked["oid"] not in repo.lfs or len(hub.blobs[asked["oid"]]) != asked["size"]:
        raise HubError(404, "the object was not uploaded")
    return {}


# --- commits


@route("POST", "/api/{repo}/commit/{name}")
def commit_changes(hub, request, repo, name):
    """All changes or none. With create_pr they become the first commit of a new pull request, open to any user."""
    create_pr = request.asks("create_pr")
    user = hub.writer(request, None if create_pr else repo.owner)
    ref = repo.writable_ref(name)
    if ref is None:
        raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
    try:
        head, *changes = [json.loads(line) for line in request.body.splitlines() if line.strip()]
        assert head["key"] == "header"
    except (AssertionError, KeyError, TypeError, ValueError):
        raise HubError(400, "a commit is lines of JSON, the first of them its header") from None
    parent = head["value"].get("parentCommit")
    if parent and parent != repo.refs[ref].oid:
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    tree = dict(repo.refs[ref].tree)
    for change in changes:
        if change["key"] not in CHANGES:
            raise HubError(400, f"unknown change {change['key']!r}")
        CHANGES[change["key"]](hub, repo, tree, change["value"])
    title, answer = head["value"]["summary"], {"success": True, "hookOutput": ""}
    page = f"{hub.url}/{repo.prefix}{repo.id}"
    if create_pr:
        number = repo.new_discussion(title, user, is_pull_request=True, base=repo.refs[ref]).num
        ref, answer["pullRequestUrl"] = f"refs/pr/{number}", f"{page}/discussions/{number}"
    made = repo.commit(ref, tree, title, head["value"].get("description") or "", user)
    return answer | {"commitOid": made.oid, "commitUrl": f"{page}/commit/{made.oid}"}


def add_file(hub, repo: Repo, tree: Tree, value: dict) -> None:
    content = value["content"]
    data = base64.b64decode(content) if value.get("encoding") == "base64" else content.encode()
    if len(data) > hub.lfs_size:
        raise HubError(413, f"{value['path']} is too large for a commit: upload it by LFS")
    tree[value["path"]] = File(data)


def add_lfs_file(hub, repo: Repo, tree: Tree, value: dict) -> None:
    if value["oid"] not in repo.lfs:
        raise HubError(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
    tree[value["path"]] = File(hub.blobs[value["oid"]], lfs=True)


def delete_file(hub, repo: Repo, tree: Tree, value: dict) -> None:
    if value["path"] not in tree:
        raise HubError(404, f"There is no file {value['path']}", "EntryNotFound")
    del tree[value["path"]]


def delete_folder(hub, repo: Repo, tree: Tree, value: dict) -> None:
    inside = [path for path in tree if path.startswith(value["path"].rstrip("/") + "/")]
    if not inside:
        raise HubError(404, f"There is no folder {value['path']}", "EntryNotFound")
    for path in inside:
        del tree[path]


CHANGES = {"file": add_file, "lfsFile": add_lfs_file, "deletedFile": delete_file, "deletedFolder": delete_folder}


# --- downloads


@route("GET HEAD", "/{page}/(?P<form>resolve|raw)/{revision}/{path}")
def download(hub, request, repo, form, commit, path):
    """A file, or the way to the CDN if it is an LFS file; `raw` is what git stores, the pointer."""
    hub.check_gate(request, repo)
    headers = {"X-Repo-Commit": found(commit).oid}
    if path not in commit.tree:
        raise HubError(404, "Entry not found", "EntryNotFound", headers=headers)
    file = commit.tree[path]
    if file.lfs and form == "resolve":
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data))}
        return Answer(status=302, headers={**headers, "Location": f"{hub.cdn_url}/lfs/{file.sha256}"})
    return in_range(request, file.stored, {**headers, "ETag": f'"{file.oid}"', "Content-Type": "text/plain"})


@route("GET HEAD", "/lfs/{key}", CDN_ROUTES)
def download_lfs(hub, request, key):
    if key not in hub.blobs:
        raise HubError(403, "no such object")
    return in_range(request, hub.blobs[key], {"ETag": etag(hub.blobs[key])})


def in_range(request: Request, data: bytes, headers: dict[str, str]) -> Answer:
    """→ the data, or the range of bytes that was asked for: first-last, first- or -length."""
    headers = {"Accept-Ranges": "bytes", **headers}
    unit, _, asked = request.headers.get("range", "").partition("=")
    if unit != "bytes" or "," in asked:
        return Answer(data, headers=headers)
    first, _, last = asked.partition("-")
    start = int(first) if first else max(0, len(data) - int(last))
    end = min(int(last), len(data) - 1) if first and last else len(data) - 1
    if start > end:
        return Answer(status=416, headers={"Content-Range": f"bytes */{len(data)}"})
    return Answer(data[start : end + 1], 206, {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"})
