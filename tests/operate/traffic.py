"""Clients for the scripts beside this file: keep-alive connections, closed and open loops, and a tally of every answer.

Each answer is checked as it comes: its request id is the one sent, a 200 has the very bytes that the same text got on an
idle server (results do not depend on the batch), a refusal is JSON of its class with the headers that belong to it.
"""

import asyncio
import collections
import itertools
import json
import os
import pathlib
import random
import sys
import time

root = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(root / "tests/clients"))

ERROR_TYPES = {408: "Timeout", 429: "Overloaded", 503: "Unhealthy", 504: "Timeout"}
OPENAI_TYPES = ("rate_limit_error", "server_error")
# Connections without a request that a client keeps.
POOL = 64
ids = itertools.count()


class LentTime:
    """Time as it passes on the processor from which the host of this machine takes most for others (`steal` in /proc/stat): while
    the host keeps a third of it, the clock runs at two thirds of the speed."""

    def __init__(self):
        self.read = self.stolen()
        self.at, self.passed, self.speed = time.monotonic(), 0.0, 1.0

    @staticmethod
    def stolen():
        """Seconds that each processor was not there so far."""
        with open("/proc/stat") as stat:
            lines = [line.split() for line in stat if line.startswith("cpu") and line[3] != " "]
        return [int(line[8]) / os.sysconf("SC_CLK_TCK") for line in lines]

    def now(self):
        return self.passed + (time.monotonic() - self.at) * self.speed

    async def run(self):
        """Keeps the speed; to be run beside those that ask for the time."""
        while True:
            await asyncio.sleep(0.25)
            read, at = self.stolen(), time.monotonic()
            took = at - self.at
            lost = min(took, max(now - before for now, before in zip(read, self.read)))
            # What was lost has been counted as if the speed had not changed, and time does not go back.
            self.passed += took * self.speed
            self.read, self.at, self.speed = read, at, max(0.02, 1 - lost / took)


class Closed(Exception):
    """The server closed the connection; `partial` tells whether it had begun an answer."""

    def __init__(self, partial):
        super().__init__("in the middle of an answer" if partial else "without a byte of an answer")
        self.partial = partial


def unchunked(data, at):
    """The body that is sent in chunks from `at` on."""
    body = bytearray()
    while True:
        end = data.index(b"\r\n", at)
        size = int(data[at:end], 16)
        if size == 0:
            return bytes(body)
        body += data[end + 2 : end + 2 + size]
        at = end + 2 + size + 2


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection, one request at a time."""

    def __init__(self):
        self.data, self.waiting, self.lost, self.head = bytearray(), None, False, None

    @classmethod
    async def open(cls, port):
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(cls, "127.0.0.1", port))[1]

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.data += data
        if self.head is None:
            end = self.data.find(b"\r\n\r\n")
            if end < 0:
                return
            lines = self.data[:end].decode().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines[1:])
            length = int(headers["content-length"]) if "content-length" in headers else None
            self.head = int(lines[0].split()[1]), headers, end + 4, length
        status, headers, start, length = self.head
        complete = len(self.data) >= start + length if length is not None else self.data.endswith(b"\r\n0\r\n\r\n")
        if complete:
            body = bytes(self.data[start:]) if length is not None else unchunked(self.data, start)
            self.data, self.head = bytearray(), None
            if headers.get("connection") == "close":
                self.lost = True
                self.transport.close()
            if self.waiting and not self.waiting.done():
                self.waiting.set_result((status, headers, body))

    def connection_lost(self, _):
        self.lost = True
        if self.waiting and not self.waiting.done():
            self.waiting.set_exception(Closed(len(self.data) > 0))

    async def ask(self, request, patience=60):
        """Status, headers and body of the answer to `request`."""
        if self.lost:
            raise Closed(False)
        self.waiting = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await asyncio.wait_for(self.waiting, patience)

    def close(self):
        self.lost = True
        self.transport.abort()


class Call:
    """A request that is sent again and again: `route`, the path it counts under, and the answer of an idle server."""

    def __init__(self, path, body, headers=()):
        data = json.dumps(body).encode()
        fixed = "".join(f"{name}: {value}\r\n" for name, value in headers)
        self.path, self.expected = path, None
        self.head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n{fixed}".encode()
        self.rest = f"content-length: {len(data)}\r\n\r\n".encode() + data

    def bytes(self, request_id):
        return self.head + b"x-request-id: %s\r\n" % request_id.encode() + self.rest

    async def learn(self, port):
        """Takes what the server answers now as what it must always answer."""
        connection = await Connection.open(port)
        status, _, self.expected = await connection.ask(self.bytes("first"))
        connection.close()
        assert status == 200, f"{self.path}: {status} {self.expected[:200]}"


class Tally:
    """What the clients saw."""

    def __init__(self):
        self.counts = collections.Counter()  # of (path, status)
        self.latencies = []  # (when due, seconds) of each 200
        self.refused = []  # when each 429 came
        self.wrong = []  # answers that should not be
        self.broken = collections.Counter()  # requests without an answer, by what happened

    def of(self, status):
        return sum(n for (_, code), n in self.counts.items() if code == status)

    def statuses(self):
        return dict(sorted(collections.Counter({code: self.of(code) for _, code in self.counts}).items()))

    def percentile(self, share, since=0.0, until=float("inf")):
        times = sorted(seconds for due, seconds in self.latencies if since <= due < until)
        return times[min(len(times) - 1, int(share * len(times)))] if times else float("nan")

    def note(self, call, request_id, due, answer):
        status, headers, body = answer
        self.counts[call.path, status] += 1
        problem = None
        if headers.get("x-request-id") != request_id:
            problem = f"the request id is {headers.get('x-request-id')}"
        elif status == 200:
            self.latencies.append((due, time.monotonic() - due))
            if call.expected is not None and body != call.expected:
                problem = "another result than on an idle server"
        elif status in ERROR_TYPES:
            if status == 429:
                self.refused.append(time.monotonic())
            error = json.loads(body)
            nested = isinstance(error["error"], dict)  # in the words of OpenAI
            if error["error"]["type"] not in OPENAI_TYPES if nested else error["error_type"] != ERROR_TYPES[status]:
                problem = "the wrong class of error"
            if status in (429, 503) and not 1 <= int(headers.get("retry-after", 0)) <= 30:
                problem = "no sensible retry-after"
        else:
            problem = "an unexpected status"
        if problem and len(self.wrong) < 10:
            self.wrong.append(f"{call.path} {status}: {problem}: {headers} {body[:200]}")

    def must_be_right(self):
        assert not self.wrong, "\n".join(self.wrong)
        assert not self.broken, f"requests without an answer: {dict(self.broken)}"
        return self


async def closed_loop(port, calls, n_clients, seconds, tally=None, stop=None):
    """`n_clients` that each send as soon as they are answered; those that get 429 wait as they are told."""
    tally = tally or Tally()
    end = time.monotonic() + seconds
    order = random.Random(n_clients)

    async def client():
        connection = None
        while time.monotonic() < end and not (stop and stop.is_set()):
            if connection is None or connection.lost:
                connection = await Connection.open(port)
            call, request_id, due = order.choice(calls), f"c-{next(ids)}", time.monotonic()
            try:
                answer = await connection.ask(call.bytes(request_id))
            except (Closed, OSError, asyncio.TimeoutError) as error:
                tally.broken[repr(error)] += 1
                connection = None
                continue
            tally.note(call, request_id, due, answer)
            if answer[0] == 429:
                await asyncio.sleep(min(int(answer[1]["retry-after"]), max(0.0, end - time.monotonic())))
        if connection:
            connection.close()

    await asyncio.gather(*(client() for _ in range(n_clients)))
    return tally


async def open_loop(port, calls, rate, seconds, tally=None, seed=1, now=time.monotonic):
    """Requests that arrive at random moments, `rate` a second of the clock `now` on average, whatever becomes of those before them.
    Latency counts from the moment that a request was due."""
    tally = tally or Tally()
    order, idle, tasks = random.Random(seed), [], set()

    async def one(due):
        call, request_id = order.choice(calls), f"o-{next(ids)}"
        try:
            while idle and idle[-1].lost:
                idle.pop()
            connection = idle.pop() if idle else await Connection.open(port)
            tally.note(call, request_id, due, await connection.ask(call.bytes(request_id)))
            if len(idle) < POOL:
                idle.append(connection)
            else:
                connection.close()
        except (Closed, OSError, asyncio.TimeoutError) as error:
            tally.broken[repr(error)] += 1

    due, end = now(), time.monotonic() + seconds
    while time.monotonic() < end:
        due += order.expovariate(rate)
        while (left := due - now()) > 0:
            await asyncio.sleep(left)
        await asyncio.sleep(0)
        task = asyncio.create_task(one(time.monotonic() + left))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    if tasks:
        await asyncio.wait(tasks)
    for connection in idle:
        connection.close()
    return tally


async def metrics(port):
    """Every series of `/metrics` by its name with labels."""
    connection = await Connection.open(port)
    status, _, body = await connection.ask(b"GET /metrics HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
    connection.close()
    assert status == 200, status
    lines = (line.rsplit(" ", 1) for line in body.decode().splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines}


def responses(series):
    """`niwaki_requests_total` of the routes that work, by (route, status)."""
    found = {}
    for name, value in series.items():
        if name.startswith("niwaki_requests_total{") and value:
            labels = dict(part.split("=") for part in name.split("{")[1].rstrip("}").replace('"', "").split(","))
            if labels["route"] != "/metrics":
                found[labels["route"], int(labels["code"])] = value
    return found


def reconcile(before, after, tally):
    """The server has counted what the clients have: responses by route and status, latencies, rejections; and it holds
    nothing any more."""
    counted = collections.Counter(responses(after))
    counted.subtract(responses(before))
    counted = {key: n for key, n in counted.items() if n}
    assert counted == dict(tally.counts), f"server: {counted}\nclients: {dict(tally.counts)}"
    grown = lambda name: sum(value - before.get(key, 0) for key, value in after.items() if key.split("{")[0] == name)
    timed = {key: value - before.get(key, 0) for key, value in after.items() if key.startswith("niwaki_request_duration_seconds_count")}
    for path in {path for path, _ in tally.counts}:
        sent = sum(n for (route, _), n in tally.counts.items() if route == path)
        assert timed[f'niwaki_request_duration_seconds_count{{route="{path}"}}'] == sent, (path, sent, timed)
    rejected = {key.split('"')[1]: value - before.get(key, 0) for key, value in after.items() if key.startswith("niwaki_rejected_total{")}
    assert rejected["overload"] + rejected["memory"] == tally.of(429), rejected
    assert rejected["deadline"] == tally.of(504), rejected
    assert rejected["draining"] == tally.of(503), rejected
    assert grown("niwaki_inference_errors_total") == 0
    holds_nothing(after)


def holds_nothing(series):
    """No request in flight but the scrape, nothing in the queue."""
    assert series["niwaki_requests_in_flight"] == 1, series["niwaki_requests_in_flight"]
    assert series["niwaki_queue_depth"] == series["niwaki_queue_tokens"] == 0, series["niwaki_queue_depth"]


async def settled(port, check=holds_nothing, seconds=10):
    """The metrics once `check` passes on them: work for clients that have gone ends with its batch."""
    end = time.monotonic() + seconds
    while True:
        series = await metrics(port)
        try:
            check(series)
            return series
        except AssertionError:
            if time.monotonic() > end:
                raise
            await asyncio.sleep(0.1)


def memory(pid, field="VmHWM"):
    """A field of the process' status in bytes: `VmRSS`, or `VmHWM`, the most it ever was."""
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))
