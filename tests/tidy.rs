//! Holds the invariants of `src/ARCHITECTURE.md`.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Source files under `src/`, with paths relative to it and `/` as separator.
fn sources() -> Vec<(String, String)> {
    fn walk(dir: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, files);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    let src = root().join("src");
    let mut files = Vec::new();
    walk(&src, &mut files);
    files.sort();
    assert!(files.len() > 20, "only {} files were found", files.len());
    files
        .into_iter()
        .map(|path| {
            let name = path.strip_prefix(&src).unwrap().to_string_lossy().replace('\\', "/");
            (name, fs::read_to_string(&path).unwrap())
        })
        .collect()
}

/// Lines that are code, not comments, with their numbers.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines()
        .enumerate()
        .map(|(index, line)| (index + 1, line.split("//").next().unwrap_or_default()))
        .filter(|(_, line)| !line.trim().is_empty())
}

fn check(offences: &[String]) {
    assert!(offences.is_empty(), "{} offences:\n{}", offences.len(), offences.join("\n"));
}

/// Reports every line of code that contains one of `words` outside the files that `allowed` accepts.
fn only_in(words: &[&str], allowed: impl Fn(&str) -> bool) {
    let mut offences = Vec::new();
    for (name, text) in sources().iter().filter(|(name, _)| !allowed(name)) {
        for (number, line) in code(text) {
            if let Some(word) = words.iter().find(|word| line.contains(**word)) {
                offences.push(format!("src/{name}:{number}: `{word}` does not belong here"));
            }
        }
    }
    check(&offences);
}

#[test]
fn folders_import_only_what_the_table_allows() {
    let text = fs::read_to_string(root().join("src/ARCHITECTURE.md")).unwrap();
    let table: Vec<(String, Vec<String>, bool)> = text
        .lines()
        .filter(|line| line.starts_with("| `"))
        .map(|line| {
            let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
            let folder = cells[0].trim_matches('`').trim_end_matches('/').to_owned();
            let list = cells.last().unwrap();
            let names = list.split('`').skip(1).step_by(2).map(str::to_owned).collect();
            (folder, names, *list == "everything")
        })
        .collect();
    assert!(table.len() >= 12, "the table of folders was not found");
    let folders: Vec<&str> = table.iter().map(|(folder, ..)| folder.as_str()).collect();
    let mut offences = Vec::new();
    for (name, text) in sources() {
        let Some((folder, _)) = name.split_once('/') else { continue };
        let Some((_, allowed, everything)) = table.iter().find(|(known, ..)| known == folder) else {
            offences.push(format!("src/{folder}/ is not in the table"));
            continue;
        };
        // What follows is tests of the file itself; they may use any room.
        let text = text.split("\n#[cfg(test)]\n").next().unwrap_or_default();
        for (number, line) in code(text) {
            for imported in &folders {
                let used =
                    line.contains(&format!("crate::{imported}::")) || line.contains(&format!("crate::{imported};"));
                if used && *imported != folder && !everything && !allowed.iter().any(|name| name == imported) {
                    offences.push(format!("src/{name}:{number}: {folder}/ must not import {imported}/"));
                }
            }
        }
    }
    check(&offences);
}

#[test]
fn intrinsics_stay_in_their_folder() {
    only_in(&["core::arch", "std::arch", "target_feature", "asm!"], |name| name.starts_with("kernels/arch/"));
}

#[test]
fn candle_stays_out_of_the_serving_path() {
    only_in(&["candle_core", "candle_nn", "candle_transformers"], |name| {
        name.starts_with("exec/candle") || name.starts_with("compress/")
    });
}

#[test]
fn status_codes_have_one_place() {
    only_in(&["StatusCode"], |name| name == "server/error.rs" || name == "server/routes/ops.rs");
}

#[test]
fn metric_names_have_one_place() {
    only_in(&["\"niwaki_"], |name| name == "telemetry/metrics.rs");
}

#[test]
fn the_policy_and_the_score_read_no_clock() {
    only_in(&["Instant::now", "SystemTime"], |name| name != "engine/policy.rs" && !name.starts_with("model/"));
    only_in(&["tracing::"], |name| !name.starts_with("model/"));
}

#[test]
fn the_score_has_at_most_eight_verbs() {
    let text = fs::read_to_string(root().join("src/model/ops.rs")).unwrap();
    let body = text.split("pub trait Ops {").nth(1).and_then(|rest| rest.split("\n}\n").next()).unwrap();
    let verbs = code(body).filter(|(_, line)| line.trim_start().starts_with("fn ")).count();
    assert!((1..=8).contains(&verbs), "{verbs} verbs");
}

#[test]
fn unsafe_stays_where_it_is_explained() {
    let allowed = |name: &str| {
        name.starts_with("kernels/arch/")
            || [
                "kernels/threads.rs",
                "kernels/threads/helper.rs",
                "kernels/threads/parts.rs",
                "checkpoint/reader.rs",
                "exec/workspace.rs",
                "telemetry/allocator.rs",
            ]
            .contains(&name)
    };
    only_in(&["unsafe {", "unsafe fn", "unsafe impl", "unsafe trait"], allowed);
}

#[test]
fn files_stay_small() {
    let long: Vec<String> = sources()
        .iter()
        .map(|(name, text)| (name, text.lines().count()))
        .filter(|(_, n_lines)| *n_lines > 600)
        .map(|(name, n_lines)| format!("src/{name}: {n_lines} lines"))
        .collect();
    check(&long);
}

#[test]
fn binaries_do_not_depend_on_the_building_machine() {
    let mut offences = Vec::new();
    for file in ["Cargo.toml", ".cargo/config.toml", "Dockerfile", ".ci/run"] {
        if let Ok(text) = fs::read_to_string(root().join(file))
            && text.contains(concat!("target-cpu", "=native"))
        {
            offences.push(format!("{file} builds for the machine that it is built on"));
        }
    }
    check(&offences);
}

#[test]
fn the_top_level_holds_what_it_should() {
    let allowed = [
        "Cargo.toml",
        "Cargo.lock",
        "LICENSE",
        "Dockerfile",
        "README.md",
        "src",
        "models",
        "deploy",
        "tests",
        "target",
    ];
    let offences: Vec<String> = fs::read_dir(root())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with('.') && !allowed.contains(&name.as_str()))
        .map(|name| format!("{name} does not belong to the top level"))
        .collect();
    check(&offences);
}
