"""Faults: SIGTERM under load, clients that misbehave, no file descriptors, a full disk, a wall clock that jumps, memory.

What must hold in each: nothing that was accepted is lost, no place in the queue stays taken, good clients notice nothing.
(A worker that panics cannot be had from outside on purpose; tests/engine and tests/http inject one through the model's
trait.) The last line is `N passed, N failed, N skipped`.
"""

import argparse
import asyncio
import collections
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback

from traffic import Call, Closed, Connection, Tally, closed_loop, holds_nothing, memory, metrics, reconcile, settled
from harness import Server, Skip

checks = []
SHORT = {"inputs": "a garden tree stays small because somebody prunes it"}
LONG = "pruning a garden tree " * 400


def check(function):
    checks.append(function)
    return function


def port_of(server):
    return int(server.url.rsplit(":", 1)[1])


class Serving:
    """A server, its port, and its end, which must be clean."""

    def __init__(self, binary, *arguments, **environment):
        self.server = Server(binary, *arguments, environment=environment)
        self.port, self.pid = port_of(self.server), self.server.process.pid

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind:
            self.server.process.kill()
        else:
            assert self.server.stop() == 0

    def log(self):
        return pathlib.Path(self.server.log.name).read_text()


# -------------------------------------------------------------------------------------------------------------- SIGTERM


async def until_the_end(port, call, stopped, tally):
    """A client through the end of a server. What it sent before the signal must be answered. What it sends after may be
    refused, or meet a closed connection, but not be answered in part."""
    connection = None
    while True:
        late = stopped.is_set()
        try:
            if connection is None or connection.lost:
                connection = await Connection.open(port)
            late = stopped.is_set()
            request_id, due = f"t-{random.getrandbits(60)}", time.monotonic()
            answer = await connection.ask(call.bytes(request_id))
        except (Closed, OSError) as error:
            if not late:
                tally.broken[f"accepted and lost: {error!r}"] += 1
            elif isinstance(error, Closed) and error.partial:
                tally.broken["an answer was cut"] += 1
            if isinstance(error, ConnectionRefusedError) and stopped.is_set():
                return
            connection = None
            continue
        tally.note(call, request_id, due, answer)
        if answer[0] == 503:
            assert answer[1]["connection"] == "close" and stopped.is_set()


@check
async def sigterm_under_load_loses_nothing_that_was_accepted(options):
    answered = refused = 0
    slowest, chance = 0.0, random.Random(7)
    for _ in range(options.repetitions):
        with Serving(options.binary) as serving:
            call = Call("/embed", SHORT)
            await call.learn(serving.port)
            tally, stopped = Tally(), asyncio.Event()
            clients = [asyncio.create_task(until_the_end(serving.port, call, stopped, tally)) for _ in range(24)]
            await asyncio.sleep(chance.uniform(0.1, 0.4))
            # Whoever has sent by now has been read or is in the socket's buffer: both count as accepted.
            stopped.set()
            serving.server.process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            await asyncio.wait_for(asyncio.gather(*clients), 30)
            assert await asyncio.to_thread(serving.server.process.wait, 30) == 0
            slowest = max(slowest, time.monotonic() - began)
            tally.must_be_right()
            assert set(tally.statuses()) <= {200, 503} and tally.of(200) > 0, tally.statuses()
            answered, refused = answered + tally.of(200), refused + tally.of(503)
    return f"{options.repetitions} ends: {answered} answered, {refused} told to go elsewhere, none lost; the slowest took {slowest:.2f} s"


# ------------------------------------------------------------------------------------------------- clients that misbehave


def raw(port, data, receive_buffer=None):
    client = socket.socket()
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.connect(("127.0.0.1", port))
    client.sendall(data)
    return client


def slam(client):
    """Closes with a reset, as a client that has crashed."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@check
async def clients_that_misbehave_take_no_place_for_good(options):
    limit = 96
    with Serving(options.binary, "--max-concurrent-requests", str(limit)) as serving:
        call, big = Call("/embed", SHORT), Call("/embed_all", {"inputs": [LONG] * 8})
        await call.learn(serving.port)
        await closed_loop(serving.port, [call], 8, 0.5)
        await asyncio.sleep(0.2)
        before = await settled(serving.port)
        good, stop = Tally(), asyncio.Event()
        load = asyncio.create_task(closed_loop(serving.port, [call], 4, 600, good, stop))
        held, vanished, chance = [], 0, random.Random(3)
        for _ in range(options.rounds):
            whole = Call("/embed", {"inputs": [LONG] * 8}).bytes("vanish")
            for client in [raw(serving.port, whole) for _ in range(6)]:  # leave while their work waits or runs
                await asyncio.sleep(chance.uniform(0, 0.02))
                slam(client)
                vanished += 1
            for cut in (10, len(call.bytes("half")) - 5):  # half a head, half a body: then gone, or silent
                slam(raw(serving.port, call.bytes("half")[:cut]))
                held.append(raw(serving.port, call.bytes("half")[:cut]))
            held.append(raw(serving.port, big.bytes("slow"), receive_buffer=4096))  # reads nothing of a large answer
            slow = raw(serving.port, big.bytes("slow"), receive_buffer=4096)  # reads a little at a time
            for _ in range(5):
                await asyncio.sleep(0.02)
                slow.setblocking(False)
                try:
                    slow.recv(512)
                except BlockingIOError:
                    pass
            slam(slow)
        # While they stall: every place is free for others.
        stop.set()
        await load
        await settled(serving.port, lambda now: now["niwaki_queue_depth"] == 0 or fail("the queue is not empty"))
        for _ in range(20):  # the last batch may still run for those who will not read its answer
            burst = Tally()
            await asyncio.gather(*(one(serving.port, call, burst) for _ in range(limit)))
            if burst.must_be_right().of(200) == limit:
                break
            await asyncio.sleep(0.2)
        assert burst.statuses() == {200: limit}, f"{burst.statuses()} of {limit} places"
        for client in held:
            slam(client)
        good.must_be_right()
        assert set(good.statuses()) == {200}, good.statuses()
        after = await settled(serving.port)
        left = after["niwaki_cancelled_total"] - before["niwaki_cancelled_total"]
        assert 0 < left, "nobody was counted as gone"
        for _ in range(50):
            files = (await metrics(serving.port))["process_open_fds"]
            if files <= before["process_open_fds"]:
                break
            await asyncio.sleep(0.1)
        assert files <= before["process_open_fds"], f"{files} files open, {before['process_open_fds']} before"
        # And from here on it counts exactly again.
        exact = await closed_loop(serving.port, [call], 8, 0.5)
        reconcile(after, await settled(serving.port), exact.must_be_right())
        return f"{vanished} left, {len(held)} stalled; {good.of(200)} good requests beside them, {left:.0f} cancellations counted"


def fail(message):
    raise AssertionError(message)


async def one(port, call, tally):
    request_id, due = f"b-{random.getrandbits(60)}", time.monotonic()
    connection = await Connection.open(port)
    tally.note(call, request_id, due, await connection.ask(call.bytes(request_id)))
    connection.close()


@check
async def who_stalls_in_the_middle_of_a_body_is_told_so(options):
    if not options.long:
        raise Skip("takes the 30 s that a body may take (--long)")
    with Serving(options.binary) as serving:
        call = Call("/embed", SHORT)
        connection = await Connection.open(serving.port)
        status, headers, body = await connection.ask(call.bytes("stall")[:-5])
        assert (status, json.loads(body)["error_type"]) == (408, "Timeout") and headers["x-request-id"] == "stall"
        return "408 after the time that a body may take"


# ------------------------------------------------------------------------------------------------------- what runs out


@check
async def without_file_descriptors_open_connections_go_on(options):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        serving = Serving(options.binary)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with serving:
        call = Call("/embed", SHORT)
        await call.learn(serving.port)
        known = await Connection.open(serving.port)
        tally = Tally()

        async def ask_known():
            request_id = f"k-{random.getrandbits(60)}"
            tally.note(call, request_id, time.monotonic(), await known.ask(call.bytes(request_id)))

        await ask_known()
        idle = [raw(serving.port, b"") for _ in range(150)]  # more than it can open; the rest wait in the kernel
        await asyncio.sleep(1.5)
        for _ in range(10):
            await ask_known()
        lines = [line for line in serving.log().splitlines() if "cannot accept" in line]
        assert 1 <= len(lines) <= 40, f"{len(lines)} lines of log"
        for client in idle:
            client.close()
        await asyncio.sleep(0.5)  # until the places of those that left are free again
        after = Tally()
        await asyncio.wait_for(asyncio.gather(*(one(serving.port, call, after) for _ in range(8))), 20)
        counts = (after.must_be_right().of(200), tally.must_be_right().of(200))
        assert counts == (8, 11), f"{counts} of (8, 11) requests answered; {after.statuses()} {tally.statuses()}"
        holds_nothing(await settled(serving.port))
        return f"11 requests on an open connection, then 8 on new ones; {len(lines)} lines of log"


@check
async def a_full_disk_for_the_log_stops_nothing(options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    full = open("/dev/full", "w")
    command = [options.binary, "serve", "--hostname", "127.0.0.1", "--port", str(port), "--json-output"]
    process = subprocess.Popen(command, stdout=full, stderr=full, env={**os.environ, "LOG_LEVEL": "debug"})
    try:
        call = Call("/embed", SHORT)
        for _ in range(200):
            try:
                await call.learn(port)
                break
            except (OSError, AssertionError):
                assert process.poll() is None, f"it ended with {process.returncode}"
                await asyncio.sleep(0.05)
        before = await metrics(port)
        tally = await closed_loop(port, [call], 4, 1)
        assert set(tally.must_be_right().statuses()) == {200}
        reconcile(before, await settled(port), tally)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 30) == 0
        return f"{tally.of(200)} requests, every line of log lost, exit code 0"
    finally:
        process.kill()


@check
async def a_clock_that_jumps_changes_nothing(options):
    """The wall clock of the process alone, by libfaketime: a day ahead, then a day back, under load."""
    library = next(iter(pathlib.Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)
    if not library:
        raise Skip("no libfaketime")
    with tempfile.TemporaryDirectory() as directory:
        clock = pathlib.Path(directory, "clock")
        clock.write_text("+0d\n")
        faked = {"LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1", "DONT_FAKE_MONOTONIC": "1"}
        with Serving(options.binary, "--default-timeout-ms", "5000", **faked) as serving:
            call = Call("/embed", SHORT)
            await call.learn(serving.port)
            before = await metrics(serving.port)
            load = asyncio.create_task(closed_loop(serving.port, [call], 4, 3))
            for jump in ("+1d\n", "-1d\n"):
                await asyncio.sleep(1)
                clock.write_text(jump)
            tally = (await load).must_be_right()
            assert set(tally.statuses()) == {200}, tally.statuses()
            after = await settled(serving.port)
            reconcile(before, after, tally)
            spent = after['niwaki_request_duration_seconds_sum{route="/embed"}'] - before['niwaki_request_duration_seconds_sum{route="/embed"}']
            assert 0 < spent < 30, f"{spent} s of latency were counted"
            return f"{tally.of(200)} requests through a day ahead and a day back"


@check
async def a_flood_of_the_longest_texts_stays_within_memory(options):
    """What a container of 120 MB has to bear; tests/deploy/container.py runs it in one."""
    with Serving(options.binary, "--threads", "1", "--default-timeout-ms", "10000") as serving:
        calls = [Call(path, {"inputs": [LONG] * 32}) for path in ("/embed", "/embed_all")]
        calls.append(Call("/embed", {"inputs": ["x " * 60_000] * 16}))  # bodies of 2 MB
        before = await metrics(serving.port)
        tally = await closed_loop(serving.port, calls, 32, options.flood)
        assert set(tally.must_be_right().statuses()) <= {200, 429, 504}, tally.statuses()
        assert tally.of(429) + tally.of(504) > 0
        peak = memory(serving.pid)
        assert peak < 120e6, f"{peak / 1e6:.1f} MB"
        reconcile(before, await settled(serving.port, seconds=30), tally)
        return f"{tally.statuses()}, {peak / 1e6:.1f} MB at most"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--binary", default="target/release/niwaki")
    parser.add_argument("--long", action="store_true", help="100 ends, more rounds, longer floods")
    parser.add_argument("--only", help="part of a check's name")
    options = parser.parse_args()
    options.repetitions, options.rounds, options.flood = (100, 20, 60) if options.long else (10, 3, 8)
    count = collections.Counter()
    for function in checks:
        if options.only and options.only not in function.__name__:
            continue
        began, name = time.monotonic(), function.__name__.replace("_", " ")
        try:
            said, outcome = asyncio.run(function(options)), "ok"
        except Skip as reason:
            said, outcome = reason, "skipped"
        except Exception:
            said, outcome = traceback.format_exc(limit=-3), "FAILED"
        count[outcome] += 1
        print(f"{outcome:7} {name} ({time.monotonic() - began:.0f} s)\n        {said}", flush=True)
    print(f"{count['ok']} passed, {count['FAILED']} failed, {count['skipped']} skipped")
    return count["FAILED"] > 0


if __name__ == "__main__":
    sys.exit(main())
