//! Texts for tokenizers of three kinds: the first byte is the longest sequence, the rest a text, or two with a zero between.

use std::sync::LazyLock;

use niwaki::checkpoint::Checkpoint;
use niwaki::text::{Direction, Tokenizer};

use super::golden;

/// WordPiece, byte-level BPE, and Unigram.
static TOKENIZERS: LazyLock<Vec<Tokenizer>> = LazyLock::new(|| {
    let open = |name: &&str| Checkpoint::open(&golden(name)).unwrap();
    let models: Vec<Checkpoint> = ["bert", "roberta", "xlm-roberta"].iter().map(open).collect();
    models.iter().map(|model| Tokenizer::from_bytes(model.tokenizer_json()).unwrap()).collect()
});

fn check(tokenizer: &Tokenizer, text: &str, limit: usize) {
    let all = tokenizer.encode(text, true).unwrap();
    assert!(all.iter().all(|&id| (id as usize) < tokenizer.vocab_size() && tokenizer.knows(id)), "{all:?}");
    assert!(all.len() >= tokenizer.n_special());
    for direction in [Direction::Left, Direction::Right] {
        // The short way gives what the long way gives.
        let cut = tokenizer.encode_within(text, limit, direction).unwrap();
        assert_eq!(cut, tokenizer.truncate(all.clone(), limit, direction));
        assert!(cut.0.len() <= limit, "{} of {limit}", cut.0.len());
        assert_eq!(cut.1, all.len() > limit);
    }
    let pieces = tokenizer.encode_detailed(text, true).unwrap();
    assert_eq!(pieces.iter().map(|piece| piece.id).collect::<Vec<_>>(), all);
    for span in pieces.iter().filter_map(|piece| piece.span.clone()) {
        assert!(span.start <= span.end && span.end <= text.len(), "{span:?} of {}", text.len());
    }
    for skip_special in [false, true] {
        tokenizer.decode(&all, skip_special).unwrap();
    }
    assert_eq!(tokenizer.encode(text, true).unwrap(), all, "the second time");
}

/// Encodes `data` in every way.
pub(crate) fn run(data: &[u8]) {
    let Some((&limit, bytes)) = data.split_first() else { return };
    let text = String::from_utf8_lossy(bytes);
    for tokenizer in TOKENIZERS.iter() {
        check(tokenizer, &text, usize::from(limit));
        if let Some((first, second)) = text.split_once('\0') {
            let part = |text| tokenizer.part(text).unwrap();
            let whole = tokenizer.pair(part(first), part(second), None).unwrap();
            assert!(!whole.was_cut && whole.ids.len() == whole.token_types.len());
            for direction in [Direction::Left, Direction::Right] {
                // Special tokens alone may be too many: that is an error.
                let Ok(pair) = tokenizer.pair(part(first), part(second), Some((limit.into(), direction))) else {
                    continue;
                };
                assert!(pair.ids.len() <= usize::from(limit).max(4), "{} of {limit}", pair.ids.len());
                assert_eq!(pair.ids.len(), pair.token_types.len());
                assert_eq!(pair.was_cut, pair.ids.len() < whole.ids.len());
            }
        }
    }
}
