//! `niwaki inspect`: what a model directory holds.

use anyhow::Context;
use serde_json::json;

use super::args::InspectArgs;
use super::default_model;
use super::output::print;
use crate::checkpoint::{Checkpoint, Inventory, Manifest, MatrixInfo, OpenOptions};
use crate::exec::cost::{Operation, forward_costs};
use crate::model::{Band, ModelError, ValueRange};

/// Lengths that whole forwards are counted for.
const LENGTHS: [usize; 4] = [16, 128, 512, 4_096];

pub(super) fn run(args: &InspectArgs) -> anyhow::Result<()> {
    let checkpoint = match &args.model {
        Some(dir) => Checkpoint::open(dir).with_context(|| format!("model {}", dir.display()))?,
        None => Checkpoint::embedded(&default_model::ARTEFACT, &OpenOptions::default()).context("the default model")?,
    };
    let inventory = checkpoint.inventory()?;
    if args.json {
        print_json(&checkpoint, &inventory)
    } else {
        let text = text(&checkpoint, &inventory, args.matrices)?;
        Ok(print(|out| out.write_all(text.as_bytes()))?)
    }
}

/// Multiply-accumulates of attention's two products for an input of a length, all layers.
fn attention_macs(checkpoint: &Checkpoint, len: usize) -> Result<u64, ModelError> {
    let costs = forward_costs(checkpoint.architecture(), &[len])?;
    let attention = costs.iter().filter(|cost| matches!(cost.operation, Operation::Attention(_)));
    Ok(attention.map(|cost| cost.macs).sum())
}

fn lengths(checkpoint: &Checkpoint) -> impl Iterator<Item = usize> {
    let limit = checkpoint.architecture().max_input_tokens;
    LENGTHS.into_iter().filter(move |len| *len <= limit)
}

fn print_json(checkpoint: &Checkpoint, inventory: &Inventory) -> anyhow::Result<()> {
    let architecture = checkpoint.architecture();
    let layers: Vec<_> = architecture
        .layers
        .iter()
        .enumerate()
        .map(|(layer, shape)| {
            let matrices = inventory.of_layer(layer);
            json!({
                "shape": shape,
                "bits": Inventory::mean(matrices.iter().copied(), |matrix| matrix.bits),
                "zeros": Inventory::mean(matrices.iter().copied(), |matrix| matrix.zeros),
                "skipped": Inventory::mean(matrices.iter().copied(), |matrix| matrix.skipped),
                "macs_per_token": matrices.iter().map(|matrix| matrix.macs).sum::<u64>(),
            })
        })
        .collect();
    let attention = lengths(checkpoint)
        .map(|len| Ok((len.to_string(), json!(attention_macs(checkpoint, len)?))))
        .collect::<Result<serde_json::Map<String, serde_json::Value>, ModelError>>()?;
    let value = json!({
        "name": checkpoint.name(),
        "weights_bytes": checkpoint.weights_bytes(),
        "bits": inventory.bits(),
        "zeros": inventory.zeros(),
        "skipped": inventory.skipped(),
        "macs_per_token": inventory.macs_per_token(),
        "attention_macs": attention,
        "architecture": architecture.spec(),
        "layers": layers,
        "groups": inventory.groups,
        "matrices": inventory.matrices,
        "manifest": checkpoint.manifest(),
    });
    Ok(print(|out| writeln!(out, "{value:#}"))?)
}

fn band_words(band: &Band, max_input_tokens: usize) -> String {
    if band.is_full_for(max_input_tokens) { "full".to_owned() } else { band.to_string() }
}

/// Forms of some matrices: one for all, or those of each role.
fn forms(matrices: &[&MatrixInfo]) -> String {
    match matrices {
        [first, rest @ ..] if rest.iter().all(|matrix| matrix.form == first.form) => first.form.clone(),
        all => all.iter().map(|matrix| format!("{} {}", matrix.role, matrix.form)).collect::<Vec<_>>().join("; "),
    }
}

fn text(checkpoint: &Checkpoint, inventory: &Inventory, each_matrix: bool) -> Result<String, ModelError> {
    let spec = checkpoint.architecture();
    let mut lines = vec![
        format!("{}: {:?}, {} layers of width {}", checkpoint.name(), spec.family, spec.layers.len(), spec.d_model),
        format!(
            "{} tokens in the vocabulary, inputs of up to {} tokens, {:?} pooling{}",
            spec.vocab_size,
            spec.max_input_tokens,
            spec.pooling,
            if spec.normalize { ", normalised" } else { "" }
        ),
        format!(
            "{:.1} MB of weights, {:.2} bits a weight; {:.1} % are zero, {:.1} % are neither stored nor multiplied",
            checkpoint.weights_bytes() as f64 / 1e6,
            inventory.bits(),
            inventory.zeros() * 100.0,
            inventory.skipped() * 100.0
        ),
        String::new(),
        format!("{:<18} {:>9} {:>7} {:>7}   stored as", "tensors", "MB", "share", "bits"),
    ];
    let all = inventory.bytes() as f64;
    for group in &inventory.groups {
        let bits = if group.elements > 0 { format!("{:.2}", group.bits()) } else { "-".to_owned() };
        let (bytes, forms) = (group.bytes as f64, group.forms.join("; "));
        lines.push(format!(
            "{:<18} {:>9.3} {:>6.1}% {bits:>7}   {forms}",
            group.group.title(),
            bytes / 1e6,
            bytes / all * 100.0
        ));
    }
    lines.push(String::new());
    lines.push(format!(
        "{:>5} {:>6} {:>7} {:>7} {:>24} {:>6} {:>7} {:>9} {:>11}   stored as",
        "layer", "heads", "d_head", "d_ffn", "attention", "bits", "zeros", "skipped", "MAC/token"
    ));
    for (layer, config) in spec.layers.iter().enumerate() {
        let matrices = inventory.of_layer(layer);
        let mean = |of: fn(&MatrixInfo) -> f64| Inventory::mean(matrices.iter().copied(), of);
        lines.push(format!(
            "{layer:>5} {:>6} {:>7} {:>7} {:>24} {:>6.2} {:>6.1}% {:>8.1}% {:>11}   {}",
            config.n_heads,
            config.d_head,
            config.d_ffn,
            band_words(&config.band, spec.max_input_tokens),
            mean(|matrix| matrix.bits),
            mean(|matrix| matrix.zeros) * 100.0,
            mean(|matrix| matrix.skipped) * 100.0,
            matrices.iter().map(|matrix| matrix.macs).sum::<u64>(),
            forms(&matrices)
        ));
    }
    lines.push(format!("{:>5} {:>88}", "all", inventory.macs_per_token()));
    let attention: Vec<String> = lengths(checkpoint)
        .map(|len| Ok(format!("{:.1} M at {len} tokens", attention_macs(checkpoint, len)? as f64 / 1e6)))
        .collect::<Result<_, ModelError>>()?;
    lines.push(format!("attention's own products: {}", attention.join(", ")));
    for (layer, ranges) in spec.ranges.iter().enumerate() {
        let words = |range: Option<ValueRange>| match range {
            Some(ValueRange { low, high }) => format!("{low:.3} to {high:.3}"),
            None => "dynamic".to_owned(),
        };
        lines.push(format!(
            "layer {layer}, ranges of the inputs of qkv, output, ffn up, ffn down: {}",
            ranges.all().map(words).join(", ")
        ));
    }
    if each_matrix {
        lines.push(String::new());
        lines.extend(matrix_lines(inventory));
    }
    if let Some(manifest) = checkpoint.manifest() {
        lines.push(String::new());
        lines.extend(manifest_lines(manifest));
    }
    Ok(lines.join("\n") + "\n")
}

fn matrix_lines(inventory: &Inventory) -> impl Iterator<Item = String> {
    let head = format!(
        "{:>5} {:<14} {:>13} {:>10} {:>6} {:>7} {:>9} {:>5} {:>9}   stored as",
        "layer", "matrix", "shape", "bytes", "bits", "zeros", "skipped", "rank", "MAC/token"
    );
    std::iter::once(head).chain(inventory.matrices.iter().map(|matrix| {
        let dash = |number: Option<usize>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
        format!(
            "{:>5} {:<14} {:>13} {:>10} {:>6.2} {:>6.1}% {:>8.1}% {:>5} {:>9}   {}",
            dash(matrix.layer),
            matrix.role,
            format!("{}x{}", matrix.rows, matrix.cols),
            matrix.bytes,
            matrix.bits,
            matrix.zeros * 100.0,
            matrix.skipped * 100.0,
            dash(matrix.rank),
            matrix.macs,
            matrix.form
        )
    }))
}

fn manifest_lines(manifest: &Manifest) -> Vec<String> {
    let mut lines = vec![
        format!("made by {} (format {})", manifest.generator, manifest.format_version),
        format!("  {}", manifest.recipe.command),
    ];
    lines.extend(manifest.recipe.passes.iter().map(|pass| format!("  - {pass}")));
    lines.push(format!("from {} (weights sha256 {})", manifest.source.model, manifest.source.weights_sha256));
    if let Some(calibration) = &manifest.calibration {
        lines.push(format!(
            "calibrated on {} texts, {} tokens (sha256 {})",
            calibration.n_texts, calibration.n_tokens, calibration.sha256
        ));
    }
    let size = &manifest.size;
    lines.push(format!(
        "{:.1} MB of tensors, {:.1} MB in the source",
        size.artefact_bytes as f64 / 1e6,
        size.source_bytes as f64 / 1e6
    ));
    if let Some(quality) = &manifest.quality {
        lines.push(format!(
            "cosine to it on {} texts of {}: mean {:.5}, 1st percentile {:.5}, smallest {:.5}",
            quality.n_texts, quality.measured_on, quality.cosine_mean, quality.cosine_p1, quality.cosine_min
        ));
    }
    lines
}
