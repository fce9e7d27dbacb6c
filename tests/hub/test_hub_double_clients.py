"""The double of the Hub against clients other than huggingface_hub: `hf`, datasets, evaluate, JavaScript."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from hub_clients import FILES, make_folder, run, run_python, statuses, without_attributes
from hub_double import OTHER_TOKEN


def test_hf_command_line(hub, tmp_path):
    hub.multipart_size, hub.chunk_size = 1000, 2000
    make_folder(tmp_path / "up")
    hf = Path(sys.executable).with_name("hf")
    if not hf.exists():
        pytest.skip("no `hf` beside this Python")

    def call(*arguments, **options):
        return run(hub, tmp_path, hf, *arguments, **options)

    assert "alice" in call("auth", "whoami")
    call("repos", "create", "alice/model", "--private")
    call("upload", "alice/model", "up", ".", "--commit-message", "pushed")
    assert without_attributes(hub.files("alice/model")) == FILES and hub.commits("alice/model")[0].title == "pushed"
    call("download", "alice/model", "--local-dir", "down")
    assert {path: (tmp_path / "down" / path).read_bytes() for path in FILES} == FILES
    call("repos", "tag", "create", "alice/model", "v1")
    call("upload", "alice/model", "up/config.json", "pr.json", "--create-pr")
    assert "pr.json" in hub.files("alice/model", "refs/pr/1")
    call("repos", "delete-files", "alice/model", "sub/*")
    assert set(FILES) - set(hub.files("alice/model")) == {"sub/\u00e9 x.txt"} <= set(hub.files("alice/model", "v1"))
    assert "not found" in call("download", "alice/model", token=OTHER_TOKEN, ok=False).lower()
    call("repos", "delete", "alice/model", "--yes")
    assert not hub.repos and not hub.unknown


METRIC = b"""import datasets
import evaluate


class Words(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions):
        return {"words": sum(len(text.split()) for text in predictions)}
"""
DATA = """
import sys
sys.modules["transformers"] = None  # evaluate tries to import it, with torch, for its evaluators: seconds
import datasets, evaluate
del sys.modules["transformers"]
data = datasets.load_dataset("alice/data", split="train")
result["rows"] = list(data["text"])
data.push_to_hub("alice/again")
result["again"] = list(datasets.load_dataset("alice/again", split="train", streaming=True).take(1))
result |= evaluate.load("alice/words").compute(predictions=data["text"])
"""


def test_datasets_and_evaluate(hub, tmp_path):
    hub.create("alice/data", {"train.jsonl": b'{"text": "one"}\n{"text": "two words"}\n'}, kind="dataset")
    hub.create("alice/words", {"words.py": METRIC}, kind="space", sdk="gradio")
    got = run_python(hub, tmp_path, DATA)
    assert got == {"rows": ["one", "two words"], "again": [{"text": "one"}], "words": 3}
    assert "data/train-00000-of-00001.parquet" in hub.files("alice/again", kind="dataset")


JAVASCRIPT = """
const hub = require("@huggingface/hub");
const url = process.env.HF_ENDPOINT, repo = "alice/model";
const common = { hubUrl: url, accessToken: process.env.HF_TOKEN, repo };
const large = new Blob([Buffer.alloc(5000, "0123456789")]), text = new Blob(["{}"]);
const collect = async (rows) => { const all = []; for await (const row of rows) all.push(row); return all; };
const fails = async (call) => { try { await call(); } catch (error) { return error.statusCode; } };

(async () => {
  const result = {};
  result.name = (await hub.whoAmI(common)).name;
  result.url = (await hub.createRepo({ ...common, visibility: "private" })).repoUrl;
  result.again = await fails(() => hub.createRepo(common));
  const files = [{ path: "config.json", content: text }, { path: "sub/model.bin", content: large }];
  const first = (await hub.uploadFiles({ ...common, files, commitTitle: "pushed", useXet: false })).commit.oid;
  await hub.uploadFile({ ...common, file: { path: "other.bin", content: new Blob(["x\\0y"]) } });
  result.stale = await fails(() => hub.uploadFiles({ ...common, files, parentCommit: first }));
  await hub.createBranch({ ...common, branch: "dev" });
  await hub.deleteFiles({ ...common, paths: ["config.json"], branch: "dev" });
  const request = { ...common, files: [{ path: "pr.txt", content: text }], isPullRequest: true };
  result.pr = (await hub.uploadFiles(request)).pullRequestUrl;
  result.files = (await collect(hub.listFiles({ ...common, recursive: true }))).map((row) => row.path);
  result.pull = (await collect(hub.listFiles({ ...common, revision: "refs/pr/1" }))).map((row) => row.path);
  result.paths = (await hub.pathsInfo({ ...common, paths: ["sub/model.bin", "none"] })).map((row) => row.lfs.size);
  result.exists = [await hub.fileExists({ ...common, path: "config.json" }),
                   await hub.fileExists({ ...common, path: "none" }),
                   await hub.repoExists({ ...common, accessToken: undefined })];
  const blob = await hub.downloadFile({ ...common, path: "sub/model.bin" });
  result.same = Buffer.from(await blob.arrayBuffer()).equals(Buffer.from(await large.arrayBuffer()));
  result.range = await (await hub.downloadFile({ ...common, path: "sub/model.bin" })).slice(4995, 5000).text();
  result.titles = (await collect(hub.listCommits(common))).map((row) => row.title);
  result.info = (await hub.modelInfo({ ...common, name: repo })).private;
  await hub.createRepo({ ...common, repo: { type: "dataset", name: "alice/data" } });
  await hub.deleteRepo({ ...common, repo: { type: "dataset", name: "alice/data" } });
  console.log(JSON.stringify(result));
})();
"""


def find_javascript_client() -> str:
    """→ the node_modules folder that has it."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("needs node and npm")
    shared = subprocess.run(["npm", "root", "--global"], capture_output=True, text=True).stdout.strip()
    for folder in (*os.environ.get("NODE_PATH", "").split(os.pathsep), str(ROOT / "node_modules"), shared):
        if folder and (Path(folder) / "@huggingface" / "hub").is_dir():
            return folder
    pytest.skip("needs `npm install @huggingface/hub`, here or elsewhere with its node_modules as NODE_PATH")


def test_javascript_client(hub, tmp_path, monkeypatch):
    """A second witness, written independently of the first."""
    hub.multipart_size, hub.chunk_size, hub.page_size = 1000, 2000, 2
    monkeypatch.setenv("NODE_PATH", find_javascript_client())
    got = json.loads(run(hub, tmp_path, "node", "-e", JAVASCRIPT))
    expected = {"config.json": b"{}", "sub/model.bin": b"0123456789" * 500, "other.bin": b"x\0y"}
    assert without_attributes(hub.files("alice/model")) == expected
    assert statuses(hub, r"PUT /upload/\w+/\d") == [200] * 3 and len(hub.blobs) == 2
    assert got["name"] == "alice" and got["url"] == f"{hub.url}/alice/model"
    assert got["again"] == 409 and got["stale"] == 412
    assert set(hub.files("alice/model", "dev")) == {".gitattributes", "sub/model.bin", "other.bin"}
    assert got["pr"] == f"{hub.url}/alice/model/discussions/1"
    assert got["files"] == [".gitattributes", "config.json", "other.bin", "sub", "sub/model.bin"]
    assert got["pull"] == [".gitattributes", "config.json", "other.bin", "pr.txt", "sub"]
    assert got["paths"] == [5000] and got["exists"] == [True, False, False]
    assert got["same"] and got["range"] == "56789" and got["info"]
    assert got["titles"] == ["Add other.bin", "pushed", "initial commit"]
    assert set(hub.repos) == {("model", "alice/model")} and not hub.unknown
