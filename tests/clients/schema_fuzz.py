"""Schema-driven fuzzing: schemathesis makes requests of the OpenAPI document, right ones and wrong ones, and holds every answer
to it. No answer may be a 5xx, have a status, type, header or body that the document does not tell, or be given without a key.

    schema_fuzz.py                      some minutes
    schema_fuzz.py --examples 2000      longer

Runs in an environment that has schemathesis. One kind of check is left out: that whatever fits the schema is accepted. A text
of 100,000 characters fits it, and is refused as too long. The last line is `N passed, N failed, N skipped`.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

from harness import Server

root = pathlib.Path(__file__).resolve().parents[2]
KEY = "a-key-of-the-tests"
SCORES = ["/predict", "/rerank", "/v1/rerank", "/v2/rerank"]
# What serves, and which routes it is asked on: all, and those that need a classifier or a reranker.
SERVICES = {
    "default model": ([], []),
    "classifier": (["--model", str(root / "tests/golden/bert-classifier")], SCORES[:1]),
    "reranker": (["--model", str(root / "tests/golden/roberta-reranker")], SCORES[1:]),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--binary", default="target/release/niwaki")
    parser.add_argument("--examples", type=int, default=40, help="requests for each operation, beside those of every boundary")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    passed = failed = 0
    for name, (arguments, paths) in SERVICES.items():
        server = Server(options.binary, *arguments, "--api-key", KEY)
        command = [
            str(pathlib.Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/api-doc/openapi.json",
            "--exclude-checks", "positive_data_acceptance", "--max-examples", str(options.examples), "--seed", str(options.seed),
            "--header", f"Authorization: Bearer {KEY}", "--request-timeout", "20", "--continue-on-failure", "--no-color",
        ]
        for path in paths:
            command += ["--include-path", path]
        with tempfile.TemporaryDirectory() as folder:  # for what it writes down
            run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        died = server.process.poll() is not None
        clean = not died and server.stop() == 0
        if run.returncode == 0 and clean:
            passed += 1
            print(f"ok      {name}: {run.stdout.strip().splitlines()[-1].strip('= ')}", flush=True)
        else:
            failed += 1
            print(run.stdout[-12000:], run.stderr[-2000:], sep="\n")
            print(f"FAILED  {name}{': the server ended' if died else ''}", flush=True)
    print(f"{passed} passed, {failed} failed, 0 skipped")
    return failed


if __name__ == "__main__":
    sys.exit(main())
