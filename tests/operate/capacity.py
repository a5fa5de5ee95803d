"""The capacity table: what one server does at texts of several lengths, by `niwaki bench --http` against `niwaki serve`.

Prints rows of Markdown: requests a second with 64 clients that ask again at once, and the latencies at 70 % of that with requests
that arrive whether or not earlier ones were answered. The clients are on the same machine, so with all processors computing they
take their share of them.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "clients"))

from harness import Server
from traffic import memory

LENGTHS = (16, 64, 128, 256)
# Each a token of its own for BERT's vocabulary.
WORDS = "a tree in the garden is small because somebody comes back to cut it every year when winter ends and light returns".split()


def texts(length):
    """64 texts of so many tokens; two of them are the special ones."""
    return [" ".join(random.Random(seed).choices(WORDS, k=length - 2)) for seed in range(64)]


def bench(binary, url, seconds, *arguments):
    command = [binary, "bench", "--http", url, "--seconds", str(seconds), "--json", *map(str, arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--binary", default="target/release/niwaki")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--threads", type=int, nargs="*", default=sorted({1, os.cpu_count()}), help="that compute")
    parser.add_argument("serve", nargs="*", help="more flags of the server, after --")
    options = parser.parse_args()
    print("| threads | tokens of a text | requests/s | texts at 70 % of that: p50 / p99, ms | resident memory at most, MB |")
    print("|---|---|---|---|---|")
    for threads in options.threads:
        for length in LENGTHS:
            server = Server(options.binary, "--threads", str(threads), *options.serve)
            with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
                file.writelines(json.dumps(text) + "\n" for text in texts(length))
                file.flush()
                of = ("--input", file.name)
                most = bench(options.binary, server.url, options.seconds, *of, "--clients", 64)
                rate = most["requests_per_s"]
                calm = bench(options.binary, server.url, options.seconds, *of, "--clients", 512, "--rate", 0.7 * rate)
                assert all(run["answered_200"] == run["requests"] for run in (most, calm)), (most, calm)
                p50, p99 = calm["latency_ms"]["p50"], calm["latency_ms"]["p99"]
                size = memory(server.process.pid) / 1e6
                print(f"| {threads} | {length} | {rate:.0f} | {p50:.1f} / {p99:.1f} | {size:.0f} |", flush=True)
            server.stop()


if __name__ == "__main__":
    sys.exit(main())
