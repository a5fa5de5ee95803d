//! `niwaki compress`: a request from flags, progress on standard error, what came out on standard output.

use super::args::CompressArgs;
use super::model::max_input_tokens;
use super::progress::Bars;
use crate::compress::{CompressRequest, Progress, Report, compress};

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

pub(super) fn run(args: &CompressArgs) -> anyhow::Result<()> {
    let request = CompressRequest {
        force: args.force,
        name: args.name.clone(),
        calibration: args.calibration.clone(),
        calibration_tokens: args.calibration_tokens,
        prune_heads: args.prune_heads,
        prune_ffn: args.prune_ffn,
        importance: args.importance,
        band: args.attention,
        max_input_tokens: max_input_tokens(args.attention, args.max_input_length),
        seed: args.seed,
        ..CompressRequest::new(&args.model, &args.out)
    };
    let report = compress(&request, &Bars::new())?;
    print(&report);
    Ok(())
}

fn print(report: &Report) {
    let manifest = &report.manifest;
    println!("{}", report.out.display());
    println!(
        "tensors: {:.1} MB, {:.1} MB before",
        manifest.size.artefact_bytes as f64 / 1e6,
        manifest.size.source_bytes as f64 / 1e6
    );
    if let Some(pruning) = &manifest.pruning {
        let kept =
            |layers: &[(usize, usize)]| layers.iter().map(|(_, after)| after.to_string()).collect::<Vec<_>>().join(" ");
        println!("heads kept per layer: {}", kept(&pruning.heads));
        println!("FFN neurons kept per layer: {}", kept(&pruning.ffn));
        let (before, after) = pruning.macs_per_token;
        println!("multiply-accumulates per token: {after}, {:.1} % of {before}", after as f64 / before as f64 * 100.0);
    }
    if let Some(quality) = &manifest.quality {
        println!(
            "cosine to the uncompressed model on {} texts of {}: mean {:.5}, 1st percentile {:.5}, smallest {:.5}",
            quality.n_texts, quality.measured_on, quality.cosine_mean, quality.cosine_p1, quality.cosine_min
        );
    }
}
