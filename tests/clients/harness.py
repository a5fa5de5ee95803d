"""What the client tests share: a list of checks, a server to run them against, and the closing line."""

import argparse
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.request

checks = []


class Skip(Exception):
    """A check that cannot run here, and why."""


def check(function):
    """Registers a check; its name is its description. It takes the server's address if it has a parameter."""
    checks.append(function)
    return function


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / (norm(a) * norm(b))


def norm(a):
    return math.sqrt(sum(x * x for x in a))


def close(a, b, tolerance=1e-5):
    return len(a) == len(b) and all(abs(x - y) <= tolerance for x, y in zip(a, b))


class Server:
    """`niwaki serve` on a free port."""

    def __init__(self, binary, *arguments, environment=()):
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")
        command = [binary, "serve", "--hostname", "127.0.0.1", "--port", "0", *arguments]
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=subprocess.STDOUT, env={**os.environ, **dict(environment)}
        )
        self.url = self._wait(30)

    def _wait(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            with open(self.log.name) as log:
                found = re.search(r"127\.0\.0\.1:(\d+)", log.read())
            if found and found[1] != "0":
                url = f"http://127.0.0.1:{found[1]}"
                try:
                    with urllib.request.urlopen(f"{url}/health/ready", timeout=5):
                        return url
                except (urllib.error.URLError, OSError):
                    pass
            time.sleep(0.02)
        self.process.kill()
        with open(self.log.name) as log:
            raise RuntimeError(f"the server did not become ready:\n{log.read()}")

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)


def main(description):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--url", help="a running server (default: start one)")
    parser.add_argument("--binary", default="target/release/niwaki")
    arguments = parser.parse_args()
    server = None if arguments.url else Server(arguments.binary)
    url = arguments.url or server.url
    passed = failed = skipped = 0
    for function in checks:
        name = function.__name__.replace("_", " ")
        given = {"url": url, "binary": arguments.binary}
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        try:
            function(**{key: given[key] for key in names})
        except Skip as reason:
            skipped += 1
            print(f"skipped  {name}: {reason}")
        except Exception:  # every check is to be reported
            failed += 1
            print(f"FAILED   {name}\n{traceback.format_exc()}")
        else:
            passed += 1
            print(f"ok       {name}")
    if server:
        code = server.stop()
        if code != 0:
            failed += 1
            print(f"FAILED   the server ended with code {code} after SIGTERM")
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    os._exit(failed != 0) if threading.active_count() > 1 else sys.exit(failed != 0)
