"""The double of the Hub against the clients of the Hub: each understands what the other sends."""

import json
import re
import subprocess
import sys
from pathlib import Path

from hub_double import TOKEN


LARGE = bytes(range(250)) * 20  # 5000 bytes
CARD = b"---\nlicense: mit\nlibrary_name: transformers\ntags:\n- tiny\n---\n# A model\n"
FILES = {"README.md": CARD, "config.json": b"{}", "model.safetensors": LARGE, "sub/\u00e9 x.txt": b"text\n" * 9}


def make_folder(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def run(hub, folder: Path, *command: object, token: str | None = TOKEN, ok: bool = True) -> str:
    """→ what a client prints, stdout first, with its caches below the folder."""
    environment = hub.environment(folder / "home", token)
    done = subprocess.run([*map(str, command)], env=environment, cwd=folder, capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout if ok else done.stdout + done.stderr


def run_python(hub, folder: Path, code: str, token: str | None = TOKEN) -> dict:
    """→ `result` as the code left it, which has the API in `api` and `fails` for the name of an expected error."""
    head = """
import json
from huggingface_hub import *
api, result = HfApi(), {}
def fails(call, *arguments, **keywords):
    try:
        call(*arguments, **keywords)
    except Exception as error:
        return type(error).__name__ + " " + str(getattr(getattr(error, "response", None), "status_code", ""))
"""
    return json.loads(run(hub, folder, sys.executable, "-c", f"{head}{code}\nprint(json.dumps(result))", token=token))


def statuses(hub, pattern: str) -> list[int]:
    """→ how the requests ended whose "METHOD target" begins like this."""
    return [status for method, target, status in hub.requests if re.match(pattern, f"{method} {target}")]


def without_attributes(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: data for path, data in files.items() if path != ".gitattributes"}


# --- huggingface_hub


PUSH = """
result["name"] = whoami()["name"]
result["url"] = str(api.create_repo("alice/model", private=True))
result["again"] = fails(api.create_repo, "alice/model")
result["exist_ok"] = str(api.create_repo("alice/model", exist_ok=True))
result["foreign"] = fails(api.create_repo, "bob/model")
result["first"] = api.upload_folder(repo_id="alice/model", folder_path="up").oid
result["unchanged"] = api.upload_folder(repo_id="alice/model", folder_path="up").oid
api.upload_folder(repo_id="alice/model", folder_path="ignoring", path_in_repo="", commit_message="ignoring")
result["snapshot"] = snapshot_download("alice/model")
rows = api.list_repo_tree("alice/model", recursive=True, expand=True)
result["tree"] = {row.path: row.last_commit.title for row in rows}
result["sub"] = [row.path for row in api.list_repo_tree("alice/model", "sub")]
result["paths"] = [row.path for row in api.get_paths_info("alice/model", ["sub", "config.json", "missing"])]
info = api.model_info("alice/model", files_metadata=True)
result["info"] = [info.sha, info.private, info.tags, info.library_name, info.card_data.license]
result["siblings"] = {row.rfilename: [row.size, row.lfs and row.lfs.sha256] for row in info.siblings}
result["missing"] = [fails(hf_hub_download, "alice/model", "missing"), fails(api.model_info, "alice/nothing"),
                     fails(api.model_info, "alice/model", revision="nothing")]
result["exists"] = [api.file_exists("alice/model", "config.json"), api.file_exists("alice/model", "missing")]
"""


def test_push_and_pull(hub, tmp_path):
    hub.multipart_size, hub.chunk_size, hub.page_size = 1000, 2000, 2
    make_folder(tmp_path / "up")
    make_folder(tmp_path / "ignoring", {".gitignore": b"*.log\n/build/\n", "x.log": b"", "build/y": b"", "z": b""})
    got = run_python(hub, tmp_path, PUSH)
    assert got["name"] == "alice" and got["url"] == got["exist_ok"] == f"{hub.url}/alice/model"
    assert got["again"] == "HfHubHTTPError 409" and got["foreign"] == "HfHubHTTPError 403"

    assert without_attributes(hub.files("alice/model")) == FILES | {".gitignore": b"*.log\n/build/\n", "z": b""}
    head, first, initial = hub.commits("alice/model")
    assert (
        got["first"] == got["unchanged"] == first.oid
        and without_attributes(hub.files("alice/model", first.oid)) == FILES
    )
    assert statuses(hub, r"PUT /upload/\w+/\d") == [200] * 3  # 5000 bytes in parts of 2000
    assert statuses(hub, "POST /api/complete-multipart") == [200]

    snapshot = Path(got["snapshot"])
    pulled = {
        path.relative_to(snapshot).as_posix(): path.read_bytes() for path in snapshot.rglob("*") if path.is_file()
    }
    assert pulled == hub.files("alice/model")
    assert statuses(hub, "GET /lfs/") == [200]  # its content came from the CDN, which took no token
    assert {path: got["tree"][path] for path in (".gitattributes", "sub", "sub/\u00e9 x.txt", "z")} == {
        ".gitattributes": initial.title,
        "sub": first.title,
        "sub/\u00e9 x.txt": first.title,
        "z": head.title,
    }
    assert got["sub"] == ["sub/\u00e9 x.txt"] and sorted(got["paths"]) == ["config.json", "sub"]
    assert got["info"] == [head.oid, True, ["transformers", "tiny", "license:mit"], "transformers", "mit"]
    assert {path: size for path, (size, _) in got["siblings"].items()} == {
        path: len(data) for path, data in hub.files("alice/model").items()
    }
    assert [path for path, (_, sha256) in got["siblings"].items() if sha256] == ["model.safetensors"]
    assert got["missing"] == [
        "RemoteEntryNotFoundError 404",
        "RepositoryNotFoundError 404",
        "RevisionNotFoundError 404",
    ]
    assert got["exists"] == [True, False] and not hub.unknown


REVISIONS = """
first = api.create_commit("alice/model", [CommitOperationAdd("a.txt", b"a"), CommitOperationAdd("old/b.bin", b"b")],
                          commit_message="first", commit_description="why").oid
api.create_branch("alice/model", branch="dev/x")
api.create_tag("alice/model", tag="v1")
result["twice"] = [fails(api.create_branch, "alice/model", branch="dev/x"),
                   fails(api.create_tag, "alice/model", tag="v1")]
api.create_commit("alice/model", [CommitOperationDelete("old/"), CommitOperationAdd("c.txt", b"c")],
                  commit_message="second", parent_commit=first)
stale = [CommitOperationAdd("c.txt", b"stale"), CommitOperationDelete("a.txt")]
result["stale"] = fails(api.create_commit, "alice/model", stale, commit_message="stale", parent_commit=first)
half = [CommitOperationAdd("d.txt", b"d"), CommitOperationDelete("missing.txt")]
result["half"] = fails(api.create_commit, "alice/model", half, commit_message="half")
api.upload_file(path_or_fileobj=b"dev", path_in_repo="a.txt", repo_id="alice/model", revision="dev/x")
result["copy"] = api.create_commit("alice/model", [CommitOperationCopy("old/b.bin", "copy.bin", src_revision="v1")],
                                   commit_message="copy").oid
request = api.upload_file(path_or_fileobj=b"pr", path_in_repo="p.txt", repo_id="alice/model", create_pr=True)
result["pr"] = [request.pr_num, request.pr_revision, request.pr_url]
api.upload_file(path_or_fileobj=b"more", path_in_repo="q.txt", repo_id="alice/model", revision="refs/pr/1")
result["files"] = {revision: sorted(api.list_repo_files("alice/model", revision=revision))
                   for revision in ("main", "v1", "dev/x", "refs/pr/1", first[:8])}
refs = api.list_repo_refs("alice/model", include_pull_requests=True)
result["refs"] = [[ref.name for ref in group] for group in (refs.branches, refs.tags, refs.pull_requests)]
rows = api.list_repo_commits("alice/model", revision="v1")
result["commits"] = [[row.title, row.message, row.authors] for row in rows]
rows = api.get_repo_discussions("alice/model")
result["discussions"] = [[row.num, row.is_pull_request, row.author] for row in rows]
result["pull"] = open(hf_hub_download("alice/model", "q.txt", revision="refs/pr/1")).read()
api.merge_pull_request("alice/model", 1)
result["status"] = api.get_discussion_details("alice/model", 1).status
api.delete_branch("alice/model", branch="dev/x")
api.delete_tag("alice/model", tag="v1")
result["gone"] = [fails(api.list_repo_files, "alice/model", revision=revision) for revision in ("dev/x", "v1")]
api.update_repo_settings("alice/model", private=True)
result["private"] = api.model_info("alice/model").private
api.create_repo("alice/data", repo_type="dataset")
api.upload_file(path_or_fileobj=b"{}", path_in_repo="d.json", repo_id="alice/data", repo_type="dataset")
result["dataset"] = api.dataset_info("alice/data").id
api.create_repo("alice/space", repo_type="space", space_sdk="gradio")
result["space"] = api.space_info("alice/space").sdk
api.delete_repo("alice/data", repo_type="dataset")
result["deleted"] = fails(api.delete_repo, "alice/data", repo_type="dataset")
"""


def test_commits_and_references(hub, tmp_path):
    hub.create("alice/model")
    got = run_python(hub, tmp_path, REVISIONS)
    assert got["twice"] == ["HfHubHTTPError 409"] * 2
    assert got["stale"] == "HfHubHTTPError 412" and got["half"] == "RemoteEntryNotFoundError 404"
    base = [".gitattributes", "a.txt"]
    assert got["files"] == {
        "main": [*base, "c.txt", "copy.bin"],
        "v1": [*base, "old/b.bin"],
        "dev/x": [*base, "old/b.bin"],
        "refs/pr/1": [*base, "c.txt", "copy.bin", "p.txt", "q.txt"],
        hub.commits("alice/model")[-2].oid[:8]: [*base, "old/b.bin"],
    }
    assert got["pr"] == [1, "refs/pr/1", f"{hub.url}/alice/model/discussions/1"]
    assert got["refs"] == [["main", "dev/x"], ["v1"], ["refs/pr/1"]]
    assert got["commits"] == [["first", "why", ["alice"]], ["initial commit", "", ["alice"]]]
    assert got["discussions"] == [[1, True, "alice"]] and got["pull"] == "more" and got["status"] == "merged"
    assert hub.files("alice/model")["q.txt"] == b"more" and hub.files("alice/model")["copy.bin"] == b"b"
    assert got["gone"] == ["RevisionNotFoundError 404"] * 2
    assert got["private"] and got["dataset"] == "alice/data" and got["space"] == "gradio"
    assert got["deleted"] == "RepositoryNotFoundError 404" and set(hub.repos) == {
        ("model", "alice/model"),
        ("space", "alice/space"),
    }
    assert not hub.unknown
