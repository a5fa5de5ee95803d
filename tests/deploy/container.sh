#!/usr/bin/env bash
# Builds the image from the unmodified Dockerfile, on stand-ins of the base images where no registry can be reached, and
# runs it: container.py says what is checked. Needs a Docker engine, and root for debootstrap. With cached dependencies
# the build takes a few minutes, without them about ten more; the checks take about five.
# The last line is `N passed, N failed, N skipped`.
set -uo pipefail
cd "$(dirname "$0")/../.."

skip() { echo "$1"; echo "0 passed, 0 failed, 1 skipped"; exit 0; }
docker info >/dev/null 2>&1 || skip "no Docker engine"
rust=$(sed -n 's/^FROM .*\(rust:[^ ]*\) AS .*/\1/p' Dockerfile | head -1)
if ! docker image inspect "$rust" >/dev/null 2>&1 && ! timeout 120 docker pull -q "$rust" 2>/dev/null; then
    command -v debootstrap >/dev/null || skip "no $rust, and no debootstrap to make a stand-in"
    tests/deploy/base_images.sh rust || skip "no $rust, and no stand-in could be made"
fi
for program in prometheus haproxy; do
    tests/deploy/base_images.sh "$program" || echo "its checks are skipped"
done

version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
docker build -q -t "niwaki:$version" --build-arg "VERSION=$version" --build-arg "REVISION=$revision" . || {
    docker build -t "niwaki:$version" . 2>&1 | tail -40
    echo "FAILED  docker build"
    echo "0 passed, 1 failed, 0 skipped"
    exit 1
}
docker image prune -f >/dev/null # the layers of the build before
exec "${PYTHON:-python3}" tests/deploy/container.py --image "niwaki:$version" "$@"
