//! What can go wrong in the score or in a player.

/// An error of the forward pass or of building a model.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A sequence without tokens.
    #[error("a sequence must hold at least one token")]
    EmptySequence,
    /// Token types do not match the ids.
    #[error("expected {expected} token types, got {got}")]
    TokenTypes {
        /// Number of ids.
        expected: usize,
        /// Number of types.
        got: usize,
    },
    /// More tokens than a batch can index.
    #[error("a batch holds at most 2^32 - 1 tokens")]
    BatchTooLarge,
    /// A token id beyond the vocabulary.
    #[error("token id {id} is out of range: the vocabulary has {vocab_size} entries")]
    TokenOutOfRange {
        /// The offending id.
        id: u32,
        /// Entries of the embedding table.
        vocab_size: usize,
    },
    /// A token type beyond the table.
    #[error("token type {token_type} is out of range: the model has {n_token_types}")]
    TokenTypeOutOfRange {
        /// The offending type.
        token_type: u8,
        /// Entries of the type table.
        n_token_types: usize,
    },
    /// A sequence longer than the model's positions.
    #[error("a sequence of {got} tokens is longer than the model's limit of {limit}")]
    SequenceTooLong {
        /// Tokens given.
        got: usize,
        /// Tokens allowed.
        limit: usize,
    },
    /// A field of an architecture that cannot be.
    #[error("architecture: {field}: {reason}")]
    Architecture {
        /// The field's name.
        field: &'static str,
        /// What is wrong, with the values.
        reason: String,
    },
    /// The player failed.
    #[error(transparent)]
    Player(Box<dyn std::error::Error + Send + Sync>),
}

impl ModelError {
    /// Wraps an error of a player.
    pub fn player(error: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::Player(Box::new(error))
    }
}
