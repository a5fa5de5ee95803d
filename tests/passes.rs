//! The passes that leave something out (blocks, single weights, ranks, layers, words, attended keys), through the binary:
//! each is really executed, served, reproducible, and better than the plainer way to do the same.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs;
use std::path::Path;

use common::workshop::{compress, entries, files, niwaki, serves, source, succeeded, write_recipe};
use niwaki::checkpoint::{Checkpoint, Manifest, TensorGroup};

const CALIBRATION: &str = "[calibration]\ntexts = \"texts.txt\"\ntokens = 4000\n";

/// A recipe of one pass, compressed twice and served.
struct Made {
    dir: tempfile::TempDir,
    said: String,
    manifest: Manifest,
}

impl Made {
    fn open(&self) -> Checkpoint {
        Checkpoint::open(&self.dir.path().join("a")).unwrap()
    }

    fn cosine(&self) -> f64 {
        self.manifest.quality.as_ref().unwrap().cosine_mean
    }

    fn bytes(&self) -> u64 {
        self.manifest.size.artefact_bytes
    }
}

fn make(passes: &str) -> Made {
    let dir = tempfile::tempdir().unwrap();
    let recipe = write_recipe(&dir.path().join("here"), &format!("{CALIBRATION}{passes}"), 600);
    let said = succeeded(&compress(&source(), &dir.path().join("a"), &["--recipe", &recipe]));
    let artefact = Checkpoint::open(&dir.path().join("a")).unwrap();
    let manifest = artefact.manifest().unwrap().clone();
    // Whatever form a matrix is stored in, its bytes are found where it is.
    let inventory = artefact.inventory().unwrap();
    assert!(inventory.matrices.iter().all(|matrix| matrix.bytes > 0), "{passes}: {:?}", inventory.matrices);
    assert!(inventory.groups.iter().all(|size| size.group != TensorGroup::Unused), "{passes}: {:?}", inventory.groups);
    Made { dir, said, manifest }
}

/// The same, compressed a second time to the same bytes, and served.
fn made(passes: &str) -> Made {
    let made = make(passes);
    let (a, b) = (made.dir.path().join("a"), made.dir.path().join("b"));
    let recipe = made.dir.path().join("here/recipe.toml");
    succeeded(&compress(&source(), &b, &["--recipe", recipe.to_str().unwrap()]));
    assert!(files(&a) == files(&b), "{passes}: two runs differ");
    serves(&a);
    made
}

fn pass(kind: &str, fields: &str) -> String {
    format!("[[pass]]\nkind = \"{kind}\"\n{fields}\n")
}

#[test]
fn blocks_go_with_their_work_and_the_rest_makes_up_for_them() {
    let fields = |more: &str| format!("group = \"all\"\nwidth = 32\ndensity = 0.6\n{more}");
    let surgeon = made(&pass("prune-blocks", &fields("")));
    let inventory = surgeon.open().inventory().unwrap();
    // A benchmark counts what is multiplied.
    let said = |command: &str, more: &[&str]| -> serde_json::Value {
        let mut run = niwaki();
        run.args([command, "--json", "--model"]).arg(surgeon.dir.path().join("a")).args(more);
        serde_json::from_str(&succeeded(&run.output().unwrap())).unwrap()
    };
    let bench = said("bench", &["--length", "16", "--rounds", "1", "--warmup", "0"]);
    let attention = said("inspect", &[])["attention_macs"]["16"].as_u64().unwrap();
    assert_eq!(bench["macs"], 16 * inventory.macs_per_token() + attention);
    for matrix in inventory.matrices.iter().filter(|matrix| matrix.layer.is_some()) {
        assert!(matrix.form.contains("block"), "{matrix:?}");
        // What is not there is neither stored nor multiplied.
        let share = matrix.macs as f64 / (matrix.rows * matrix.cols) as f64;
        assert!((share - 0.6).abs() < 0.07, "{matrix:?}");
    }
    // Without a width each matrix has the one that suits its shape; in a model as narrow as this that is 32.
    let each = make(&pass("prune-blocks", &fields("").replace("width = 32\n", "")));
    assert!(each.bytes() == surgeon.bytes() && each.cosine().to_bits() == surgeon.cosine().to_bits());
    let magnitude = make(&pass("prune-blocks", &fields("score = \"magnitude\"\nrefit = false")));
    let activation = make(&pass("prune-blocks", &fields("score = \"activation\"\nrefit = false")));
    assert!(surgeon.bytes() == magnitude.bytes(), "as many blocks stay");
    let (best, middle, least) = (surgeon.cosine(), activation.cosine(), magnitude.cosine());
    assert!(best > middle + 0.01 && middle > least, "{best} {middle} {least}");
    // By magnitude alone no text is needed.
    let dir = tempfile::tempdir().unwrap();
    let plain = pass("prune-blocks", &fields("score = \"magnitude\"\nrefit = false"));
    let recipe = write_recipe(&dir.path().join("here"), &plain, 1);
    succeeded(&compress(&source(), &dir.path().join("a"), &["--recipe", &recipe]));
}

#[test]
fn single_weights_make_the_file_smaller_and_bring_no_speed() {
    let half = made(&pass("prune-unstructured", "density = 0.5"));
    assert!(half.said.contains("no speed"), "{}", half.said);
    assert!(half.manifest.recipe.passes[0].contains("not faster"));
    let inventory = half.open().inventory().unwrap();
    for matrix in inventory.matrices.iter().filter(|matrix| matrix.layer.is_some()) {
        assert!(matrix.form.contains("bitmap") && (0.4..0.6).contains(&matrix.zeros), "{matrix:?}");
        assert_eq!(matrix.macs, (matrix.rows * matrix.cols) as u64, "the work is that of the whole matrix");
    }
    let all = make("");
    assert!(half.bytes() < all.bytes());
    let grouped = made(&pass("prune-unstructured", "n_of_m = [2, 4]"));
    let found = grouped.open();
    for matrix in found.inventory().unwrap().matrices.iter().filter(|matrix| matrix.layer.is_some()) {
        assert!((0.49..0.56).contains(&matrix.zeros), "{matrix:?}");
    }
    let plain = make(&pass("prune-unstructured", "density = 0.5\nscore = \"magnitude\"\nrefit = false"));
    assert!(
        half.cosine() > grouped.cosine() && grouped.cosine() > plain.cosine(),
        "{} {} {}",
        half.cosine(),
        grouped.cosine(),
        plain.cosine()
    );
}

#[test]
fn low_ranks_are_executed_as_factors_and_whitening_beats_the_plain_decomposition_at_every_rank() {
    for rank in [6, 10, 14] {
        let fields = |metric: &str| format!("group = \"ffn\"\nrank = {rank}\nmetric = \"{metric}\"\nrefit = false");
        let whitened = make(&pass("low-rank", &fields("whitened")));
        let plain = make(&pass("low-rank", &fields("plain")));
        assert!(whitened.cosine() > plain.cosine(), "rank {rank}: {} {}", whitened.cosine(), plain.cosine());
        assert_eq!(whitened.bytes(), plain.bytes());
        let inventory = whitened.open().inventory().unwrap();
        let factors: Vec<_> = inventory.matrices.iter().filter(|matrix| matrix.rank == Some(rank)).collect();
        assert_eq!(factors.len(), 6, "both FFN matrices of three layers");
        assert!(factors.iter().all(|matrix| matrix.macs == (rank * (32 + 64)) as u64), "{factors:?}");
    }
    let fisher = made(&pass("low-rank", "group = \"all\"\nshare = 0.8\nmetric = \"whitened-fisher\""));
    let linears: u64 = fisher.open().inventory().unwrap().matrices.iter().map(|matrix| matrix.macs).sum();
    assert!(fisher.said.contains("stays whole"), "what stays whole is said: {}", fisher.said);
    assert!(linears > 0);
    made(&pass("low-rank", "group = \"embedding\"\nrank = 16\nmetric = \"whitened-fisher\""));
}

#[test]
fn factors_that_are_no_gain_are_refused_matrix_by_matrix() {
    // Break-even of 32x32 is 16, of 64x32 is 21.3.
    let made = make(&pass("low-rank", "group = \"all\"\nrank = 17\nmetric = \"plain\"\nrefit = false"));
    let inventory = made.open().inventory().unwrap();
    let of = |role: &str| {
        inventory
            .matrices
            .iter()
            .filter(|matrix| matrix.role.contains(role))
            .map(|m| m.rank.is_some())
            .collect::<Vec<_>>()
    };
    assert!(
        made.said.contains("layer 0 attention out stays whole") || made.said.contains("stays whole"),
        "{}",
        made.said
    );
    assert!(
        inventory.matrices.iter().any(|m| m.rank == Some(17)) && inventory.matrices.iter().any(|m| m.rank.is_none()),
        "{:?} {:?}",
        of("ffn"),
        of("attention")
    );
    let thick = make(&pass("low-rank", "group = \"ffn\"\nrank = 32\nmetric = \"plain\"\nrefit = false"));
    assert!(thick.said.contains("nothing was changed"), "{}", thick.said);
    assert_eq!(thick.manifest.schemes["ffn.weight"], "int8-per-row");
}

#[test]
fn layers_go_whole_and_what_they_did_is_made_up_for() {
    let dropped = made(&pass("drop-layers", "layers = [1]"));
    assert_eq!(dropped.open().architecture().layers.len(), 2);
    let pruning = dropped.manifest.pruning.clone().unwrap();
    assert_eq!(pruning.heads, [(2, 2), (2, 0), (2, 2)]);
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(dropped.dir.path().join("a/config.json")).unwrap()).unwrap();
    assert_eq!(config["num_hidden_layers"], 2);
    let refitted = made(&(pass("drop-layers", "layers = [1]") + &pass("reconstruct", "")));
    assert!(refitted.cosine() > dropped.cosine(), "{} {}", refitted.cosine(), dropped.cosine());
    // What is gone counts whether the fit aims at the stream or at the branch.
    let branch = made(&(pass("drop-layers", "layers = [1]") + &pass("reconstruct", "target = \"branch\"")));
    assert!(branch.cosine() > dropped.cosine(), "{} {}", branch.cosine(), dropped.cosine());
    // The layer that is missed least, on other texts than those that are measured on here.
    let chosen = made(&pass("drop-layers", "count = 1"));
    assert_eq!(chosen.open().architecture().layers.len(), 2);
    let named = |layer: usize| make(&pass("drop-layers", &format!("layers = [{layer}]")));
    let named: Vec<Made> = (0..3).map(named).collect();
    let weights = |made: &Made| files(&made.dir.path().join("a"))["model.safetensors"].clone();
    let index = named.iter().position(|made| weights(made) == weights(&chosen)).expect("one of the three");
    let worst = named.iter().map(Made::cosine).fold(1.0, f64::min);
    assert!(named[index].cosine() > worst, "{index} of {:?}", named.iter().map(Made::cosine).collect::<Vec<_>>());
}

#[test]
fn words_go_from_table_and_tokenizer_alike() {
    let made = made(&pass("vocabulary", "keep = 90"));
    let artefact = made.open();
    assert_eq!(artefact.architecture().vocab_size, 90);
    let tokenizer: serde_json::Value = serde_json::from_slice(artefact.tokenizer_json()).unwrap();
    let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
    let mut ids: Vec<u64> = vocab.values().map(|id| id.as_u64().unwrap()).collect();
    ids.sort_unstable();
    assert_eq!(ids, (0..90).collect::<Vec<_>>());
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(made.dir.path().join("a/config.json")).unwrap()).unwrap();
    assert_eq!(config["vocab_size"], 90);
    // Texts whose words all stayed are what they were.
    assert!(made.manifest.golden.iter().any(|golden| golden.cosine > 0.999), "{:?}", made.manifest.quality);
    let whole = make("");
    assert!(made.bytes() < whole.bytes());
    // Later passes see the new words.
    let both = self::made(
        &(pass("vocabulary", "share = 0.8")
            + &pass("quantize", "group = \"embedding\"\nbits = 4\ncompensate = \"gptq\"")),
    );
    assert_eq!(both.manifest.schemes["embeddings"], "codebook4-per-row");
}

#[test]
fn a_pattern_is_carried_layer_by_layer_and_its_fidelity_told() {
    let narrow = pass("attention", "pattern = \"window=1\"\nlayers = [0, 1]\nmax_input_length = 60");
    let made = made(&(narrow + &pass("attention", "pattern = \"window=4,globals=cls\"\nlayers = [2]")));
    let artefact = made.open();
    let bands: Vec<String> = artefact.architecture().layers.iter().map(|layer| layer.band.to_string()).collect();
    assert_eq!(bands, ["window=1", "window=1", "window=4,globals=1"]);
    assert!(artefact.architecture().positions.tiled && artefact.architecture().max_input_tokens == 60);
    let told: Vec<&str> = made.said.lines().filter(|line| line.contains("cosine to full attention")).collect();
    assert!(told.len() == 2 && told[0].contains("60 tokens"), "{}", made.said);
    let cosine = |said: &str| -> f64 {
        let line = said.lines().rfind(|line| line.contains("cosine to full attention")).unwrap();
        line.split("attention ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap()
    };
    let wide = make(&pass("attention", "pattern = \"window=100\"\nmax_input_length = 60"));
    assert!((cosine(&wide.said) - 1.0).abs() < 1e-6, "what hides nothing changes nothing: {}", wide.said);
    assert!(cosine(&made.said) < 0.9999, "{}", made.said);
    // Made up for by a fit against full attention.
    let pattern = pass("attention", "pattern = \"window=1\"");
    let (plain, fitted) = (make(&pattern), make(&(pattern + &pass("reconstruct", ""))));
    assert!(fitted.cosine() > plain.cosine(), "{} {}", fitted.cosine(), plain.cosine());
}

#[test]
fn ranges_of_inputs_can_be_fixed_by_every_method() {
    let quantize = pass("quantize", "");
    let dynamic = make(&quantize);
    let fixed = |fields: &str| format!("{quantize}{}", pass("activations", fields));
    let one = made(&fixed("range = \"percentile\"\npercentile = 0.999"));
    let mut all = vec![one.open().architecture().ranges.clone()];
    for method in ["min-max", "mse", "entropy"] {
        let made = make(&fixed(&format!("range = \"{method}\"")));
        assert!(made.cosine() > 0.9, "{method}: {}", made.cosine());
        assert_eq!(made.manifest.schemes["linear.input"], "uint8-static");
        all.push(made.open().architecture().ranges.clone());
    }
    for (index, ranges) in all.iter().enumerate() {
        assert!(ranges.len() == one.open().architecture().layers.len() && !all[..index].contains(ranges));
        assert!(ranges.iter().all(|layer| layer.all().iter().all(Option::is_some)));
    }
    // What lies outside is lost.
    let clipped = make(&fixed("range = \"percentile\"\npercentile = 0.8"));
    assert!(one.cosine() > 0.9 && one.cosine() > clipped.cosine(), "{} {}", one.cosine(), clipped.cosine());
    assert_eq!(dynamic.manifest.schemes["linear.input"], "uint8-per-token-dynamic");
    // Of one group only.
    let half = make(&fixed("group = \"ffn\""));
    for layer in &half.open().architecture().ranges {
        assert!(
            layer.attention_in.is_none() && layer.context.is_none() && layer.ffn_in.is_some() && layer.hidden.is_some()
        );
    }
    // The other group by another method; what the first pass has fixed stays.
    let both =
        make(&fixed(&format!("group = \"ffn\"\n{}", pass("activations", "group = \"attention\"\nrange = \"mse\""))));
    for (layer, only) in both.open().architecture().ranges.iter().zip(&half.open().architecture().ranges) {
        assert!(layer.all().iter().all(Option::is_some) && (layer.ffn_in, layer.hidden) == (only.ffn_in, only.hidden));
    }
    let shown = succeeded(&niwaki().args(["inspect", "--model"]).arg(half.dir.path().join("a")).output().unwrap());
    assert!(shown.contains("qkv, output, ffn up, ffn down: dynamic, dynamic, -"), "{shown}");
}

#[test]
fn what_cannot_be_is_refused_with_its_line_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("place");
    fs::create_dir(&place).unwrap();
    let check = |passes: &str, line: usize, words: &str| {
        let recipe = write_recipe(&dir.path().join("recipes"), &format!("{CALIBRATION}{passes}"), 20);
        let output = compress(&source(), &place.join("out"), &["--recipe", &recipe]);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{passes}: {errors}");
        assert_eq!(errors.lines().count(), 1, "{errors}");
        let place_of = format!("recipe.toml:{}: ", line + 3);
        assert!(errors.contains(&place_of) && errors.contains(words), "{passes}: {errors}");
        assert_eq!(entries(&place), [""; 0]);
    };
    check(&pass("prune-blocks", "density = 1.0"), 3, "1 is not in");
    check(&pass("prune-blocks", "width = 48"), 3, "48");
    check(&pass("prune-blocks", "width = 64\ngroup = \"attention\""), 3, "does not divide layer 0 qkv");
    check(&pass("prune-blocks", "group = \"embedding\""), 3, "looked up");
    check(&pass("prune-unstructured", "n_of_m = [4, 2]"), 3, "4 of 2");
    check(&pass("prune-unstructured", "n_of_m = [3, 5]"), 3, "does not divide");
    check(&pass("prune-unstructured", "density = 0.5\nn_of_m = [2, 4]"), 4, "either");
    check(&pass("low-rank", "rank = 33"), 3, "33 is above the matrix");
    check(&pass("low-rank", "rank = 0"), 3, "leaves nothing");
    check(&pass("low-rank", "share = 0.001"), 3, "cannot be met");
    check(&pass("low-rank", "rank = 4\nenergy = 0.9"), 1, "one of");
    check(&pass("drop-layers", "layers = [3]"), 3, "no layer 3");
    check(&pass("drop-layers", "layers = [0, 1, 2]"), 3, "one must stay");
    check(&pass("drop-layers", "count = 3"), 3, "the model has 3");
    check(&pass("vocabulary", "keep = 112"), 3, "112");
    check(&pass("vocabulary", "keep = 7"), 3, "must stay");
    check(&pass("attention", "pattern = \"windw=3\""), 3, "windw");
    check(&pass("attention", "pattern = \"window=3\"\nlayers = [7]"), 4, "no layer 7");
    check(&pass("attention", "pattern = \"full\"\nmax_input_length = 60"), 4, "24 positions");
    check(&pass("attention", ""), 1, "pattern");
    check(&(pass("quantize", "") + &pass("activations", "percentile = 0.4")), 6, "0.4 is not above");
    check(&(pass("quantize", "") + &pass("activations", "group = \"embedding\"")), 6, "no input");
    check(&pass("activations", ""), 1, "after");
    let blocks = pass("prune-blocks", "width = 32");
    check(&(blocks.clone() + &pass("quantize", "group = \"all\"")), 6, "`prune-blocks` has stored");
    check(&(blocks + &pass("drop-layers", "count = 1")), 4, "before every pass that stores");
}

#[test]
fn other_tokenizers_are_refused_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let recipe =
        write_recipe(&dir.path().join("recipes"), &format!("{CALIBRATION}{}", pass("vocabulary", "keep = 20")), 20);
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/roberta");
    let output = niwaki()
        .args(["compress", "--recipe", &recipe, "--model"])
        .arg(model)
        .arg("--out")
        .arg(dir.path().join("a"))
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.code() == Some(2) && errors.contains("recipe.toml:4") && errors.contains("WordPiece"),
        "{errors}"
    );
    assert!(!dir.path().join("a").exists());
}

#[test]
fn the_report_stands_alone_and_tells_of_every_part() {
    let passes = pass("attention", "pattern = \"window=2\"\nlayers = [1]")
        + &pass("drop-layers", "layers = [0]")
        + &pass("sensitivity", "")
        + &pass("prune-blocks", "group = \"ffn\"\nwidth = 32")
        + &pass("quantize", "group = \"embedding\"\nbits = 4");
    let made = make(&passes);
    let artefact = made.dir.path().join("a");
    let json: serde_json::Value = serde_json::from_slice(&fs::read(artefact.join("report.json")).unwrap()).unwrap();
    let html = fs::read_to_string(artefact.join("report.html")).unwrap();
    for outside in ["http:", "https:", "src=", "href=", "<script", "@import", "url("] {
        assert!(!html.contains(outside), "{outside}");
    }
    // Sizes by group add up to what the files hold.
    let sum = |groups: &serde_json::Value| -> u64 {
        groups.as_array().unwrap().iter().map(|group| group["bytes"].as_u64().unwrap()).sum()
    };
    assert_eq!(sum(&json["after"]), made.bytes());
    assert!(sum(&json["before"]) > 3 * sum(&json["after"]) / 2);
    // A part for the embedding and each layer of the source, the one that is gone among them.
    let parts: Vec<&str> =
        json["parts"].as_array().unwrap().iter().map(|part| part["part"].as_str().unwrap()).collect();
    assert_eq!(parts, ["embedding", "layer 0, gone", "layer 1", "layer 2"]);
    assert!(
        json["parts"].as_array().unwrap().iter().all(|part| part["loss"].as_f64().unwrap() > 0.0),
        "{}",
        json["parts"]
    );
    // The way: the source, each pass, and what was written; bytes never grow here.
    let way = json["way"].as_array().unwrap();
    assert_eq!(way.len(), 1 + 5 + 1);
    let bytes: Vec<u64> = way.iter().map(|stop| stop["bytes"].as_u64().unwrap()).collect();
    assert!(bytes.is_sorted_by(|a, b| a >= b), "{bytes:?}");
    assert!(way[2]["macs_per_token"].as_u64() > way[4]["macs_per_token"].as_u64(), "blocks save work: {way:?}");
    assert_eq!(json["attention"][0]["pattern"], "window=2");
    assert_eq!(json["attention"][1]["pattern"], "full");
    assert!(json["passes"][2]["matrices"][0]["sensitivity"].is_number() && json["speed"].is_null());
    assert_eq!(html.matches("<svg class=\"pattern\"").count(), 2);
    for heading in [
        "Size by group",
        "Quality against size and speed",
        "Sensitivity by layer",
        "Attention patterns",
        "prune-blocks",
    ] {
        assert!(html.contains(heading), "{heading}");
    }
    let hashes = &made.manifest.files;
    assert_eq!(hashes["report.html"], niwaki::checkpoint::sha256_hex(html.as_bytes()));
    // With the speed, when it is asked for.
    let recipe = made.dir.path().join("here/recipe.toml");
    let fast = made.dir.path().join("fast");
    succeeded(&compress(&source(), &fast, &["--speed", "--recipe", recipe.to_str().unwrap()]));
    let json: serde_json::Value = serde_json::from_slice(&fs::read(fast.join("report.json")).unwrap()).unwrap();
    assert!(json["speed"]["artefact"]["tokens_per_s"].as_f64().unwrap() > 0.0);
    assert!(fs::read_to_string(fast.join("report.html")).unwrap().contains("quality against measured speed"));
    assert_eq!(
        fs::read(fast.join("model.safetensors")).unwrap(),
        fs::read(artefact.join("model.safetensors")).unwrap()
    );
}
