#!/usr/bin/env python3
"""Writes calibration text: one text a line as a JSON string, mixed from corpora of different kinds.

  make_calibration.py --stsb sts-train.csv --sick SICK_train.txt --sst2 train.tsv --msmarco corpus.jsonl \\
      --wikitext wiki.valid.tokens --essays essays/ --tinystories stories.txt --docs vendor/ > calibration.txt

A pruned model keeps what calibration text shows and forgets the rest, so breadth counts for more than length. Every
corpus is optional:

  --stsb         STS Benchmark, train split (tab-separated, sentences in columns 6 and 7)
  --sick         SICK, train split (tab-separated, sentences in columns 2 and 3)
  --sst2         SST-2, train split (tab-separated, label and sentence)
  --msmarco      passages, JSON lines with a field `text`
  --wikitext     WikiText-2, validation split (one paragraph a line)
  --essays       a directory of .txt files of prose
  --tinystories  stories separated by <|endoftext|>
  --docs         a directory of Rust sources, of which the doc comments are taken (`cargo vendor` makes one)

  --without      files whose texts (tab-separated cells, or JSON lines with a field `text`) are left out, however they got
                 into a corpus: what the result is measured on

A third of the passages is cut at a random word, as inputs are in practice.
The order is shuffled with a fixed seed, so the same inputs give the same bytes. None of the texts is part of this
repository.
"""
import argparse
import json
import pathlib
import random
import re
import sys

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for corpus in ("stsb", "sick", "sst2", "msmarco", "wikitext", "essays", "tinystories", "docs"):
    parser.add_argument(f"--{corpus}")
parser.add_argument("--without", nargs="*", default=[])
parser.add_argument("--texts", type=int, default=8000, help="texts in all (default: %(default)s)")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()


def read(path):
    return pathlib.Path(path).read_text(encoding="utf-8", errors="replace")


def clean(text):
    return " ".join(text.replace("<unk>", "it").replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", ".").split())


def cells(path, columns):
    return [row[column] for row in (line.split("\t") for line in read(path).split("\n")) for column in columns
            if column < len(row)]


def essays(path):
    """Groups of one to six sentences."""
    for file in sorted(pathlib.Path(path).glob("*.txt")):
        sentences = re.split(r"(?<=[.?!])\s+", clean(read(file)))
        while sentences:
            n = rng.randint(1, 6)
            yield " ".join(sentences[:n])
            del sentences[:n]


def docs(path):
    """Paragraphs of doc comments, without code blocks, headings and tables."""
    for file in sorted(pathlib.Path(path).rglob("*.rs")):
        lines, code = [], False
        for line in read(file).split("\n"):
            comment = re.match(r"\s*//[/!] ?(.*)", line)
            text = comment.group(1).strip() if comment else ""
            if text.startswith("```"):
                code = not code
                text = ""
            if comment and text and not code and text[0] not in "#|<[":
                lines.append(text)
                continue
            if not comment:
                code = False
            if lines:
                yield re.sub(r"\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])?", r"\1", " ".join(lines)).replace("`", "")
                lines = []


def forbidden():
    """Every cell of the files that the result is measured on, and every sentence of their longer texts."""
    for path in args.without:
        for line in read(path).split("\n"):
            for cell in [json.loads(line)["text"]] if line.startswith("{") else line.split("\t"):
                yield clean(cell)
                yield from (sentence for sentence in re.split(r"(?<=[.?!])\s+", clean(cell)) if len(sentence) > 25)


without = set(forbidden())
rng = random.Random(args.seed)
# Corpus, its texts, its share, whether its texts are long enough to be cut.
corpora = [
    (args.stsb, lambda path: cells(path, (5, 6)), 3, False),
    (args.sick, lambda path: cells(path, (1, 2)), 1, False),
    (args.sst2, lambda path: cells(path, (1,)), 1.5, False),
    (args.msmarco, lambda path: [json.loads(line)["text"] for line in read(path).split("\n") if line], 4, True),
    (args.wikitext, lambda path: [line for line in read(path).split("\n") if not line.strip().startswith("=")], 2, True),
    (args.essays, essays, 1.5, True),
    (args.tinystories, lambda path: read(path).split("<|endoftext|>"), 0.5, True),
    (args.docs, docs, 4, True),
]
corpora = [(path, texts, share, long) for path, texts, share, long in corpora if path]
if not corpora:
    parser.error("give at least one corpus")
total = sum(share for _, _, share, _ in corpora)
chosen = []
for path, texts, share, long in corpora:
    unique = sorted({text for text in map(clean, texts(path)) if len(text) > 10 and text not in without})
    rng.shuffle(unique)
    for text in unique[: round(args.texts * share / total)]:
        words = text.split()[:160]
        if long and rng.random() < 1 / 3:
            words = words[: rng.randint(1, len(words))]
        chosen.append(" ".join(words))
rng.shuffle(chosen)
sys.stdout.write("".join(json.dumps(text, ensure_ascii=False) + "\n" for text in chosen))
