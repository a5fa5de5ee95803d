//! A recipe: passes in order, from a TOML file or from flags.
//!
//! ```toml
//! name = "structured-25"          # optional
//! seed = 0
//!
//! [calibration]                   # needed by passes that measure on text
//! texts = "calibration.txt"       # relative to the recipe
//! tokens = 30000
//!
//! [[pass]]
//! kind = "prune-structured"
//! heads = 0.25
//! ffn = 0.25
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml::Spanned;
use toml::de::{DeTable, DeValue, ValueDeserializer};

use super::CompressError;
use super::passes::{Pass, Refusal, Stage};
use super::reconstruct::Matrices;
use super::slots::Group;
use crate::model::Architecture;

/// What to do to a model.
#[derive(Debug, Clone, Default)]
pub struct Recipe {
    /// Its name, for reports.
    pub name: Option<String>,
    /// Seed of every random choice.
    pub seed: u64,
    /// Where calibration text comes from.
    pub calibration: CalibrationSettings,
    /// Passes in order.
    pub steps: Vec<Step>,
    /// The file that it was read from.
    file: Option<PathBuf>,
}

/// The `[calibration]` table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CalibrationSettings {
    /// Texts, one a line.
    #[serde(skip_serializing)]
    pub texts: Option<PathBuf>,
    /// Tokens of them to use.
    pub tokens: usize,
}

impl Default for CalibrationSettings {
    fn default() -> Self {
        Self { texts: None, tokens: 30_000 }
    }
}

/// A pass and where it was asked for.
#[derive(Debug, Clone)]
pub struct Step {
    /// The pass.
    pub pass: Pass,
    /// Line of the pass in the recipe's file, and of each of its fields.
    line: usize,
    fields: BTreeMap<String, usize>,
    /// Flags that set fields, for recipes that come from flags.
    flags: &'static [(&'static str, &'static str)],
}

impl Step {
    fn of_flags(pass: Pass, flags: &'static [(&'static str, &'static str)]) -> Self {
        Self { pass, line: 0, fields: BTreeMap::new(), flags }
    }

    /// Its line in the recipe's file, or that of a field; `None` for a pass that flags made.
    fn line(&self, field: &str) -> Option<usize> {
        self.fields.get(field).copied().or((self.line > 0).then_some(self.line))
    }
}

/// Line of a byte, from 1.
fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|&byte| byte == b'\n').count() + 1
}

struct Source<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Source<'_> {
    fn refuse(&self, offset: usize, reason: impl Into<String>) -> CompressError {
        CompressError::Recipe { file: self.path.to_owned(), line: line_of(self.text, offset), reason: reason.into() }
    }

    /// The parser's reason, and the line that it names; what is missing in a table is missed at the table's start.
    fn syntax(&self, start: usize) -> impl Fn(toml::de::Error) -> CompressError + '_ {
        move |error| {
            let offset = error.span().map_or(start, |span| span.start);
            self.refuse(offset, error.message().lines().collect::<Vec<_>>().join("; "))
        }
    }
}

impl Recipe {
    /// A recipe without passes: plain INT8.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { seed, ..Self::default() }
    }

    /// Adds a pass whose fields were set by flags: `(field, flag)`.
    pub fn push(&mut self, pass: impl Into<Pass>, flags: &'static [(&'static str, &'static str)]) {
        self.steps.push(Step::of_flags(pass.into(), flags));
    }

    /// Puts a pass of flags before all others, those of a file included.
    pub fn begin_with(&mut self, pass: impl Into<Pass>, flags: &'static [(&'static str, &'static str)]) {
        self.steps.insert(0, Step::of_flags(pass.into(), flags));
    }

    /// Reads a recipe.
    ///
    /// # Errors
    /// Naming the file and line of what is not TOML, unknown, of the wrong type or out of range.
    pub fn read(path: &Path) -> Result<Self, CompressError> {
        let bytes =
            std::fs::read(path).map_err(|source| CompressError::ReadRecipe { path: path.to_owned(), source })?;
        let text = String::from_utf8(bytes).map_err(|error| CompressError::Recipe {
            file: path.to_owned(),
            line: line_of(&String::from_utf8_lossy(error.as_bytes()), error.utf8_error().valid_up_to()),
            reason: "is not UTF-8 text".to_owned(),
        })?;
        let mut recipe = Self::parse(&text, path)?;
        if let Some(texts) = &mut recipe.calibration.texts {
            *texts = path.parent().unwrap_or(Path::new("")).join(&texts);
        }
        Ok(recipe)
    }

    /// Parses a recipe; `path` is for messages.
    fn parse(text: &str, path: &Path) -> Result<Self, CompressError> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Head {
            name: Option<String>,
            #[serde(default)]
            seed: u64,
            #[serde(default)]
            calibration: CalibrationSettings,
        }
        let source = Source { path, text };
        let document = DeTable::parse(text).map_err(source.syntax(0))?;
        let span = document.span();
        let mut table = document.into_inner();
        let passes = table.remove("pass");
        let head = ValueDeserializer::from(Spanned::new(span.clone(), DeValue::Table(table)));
        let head = Head::deserialize(head).map_err(source.syntax(span.start))?;
        let mut steps = Vec::new();
        if let Some(passes) = passes {
            let start = passes.span().start;
            let DeValue::Array(passes) = passes.into_inner() else {
                return Err(source.refuse(start, "passes are tables: [[pass]]"));
            };
            for pass in passes {
                steps.push(parse_step(&source, pass)?);
            }
        }
        Ok(Self { name: head.name, seed: head.seed, calibration: head.calibration, steps, file: Some(path.to_owned()) })
    }

    /// Refuses what can be known to be impossible for a model of this shape.
    ///
    /// # Errors
    /// Naming the line or flag.
    pub fn check(&self, architecture: &Architecture) -> Result<(), CompressError> {
        let mut stored_by: Option<&Pass> = None;
        let mut stores: Vec<(Group, &Pass)> = Vec::new();
        let mut shape = architecture.clone();
        for step in &self.steps {
            let behaviour = step.pass.behaviour();
            behaviour.check(&shape).map_err(|refusal| self.refusal(step, &refusal))?;
            shape = behaviour.leaves(&shape);
            match (behaviour.stage(), stored_by) {
                (Stage::Shape, Some(earlier)) => {
                    let reason = format!(
                        "changes weights that `{}` has stored before; put it before every pass that stores",
                        earlier.kind()
                    );
                    return Err(self.refusal(step, &Refusal::new("", reason)));
                }
                (Stage::Correct, None) => {
                    let reason = "makes up for what storing cost; put it after a pass that stores";
                    return Err(self.refusal(step, &Refusal::new("", reason)));
                }
                (Stage::Store, _) => stored_by = Some(&step.pass),
                _ => {}
            }
            let Some(group) = behaviour.stores() else { continue };
            if let Some((_, earlier)) = stores.iter().find(|(other, _)| other.overlaps(group)) {
                let reason =
                    format!("{group}: stores matrices that `{}` has stored before; name other ones", earlier.kind());
                return Err(self.refusal(step, &Refusal::new("group", reason)));
            }
            stores.push((group, &step.pass));
        }
        self.check_smooth()?;
        if let Some(step) = self.first_with_text() {
            if self.calibration.texts.is_none() {
                let reason = "measures on text: give a file of texts, one a line, by --calibration or as `texts` in \
                              [calibration]";
                return Err(self.refusal(step, &Refusal::new("", reason)));
            }
            if self.calibration.tokens == 0 {
                return Err(CompressError::Setting {
                    setting: "calibration tokens".to_owned(),
                    reason: "0 tokens show nothing".to_owned(),
                });
            }
        }
        Ok(())
    }

    /// Refuses a refit of all matrices after `smooth`: values are fitted to those of the model as it came, whose outliers are where
    /// they were.
    fn check_smooth(&self) -> Result<(), CompressError> {
        let mut after = self.steps.iter().skip_while(|step| !matches!(step.pass, Pass::Smooth(_)));
        let refits = |step: &&Step| matches!(&step.pass, Pass::Reconstruct(pass) if pass.matrices == Matrices::All);
        let Some(step) = after.find(refits) else { return Ok(()) };
        let reason = "undoes what `smooth` has done before; put it before that, or give matrices = \"outputs\"";
        Err(self.refusal(step, &Refusal::new("matrices", reason)))
    }

    /// Refuses what can be known to be impossible for a tokenizer whose word embedding has `rows` rows.
    ///
    /// # Errors
    /// Naming the line or flag.
    pub fn check_tokenizer(&self, tokenizer_json: &[u8], rows: usize) -> Result<(), CompressError> {
        let check = |step: &Step| {
            let checked = step.pass.behaviour().check_tokenizer(tokenizer_json, rows);
            checked.map_err(|refusal| self.refusal(step, &refusal))
        };
        self.steps.iter().try_for_each(check)
    }

    /// Whether a pass measures on calibration text.
    #[must_use]
    pub fn needs_text(&self) -> bool {
        self.first_with_text().is_some()
    }

    fn first_with_text(&self) -> Option<&Step> {
        self.steps.iter().find(|step| step.pass.behaviour().needs_text())
    }

    fn refusal(&self, step: &Step, refusal: &Refusal) -> CompressError {
        let flag = step.flags.iter().find(|(field, _)| *field == refusal.field).map(|(_, flag)| *flag);
        let named = if refusal.field.is_empty() { String::new() } else { format!("{}: ", refusal.field) };
        match (self.file.as_ref().zip(step.line(refusal.field)), flag) {
            (Some((file, line)), _) => CompressError::Recipe {
                file: file.clone(),
                line,
                reason: format!("{}: {named}{}", step.pass.kind(), refusal.reason),
            },
            (None, Some(flag)) => CompressError::Setting { setting: flag.to_owned(), reason: refusal.reason.clone() },
            (None, None) => CompressError::Setting {
                setting: step.pass.kind().to_owned(),
                reason: format!("{named}{}", refusal.reason),
            },
        }
    }

    /// An error of a running pass with its place in the recipe, when it is about a setting.
    pub(super) fn located(&self, step: &Step, error: CompressError) -> CompressError {
        let CompressError::Setting { setting, reason } = error else { return error };
        match self.file.as_ref().zip(step.line(&setting)) {
            Some((file, line)) => CompressError::Recipe {
                file: file.clone(),
                line,
                reason: format!("{}: {setting}: {reason}", step.pass.kind()),
            },
            None => CompressError::Setting { setting, reason },
        }
    }

    /// The recipe as TOML with every setting spelt out, whatever it was made from. Where the texts stand is left out:
    /// the manifest names them by their hash.
    ///
    /// # Panics
    /// Never: every pass is a table of plain values.
    #[must_use]
    pub fn to_toml(&self) -> String {
        #[derive(Serialize)]
        struct Whole<'a> {
            #[serde(skip_serializing_if = "Option::is_none")]
            name: Option<&'a str>,
            seed: u64,
            #[serde(skip_serializing_if = "Option::is_none")]
            calibration: Option<&'a CalibrationSettings>,
            #[serde(skip_serializing_if = "Vec::is_empty")]
            pass: Vec<&'a Pass>,
        }
        let whole = Whole {
            name: self.name.as_deref(),
            seed: self.seed,
            calibration: self.needs_text().then_some(&self.calibration),
            pass: self.steps.iter().map(|step| &step.pass).collect(),
        };
        toml::to_string(&whole).expect("a recipe is a table of plain values")
    }
}

fn parse_step(source: &Source<'_>, pass: Spanned<DeValue<'_>>) -> Result<Step, CompressError> {
    let span = pass.span();
    let DeValue::Table(mut table) = pass.into_inner() else {
        return Err(source.refuse(span.start, "a pass is a table: [[pass]]"));
    };
    let Some(kind) = table.remove("kind") else {
        return Err(source.refuse(span.start, "a pass without `kind`"));
    };
    let at = kind.span().start;
    let fields = table
        .iter()
        .map(|(name, _)| (name.get_ref().clone().into_owned(), line_of(source.text, name.span().start)))
        .collect();
    let name = kind.get_ref().as_str().map(str::to_owned).ok_or_else(|| source.refuse(at, "`kind` is not a name"))?;
    let values = ValueDeserializer::from(Spanned::new(span.clone(), DeValue::Table(table)));
    let pass = Pass::read(&name, values)
        .ok_or_else(|| source.refuse(at, format!("unknown pass `{name}`; there are {}", Pass::KINDS.join(", "))))?
        .map_err(source.syntax(span.start))?;
    Ok(Step { pass, line: line_of(source.text, span.start), fields, flags: &[] })
}

#[cfg(test)]
#[path = "recipe/tests.rs"]
mod tests;
