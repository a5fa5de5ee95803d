//! `niwaki inspect`: what a model directory holds.

use anyhow::Context;
use serde_json::json;

use super::args::InspectArgs;
use super::default_model;
use crate::checkpoint::{Checkpoint, OpenOptions};
use crate::model::{Architecture, LinearSlot};
use crate::quant::Weight;

pub(super) fn run(args: &InspectArgs) -> anyhow::Result<()> {
    let checkpoint = match &args.model {
        Some(dir) => Checkpoint::open(dir).with_context(|| format!("model {}", dir.display()))?,
        None => Checkpoint::embedded(&default_model::ARTEFACT, &OpenOptions::default()).context("the default model")?,
    };
    if args.json { print_json(&checkpoint) } else { print_table(&checkpoint) }
}

/// Multiply-accumulates of a layer's linear maps for one token.
fn layer_macs(architecture: &Architecture, layer: usize) -> usize {
    [LinearSlot::Qkv(layer), LinearSlot::AttentionOut(layer), LinearSlot::FfnUp(layer), LinearSlot::FfnDown(layer)]
        .iter()
        .map(|slot| {
            let (n_out, n_in) = slot.shape(&architecture.layers[layer], architecture.d_model);
            n_out * n_in
        })
        .sum()
}

fn bits(checkpoint: &Checkpoint, slot: LinearSlot) -> anyhow::Result<u8> {
    Ok(match checkpoint.linear(slot)?.weight {
        Weight::F32(_) => 32,
        Weight::Codebook4(_) => 4,
        _ => 8,
    })
}

fn print_json(checkpoint: &Checkpoint) -> anyhow::Result<()> {
    let architecture = checkpoint.architecture();
    let layers: Vec<_> = (0..architecture.layers.len())
        .map(|layer| {
            Ok(json!({
                "shape": architecture.layers[layer],
                "bits": bits(checkpoint, LinearSlot::FfnUp(layer))?,
                "macs_per_token": layer_macs(architecture, layer),
            }))
        })
        .collect::<anyhow::Result<_>>()?;
    let value = json!({
        "name": checkpoint.name(),
        "weights_bytes": checkpoint.weights_bytes(),
        "architecture": architecture.spec(),
        "layers": layers,
        "manifest": checkpoint.manifest(),
    });
    println!("{}", serde_json::to_string_pretty(&value)?);
    Ok(())
}

fn print_table(checkpoint: &Checkpoint) -> anyhow::Result<()> {
    let spec = checkpoint.architecture();
    println!("{}: {:?}, {} layers of width {}", checkpoint.name(), spec.family, spec.layers.len(), spec.d_model);
    println!(
        "{} tokens in the vocabulary, inputs of up to {} tokens, {:?} pooling{}",
        spec.vocab_size,
        spec.max_input_tokens,
        spec.pooling,
        if spec.normalize { ", normalised" } else { "" }
    );
    println!("{:.1} MB of weights\n", checkpoint.weights_bytes() as f64 / 1e6);
    println!(
        "{:>5} {:>6} {:>7} {:>7} {:>6} {:>24} {:>12}",
        "layer", "heads", "d_head", "d_ffn", "bits", "attention", "MAC/token"
    );
    let mut total = 0;
    for (layer, config) in spec.layers.iter().enumerate() {
        let macs = layer_macs(spec, layer);
        total += macs;
        let band = config.band;
        let attention = if band.is_full_for(spec.max_input_tokens) { "full".to_owned() } else { band.to_string() };
        let bits = bits(checkpoint, LinearSlot::FfnUp(layer))?;
        println!(
            "{layer:>5} {:>6} {:>7} {:>7} {bits:>6} {attention:>24} {macs:>12}",
            config.n_heads, config.d_head, config.d_ffn
        );
    }
    println!("{:>5} {total:>68}", "all");
    if let Some(manifest) = checkpoint.manifest() {
        println!("\nmade by {}\n  {}", manifest.generator, manifest.recipe.command);
        println!("from {} (weights sha256 {})", manifest.source.model, manifest.source.weights_sha256);
        if let Some(quality) = &manifest.quality {
            println!(
                "cosine to it on {} texts of {}: mean {:.5}, 1st percentile {:.5}, smallest {:.5}",
                quality.n_texts, quality.measured_on, quality.cosine_mean, quality.cosine_p1, quality.cosine_min
            );
        }
    }
    Ok(())
}
