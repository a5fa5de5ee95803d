#!/usr/bin/env python3
"""Golden values for tests/parity.rs, computed by PyTorch and Hugging Face transformers.

    python make_golden.py tiny [--only NAME ...]       # rewrites the small models beside this file (committed)
    python make_golden.py real --model DIR --out DIR   # embeddings of 200 texts by a real sentence encoder

Needs: torch, transformers, tokenizers, safetensors (any versions: the ones used are written into every file).

The small models have random weights of a size at which attention is far from uniform and the residual stream far from
the embedding, so that a wrong mask, position, order of heads or activation shows in every number. They are computed in
f64 from the stored weights; what a test measures is therefore its own rounding alone.
"""

import argparse
import collections
import json
import math
import platform
import re
import shutil
from pathlib import Path

import safetensors.torch
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = Path(__file__).resolve().parent
SEED = 20261123
DIGITS = 7  # significant, as many as f32 has

CORPUS = [
    "The old pine tree in the garden was pruned with patience every spring.",
    "A small tree stays beautiful when every branch has light and room.",
    "Rain falls on the stones, and the stones remember nothing at all.",
    "How many needles does a pine have? Nobody in the village has counted them.",
    "Cut the long shoots back to two buds; the tree answers with twelve new ones.",
    "One, two, three: the garden, the gardener and the evening rain.",
]


def header():
    return {
        "made_by": "tests/golden/make_golden.py",
        "seed": SEED,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def rounded(tensor):
    """Nested lists of numbers with DIGITS significant digits."""
    if tensor.dim() > 1:
        return [rounded(row) for row in tensor]
    return [float(f"{value:.{DIGITS}g}") for value in tensor.tolist()]


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n")


def write_golden(path, value, cases):
    """One case a line, so that a change shows as a change of lines."""
    lines = ",\n".join(json.dumps(one, separators=(",", ":"), ensure_ascii=False) for one in cases)
    path.write_text(json.dumps(value, indent=1)[:-2] + ',\n "cases": [\n' + lines + "\n]}\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------- tokenizers


def counted(pieces):
    """Pieces by falling frequency, then by name: the library's own trainers break ties differently in every run."""
    return sorted(collections.Counter(pieces).items(), key=lambda item: (-item[1], item[0]))


def word_piece():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [word for text in CORPUS for word in re.findall(r"[a-z]+|[^a-z ]", text.lower())]
    letters = [letter for letter, _ in counted("".join(words))]
    pieces = letters + [f"##{letter}" for letter in letters] + [word for word, _ in counted(words) if len(word) > 1]
    vocab = {piece: index for index, piece in enumerate((special + pieces)[:112])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def byte_level_bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=112, special_tokens=special))
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer


def unigram():
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words = [f"\u2581{word}" for text in CORPUS for word in text.split()]
    counts = counted("".join(words)) + [(word, 5 * count) for word, count in counted(words)]
    total = sum(count for _, count in counts)
    pieces = [(piece, math.log(count / total)) for piece, count in counts]
    tokenizer = Tokenizer(models.Unigram([(piece, 0.0) for piece in special] + pieces[:95], unk_id=3))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


# ---------------------------------------------------------------------------------------------------- small models


def randomize(model, generator):
    """Weights at which every part of a layer matters."""
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            value = 0.3 * noise
        elif parameter.dim() == 1:  # a LayerNorm's gain
            value = 1 + 0.3 * noise
        elif "embeddings" in name:
            value = noise
        else:
            value = noise * 1.5 / parameter.shape[-1] ** 0.5
        parameter.data.copy_(value)


def pool(rows):
    return {
        "cls": rounded(rows[0]),
        "mean": rounded(rows.mean(0)),
        "max": rounded(rows.max(0).values),
        "last_token": rounded(rows[-1]),
        "mean_sqrt_len": rounded(rows.sum(0) / len(rows) ** 0.5),
    }


def band_mask(n_tokens, band):
    """0 where query i sees key j, -inf elsewhere: the dense form of {left, right, globals}."""
    i, j = torch.arange(n_tokens)[:, None], torch.arange(n_tokens)[None, :]
    seen = (j < band["globals"]) | (i < band["globals"]) | ((i - band["left"] <= j) & (j <= i + band["right"]))
    mask = torch.zeros(n_tokens, n_tokens, dtype=torch.float64)
    return mask.masked_fill(~seen, -torch.inf)[None, None], seen


@torch.no_grad()
def play(model, ids, token_types=None, band=None, tile=None):
    """Rows after the embedding and after each layer, [n_layers + 1, n_tokens, d_model]."""
    inputs = {"input_ids": torch.tensor([ids])}
    if token_types is not None:
        inputs["token_type_ids"] = torch.tensor([token_types])
    if tile is not None:
        inputs["position_ids"] = torch.arange(len(ids))[None] % tile
    if band is not None:
        inputs["attention_mask"], seen = band_mask(len(ids), band)
    out = model(**inputs, output_hidden_states=True, output_attentions=True)
    for layer in out.attentions:
        assert torch.allclose(layer.sum(-1), torch.ones_like(layer.sum(-1)))
        if band is not None:
            assert (layer[0][:, ~seen] == 0).all(), "the mask did not reach the attention"
            assert (layer[0][:, seen] > 0).all()
    return torch.stack(out.hidden_states)[:, 0]


def case(model, ids, **options):
    hidden = play(model, ids, **options)
    found = {"ids": ids} | {key: options[key] for key in ("token_types", "band") if key in options}
    return found | {"hidden": rounded(hidden), "pooled": pool(hidden[-1])}


def write_sentence_files(folder, width, mode, normalize, max_seq_length):
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * normalize
    write_json(
        folder / "modules.json",
        [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (path, kind) in enumerate(kinds)
        ],
    )
    (folder / "1_Pooling").mkdir()
    flags = ["cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken"]
    config = {"word_embedding_dimension": width} | {f"pooling_mode_{flag}": flag == mode for flag in flags}
    write_json(folder / "1_Pooling" / "config.json", config)
    if max_seq_length is not None:
        write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": False})


def write_weights(folder, tensors, n_shards):
    if n_shards == 1:
        safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for shard in range(n_shards):
        file = f"model-{shard + 1:05}-of-{n_shards:05}.safetensors"
        of_shard = names[len(names) * shard // n_shards : len(names) * (shard + 1) // n_shards]
        part = {name: tensors[name] for name in of_shard}
        safetensors.torch.save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= {name: file for name in part}
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


ONLY = []  # names of the small models to rewrite; all of them if empty


def make(name, config, tokenizer, *, pooling, normalize, max_seq_length=None, dtype=torch.float32, prefix="",
         n_shards=1, extra=lambda model, ids: []):
    """Writes one small model with its golden values."""
    if ONLY and name not in ONLY:
        return
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config.vocab_size = tokenizer.get_vocab_size()
    config._attn_implementation = "eager"  # the only one that returns what it attended to
    generator = torch.Generator().manual_seed(SEED)
    options = {} if config.model_type == "distilbert" else {"add_pooling_layer": False}
    model = transformers.AutoModel.from_config(config, **options).eval()
    randomize(model, generator)
    model = model.to(dtype)
    tensors = {f"{prefix}{key}": value.detach().clone() for key, value in model.named_parameters()}
    model = model.double()

    write_weights(folder, tensors, n_shards)
    write_json(folder / "config.json", config.to_dict() | {"architectures": [type(model).__name__]})
    tokenizer.save(str(folder / "tokenizer.json"))
    width = model.get_input_embeddings().embedding_dim
    write_sentence_files(folder, width, pooling, normalize, max_seq_length)

    cases = [{"text": text} | case(model, tokenizer.encode(text).ids) for text in [CORPUS[2][:24], "Pruned.", "xyz 42!"]]
    draw = torch.randint(5, config.vocab_size, (64,), generator=generator).tolist()  # ids below 5 are special
    cases += [case(model, draw[:n_tokens]) for n_tokens in [1, 2, 17]]
    cases += extra(model, draw)
    write_golden(folder / "golden.json", header() | {"model": name}, cases)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{name}: {size} bytes, {len(cases)} cases of {[len(one['ids']) for one in cases]} tokens")


SCORES = {
    "regression": lambda logits: logits,
    "multi_label_classification": torch.sigmoid,
    "single_label_classification": lambda logits: torch.softmax(logits, -1),
    None: torch.sigmoid,  # of a single label
}


@torch.no_grad()
def make_classifier(name, config, tokenizer, *, labels, problem_type, dtype=torch.float32):
    """Writes one small model with a classification head: logits and scores of texts and of pairs of texts."""
    if ONLY and name not in ONLY:
        return
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config.vocab_size = tokenizer.get_vocab_size()
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.problem_type = problem_type
    config._attn_implementation = "eager"
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    randomize(model, torch.Generator().manual_seed(SEED))
    model = model.to(dtype)
    write_weights(folder, {key: value.detach().clone() for key, value in model.named_parameters()}, 1)
    model = model.double()
    write_json(folder / "config.json", config.to_dict() | {"architectures": [type(model).__name__]})
    tokenizer.save(str(folder / "tokenizer.json"))
    texts = [(CORPUS[2][:24],), ("Pruned.",), ("rain", "Two stones."), (CORPUS[1][:20], "tree"), ("xyz 42!", "a pine"), ("", "rain")]
    cases = []
    for text in texts:
        encoding = tokenizer.encode(*text)
        inputs = {"input_ids": torch.tensor([encoding.ids])}
        if getattr(config, "type_vocab_size", 1) > 1:
            inputs["token_type_ids"] = torch.tensor([encoding.type_ids])
        logits = model(**inputs).logits[0]
        found = {"text": list(text), "ids": encoding.ids, "token_types": encoding.type_ids}
        cases.append(found | {"logits": rounded(logits), "scores": rounded(SCORES[problem_type](logits))})
    write_golden(folder / "golden.json", header() | {"model": name}, cases)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{name}: {size} bytes, {len(cases)} cases of {[len(one['ids']) for one in cases]} tokens")


def tiny():
    shape = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
                 hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

    def bert_extras(model, ids):
        wide, narrow = {"left": 0, "right": 5, "globals": 3}, {"left": 3, "right": 2, "globals": 1}
        found = [case(model, ids[:11], token_types=[0] * 5 + [1] * 6), case(model, ids[:16], band=wide)]
        # Longer than the table: positions repeat, as Longformer's did when it was made from RoBERTa.
        tiled = case(model, ids[:28], band=narrow, tile=model.config.max_position_embeddings)
        return found + [tiled | {"max_input_tokens": 64}]

    make("bert", transformers.BertConfig(**shape, max_position_embeddings=24, type_vocab_size=2), word_piece(),
         pooling="mean_tokens", normalize=True, max_seq_length=20, extra=bert_extras)
    make("roberta", transformers.RobertaConfig(**shape, max_position_embeddings=26, type_vocab_size=1),
         byte_level_bpe(), pooling="cls_token", normalize=False, prefix="roberta.")
    make("xlm-roberta",
         transformers.XLMRobertaConfig(**shape, max_position_embeddings=26, type_vocab_size=1, layer_norm_eps=1e-5),
         unigram(), pooling="mean_tokens", normalize=True, n_shards=2)
    make("camembert",
         transformers.CamembertConfig(**shape | {"hidden_act": "gelu_new", "intermediate_size": 96},
                                      max_position_embeddings=26, type_vocab_size=1),
         unigram(), pooling="max_tokens", normalize=False, dtype=torch.bfloat16)
    make("distilbert",
         transformers.DistilBertConfig(dim=64, n_layers=2, n_heads=2, hidden_dim=96, activation="relu", dropout=0.0,
                                       attention_dropout=0.0, max_position_embeddings=24),
         word_piece(), pooling="lasttoken", normalize=True, dtype=torch.float16)

    small = shape | dict(num_hidden_layers=2)
    make_classifier("bert-classifier", transformers.BertConfig(**small, max_position_embeddings=48, type_vocab_size=2),
                    word_piece(), labels=["calm", "stormy", "other"], problem_type="single_label_classification")
    make_classifier("roberta-reranker", transformers.RobertaConfig(**small, max_position_embeddings=50, type_vocab_size=1),
                    byte_level_bpe(), labels=["LABEL_0"], problem_type=None)
    make_classifier("distilbert-classifier",
                    transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, activation="gelu",
                                                  dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
                                                  max_position_embeddings=48),
                    word_piece(), labels=["tree", "stone"], problem_type="multi_label_classification",
                    dtype=torch.float16)


# ---------------------------------------------------------------------------------------------------- real encoder


def mixed_texts(count=200):
    """Texts of many kinds and of 1 to several hundred words; the same on every machine."""
    bank = (HERE / "texts.txt").read_text(encoding="utf-8").splitlines()
    state = SEED

    def draw(bound):  # a linear congruential generator: does not change with Python's version
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (state >> 33) % bound

    texts = list(bank)
    while len(texts) < count:
        texts.append(" ".join(bank[draw(len(bank))] for _ in range(2 + draw(1 + draw(24)))))
    return texts[:count]


@torch.no_grad()
def real(model_dir, out_dir):
    """f32, mean pooling, not normalised, truncated as sentence_bert_config.json says."""
    model_dir, out_dir = Path(model_dir), Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    model = transformers.AutoModel.from_pretrained(model_dir, attn_implementation="eager", dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(json.loads((model_dir / "sentence_bert_config.json").read_text())["max_seq_length"])
    config = json.loads((model_dir / "1_Pooling" / "config.json").read_text())
    assert config["pooling_mode_mean_tokens"], "only mean pooling is needed here"
    cases = []
    for text in mixed_texts():
        ids = tokenizer.encode(text).ids
        rows = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        cases.append({"text": text, "ids": ids, "pooled": {"mean": rounded(rows.mean(0))}})
    lengths = sorted(len(one["ids"]) for one in cases)
    write_golden(out_dir / "golden.json", header() | {"model": model_dir.name}, cases)
    print(f"{len(cases)} texts of {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_tiny = commands.add_parser("tiny")
    of_tiny.add_argument("--only", nargs="*", default=[])
    of_real = commands.add_parser("real")
    of_real.add_argument("--model", required=True)
    of_real.add_argument("--out", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order
    if arguments.command == "tiny":
        ONLY.extend(arguments.only)
        tiny()
    else:
        real(arguments.model, arguments.out)
