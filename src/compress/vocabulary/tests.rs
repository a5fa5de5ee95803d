use serde_json::json;

use super::*;
use crate::text::Tokenizer;

const TOKENS: [&str; 18] = [
    "[PAD]",
    "[unused0]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "b",
    "c",
    "##a",
    "##b",
    "##c",
    "ab",
    "abc",
    "##bc",
    "cab",
    "ba",
    "##ab",
    "bab",
];

fn wordpiece() -> Vec<u8> {
    let vocab: Map<String, Value> =
        TOKENS.iter().enumerate().map(|(id, token)| ((*token).to_owned(), Value::from(id))).collect();
    let special = |id: usize| {
        json!({"id": id, "content": TOKENS[id], "special": true, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false})
    };
    let template = |name: &str, id: usize| json!({"id": name, "ids": [id], "tokens": [name]});
    let sequence = json!([
        {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
    ]);
    serde_json::to_vec(&json!({
        "version": "1.0",
        "truncation": null,
        "padding": {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "[PAD]"},
        "added_tokens": [special(0), special(2), special(3), special(4)],
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                       "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "TemplateProcessing", "single": sequence, "pair": sequence,
                           "special_tokens": {"[CLS]": template("[CLS]", 3), "[SEP]": template("[SEP]", 4)}},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": vocab},
    }))
    .unwrap()
}

fn counts(of: &[(&str, u64)]) -> Vec<u64> {
    let mut counts = vec![0; TOKENS.len()];
    for (token, count) in of {
        counts[TOKENS.iter().position(|other| other == token).unwrap()] = *count;
    }
    counts
}

fn tokens(tokenizer: &Tokenizer, vocab_txt: &[u8], text: &str) -> Vec<String> {
    let names: Vec<&str> = std::str::from_utf8(vocab_txt).unwrap().lines().collect();
    tokenizer.encode(text, true).unwrap().iter().map(|&id| names[id as usize].to_owned()).collect()
}

#[test]
fn frequent_entries_stay_and_the_words_of_others_split() {
    let vocabulary = Vocabulary::read(&wordpiece(), TOKENS.len()).unwrap();
    // Four special tokens and six single characters.
    assert_eq!((vocabulary.len(), vocabulary.n_fixed()), (18, 10));
    let pruned = vocabulary.prune(&counts(&[("abc", 9), ("ba", 5), ("cab", 5), ("##bc", 1)]), 13).unwrap();
    let expected: Vec<u32> = vec![0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 15];
    assert_eq!(pruned.kept, expected);
    let tokenizer = Tokenizer::from_bytes(&pruned.tokenizer_json).unwrap();
    assert_eq!(tokenizer.vocab_size(), 13);
    let tokens = |text| tokens(&tokenizer, &pruned.vocab_txt, text);
    assert_eq!(tokens("abc cab"), ["[CLS]", "abc", "cab", "[SEP]"]);
    assert_eq!(tokens("ab bab"), ["[CLS]", "a", "##b", "ba", "##b", "[SEP]"]);
    assert_eq!(tokens("xyz"), ["[CLS]", "[UNK]", "[SEP]"]);
}

#[test]
fn a_text_whose_entries_all_stay_keeps_its_rows() {
    let full = Tokenizer::from_bytes(&wordpiece()).unwrap();
    let vocabulary = Vocabulary::read(&wordpiece(), TOKENS.len()).unwrap();
    let text = "abc ba cab c";
    let mut seen = vec![0; TOKENS.len()];
    let old = full.encode(text, true).unwrap();
    old.iter().for_each(|&id| seen[id as usize] += 1);
    let pruned = vocabulary.prune(&seen, 13).unwrap();
    let new = Tokenizer::from_bytes(&pruned.tokenizer_json).unwrap().encode(text, true).unwrap();
    let rows: Vec<u32> = new.iter().map(|&id| pruned.kept[id as usize]).collect();
    assert_eq!(rows, old);
}

#[test]
fn equal_counts_keep_the_lower_id_and_everything_can_stay() {
    let vocabulary = Vocabulary::read(&wordpiece(), TOKENS.len()).unwrap();
    let pruned = vocabulary.prune(&[], 11).unwrap();
    assert!(pruned.kept.contains(&1) && pruned.kept.len() == 11);
    assert_eq!(vocabulary.prune(&[], 99).unwrap().kept, (0..18).collect::<Vec<u32>>());
}

#[test]
fn what_cannot_be_pruned_is_refused_with_the_reason() {
    let vocabulary = Vocabulary::read(&wordpiece(), TOKENS.len()).unwrap();
    assert_eq!(vocabulary.prune(&[], 9), Err(VocabularyError::TooFew { asked: 9, needed: 10 }));
    let range = Vocabulary::read(&wordpiece(), 12).unwrap_err();
    assert!(matches!(range, VocabularyError::Range { rows: 12, .. }), "{range}");
    for kind in ["BPE", "Unigram"] {
        let json = serde_json::to_vec(&json!({"model": {"type": kind, "vocab": []}})).unwrap();
        let error = Vocabulary::read(&json, 10).unwrap_err();
        assert_eq!(error, VocabularyError::Model(kind.to_owned()));
        assert!(error.to_string().contains(kind));
    }
    assert!(Vocabulary::read(b"not json", 10).is_err());
    assert!(Vocabulary::read(br#"{"model": {"type": "WordPiece"}}"#, 10).is_err());
}

#[test]
fn older_post_processors_are_renumbered_too() {
    let mut json: Value = serde_json::from_slice(&wordpiece()).unwrap();
    json["post_processor"] = json!({"type": "BertProcessing", "sep": ["[SEP]", 4], "cls": ["[CLS]", 3]});
    let vocabulary = Vocabulary::read(&serde_json::to_vec(&json).unwrap(), TOKENS.len()).unwrap();
    let pruned = vocabulary.prune(&counts(&[("abc", 2)]), 11).unwrap();
    let tokenizer = Tokenizer::from_bytes(&pruned.tokenizer_json).unwrap();
    assert_eq!(tokens(&tokenizer, &pruned.vocab_txt, "abc"), ["[CLS]", "abc", "[SEP]"]);
}

#[test]
fn ids_in_the_files_beside_it_follow() {
    let pruned = Vocabulary::read(&wordpiece(), TOKENS.len()).unwrap().prune(&[9, 0, 9], 10).unwrap();
    let ids = NewIds::between(&wordpiece(), &pruned.tokenizer_json);
    // `[unused0]` goes, so all after it move down by one.
    let object = |value: Value| value.as_object().unwrap().clone();
    let mut config =
        object(json!({"pad_token_id": 0, "sep_token_id": 4, "mask_token_id": 1, "eos_token_id": null, "n": 4}));
    ids.renumber_config(&mut config);
    assert_eq!(Value::Object(config), json!({"pad_token_id": 0, "sep_token_id": 3, "eos_token_id": null, "n": 4}));
    let mut config = object(json!({"added_tokens_decoder": {"0": "[PAD]", "1": "[unused0]", "4": "[SEP]"}, "n": 4}));
    ids.renumber_tokenizer_config(&mut config);
    assert_eq!(Value::Object(config), json!({"added_tokens_decoder": {"0": "[PAD]", "3": "[SEP]"}, "n": 4}));
}
