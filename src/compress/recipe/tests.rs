use super::*;
use crate::compress::passes::{PruneStructured, Quantize};
use crate::model::{Activation, ArchitectureSpec, Family, LayerConfig, Pooling, Positions};

fn architecture() -> Architecture {
    let layer = LayerConfig { n_heads: 4, d_head: 8, d_ffn: 128, band: crate::model::Band::FULL };
    Architecture::new(ArchitectureSpec {
        ranges: Vec::new(),
        family: Family::Bert,
        vocab_size: 50,
        n_token_types: 2,
        positions: Positions { table_len: 16, offset: 0, tiled: false },
        d_model: 32,
        norm_eps: 1e-12,
        activation: Activation::Gelu,
        layers: vec![layer; 2],
        pooling: Pooling::Mean,
        normalize: true,
        max_input_tokens: 16,
        head: None,
    })
    .unwrap()
}

fn parse(text: &str) -> Result<Recipe, CompressError> {
    Recipe::parse(text, Path::new("r.toml"))
}

/// The message of a recipe that is refused, by its text or for the architecture above.
fn refusal(text: &str) -> String {
    let result = parse(text).and_then(|recipe| recipe.check(&architecture()));
    result.expect_err(text).to_string()
}

#[test]
fn every_mistake_names_its_line() {
    let quantize = "[[pass]]\nkind = \"quantize\"\n";
    for (text, line, words) in [
        ("seed = \n", 1, "value"),
        ("\nseed = -1\n", 2, "u64"),
        ("seed = 0\nsed = 1\n", 2, "sed"),
        ("[calibration]\ntexts = \"x\"\ntoken = 5\n", 3, "token"),
        ("[[pass]]\nbits = 8\n", 1, "kind"),
        ("# a\n\n[[pass]]\nkind = \"quantise\"\n", 4, "quantise"),
        ("[[pass]]\nkind = 3\n", 2, "kind"),
        ("pass = 3\n", 1, "[[pass]]"),
        ("[[pass]]\nkind = \"quantize\"\nbit = 8\n", 3, "bit"),
        ("[[pass]]\nkind = \"quantize\"\ngroup = \"fnn\"\n", 3, "fnn"),
        ("[[pass]]\nkind = \"quantize\"\nbits = 300\n", 3, "300"),
        ("[[pass]]\nkind = \"quantize\"\nbits = 9\n", 3, "9"),
        (&format!("{quantize}\n[[pass]]\nkind = \"prune-structured\"\n\nheads = 0.95\n"), 7, "0.95"),
        (&format!("{quantize}\n[[pass]]\nkind = \"prune-structured\"\nffn = nan\n"), 6, "NaN"),
        ("[[pass]]\nkind = \"prune-structured\"\nshare = 0.95\n", 3, "0.95"),
        ("[[pass]]\nkind = \"prune-structured\"\nshare = 0.1\nffn = 0.2\n", 3, "either"),
        ("[[pass]]\nkind = \"prune-structured\"\nof = \"bytes\"\nshare = 0.8\n", 4, "cannot be met"),
        ("[[pass]]\nkind = \"prune-structured\"\nshare = 0.1\nof = \"time\"\n", 4, "time"),
        ("[[pass]]\nkind = \"reconstruct\"\nridge = -1.0\n", 3, "-1"),
        ("[[pass]]\nkind = \"reconstruct\"\nmatrices = \"some\"\n", 3, "some"),
        (&format!("{quantize}[[pass]]\nkind = \"reconstruct\"\n"), 3, "before"),
        ("[[pass]]\nkind = \"reconstruct\"\n", 1, "--calibration"),
        (
            "[[pass]]\nkind = \"smooth\"\n[[pass]]\nkind = \"reconstruct\"\nmatrices = \"all\"\n",
            5,
            "undoes what `smooth`",
        ),
        ("[[pass]]\nkind = \"correct-bias\"\n", 1, "after"),
        ("[[pass]]\nkind = \"quantize\"\nbits = 8\nformat = \"nf4\"\n", 3, "linear"),
        ("[[pass]]\nkind = \"quantize\"\nbits = 4\nper = \"group\"\ngroup_size = 4\n", 5, "4 is not"),
        (&format!("{quantize}weighting = \"inputs\"\n"), 3, "mse"),
        (&format!("{quantize}bits = 4\nsymmetric = false\nweighting = \"inputs\"\n"), 5, "without weights"),
        (&format!("{quantize}bits = 4\ngroup = \"ffn\"\nweighting = \"fisher\"\n"), 5, "k-means"),
        (&format!("{quantize}bits = 4\nformat = \"nf4\"\ntable_reach = 32\n"), 5, "kmeans"),
        (&format!("{quantize}percentile = 0.99\n"), 3, "range = \"percentile\""),
        (&format!("{quantize}group_size = 32\n"), 3, "per = \"group\""),
        (&format!("{quantize}sweeps = 2\n"), 3, "gptq"),
        (&format!("{quantize}ridge = 0.1\n"), 3, "weighting"),
        (&format!("{quantize}compensate = \"gptq\"\nrefit_ridge = 0.1\n"), 4, "refit = true"),
        (&format!("{quantize}group = \"embedding\"\ncompensate = \"gptq\"\nrefit = true\n"), 5, "have none"),
        (&format!("{quantize}[[pass]]\nkind = \"activations\"\npercentile = 0.99\n"), 5, "range = \"percentile\""),
        ("[[pass]]\nkind = \"prune-structured\"\nheads = 0.1\nof = \"bytes\"\n", 4, "not given"),
        ("[[pass]]\nkind = \"prune-structured\"\n", 1, "removes nothing"),
        ("[[pass]]\nkind = \"mixed-precision\"\nloss = 0.1\nmegabytes = 3\n", 3, "one budget"),
        ("[[pass]]\nkind = \"mixed-precision\"\n\nmegabytes = 0.001\n", 4, "cannot be met"),
    ] {
        let message = refusal(text);
        assert!(message.starts_with(&format!("r.toml:{line}: ")), "{text:?}: {message}");
        assert!(message.contains(words) && !message.contains('\n'), "{text:?}: {message}");
    }
}

#[test]
fn what_flags_set_is_named_by_the_flag() {
    let mut recipe = Recipe::new(0);
    let pass = PruneStructured { heads: 0.9, ..PruneStructured::default() };
    recipe.push(pass, &[("heads", "--prune-heads")]);
    let message = recipe.check(&architecture()).unwrap_err().to_string();
    assert!(message.starts_with("--prune-heads: 0.9 "), "{message}");
}

#[test]
fn a_recipe_written_out_is_the_same_recipe() {
    let mut recipe = Recipe::new(7);
    recipe.calibration.texts = Some("somewhere/texts".into());
    recipe.push(PruneStructured { heads: 0.25, ..PruneStructured::default() }, &[]);
    recipe.push(Quantize::default(), &[]);
    let text = recipe.to_toml();
    assert!(!text.contains("somewhere"), "{text}");
    let read = parse(&text).unwrap();
    assert_eq!((read.seed, read.calibration.tokens), (7, 30_000));
    let passes = |recipe: &Recipe| recipe.steps.iter().map(|step| step.pass.clone()).collect::<Vec<_>>();
    assert_eq!(passes(&read), passes(&recipe));
    assert_eq!(read.to_toml(), text);
    assert!(parse("").unwrap().steps.is_empty(), "an empty recipe is plain INT8");
}

#[test]
fn texts_stand_relative_to_the_recipe() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r.toml");
    std::fs::write(&path, "[calibration]\ntexts = \"t.txt\"\n").unwrap();
    assert_eq!(Recipe::read(&path).unwrap().calibration.texts, Some(dir.path().join("t.txt")));
    std::fs::write(&path, b"name = \"\xff\"\n").unwrap();
    assert!(Recipe::read(&path).unwrap_err().to_string().ends_with("r.toml:1: is not UTF-8 text"));
    assert!(Recipe::read(&dir.path().join("none.toml")).unwrap_err().to_string().contains("none.toml"));
}

#[test]
fn passes_are_checked_on_what_earlier_ones_leave() {
    let pass = |kind: &str, fields: &str| format!("[[pass]]\nkind = \"{kind}\"\n{fields}\n");
    let with_text = |passes: &[String]| format!("[calibration]\ntexts = \"t\"\n{}", passes.concat());
    // 4 bits of all words are more than this; of those that stay they are not.
    let (words, mixed) = (pass("vocabulary", "keep = 10"), pass("mixed-precision", "megabytes = 0.002"));
    assert!(refusal(&with_text(std::slice::from_ref(&mixed))).contains("cannot be met"));
    parse(&with_text(&[words.clone(), mixed])).unwrap().check(&architecture()).unwrap();
    assert!(refusal(&with_text(&[words, pass("vocabulary", "keep = 12")])).contains("12 is not below the 10"));

    let last = pass("attention", "pattern = \"window=4\"\nlayers = [1]");
    parse(&last).unwrap().check(&architecture()).unwrap();
    for dropped in ["layers = [0]", "count = 1"] {
        let message = refusal(&with_text(&[pass("drop-layers", dropped), last.clone()]));
        assert!(message.starts_with("r.toml:9: attention: layers: there is no layer 1"), "{message}");
    }
    let twice = [pass("drop-layers", "layers = [0]"), pass("drop-layers", "layers = [0]")];
    assert!(refusal(&with_text(&twice)).contains("one must stay"));
}
