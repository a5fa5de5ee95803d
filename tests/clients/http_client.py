"""Plain HTTP against a running server: what every rejection looks like, and the operations routes."""

import gzip
import http.client
import json
import os
import signal
import threading
import time
from urllib.parse import urlsplit

from harness import Server, check, close, main, norm


def call(url, method, path, body=None, **headers):
    """Status, headers and body of one request; a body that is not bytes is sent as JSON."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
        headers.setdefault("content_type", "application/json")
    connection.request(method, path, body, {key.replace("_", "-"): value for key, value in headers.items()})
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, {key.lower(): value for key, value in answer.getheaders()}, data


def metric(url, name, **labels):
    """The sum of a metric's series that carry these labels."""
    total = 0.0
    for line in call(url, "GET", "/metrics")[2].decode().splitlines():
        series, _, value = line.rpartition(" ")
        if series.split("{")[0] == name and all(f'{key}="{wanted}"' in series for key, wanted in labels.items()):
            total += float(value)
    return total


@check
def embed_gives_rows_and_the_headers_of_tei(url):
    status, headers, body = call(url, "POST", "/embed", {"inputs": ["one", "two"]})
    rows = json.loads(body)
    assert status == 200 and len(rows) == 2 and abs(norm(rows[0]) - 1) < 1e-4
    for name in ["x-compute-type", "x-compute-time", "x-compute-characters", "x-compute-tokens", "x-total-time",
                 "x-tokenization-time", "x-queue-time", "x-inference-time", "x-request-id"]:
        assert name in headers, name
    assert headers["x-compute-characters"] == "6"
    assert json.loads(call(url, "POST", "/embed", {"inputs": "one"})[2]) == rows[:1]


@check
def every_rejection_is_json_with_its_status(url):
    good = {"inputs": "x"}
    cases = [
        ("POST", "/embed", b"{", {"content_type": "application/json"}, [400]),
        ("POST", "/embed", b"\xff\xfe", {"content_type": "application/json"}, [400]),
        ("POST", "/embed", json.dumps(good).encode(), {"content_type": "text/plain"}, [415]),
        ("POST", "/embed", {"inputs": 1.5}, {}, [400, 422]),
        ("POST", "/embed", {"inputs": None}, {}, [400, 422]),
        ("POST", "/embed", {}, {}, [400, 422]),
        ("POST", "/embed", {"inputs": ""}, {}, [400]),
        ("POST", "/embed", {"inputs": []}, {}, [400]),
        ("POST", "/embed", {"inputs": ["x"] * 33}, {}, [413, 422]),
        ("POST", "/embed", {"inputs": [4_000_000_000]}, {}, [422]),
        ("POST", "/embed", {"inputs": "x", "dimensions": 0}, {}, [422]),
        ("POST", "/embed", {"inputs": "x" * 3_000_000}, {}, [413]),
        ("POST", "/embed", good, {"x_request_timeout_ms": "soon"}, [400, 422]),
        ("GET", "/embed", None, {}, [405]),
        ("POST", "/no/such/route", good, {}, [404]),
        ("POST", "/tokenize", {"inputs": 5}, {}, [400, 422]),
        ("POST", "/decode", {"ids": "x"}, {}, [400, 422]),
        ("POST", "/similarity", {"inputs": {"source_sentence": "x", "sentences": []}}, {}, [400, 422]),
        ("POST", "/v1/embeddings", {"input": {}}, {}, [400, 422]),
    ]
    wrong = []
    for method, path, body, headers, expected in cases:
        status, answered, data = call(url, method, path, body, **headers)
        try:
            error = json.loads(data)
            nested = path.startswith("/v1")
            said = error["error"]["message"] if nested else error["error"]
            kind = error["error"]["type"] if nested else error["error_type"]
            fine = said and kind and "x-request-id" in answered
        except (ValueError, KeyError, TypeError):
            fine = False
        if status not in expected or not fine:
            wrong.append(f"{method} {path} {str(body)[:60]}: {status} {data[:120]}")
    assert not wrong, "\n".join(wrong)
    assert call(url, "POST", "/embed", good)[0] == 200


@check
def a_request_id_comes_back(url):
    for path, body in [("/embed", {"inputs": "x"}), ("/embed", {})]:
        assert call(url, "POST", path, body, x_request_id="id-4711")[1]["x-request-id"] == "id-4711"


@check
def tokenize_and_decode_are_inverse(url):
    text = "a small tree stays beautiful"
    tokens = json.loads(call(url, "POST", "/tokenize", {"inputs": text})[2])[0]
    assert tokens[0]["special"] and not tokens[1]["special"]
    assert all(text[token["start"]:token["stop"]] == token["text"].removeprefix("##") for token in tokens[1:-1])
    decoded = json.loads(call(url, "POST", "/decode", {"ids": [token["id"] for token in tokens]})[2])
    assert decoded == [text]


@check
def every_token_has_a_row(url):
    rows = json.loads(call(url, "POST", "/embed_all", {"inputs": "one two"})[2])[0]
    pooled = json.loads(call(url, "POST", "/embed", {"inputs": "one two", "normalize": False})[2])[0]
    assert len(rows) == 4
    assert close([sum(column) / 4 for column in zip(*rows)], pooled, 1e-4), "mean pooling of the token rows"


@check
def large_answers_are_compressed_for_those_who_ask(url):
    body = {"inputs": ["one"] * 8}
    _, headers, data = call(url, "POST", "/embed", body, accept_encoding="gzip")
    plain = call(url, "POST", "/embed", body)[2]
    assert headers.get("content-encoding") == "gzip" and gzip.decompress(data) == plain


@check
def operations_routes_answer(url):
    for path in ["/health", "/health/live", "/health/ready", "/ping", "/"]:
        assert call(url, "GET", path)[0] == 200, path
    info = json.loads(call(url, "GET", "/info")[2])
    assert info["max_input_length"] > 0 and info["version"]
    document = json.loads(call(url, "GET", "/api-doc/openapi.json")[2])
    assert {"/embed", "/v1/embeddings", "/health"} <= set(document["paths"])
    status, headers, _ = call(url, "GET", "/docs/")
    assert status == 200 and "html" in headers["content-type"]


@check
def counts_add_up(url):
    before = [metric(url, "niwaki_requests_total", route="/embed", code=code) for code in ("200", "400")]
    for _ in range(7):
        call(url, "POST", "/embed", {"inputs": "x"})
    for _ in range(3):
        call(url, "POST", "/embed", {"inputs": ""})
    after = [metric(url, "niwaki_requests_total", route="/embed", code=code) for code in ("200", "400")]
    assert [b - a for a, b in zip(before, after)] == [7, 3]


@check
def a_key_is_asked_for(binary):
    server = Server(binary, environment={"API_KEY": "right"}.items())
    try:
        body = {"inputs": "x"}
        assert call(server.url, "POST", "/embed", body)[0] == 401
        assert call(server.url, "POST", "/embed", body, authorization="Bearer wrong")[0] == 401
        assert call(server.url, "POST", "/embed", body, authorization="Bearer right")[0] == 200
        assert call(server.url, "GET", "/health")[0] == 200
    finally:
        assert server.stop() == 0


@check
def sigterm_lets_work_in_flight_finish(binary):
    server = Server(binary)
    answers = []
    body = {"inputs": ["the garden and the evening rain " * 40] * 32}
    threads = [threading.Thread(target=lambda: answers.append(call(server.url, "POST", "/embed", body)[0]))
               for _ in range(4)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 10
    while metric(server.url, "niwaki_requests_in_flight") < 4 and not answers and time.monotonic() < end:
        time.sleep(0.005)
    os.kill(server.process.pid, signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert answers == [200] * 4, answers
    assert server.process.wait(timeout=30) == 0


if __name__ == "__main__":
    main(__doc__)
