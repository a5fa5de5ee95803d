//! Against the tokenizer library's own truncation, on tokenizers made here.

use proptest::prelude::*;

use super::*;

/// A small WordPiece tokenizer: letters, digits, some words; `[CLS] … [SEP]`, or with `roberta` `<s> … </s></s>`-like
/// frames of unequal length; and an added token that reaches over a blank.
fn json(normalizer: &str, template: &str) -> Vec<u8> {
    let mut vocab = vec!["[PAD]".to_owned(), "[UNK]".to_owned(), "[CLS]".to_owned(), "[SEP]".to_owned()];
    for word in ["the", "tree", "garden", "##s", "##ing", "prun", "new york", ",", ".", "é", "e"] {
        vocab.push(word.to_owned());
    }
    for letter in ('a'..='z').chain('0'..='9').filter(|&letter| letter != 'e') {
        vocab.push(letter.to_string());
    }
    for letter in ('a'..='z').filter(|&letter| letter != 's') {
        vocab.push(format!("##{letter}"));
    }
    let vocab: Vec<String> = vocab.iter().enumerate().map(|(id, word)| format!("\"{word}\": {id}")).collect();
    let special = |id: u32, word: &str| {
        format!(
            r#"{{"id":{id},"content":"{word}","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}}"#
        )
    };
    let added = format!(
        r#"{},{},{},{},{}"#,
        special(0, "[PAD]"),
        special(1, "[UNK]"),
        special(2, "[CLS]"),
        special(3, "[SEP]"),
        special(10, "new york").replace("\"special\":true", "\"special\":false"),
    );
    format!(
        r###"{{"version":"1.0",
        "truncation":{{"direction":"Right","max_length":4,"strategy":"LongestFirst","stride":0}},
        "padding":{{"strategy":{{"Fixed":16}},"direction":"Right","pad_to_multiple_of":null,"pad_id":0,"pad_type_id":0,"pad_token":"[PAD]"}},
        "added_tokens":[{added}],"normalizer":{normalizer},"pre_tokenizer":{{"type":"BertPreTokenizer"}},
        "post_processor":{{"type":"TemplateProcessing","single":{template},"pair":[{{"SpecialToken":{{"id":"[CLS]","type_id":0}}}},{{"Sequence":{{"id":"A","type_id":0}}}},{{"SpecialToken":{{"id":"[SEP]","type_id":0}}}},{{"Sequence":{{"id":"B","type_id":1}}}},{{"SpecialToken":{{"id":"[SEP]","type_id":1}}}}],
        "special_tokens":{{"[CLS]":{{"id":"[CLS]","ids":[2],"tokens":["[CLS]"]}},"[SEP]":{{"id":"[SEP]","ids":[3],"tokens":["[SEP]"]}}}}}},
        "decoder":{{"type":"WordPiece","prefix":"##","cleanup":true}},
        "model":{{"type":"WordPiece","unk_token":"[UNK]","continuing_subword_prefix":"##","max_input_chars_per_word":20,"vocab":{{{}}}}}}}"###,
        vocab.join(",")
    )
    .into_bytes()
}

const BERT: &str =
    r#"{"type":"BertNormalizer","clean_text":true,"handle_chinese_chars":true,"strip_accents":null,"lowercase":true}"#;
const CLS_A_SEP: &str = r#"[{"SpecialToken":{"id":"[CLS]","type_id":0}},{"Sequence":{"id":"A","type_id":0}},{"SpecialToken":{"id":"[SEP]","type_id":0}}]"#;
const CLS_CLS_A: &str = r#"[{"SpecialToken":{"id":"[CLS]","type_id":0}},{"SpecialToken":{"id":"[CLS]","type_id":0}},{"Sequence":{"id":"A","type_id":0}}]"#;
const A_SEP: &str = r#"[{"Sequence":{"id":"A","type_id":0}},{"SpecialToken":{"id":"[SEP]","type_id":0}}]"#;

fn bert() -> Tokenizer {
    Tokenizer::from_bytes(&json(BERT, CLS_A_SEP)).unwrap()
}

#[test]
fn padding_and_truncation_of_the_file_are_off() {
    let ids = bert().encode("the garden trees", true).unwrap();
    assert_eq!(ids, [2, 4, 6, 5, 7, 3]);
    assert_eq!(bert().encode("", true).unwrap(), [2, 3]);
    assert_eq!(bert().encode("the", false).unwrap(), [4]);
    assert!(matches!(Tokenizer::from_bytes(b"{}"), Err(TextError::File(_))));
}

#[test]
fn frames_are_read_off_the_template() {
    for (template, prefix, suffix) in
        [(CLS_A_SEP, vec![2], vec![3]), (CLS_CLS_A, vec![2, 2], vec![]), (A_SEP, vec![], vec![3])]
    {
        let tokenizer = Tokenizer::from_bytes(&json(BERT, template)).unwrap();
        assert_eq!((&tokenizer.prefix, &tokenizer.suffix), (&prefix, &suffix), "{template}");
    }
}

#[test]
fn ids_of_a_client_are_cut_with_or_without_their_frame() {
    let tokenizer = bert();
    assert_eq!(tokenizer.truncate(vec![2, 4, 5, 6, 3], 4, Direction::Right), (vec![2, 4, 5, 3], true));
    assert_eq!(tokenizer.truncate(vec![2, 4, 5, 6, 3], 4, Direction::Left), (vec![2, 5, 6, 3], true));
    assert_eq!(tokenizer.truncate(vec![4, 5, 6, 7], 2, Direction::Right), (vec![4, 5], true));
    assert_eq!(tokenizer.truncate(vec![4, 5, 6, 7], 2, Direction::Left), (vec![6, 7], true));
    assert_eq!(tokenizer.truncate(vec![2, 4, 3], 1, Direction::Right), (vec![2], true));
    assert_eq!(tokenizer.truncate(vec![2, 4, 3], 3, Direction::Right), (vec![2, 4, 3], false));
}

#[test]
fn pieces_carry_the_bytes_they_stand_for() {
    let text = "Thé  gardens [SEP]";
    let pieces = bert().encode_detailed(text, true).unwrap();
    let words: Vec<_> = pieces.iter().map(|piece| (piece.text.as_str(), piece.special)).collect();
    assert_eq!(
        words,
        [("[CLS]", true), ("Thé", false), ("garden", false), ("s", false), ("[SEP]", false), ("[SEP]", true)]
    );
    for piece in pieces.iter().filter(|piece| !piece.special) {
        assert_eq!(&text[piece.span.clone().unwrap()], piece.text);
    }
}

#[test]
fn decode_is_the_way_back() {
    let tokenizer = bert();
    let ids = tokenizer.encode("the gardens, pruning", true).unwrap();
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "the gardens, pruning");
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "[CLS] the gardens, pruning [SEP]");
    assert!(tokenizer.knows(0) && !tokenizer.knows(10_000) && tokenizer.vocab_size() < 100);
}

#[test]
fn pairs_are_framed_and_typed() {
    let tokenizer = bert();
    let part = |text: &str| tokenizer.part(text).unwrap();
    let pair = tokenizer.pair(part("the tree"), part("gardens"), None).unwrap();
    assert_eq!((&pair.ids[..], &pair.token_types[..]), (&[2, 4, 5, 3, 6, 7, 3][..], &[0, 0, 0, 0, 1, 1, 1][..]));
    let limit = Some((5, Direction::Right));
    let pair = tokenizer.pair(part("the tree"), part("gardens"), limit).unwrap();
    assert_eq!((&pair.ids[..], pair.was_cut), (&[2, 4, 3, 6, 3][..], true));
    let empty = tokenizer.pair(part(""), part("the"), limit).unwrap();
    assert_eq!((&empty.ids[..], empty.was_cut), (&[2, 3, 4, 3][..], false));
}

/// Words, blanks, added tokens and what else a text is made of.
fn text() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        6 => "[a-z]{1,6}",
        4 => Just("garden ".to_owned()),
        4 => Just(" ".to_owned()),
        1 => Just("new york".to_owned()),
        1 => Just(" new york ".to_owned()),
        1 => Just("[SEP]".to_owned()),
        1 => Just("[CLS]".to_owned()),
        1 => "[\t\n\r\u{b}\u{c}\u{a0}\u{2003}\u{200b}]",
        1 => Just("\u{301}".to_owned()),
        1 => "[庭木é,.]{1,3}",
        1 => "[a-z]{15,40}",
        1 => any::<char>().prop_map(String::from),
    ];
    prop::collection::vec(part, 0..120).prop_map(|parts| parts.concat())
}

/// What the library itself makes of it.
fn library(json: &[u8], text: &str, max_length: usize, direction: Direction) -> Vec<u32> {
    let mut tokenizer = tokenizers::Tokenizer::from_bytes(json).unwrap();
    tokenizer.with_padding(None);
    let direction = match direction {
        Direction::Left => TruncationDirection::Left,
        Direction::Right => TruncationDirection::Right,
    };
    let params = TruncationParams { direction, max_length, strategy: TruncationStrategy::LongestFirst, stride: 0 };
    tokenizer.with_truncation(Some(params)).unwrap();
    tokenizer.encode(text, true).unwrap().get_ids().to_vec()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn truncation_is_the_librarys(
        text in text(),
        max_tokens in 2usize..40,
        left in any::<bool>(),
        template in prop_oneof![Just(CLS_A_SEP), Just(CLS_CLS_A), Just(A_SEP)],
        normalizer in prop_oneof![Just(BERT), Just("null")],
    ) {
        let json = json(normalizer, template);
        let direction = if left { Direction::Left } else { Direction::Right };
        let tokenizer = Tokenizer::from_bytes(&json).unwrap();
        let expected = library(&json, &text, max_tokens, direction);
        let whole = tokenizer.encode(&text, true).unwrap();
        let was_cut = whole.len() > max_tokens;
        prop_assert_eq!(tokenizer.truncate(whole, max_tokens, direction), (expected.clone(), was_cut));
        prop_assert_eq!(tokenizer.encode_within(&text, max_tokens, direction).unwrap(), (expected, was_cut));
    }

    #[test]
    fn the_end_of_a_long_text_changes_nothing(text in text(), times in 1usize..40, max_tokens in 2usize..20) {
        let tokenizer = bert();
        prop_assert!(tokenizer.cut_margin.is_some());
        let text = text.repeat(times);
        let whole = tokenizer.encode(&text, true).unwrap();
        let expected = tokenizer.truncate(whole, max_tokens, Direction::Right);
        prop_assert_eq!(tokenizer.encode_within(&text, max_tokens, Direction::Right).unwrap(), expected);
    }

    #[test]
    fn pairs_are_cut_as_the_library_cuts_them(
        first in text(),
        second in text(),
        max_tokens in 4usize..60,
        left in any::<bool>(),
    ) {
        let json = json(BERT, CLS_A_SEP);
        let tokenizer = Tokenizer::from_bytes(&json).unwrap();
        let direction = if left { Direction::Left } else { Direction::Right };
        let mut library = tokenizers::Tokenizer::from_bytes(&json).unwrap();
        library.with_padding(None);
        let strategy = TruncationStrategy::LongestFirst;
        let of_library = if left { TruncationDirection::Left } else { TruncationDirection::Right };
        let params = TruncationParams { direction: of_library, max_length: max_tokens, strategy, stride: 0 };
        library.with_truncation(Some(params)).unwrap();
        let expected = library.encode((first.as_str(), second.as_str()), true).unwrap();
        let limit = Some((max_tokens, direction));
        let part = |text| tokenizer.part(text).unwrap();
        let pair = tokenizer.pair(part(&first), part(&second), limit).unwrap();
        let types: Vec<u32> = pair.token_types.iter().map(|&kind| u32::from(kind)).collect();
        if !pair.was_cut {
            prop_assert_eq!(&pair.ids[..], expected.get_ids());
            prop_assert_eq!(&types[..], expected.get_type_ids());
        } else {
            // The library stops reading early, from either side, and then no longer knows which text was the longer one:
            // an odd token may go to either.
            prop_assert_eq!(pair.ids.len(), expected.get_ids().len());
            let second = |types: &[u32]| types.iter().sum::<u32>();
            prop_assert!(second(&types).abs_diff(second(expected.get_type_ids())) <= 1);
        }
    }
}

#[test]
fn a_file_that_is_no_tokenizer_is_an_error() {
    let whole = String::from_utf8(json(BERT, CLS_A_SEP)).unwrap();
    // The library panics on some of these.
    let decoder = whole.find("\"decoder\":{").unwrap() + "\"decoder\":{".len();
    for damaged in [
        String::new(),
        whole[..whole.len() / 2].to_owned(),
        whole[..decoder].to_owned() + "\u{1}" + &whole[decoder..],
        whole[..decoder].to_owned() + "\"\\ud800\":1," + &whole[decoder..],
        whole.replace("\"WordPiece\"", "\"WordPieces\""),
    ] {
        assert!(matches!(Tokenizer::from_bytes(damaged.as_bytes()), Err(TextError::File(_))), "{damaged}");
    }
}

#[test]
fn a_pair_of_long_texts_costs_what_its_tokens_cost() {
    // What is cut off comes in a thousand pieces a text; joining each with each took gigabytes.
    let tokenizer = bert();
    let long = "the trees ".repeat(4000);
    let part = || tokenizer.part(&long).unwrap();
    let whole = tokenizer.pair(part(), part(), None).unwrap();
    let start = std::time::Instant::now();
    let cut = tokenizer.pair(part(), part(), Some((16, Direction::Right))).unwrap();
    assert!(start.elapsed() < std::time::Duration::from_secs(3), "{:?}", start.elapsed());
    assert_eq!((cut.ids.len(), cut.was_cut, whole.was_cut), (16, true, false));
}
