"""A hub id against a hub of our own: a server on the loopback that holds one tiny model, as huggingface_hub asks for it."""

import hashlib
import http.server
import json
import threading

import pytest

from conftest import script

COMMIT = "0" * 39 + "1"


@pytest.fixture
def hub(tiny):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, body, status=200, **headers):
            self.send_response(status)
            for name, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.split("?")[0]
            asked.append(path)
            files = sorted(f.name for f in tiny.iterdir()) + ["pytorch_model.bin"]
            if "/gated/model" in path:
                return self.answer(b"{}", 403, X_Error_Code="GatedRepo")
            if "/test/tiny" not in path:
                return self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
            if "/tree/" in path:
                entries = [{"type": "file", "path": f, "size": 1, "oid": "0" * 40} for f in files]
                return self.answer(json.dumps(entries).encode(), Content_Type="application/json")
            if path.startswith("/api/models/"):
                info = {"id": "test/tiny", "modelId": "test/tiny", "sha": COMMIT, "siblings": [{"rfilename": f} for f in files],
                        "private": False, "tags": [], "downloads": 0, "likes": 0}
                return self.answer(json.dumps(info).encode(), Content_Type="application/json")
            body = (tiny / path.split("/")[-1]).read_bytes()
            self.answer(body, ETag=f'"{hashlib.sha256(body).hexdigest()}"', Content_Type="application/octet-stream")

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def test_load_from_a_hub_then_offline(hub, tmp_path):
    endpoint, asked = hub
    env = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
    run = ["infer.py", "--full", "--model", "test/tiny", "--prompt", "the cat", "--max-new-tokens", 2]
    done = script(*run, env=env, process=True)
    assert done.returncode == 0, done.stderr
    assert not any("pytorch_model.bin" in path for path in asked)  # only what is read, and no pickle
    count = len(asked)
    done = script(*run, env=env | {"HF_HUB_OFFLINE": "1"}, process=True)
    assert done.returncode == 0 and len(asked) == count, done.stderr


@pytest.mark.parametrize("name, word", [("gated/model", "hf auth login"), ("no/such", "no such model")])
def test_what_the_hub_refuses_is_one_line(hub, tmp_path, name, word):
    env = {"HF_ENDPOINT": hub[0], "HF_HOME": str(tmp_path)}
    done = script("infer.py", "--full", "--model", name, "--prompt", "x", env=env, process=True)
    assert done.returncode == 2 and word in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_no_hub_and_nothing_cached(tmp_path):
    done = script("infer.py", "--full", "--model", "test/tiny", "--prompt", "x", env={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}, process=True)
    assert done.returncode == 2 and "reached" in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
