//! The model card: what the artefact is, in words and tables.

use std::fmt::Write;

use crate::checkpoint::Manifest;

/// The licence that the source's card names in its front matter.
pub(super) fn license_of(card: &str) -> Option<String> {
    let front = card.strip_prefix("---")?.split("\n---").next()?;
    front
        .lines()
        .find_map(|line| line.strip_prefix("license:"))
        .map(|license| license.trim().trim_matches(['"', '\'']).to_owned())
        .filter(|license| !license.is_empty())
}

/// What the model is for, in the hub's words, and a tag; a head with one label ranks texts, as for `serve`.
fn task(manifest: &Manifest) -> (&'static str, &'static str) {
    match manifest.architecture.head.as_ref().map(|head| head.labels.len()) {
        None => ("sentence-similarity", "sentence-embeddings"),
        Some(1) => ("text-ranking", "cross-encoder"),
        Some(_) => ("text-classification", "text-classification"),
    }
}

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// The text of the card.
pub(super) fn card(manifest: &Manifest) -> String {
    let mut text = String::from("---\n");
    if let Some(license) = &manifest.source.license {
        line(&mut text, &format!("license: {license}"));
    }
    let (task, tag) = task(manifest);
    line(&mut text, &format!("pipeline_tag: {task}\ntags:\n- {tag}\n- int8\n---\n"));
    line(&mut text, &format!("# {}\n", manifest.model));
    line(
        &mut text,
        &format!(
            "`{}` compressed by {}. Serve it with `niwaki serve --model DIR`; `niwaki inspect --model DIR` shows its \
             layers.\n",
            manifest.source.model, manifest.generator
        ),
    );
    line(&mut text, &format!("```sh\n{}\n```\n", manifest.recipe.command));
    line(&mut text, "Passes, in order:\n");
    for pass in &manifest.recipe.passes {
        line(&mut text, &format!("- {pass}"));
    }
    let size = &manifest.size;
    line(&mut text, "\n| | source | this model |\n|---|---|---|");
    let (before, after) = (megabytes(size.source_bytes), megabytes(size.artefact_bytes));
    line(&mut text, &format!("| weights | {before:.1} MB | {after:.1} MB |"));
    if let Some(pruning) = &manifest.pruning {
        let (before, after) = pruning.macs_per_token;
        line(
            &mut text,
            &format!(
                "| multiply-accumulates per token, matrix products | {:.2} M | {:.2} M |",
                before as f64 / 1e6,
                after as f64 / 1e6
            ),
        );
        let list = |pick: fn(&(usize, usize)) -> usize, pairs: &[(usize, usize)]| {
            pairs.iter().map(|pair| pick(pair).to_string()).collect::<Vec<_>>().join(", ")
        };
        for (name, pairs) in [("heads per layer", &pruning.heads), ("FFN neurons per layer", &pruning.ffn)] {
            line(&mut text, &format!("| {name} | {} | {} |", list(|p| p.0, pairs), list(|p| p.1, pairs)));
        }
    }
    if let Some(quality) = &manifest.quality {
        line(
            &mut text,
            &format!(
                "\nCosine to the source's embeddings on {} ({} texts): mean {:.4}, first percentile {:.4}, least {:.4}.",
                quality.measured_on, quality.n_texts, quality.cosine_mean, quality.cosine_p1, quality.cosine_min
            ),
        );
    }
    if let Some(calibration) = &manifest.calibration {
        line(
            &mut text,
            &format!(
                "\nCalibrated on {} texts, {} tokens (sha256 of the file: `{}`).",
                calibration.n_texts, calibration.n_tokens, calibration.sha256
            ),
        );
    }
    line(&mut text, &format!("\nWeights of the source: sha256 `{}`.", manifest.source.weights_sha256));
    text
}

fn line(text: &mut String, line: &str) {
    writeln!(text, "{line}").expect("writing to a String cannot fail");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_licence_is_found_in_the_front_matter_only() {
        assert_eq!(license_of("---\ntags:\n- x\nlicense: apache-2.0\n---\n# m"), Some("apache-2.0".to_owned()));
        assert_eq!(license_of("---\nlicense: 'mit'\n---\n"), Some("mit".to_owned()));
        assert_eq!(license_of("---\ntags: x\n---\nlicense: mit\n"), None);
        assert_eq!(license_of("# no front matter\nlicense: mit"), None);
    }
}
