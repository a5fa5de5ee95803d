//! Running `niwaki compress` and `niwaki serve` through the binary.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The tiny sentence encoder that the golden files belong to.
pub(crate) fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bert")
}

pub(crate) fn niwaki() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_niwaki"));
    command.env_remove("MODEL").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// `niwaki compress --model MODEL --out OUT ARGS…`
pub(crate) fn compress(model: &Path, out: &Path, args: &[&str]) -> Output {
    niwaki().arg("compress").arg("--model").arg(model).arg("--out").arg(out).args(args).output().unwrap()
}

/// What a run said that must have succeeded.
pub(crate) fn succeeded(output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Calibration text of `n` lines, and the recipe beside it.
pub(crate) fn write_recipe(dir: &Path, recipe: &str, n: usize) -> String {
    fs::create_dir_all(dir).unwrap();
    let golden = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/texts.txt")).unwrap();
    let lines: Vec<&str> = golden.lines().filter(|line| !line.trim().is_empty()).collect();
    let texts: String = (0..n).map(|i| format!("{} {i}\n", lines[i % lines.len()])).collect();
    fs::write(dir.join("texts.txt"), texts).unwrap();
    let path = dir.join("recipe.toml");
    fs::write(&path, recipe).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Every file below `dir` with its bytes.
pub(crate) fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    fn walk(root: &Path, dir: &Path, files: &mut BTreeMap<String, Vec<u8>>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(root, &path, files);
            } else {
                files.insert(path.strip_prefix(root).unwrap().display().to_string(), fs::read(&path).unwrap());
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(dir, dir, &mut found);
    found
}

/// Names in a directory.
pub(crate) fn entries(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().display().to_string()).collect();
    names.sort();
    names
}

/// Starts `niwaki serve`, which answers only after its golden self-check has passed, and asks it for its health.
pub(crate) fn serves(artefact: &Path) {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let mut server = niwaki()
        .args(["serve", "--hostname", "127.0.0.1", "--port", &port, "--model"])
        .arg(artefact)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    let healthy = loop {
        if niwaki().args(["health", "--port", &port]).output().unwrap().status.success() {
            break true;
        }
        if server.try_wait().unwrap().is_some() || Instant::now() > deadline {
            break false;
        }
        std::thread::sleep(Duration::from_millis(30));
    };
    drop(server.kill());
    server.wait().unwrap();
    assert!(healthy, "{} is not served", artefact.display());
}
