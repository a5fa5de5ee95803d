#!/usr/bin/env bash
# Runs the fuzz targets, each for SECONDS: run.sh [SECONDS] [TARGET...]. Findings go to target/fuzz/findings, and belong into
# tests/fuzz/corpus once they are mended: tests/corpus.rs replays what is there.
#
# Needs `cargo install cargo-fuzz` and a C++ compiler. A stable compiler will do; it is told that it may instrument.
set -euo pipefail
cd "$(dirname "$0")/../.."
seconds=${1:-600}
shift || true
targets=("${@:-}")
[ -n "${targets[0]}" ] || targets=(artefacts requests texts traces)
cp Cargo.lock tests/fuzz/Cargo.lock # the versions that the project has; what is missing is added
export RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR="$PWD/target/fuzz/build" LSAN_OPTIONS=detect_leaks=0
passed=0 failed=0
for target in "${targets[@]}"; do
    findings=$PWD/target/fuzz/findings/$target found=$PWD/target/fuzz/corpus/$target
    mkdir -p "$findings" "$found"
    # What it learns goes into the first folder of inputs, the seeds stay as they are.
    if cargo fuzz run --fuzz-dir tests/fuzz "$target" "$found" "tests/fuzz/corpus/$target" -- \
        -max_total_time="$seconds" -timeout=20 -rss_limit_mb=3000 -max_len=4096 -artifact_prefix="$findings/"; then
        passed=$((passed + 1)) && echo "ok      $target: $seconds s, no finding"
    else
        failed=$((failed + 1)) && echo "FAILED  $target: see $findings"
    fi
done
echo "$passed passed, $failed failed, 0 skipped"
((failed == 0))
