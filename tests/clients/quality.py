"""What compression costs on the STS benchmark: Spearman's correlation of cosine and human score, by `niwaki embed`.

The file is STS-B's: tab-separated, without header or quoting; score, sentence 1 and sentence 2 are columns 5 to 7.
"""

import argparse
import json
import subprocess
import sys

import numpy as np

# In points of 100 times Spearman's correlation.
INT8_COST = 0.15  # plain INT8 made at load
DEFAULT_COST = 1.2  # the artefact inside the binary, pruned as well


def embed(binary, sentences, *arguments):
    lines = "\n".join(sentences) + "\n"
    command = [binary, "embed", *arguments]
    result = subprocess.run(command, input=lines, capture_output=True, text=True, encoding="utf-8")
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{result.stderr}")
    rows = np.array([json.loads(line) for line in result.stdout.splitlines()], dtype=np.float64)
    assert len(rows) == len(sentences), f"{len(rows)} rows for {len(sentences)} sentences"
    return rows


def ranks(values):
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def spearman(a, b):
    return 100 * np.corrcoef(ranks(a), ranks(b))[0, 1]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sts", required=True)
    parser.add_argument("--model", required=True, help="the uncompressed model")
    parser.add_argument("--binary", default="target/release/niwaki")
    arguments = parser.parse_args()
    with open(arguments.sts, encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    human = np.array([float(row[4]) for row in rows])
    sentences = [row[5].strip() for row in rows] + [row[6].strip() for row in rows]

    def score(*options):
        embeddings = embed(arguments.binary, sentences, *options)
        a, b = embeddings[: len(rows)], embeddings[len(rows) :]
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        return spearman(np.einsum("ij,ij->i", a, b) / norms, human)

    f32 = score("--model", arguments.model, "--precision", "f32")
    print(f"f32: {f32:.2f} on {len(rows)} pairs")
    failed = 0
    for name, cost, options in [
        ("int8", INT8_COST, ["--model", arguments.model, "--precision", "int8"]),
        ("default artefact", DEFAULT_COST, []),
    ]:
        found = score(*options)
        fine = f32 - found <= cost
        failed += not fine
        print(f"{'ok      ' if fine else 'FAILED  '} {name}: {found:.2f}, {f32 - found:+.2f} points (at most {cost})")
    print(f"{2 - failed} passed, {failed} failed, 0 skipped")
    sys.exit(failed != 0)


if __name__ == "__main__":
    main()
