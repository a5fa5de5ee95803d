#!/usr/bin/env python3
"""Writes the calibration text of the default model: one text a line, mixed from three public corpora.

  make_calibration.py --wikitext wiki.valid.tokens --stsb sts-train.csv --tinystories stories.txt > calibration.txt

WikiText-2 validation split (one paragraph a line), STS Benchmark train split (tab-separated, sentences in columns 6 and
7), and any excerpt of TinyStories (stories separated by <|endoftext|>). The order is shuffled with a fixed seed, so
the same inputs give the same bytes. None of the texts is part of this repository.
"""
import argparse
import random
import sys

parser = argparse.ArgumentParser()
parser.add_argument("--wikitext", required=True)
parser.add_argument("--stsb", required=True)
parser.add_argument("--tinystories", required=True)
args = parser.parse_args()


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def clean(text):
    return " ".join(text.replace("<unk>", "it").replace(" @-@ ", "-").replace(" @,@ ", ",").split())


wiki = [clean(line) for line in read(args.wikitext).split("\n") if len(line) > 60 and not line.strip().startswith("=")]
sts = [clean(cell) for line in read(args.stsb).split("\n") for cell in line.split("\t")[5:7]]
stories = [clean(story)[:600] for story in read(args.tinystories).split("<|endoftext|>")]
rng = random.Random(0)
texts = []
for corpus, n in ((wiki, 1500), (sts, 6000), (stories, 500)):
    corpus = sorted({text for text in corpus if len(text) > 10})
    rng.shuffle(corpus)
    texts += corpus[:n]
rng.shuffle(texts)
sys.stdout.write("\n".join(texts) + "\n")
