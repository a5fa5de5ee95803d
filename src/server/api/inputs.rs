//! Readers of the inputs, which come in several shapes.
//!
//! Written by hand: serde's untagged enums buffer everything first and say nothing useful about what is wrong.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use utoipa::openapi::schema::{AnyOf, Array, ObjectBuilder, Schema, SchemaType, Type};
use utoipa::openapi::{KnownFormat, RefOr, SchemaFormat};
use utoipa::{PartialSchema, ToSchema};

/// A list holds at most this many inputs in memory; of those beyond only the number is kept. Small inputs cost more as
/// values than as JSON, and a body is bounded in bytes alone.
pub const MAX_ITEMS: usize = 16_384;

/// A list that may be too long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bounded<T> {
    /// The first [`MAX_ITEMS`] entries.
    pub items: Vec<T>,
    /// How many were sent.
    pub n_sent: usize,
}

impl<T> Bounded<T> {
    pub(super) fn new() -> Self {
        Self { items: Vec::new(), n_sent: 0 }
    }

    pub(super) fn push(&mut self, item: T) {
        self.items.push(item);
        self.n_sent += 1;
    }

    /// Appends another list, as far as there is room.
    pub(super) fn append(&mut self, other: Self) {
        let room = MAX_ITEMS.saturating_sub(self.items.len());
        self.items.extend(other.items.into_iter().take(room));
        self.n_sent += other.n_sent;
    }

    /// Takes the rest of `seq`.
    pub(super) fn fill<'de, A: SeqAccess<'de>>(mut self, mut seq: A) -> Result<Self, A::Error>
    where
        T: Deserialize<'de>,
    {
        while self.items.len() < MAX_ITEMS {
            match seq.next_element()? {
                Some(item) => self.push(item),
                None => return Ok(self),
            }
        }
        while seq.next_element::<IgnoredAny>()?.is_some() {
            self.n_sent += 1;
        }
        Ok(self)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Bounded<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for List<T> {
            type Value = Bounded<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Self::Value, A::Error> {
                Bounded::new().fill(seq)
            }
        }
        deserializer.deserialize_seq(List(PhantomData))
    }
}

/// A JSON object. (A derived reader would take a list of the fields' values as well.)
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Object<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ObjectVisitor<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for ObjectVisitor<T> {
            type Value = Object<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }
        deserializer.deserialize_map(ObjectVisitor(PhantomData))
    }
}

/// One input: a text, or token ids that are used as they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// A text.
    Text(String),
    /// Token ids, special tokens included.
    Ids(Vec<u32>),
}

impl<'de> Deserialize<'de> for Item {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ItemVisitor;
        impl<'de> Visitor<'de> for ItemVisitor {
            type Value = Item;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of token ids")
            }
            fn visit_str<E>(self, text: &str) -> Result<Item, E> {
                Ok(Item::Text(text.to_owned()))
            }
            fn visit_string<E>(self, text: String) -> Result<Item, E> {
                Ok(Item::Text(text))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Item, A::Error> {
                let mut ids = Vec::new();
                while let Some(id) = seq.next_element()? {
                    ids.push(id);
                }
                Ok(Item::Ids(ids))
            }
        }
        deserializer.deserialize_any(ItemVisitor)
    }
}

/// The inputs of a request: one, or a list. A flat list of numbers is one input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// One input.
    One(Item),
    /// A list of inputs.
    Many(Bounded<Item>),
}

impl<'de> Deserialize<'de> for Input {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        /// The first entry of a list says what the list is.
        enum First {
            Id(u32),
            Item(Item),
        }
        impl<'de> Deserialize<'de> for First {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct FirstVisitor;
                impl<'de> Visitor<'de> for FirstVisitor {
                    type Value = First;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str("a string, a token id or a list of token ids")
                    }
                    fn visit_u64<E: serde::de::Error>(self, id: u64) -> Result<First, E> {
                        let id = u32::try_from(id);
                        id.map(First::Id).map_err(|_| E::custom("a token id does not fit 32 bits"))
                    }
                    fn visit_str<E>(self, text: &str) -> Result<First, E> {
                        Ok(First::Item(Item::Text(text.to_owned())))
                    }
                    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<First, A::Error> {
                        let ids = SeqAccessDeserializer::new(seq);
                        Item::deserialize(ids).map(First::Item)
                    }
                }
                deserializer.deserialize_any(FirstVisitor)
            }
        }
        struct InputVisitor;
        impl<'de> Visitor<'de> for InputVisitor {
            type Value = Input;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a list of token ids, or a list of these")
            }
            fn visit_str<E>(self, text: &str) -> Result<Input, E> {
                Ok(Input::One(Item::Text(text.to_owned())))
            }
            fn visit_string<E>(self, text: String) -> Result<Input, E> {
                Ok(Input::One(Item::Text(text)))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Input, A::Error> {
                let mut many = Bounded::new();
                match seq.next_element()? {
                    None => Ok(Input::Many(many)),
                    Some(First::Item(item)) => {
                        many.push(item);
                        many.fill(seq).map(Input::Many)
                    }
                    Some(First::Id(id)) => {
                        let mut ids = vec![id];
                        while let Some(id) = seq.next_element()? {
                            ids.push(id);
                        }
                        Ok(Input::One(Item::Ids(ids)))
                    }
                }
            }
        }
        deserializer.deserialize_any(InputVisitor)
    }
}

/// `"s"` or `["s", …]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Texts {
    /// One text.
    One(String),
    /// A list.
    Many(Bounded<String>),
}

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextsVisitor;
        impl<'de> Visitor<'de> for TextsVisitor {
            type Value = Texts;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }
            fn visit_str<E>(self, text: &str) -> Result<Texts, E> {
                Ok(Texts::One(text.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Texts, A::Error> {
                Bounded::new().fill(seq).map(Texts::Many)
            }
        }
        deserializer.deserialize_any(TextsVisitor)
    }
}

/// `[1, 2]` or `[[1, 2], …]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdLists(pub Bounded<Vec<u32>>);

impl<'de> Deserialize<'de> for IdLists {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Input::deserialize(deserializer)? {
            Input::One(Item::Ids(ids)) => Ok(Self(Bounded { items: vec![ids], n_sent: 1 })),
            Input::Many(many) => {
                let lists = many.items.into_iter().map(|item| match item {
                    Item::Ids(ids) => Ok(ids),
                    Item::Text(_) => Err(D::Error::custom("expected a list of token ids, found a string")),
                });
                Ok(Self(Bounded { items: lists.collect::<Result<_, _>>()?, n_sent: many.n_sent }))
            }
            Input::One(Item::Text(_)) => Err(D::Error::custom("expected token ids, found a string")),
        }
    }
}

fn plain(kind: Type) -> ObjectBuilder {
    ObjectBuilder::new().schema_type(SchemaType::Type(kind))
}

fn id_list() -> Schema {
    let id = plain(Type::Integer).format(Some(SchemaFormat::KnownFormat(KnownFormat::Int32))).minimum(Some(0));
    Schema::Array(Array::new(id.build()))
}

fn any_of(schemas: Vec<Schema>) -> Schema {
    let mut any = AnyOf::new();
    any.items = schemas.into_iter().map(RefOr::T).collect();
    Schema::AnyOf(any)
}

fn text_schema() -> Schema {
    Schema::Object(plain(Type::String).build())
}

/// The types with a reader of their own describe themselves.
macro_rules! described {
    ($name:ident, $schema:expr) => {
        impl PartialSchema for $name {
            fn schema() -> RefOr<Schema> {
                RefOr::T($schema)
            }
        }
        impl ToSchema for $name {}
    };
}

described!(Item, any_of(vec![text_schema(), id_list()]));
described!(
    Input,
    any_of(vec![text_schema(), id_list(), Schema::Array(Array::new(any_of(vec![text_schema(), id_list()])))])
);
described!(Texts, any_of(vec![text_schema(), Schema::Array(Array::new(text_schema()))]));
described!(IdLists, any_of(vec![id_list(), Schema::Array(Array::new(id_list()))]));

#[cfg(test)]
mod tests {
    use super::*;

    fn input(json: &str) -> Result<Input, serde_json::Error> {
        serde_json::from_str(json)
    }

    fn text(text: &str) -> Item {
        Item::Text(text.to_owned())
    }

    #[test]
    fn inputs_are_read_in_every_shape() {
        assert_eq!(input(r#""a\nb""#).unwrap(), Input::One(text("a\nb")));
        assert_eq!(input("[1, 2]").unwrap(), Input::One(Item::Ids(vec![1, 2])));
        let many = |items: Vec<Item>| Input::Many(Bounded { n_sent: items.len(), items });
        assert_eq!(input("[]").unwrap(), many(vec![]));
        assert_eq!(input(r#"["a", "b"]"#).unwrap(), many(vec![text("a"), text("b")]));
        assert_eq!(input(r#"[[1], "b", []]"#).unwrap(), many(vec![Item::Ids(vec![1]), text("b"), Item::Ids(vec![])]));
        for wrong in [
            "null",
            "1",
            "true",
            "{}",
            "[null]",
            "[1, \"a\"]",
            "[\"a\", 1]",
            "[-1]",
            "[1.5]",
            "[4294967296]",
            "[1, 4294967296]",
            "[[[1]]]",
            "[[\"a\"]]",
            "[[1, null]]",
            "[1e3]",
            "[true]",
            "[{}]",
        ] {
            let error = input(wrong).unwrap_err();
            assert!(error.is_data(), "{wrong}: {error}");
        }
    }

    #[test]
    fn a_list_beyond_the_limit_is_counted_and_not_kept() {
        let json = format!("[{}\"\"]", "\"\",".repeat(MAX_ITEMS + 9));
        let Input::Many(many) = input(&json).unwrap() else { panic!("a list is Many") };
        assert_eq!((many.items.len(), many.n_sent), (MAX_ITEMS, MAX_ITEMS + 10));
        let lists: IdLists = serde_json::from_str(&format!("[{}[]]", "[1],".repeat(MAX_ITEMS + 9))).unwrap();
        assert_eq!((lists.0.items.len(), lists.0.n_sent), (MAX_ITEMS, MAX_ITEMS + 10));
    }

    #[test]
    fn ids_to_decode_are_one_list_or_several() {
        let lists = |json: &str| serde_json::from_str::<IdLists>(json).map(|lists| lists.0.items);
        assert_eq!(lists("[1, 2]").unwrap(), [vec![1, 2]]);
        assert_eq!(lists("[[1], [2, 3]]").unwrap(), [vec![1], vec![2, 3]]);
        assert_eq!(lists("[]").unwrap(), Vec::<Vec<u32>>::new());
        assert!(lists("\"a\"").is_err() && lists("[\"a\"]").is_err() && lists("[[1], \"a\"]").is_err());
    }
}
