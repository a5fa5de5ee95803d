//! `niwaki compress`: a request from flags, progress on standard error, what came out on standard output.

use std::io::{self, Write};

use anyhow::bail;

use super::args::CompressArgs;
use super::model::max_input_tokens;
use super::output::print;
use super::progress::Bars;
use crate::compress::{
    Attention, AttentionPattern, CompressRequest, Outcome, Progress, PruneStructured, Quantize, Recipe, Reconstruct,
    compress,
};
use crate::exec::Runtime;
use crate::kernels::Isa;
use crate::telemetry::process;

impl Progress for Bars {
    fn phase_started(&self, name: &str, total: u64) {
        self.start(name, Some(total), 0, false);
    }

    fn advanced(&self, by: u64) {
        self.advance(by);
    }

    fn phase_finished(&self) {
        self.finish();
    }
}

/// The recipe of a file, or the one that the flags spell; other flags override what it says of calibration and seed.
fn recipe(args: &CompressArgs) -> anyhow::Result<Recipe> {
    let mut recipe = match &args.recipe {
        Some(file) => Recipe::read(file)?,
        None => {
            let mut recipe = Recipe::new(0);
            if args.prune_heads > 0.0 || args.prune_ffn > 0.0 {
                let pass = PruneStructured {
                    heads: args.prune_heads,
                    ffn: args.prune_ffn,
                    importance: args.importance.unwrap_or_default(),
                    ..PruneStructured::default()
                };
                recipe.push(pass, &[("heads", "--prune-heads"), ("ffn", "--prune-ffn")]);
                recipe.push(Reconstruct::default(), &[]);
            } else if args.importance.is_some() {
                bail!("--importance says what --prune-heads and --prune-ffn remove: give one of them");
            }
            recipe.push(Quantize::default(), &[]);
            recipe
        }
    };
    if let Some(band) = args.attention {
        // The first pass, not a way to open the source: what comes out is measured against the model as it was.
        let pattern = Attention {
            pattern: AttentionPattern(band),
            layers: None,
            max_input_length: max_input_tokens(args.attention, args.max_input_length),
        };
        recipe.begin_with(pattern, &[("max_input_length", "--max-input-length")]);
    }
    let flag = args.calibration.as_ref().map(|_| "--calibration");
    if let Some(flag) =
        flag.or(args.calibration_tokens.map(|_| "--calibration-tokens")).filter(|_| !recipe.needs_text())
    {
        bail!("{flag}: no pass measures on text, so none would be read");
    }
    if let Some(texts) = &args.calibration {
        recipe.calibration.texts = Some(texts.clone());
    }
    if let Some(tokens) = args.calibration_tokens {
        recipe.calibration.tokens = tokens;
    }
    if let Some(seed) = args.seed {
        recipe.seed = seed;
    }
    Ok(recipe)
}

pub(super) fn run(args: &CompressArgs) -> anyhow::Result<()> {
    let request = CompressRequest {
        force: args.force,
        name: args.name.clone(),
        speed: args.speed,
        max_input_tokens: args.max_input_length.filter(|_| args.attention.is_none()),
        ..CompressRequest::new(&args.model, &args.out, recipe(args)?)
    };
    let runtime = Runtime::new(Isa::detect(), process::available_cpus())?;
    let outcome = compress(&request, &runtime, &Bars::new())?;
    Ok(print(|out| describe(&outcome, out))?)
}

fn describe(outcome: &Outcome, out: &mut dyn Write) -> io::Result<()> {
    let manifest = &outcome.manifest;
    writeln!(out, "{}", outcome.out.display())?;
    writeln!(
        out,
        "tensors: {:.1} MB, {:.1} MB before",
        manifest.size.artefact_bytes as f64 / 1e6,
        manifest.size.source_bytes as f64 / 1e6
    )?;
    if let Some(pruning) = &manifest.pruning {
        let kept =
            |layers: &[(usize, usize)]| layers.iter().map(|(_, after)| after.to_string()).collect::<Vec<_>>().join(" ");
        writeln!(out, "heads kept per layer: {}", kept(&pruning.heads))?;
        writeln!(out, "FFN neurons kept per layer: {}", kept(&pruning.ffn))?;
        let (before, after) = pruning.macs_per_token;
        writeln!(
            out,
            "multiply-accumulates per token: {after}, {:.1} % of {before}",
            after as f64 / before as f64 * 100.0
        )?;
    }
    for pass in &outcome.report.passes {
        for note in &pass.notes {
            writeln!(out, "{}: {note}", pass.kind)?;
        }
    }
    if let Some(quality) = &manifest.quality {
        writeln!(
            out,
            "cosine to the uncompressed model on {} texts of {}: mean {:.5}, 1st percentile {:.5}, smallest {:.5}",
            quality.n_texts, quality.measured_on, quality.cosine_mean, quality.cosine_p1, quality.cosine_min
        )?;
    }
    Ok(())
}
