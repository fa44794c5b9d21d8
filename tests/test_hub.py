"""Models and data sets from a hub of our own: a server on the loopback that answers as huggingface_hub asks, with files made here."""

import hashlib
import http.server
import json
import shutil
import threading

import pytest

from conftest import script

ONLINE = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
COMMITS = {"main": "0" * 39 + "1", "v2": "0" * 39 + "2"}  # revisions of every repository
WIKI = [" = Robert Boulter = \n", "", " He had a role as \" Craig \" . \n", " caf\u00e9 \u4f60\u597d \n"]
ITEMS = [{"question": f"What sat on mat {n}?", "choices": ["the cat", "the dog", "2024", "a hat"][: 4 - n % 2], "answer": n % 3} for n in range(6)]
MMLU = [{"subject": "high_school_mats", **item, "choices": ["the cat", "the dog", "2024", "a hat"]} for item in ITEMS]
ARTICLES = [{"id": f"{n:040x}", "article": f"(CNN) -- The cat \u201csat\u201d {n} times .", "highlights": f"Cat sat .\n{n} times ."} for n in range(4)]


def data_sets(folder):
    """The hub's data sets, a few rows each, at the paths and with the columns that they have there."""
    import pyarrow
    from pyarrow import parquet

    arc = [{"id": f"q{n}", "question": item["question"], "choices": {"text": item["choices"], "label": list("1234" if n == 2 else "ABCD")[: len(item["choices"])]},
            "answerKey": ("1234" if n == 2 else "ABCD")[item["answer"]]} for n, item in enumerate(ITEMS)]
    files = {}
    for split in ("train", "test", "validation"):
        mark = lambda rows, key: [row | {key: f"{row[key]}{split} "} for row in rows]
        files[f"Salesforce/wikitext/wikitext-2-raw-v1/{split}-00000-of-00001"] = mark([{"text": t} for t in WIKI], "text")
        files[f"cais/mmlu/all/{split}-00000-of-00001"] = mark(MMLU, "question")
        files[f"allenai/ai2_arc/ARC-Easy/{split}-00000-of-00001"] = mark(arc, "question")
        files[f"allenai/ai2_arc/ARC-Challenge/{split}-00000-of-00001"] = mark(arc[::-1], "question")
        for n in range(2):  # in two files
            files[f"abisee/cnn_dailymail/3.0.0/{split}-0000{n}-of-00002"] = mark(ARTICLES[2 * n : 2 * n + 2], "article")
    for name, rows in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}.parquet")


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """ORG/NAME/PATH of everything on the hub."""
    folder = tmp_path_factory.mktemp("hub")
    data_sets(folder)
    shutil.copytree(tiny, folder / "test" / "tiny")
    for junk in ("pytorch_model.bin", "consolidated.safetensors", "training_args.bin"):
        (folder / "test" / "tiny" / junk).write_bytes(b"junk")
    return folder


@pytest.fixture
def hub(files):
    """(endpoint, paths that were asked for, what to do to a body on its way)."""
    asked, change = [], {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, body, status=200, **headers):
            self.send_response(status)
            for name, value in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.split("?")[0].replace("%2F", "/")
            asked.append(path)
            if "/gated/model" in path:
                return self.answer(b"{}", 403, X_Error_Code="GatedRepo")
            api = path.startswith("/api/")
            words = path.removeprefix("/api").strip("/").split("/")
            words = words[1:] if words[0] in ("models", "datasets") else words
            repo = files / "/".join(words[:2])
            if len(words) < 2 or not repo.is_dir():
                return self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
            revision = words[3] if len(words) > 3 else "main"
            commit = COMMITS.get(revision) or (revision if revision in COMMITS.values() else None)
            if commit is None:
                return self.answer(b"{}", 404, X_Error_Code="RevisionNotFound")
            names = sorted(str(f.relative_to(repo)) for f in repo.rglob("*") if f.is_file())
            if api and "tree" in words:
                return self.answer(json.dumps([{"type": "file", "path": n, "size": (repo / n).stat().st_size, "oid": "0" * 40} for n in names]).encode())
            if api:
                info = {"id": "/".join(words[:2]), "sha": commit, "siblings": [{"rfilename": n} for n in names], "private": False, "tags": [],
                        "downloads": 0, "likes": 0}
                return self.answer(json.dumps(info).encode())
            file = repo / "/".join(words[4:])
            if not file.is_file():
                return self.answer(b"{}", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            body = file.read_bytes()
            tag = hashlib.sha256(body).hexdigest() if len(body) > 999 else hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
            body = change.get(file.name, lambda body: body)(body)
            self.answer(body, ETag=f'"{tag}"', X_Repo_Commit=commit, Content_Type="application/octet-stream")

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked, change
    server.shutdown()


def last_line(done):
    """What is said after the progress bars of a download."""
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_load_from_a_hub_then_offline(hub, tmp_path):
    endpoint, asked, _ = hub
    env = ONLINE | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
    run = ["infer.py", "--full", "--model", "test/tiny", "--prompt", "the cat", "--max-new-tokens", 2]
    done = script(*run, env=env)
    assert done.returncode == 0, done.stderr
    assert not any(name in path for path in asked for name in (".bin", "consolidated"))  # only what is read, and no pickle
    assert any("/main/" in path or COMMITS["main"] in path for path in asked)
    count = len(asked)
    done = script(*run, env=env | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0 and len(asked) == count, done.stderr


def test_a_revision_is_the_one_that_is_asked_for(hub, tmp_path):
    env = ONLINE | {"HF_ENDPOINT": hub[0], "HF_HOME": str(tmp_path)}
    run = ["infer.py", "--full", "--prompt", "the cat", "--max-new-tokens", 1, "--model"]
    assert script(*run, "test/tiny@v2", env=env).returncode == 0
    assert [f.name for f in (tmp_path / "hub" / "models--test--tiny" / "snapshots").iterdir()] == [COMMITS["v2"]]
    done = script(*run, "test/tiny@main", env=env | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2 and "test/tiny@main" in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_file_that_is_damaged_on_its_way_is_not_used(hub, tmp_path, file):
    endpoint, _, change = hub
    env = ONLINE | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
    change[file] = lambda body: body[:-9] + bytes([body[-9] ^ 1]) + body[-8:]
    run = ["infer.py", "--full", "--prompt", "the cat", "--max-new-tokens", 1, "--model", "test/tiny"]
    done = script(*run, env=env)
    assert done.returncode == 2 and "damaged" in last_line(done), done.stderr
    change.clear()
    done = script(*run, env=env)  # it is fetched anew
    assert done.returncode == 0, done.stderr


def test_a_cache_that_cannot_be_written(hub, tmp_path):
    (tmp_path / "file").write_text("")
    done = script("infer.py", "--full", "--model", "test/tiny", "--prompt", "x", env=ONLINE | {"HF_ENDPOINT": hub[0], "HF_HOME": str(tmp_path / "file" / "hf")})
    assert done.returncode == 2 and "HF_HOME" in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize("name, word", [("gated/model", "hf auth login"), ("no/such", "no such model"), ("test/tiny@v9", "revision 'v9'"), ("a//b", "unknown model"),
                                        ("a--b/..c", "no such model"), ("../nonesuch", "unknown model"), ("test/tiny@../..", "test/tiny")])
def test_what_the_hub_refuses_is_one_line(hub, tmp_path, name, word):
    env = ONLINE | {"HF_ENDPOINT": hub[0], "HF_HOME": str(tmp_path)}
    done = script("infer.py", "--full", "--model", name, "--prompt", "x", env=env)
    assert done.returncode == 2 and word in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_no_hub_and_nothing_cached(tmp_path):
    done = script("infer.py", "--full", "--model", "test/tiny", "--prompt", "x", env=ONLINE | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)})
    assert done.returncode == 2 and "reached" in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


# ----------------------------------------------------------------------------------------------------------
# Data sets


def read(expression, env):
    """What data.py gives, in a process of its own: the hub's client reads its settings when it is imported."""
    return script(f"import json, sys; from data import *; print(json.dumps({expression}))", env=ONLINE | env)


def test_rows_are_the_same_from_the_hub_and_from_a_folder(hub, tmp_path):
    endpoint, asked, _ = hub
    env = ONLINE | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    folder = tmp_path / "data"
    for split, there in (("train", "train"), ("test", "test")):
        mark = lambda rows, key, there=there: [row | {key: f"{row[key]}{there} "} for row in rows]
        mmlu = mark(MMLU, "question", "validation" if split == "train" else there)
        for name, rows in (("mmlu", mmlu), ("arc_easy", mark(ITEMS, "question")), ("arc_challenge", mark(ITEMS[::-1], "question")), ("cnn_dm", mark(ARTICLES, "article"))):
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "wikitext2").mkdir(exist_ok=True)
        (folder / "wikitext2" / f"{split}.txt").write_text("".join(row["text"] for row in mark([{"text": t} for t in WIKI], "text")), encoding="utf-8")
    everything = ("[[load_text('wikitext2', s, d), load_articles(s, d), *[load_items(t, s, d) for t in ('arc_easy', 'arc_challenge', 'mmlu')]] "
                  "for d in (None, DIR) for s in ('train', 'test')]").replace("DIR", repr(str(folder)))
    done = read(everything, env)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {item.pop("place").split(" ")[-1] for row in rows for items in row[2:] for item in items} >= {"1", "2"}
    train, test, train_there, test_there = rows
    assert train == train_there and test == test_there and train != test
    assert not any("validation" in path and "mmlu" not in path for path in asked if "/resolve/" in path)  # only the split that is read
    count = len(asked)
    again = read("load_articles('test')", env | {"HF_HUB_OFFLINE": "1"})
    assert again.returncode == 0 and json.loads(again.stdout) == test[1] and len(asked) == count


@pytest.mark.parametrize("prepare, env, word", [
    ("import sys; sys.modules['pyarrow'] = None", {}, "pip install pyarrow"), ("pass", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "--data-dir"),
    ("pass", {"HF_HUB_OFFLINE": "1"}, "--data-dir")])
def test_a_data_set_that_cannot_be_had_is_one_line(tmp_path, prepare, env, word):
    done = script(f"{prepare}; from data import *; load_items('mmlu', 'test')", env=ONLINE | {"HF_HOME": str(tmp_path)} | env)
    assert done.returncode == 2 and word in done.stderr and "mmlu" in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_damaged_parquet_is_one_line(hub, tmp_path, files):
    file = files / "cais" / "mmlu" / "all" / "test-00000-of-00001.parquet"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[: len(whole) // 2])
        done = read("load_items('mmlu', 'test')", {"HF_ENDPOINT": hub[0], "HF_HOME": str(tmp_path)})
    finally:
        file.write_bytes(whole)
    assert done.returncode == 2 and "mmlu" in last_line(done), done.stderr
