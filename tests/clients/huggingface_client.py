"""The `huggingface_hub` package: its inference client against a running server, and its cache shared with niwaki."""

import hashlib
import http.server
import json
import os
import subprocess
import tempfile
import threading
from pathlib import Path

import huggingface_hub
from harness import check, close, cosine, main, norm
from huggingface_hub import InferenceClient

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "bert"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXTS = ["A pine tree is pruned in spring.", "Someone cuts the branches of a conifer.", "Interest rates rose today."]


@check
def feature_extraction_gives_a_row_per_text(url):
    client = InferenceClient(model=url, timeout=30)
    one = client.feature_extraction(TEXTS[0])
    many = client.feature_extraction(TEXTS)
    assert one.shape == (1, many.shape[1]) and many.shape[0] == 3
    assert one[0].tolist() == many[0].tolist()
    assert abs(norm(many[2].tolist()) - 1) < 1e-4


@check
def feature_extraction_takes_its_options(url):
    client = InferenceClient(model=f"{url}/embed", timeout=30)
    raw = client.feature_extraction(TEXTS[0], normalize=False)[0].tolist()
    unit = client.feature_extraction(TEXTS[0], normalize=True)[0].tolist()
    assert close([value / norm(raw) for value in raw], unit)
    long = "garden " * 5_000
    left = client.feature_extraction(long + "rain", truncate=True, truncation_direction="left")[0].tolist()
    right = client.feature_extraction(long + "rain", truncate=True, truncation_direction="right")[0].tolist()
    assert left != right and abs(norm(left) - 1) < 1e-4


@check
def sentence_similarity_is_the_cosine(url):
    scores = InferenceClient(model=f"{url}/similarity", timeout=30).sentence_similarity(TEXTS[0], TEXTS[1:])
    rows = [row.tolist() for row in InferenceClient(model=url).feature_extraction(TEXTS)]
    assert close(scores, [cosine(rows[0], rows[1]), cosine(rows[0], rows[2])], 1e-4)


class StandIn:
    """The hub with one model, enough of it for both clients."""

    def __enter__(self):
        files = {str(path.relative_to(GOLDEN)): path.read_bytes() for path in GOLDEN.rglob("*") if path.is_file()}

        def digest(name):  # large files go by their SHA-256, others by the id of their git blob
            if name.endswith(".safetensors"):
                return hashlib.sha256(files[name]).hexdigest()
            return hashlib.sha1(f"blob {len(files[name])}\0".encode() + files[name]).hexdigest()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                path = self.path.partition("?")[0]
                if path.startswith("/api/models/org/tiny/tree/"):
                    entries = [{"type": "file", "path": name, "size": len(files[name]), "oid": digest(name)}
                               for name in sorted(files)]
                    return self.send(json.dumps(entries).encode(), {"Content-Type": "application/json"})
                if path.startswith("/api/models/org/tiny"):
                    siblings = [{"rfilename": name} for name in sorted(files)]
                    model = {"id": "org/tiny", "sha": COMMIT, "siblings": siblings, "private": False, "tags": [],
                             "downloads": 0, "likes": 0}
                    return self.send(json.dumps(model).encode(), {"Content-Type": "application/json"})
                name = path.split("/", 5)[-1]
                if name not in files:
                    return self.send(b"Entry not found", {"X-Error-Code": "EntryNotFound"}, 404)
                self.send(files[name], {"ETag": f'"{digest(name)}"', "X-Repo-Commit": COMMIT})

            do_HEAD = do_GET

            def send(self, body, headers, status=200):
                self.send_response(status)
                for header in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(*header)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def niwaki_embed(binary, cache, **environment):
    result = subprocess.run(
        [binary, "embed", "--model-id", "org/tiny"],
        input="Rain falls on the stones\n",
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "HUGGINGFACE_HUB_CACHE": str(cache), **environment},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[0])


@check
def what_niwaki_downloads_is_there_for_python(binary):
    with tempfile.TemporaryDirectory() as cache:
        with StandIn() as endpoint:
            row = niwaki_embed(binary, cache, HF_ENDPOINT=endpoint)
        found = huggingface_hub.snapshot_download("org/tiny", cache_dir=cache, local_files_only=True)
        weights = Path(found, "model.safetensors")
        assert weights.read_bytes() == (GOLDEN / "model.safetensors").read_bytes()
        repos = huggingface_hub.scan_cache_dir(cache)
        assert not repos.warnings and [repo.repo_id for repo in repos.repos] == ["org/tiny"]
        assert niwaki_embed(binary, cache, HF_HUB_OFFLINE="1") == row


@check
def what_python_downloads_is_there_for_niwaki(binary):
    with tempfile.TemporaryDirectory() as cache:
        with StandIn() as endpoint:
            huggingface_hub.snapshot_download("org/tiny", cache_dir=cache, endpoint=endpoint)
        assert len(niwaki_embed(binary, cache, HF_HUB_OFFLINE="1")) == 32


if __name__ == "__main__":
    main(__doc__)
