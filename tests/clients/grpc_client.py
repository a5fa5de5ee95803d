"""gRPC's own client against a running server: messages, streams, errors, deadlines, health; and a client of the Open
Inference Protocol. The stubs are compiled from the repository's proto file."""

import importlib
import json
import pathlib
import sys
import tempfile
import threading
import urllib.request

import grpc
import numpy
import tritonclient.http
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_tools import protoc

from harness import Server, check, close, main, norm

ROOT = pathlib.Path(__file__).resolve().parents[2]


def compiled():
    """The modules that `protoc` makes of the service's file."""
    out = tempfile.mkdtemp()
    folder = ROOT / "src/server/grpc"
    code = protoc.main(["protoc", f"-I{folder}", f"--python_out={out}", f"--grpc_python_out={out}", "tei.proto"])
    assert code == 0, "tei.proto does not compile"
    sys.path.insert(0, out)
    return importlib.import_module("tei_pb2"), importlib.import_module("tei_pb2_grpc")


tei, stubs = compiled()
TEXTS = ["A niwaki is a garden tree.", "Rain on stones", "x", "été 庭木 🌲"]


class Grpc:
    """A server of its own with a gRPC port, and a channel to it."""

    def __init__(self, binary, *arguments, **environment):
        self.server = Server(binary, "--grpc-port", "0", "--json-output", *arguments, environment=environment.items())
        with open(self.server.log.name) as log:
            events = [json.loads(line) for line in log]
        self.url = self.server.url
        self.address = next(event["grpc"] for event in events if event.get("grpc"))
        self.channel = grpc.insecure_channel(self.address)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.channel.close()
        assert self.server.stop() == 0


def http_rows(url, texts, path="/embed", **fields):
    body = json.dumps({"inputs": texts, **fields}).encode()
    request = urllib.request.Request(url + path, body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def code(call):
    """The status that a call fails with."""
    try:
        call()
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@check
def embeddings_are_those_of_http(binary):
    with Grpc(binary) as server:
        stub = stubs.EmbedStub(server.channel)
        rows = http_rows(server.url, TEXTS)
        for text, row in zip(TEXTS, rows, strict=True):
            answer = stub.Embed(tei.EmbedRequest(inputs=text))
            assert close(answer.embeddings, row, 1e-6), text
            assert answer.metadata.compute_chars == len(text) and answer.metadata.compute_tokens >= 3
            assert answer.metadata.total_time_ns >= answer.metadata.inference_time_ns > 0
        raw = stub.Embed(tei.EmbedRequest(inputs=TEXTS[0], normalize=False, dimensions=10)).embeddings
        assert len(raw) == 10 and close(raw, http_rows(server.url, TEXTS[0], normalize=False, dimensions=10)[0], 1e-5)
        tokens = stub.EmbedAll(tei.EmbedAllRequest(inputs=TEXTS[0])).token_embeddings
        expected = http_rows(server.url, TEXTS[0], "/embed_all")[0]
        assert len(tokens) == len(expected)
        assert all(close(token.embeddings, row, 1e-5) for token, row in zip(tokens, expected))


@check
def streams_answer_every_message_in_order(binary):
    with Grpc(binary) as server:
        stub = stubs.EmbedStub(server.channel)
        texts = [f"tree number {index}" for index in range(300)]
        answers = list(stub.EmbedStream(tei.EmbedRequest(inputs=text) for text in texts))
        assert len(answers) == 300
        rows = sum((http_rows(server.url, texts[start : start + 30]) for start in range(0, 300, 30)), [])
        assert all(close(answer.embeddings, row, 1e-6) for answer, row in zip(answers, rows, strict=True))
        # A stream that is asked as its answers come.
        turn = threading.Semaphore(1)

        def questions():
            for text in texts[:20]:
                assert turn.acquire(timeout=20)
                yield tei.EmbedRequest(inputs=text)

        for row, answer in zip(rows, stub.EmbedStream(questions())):
            assert close(answer.embeddings, row, 1e-6)
            turn.release()
        # The first message that cannot be ends it.
        bad = stub.EmbedStream(tei.EmbedRequest(inputs=text) for text in ["a", "b", "", "c"])
        seen = 0
        try:
            for _ in bad:
                seen += 1
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
        assert seen == 2
        tokens = stubs.TokenizeStub(server.channel)
        pieces = list(tokens.TokenizeStream(tei.EncodeRequest(inputs=text, add_special_tokens=True) for text in TEXTS))
        assert [piece.tokens[0].id for piece in pieces] == [101] * len(TEXTS)
        decoded = tokens.Decode(tei.DecodeRequest(ids=[token.id for token in pieces[1].tokens], skip_special_tokens=True))
        assert decoded.text == "rain on stones"


@check
def errors_have_their_codes(binary):
    with Grpc(binary, "--auto-truncate", "false", "--payload-limit", "20000") as server:
        stub = stubs.EmbedStub(server.channel)
        status = grpc.StatusCode
        request = tei.EmbedRequest
        cases = [
            (lambda: stub.Embed(request(inputs="")), status.INVALID_ARGUMENT),
            (lambda: stub.Embed(request(inputs="tree " * 2000)), status.INVALID_ARGUMENT),
            (lambda: stub.Embed(request(inputs="x", dimensions=100_000)), status.INVALID_ARGUMENT),
            (lambda: stub.Embed(request(inputs="x", prompt_name="none")), status.INVALID_ARGUMENT),
            (lambda: stub.Embed(request(inputs="x"), metadata=[("x-model", "other")]), status.NOT_FOUND),
            (lambda: stub.EmbedSparse(tei.EmbedSparseRequest(inputs="x")), status.UNIMPLEMENTED),
            (lambda: stubs.RerankStub(server.channel).Rerank(tei.RerankRequest(query="x", texts=["y"])),
             status.FAILED_PRECONDITION),
            (lambda: stubs.PredictStub(server.channel).Predict(tei.PredictRequest(inputs="x")),
             status.FAILED_PRECONDITION),
            (lambda: stub.Embed(request(inputs="x" * 30_000)), status.OUT_OF_RANGE),
            (lambda: server.channel.unary_unary("/tei.v1.Embed/None")(b""), status.UNIMPLEMENTED),
        ]
        for index, (call, expected) in enumerate(cases):
            assert code(call) == expected, (index, code(call))
        # A deadline that passes behind others' work.
        long = "tree " * 200
        others = [stub.Embed.future(request(inputs=long)) for _ in range(40)]
        assert code(lambda: stub.Embed(request(inputs=long), timeout=0.005)) == status.DEADLINE_EXCEEDED
        assert {code(call.result) for call in others} == {status.OK}
        # None of them hurt the channel.
        assert abs(norm(stub.Embed(request(inputs="x")).embeddings) - 1) < 1e-4


@check
def a_key_is_asked_for_and_health_is_not(binary):
    with Grpc(binary, API_KEY="right") as server:
        stub = stubs.EmbedStub(server.channel)
        embed = lambda *metadata: code(lambda: stub.Embed(tei.EmbedRequest(inputs="x"), metadata=metadata))
        assert embed() == grpc.StatusCode.UNAUTHENTICATED
        assert embed(("authorization", "Bearer wrong")) == grpc.StatusCode.UNAUTHENTICATED
        assert embed(("authorization", "Bearer right")) == grpc.StatusCode.OK
        assert embed(("x-api-key", "right")) == grpc.StatusCode.OK
        health = health_pb2_grpc.HealthStub(server.channel)
        serving = health_pb2.HealthCheckResponse.SERVING
        for name in ["", "tei.v1.Embed", "tei.v1.Rerank"]:
            assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == serving, name
        unknown = health_pb2.HealthCheckRequest(service="none")
        assert code(lambda: health.Check(unknown)) == grpc.StatusCode.NOT_FOUND


@check
def a_drain_is_told_to_watchers(binary):
    with Grpc(binary) as server:
        health = health_pb2_grpc.HealthStub(server.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="tei.v1.Embed"))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        # Work that keeps the drain open.
        stub = stubs.EmbedStub(server.channel)
        calls = [stub.Embed.future(tei.EmbedRequest(inputs="the evening rain " * 40)) for _ in range(30)]
        calls[0].result()
        server.server.process.terminate()
        try:
            seen = [answer.status for answer in watch]
            assert seen[-1:] in ([], [health_pb2.HealthCheckResponse.NOT_SERVING]), seen
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.UNAVAILABLE, error
        codes = {code(call.result) for call in calls}
        assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}, codes
        assert calls[0].code() == grpc.StatusCode.OK


@check
def calls_at_once_share_a_channel(binary):
    with Grpc(binary, "--default-timeout-ms", "0") as server:
        stub = stubs.EmbedStub(server.channel)
        texts = [f"stone {index % 17}" for index in range(400)]
        calls = [stub.Embed.future(tei.EmbedRequest(inputs=text)) for text in texts]
        rows = [list(call.result(timeout=60).embeddings) for call in calls]
        assert all(rows[index] == rows[index % 17] for index in range(400)), "the same text gives the same bits"


@check
def info_says_what_it_is(binary):
    with Grpc(binary, "--max-client-batch-size", "7") as server:
        info = stubs.InfoStub(server.channel).Info(tei.InfoRequest())
        assert info.model_type == tei.MODEL_TYPE_EMBEDDING and info.max_client_batch_size == 7
        assert info.version and info.model_id and info.max_input_length > 100


@check
def a_client_of_the_open_inference_protocol_is_answered(url):
    with tritonclient.http.InferenceServerClient(url.removeprefix("http://")) as client:
        assert client.is_server_live() and client.is_server_ready()
        assert "niwaki" in client.get_server_metadata()["name"]
        with urllib.request.urlopen(url + "/v1/models") as answer:
            name = json.load(answer)["data"][0]["id"]
        assert client.is_model_ready(name) and not client.is_model_ready("other")
        metadata = client.get_model_metadata(name)
        assert {entry["name"] for entry in metadata["inputs"]} >= {"text"}
        given = tritonclient.http.InferInput("text", [len(TEXTS)], "BYTES")
        given.set_data_from_numpy(numpy.array(TEXTS, dtype=object), binary_data=False)
        wanted = tritonclient.http.InferRequestedOutput(metadata["outputs"][0]["name"], binary_data=False)
        answer = client.infer(name, [given], outputs=[wanted], request_id="r1")
        rows = answer.as_numpy(metadata["outputs"][0]["name"])
        assert rows.shape[0] == len(TEXTS) and answer.get_response()["id"] == "r1"
        assert all(close(row, other, 1e-5) for row, other in zip(rows.tolist(), http_rows(url, TEXTS), strict=True))


if __name__ == "__main__":
    main(__doc__)
