#!/usr/bin/env bash
# Builds the image from the unmodified Dockerfile, on stand-ins of the base images where no registry can be reached, and
# runs it: container.py says what is checked. Needs a Docker engine, and root for debootstrap. On two cores the build takes
# several minutes, twice as many without the layer of dependencies, and at most $BUILD_SECONDS (1500); the checks take
# about four.
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
log=$(mktemp)
trap 'rm -f "$log"' EXIT
began=$SECONDS limit=${BUILD_SECONDS:-1500}
# build OPTION...: within what is left of the time; a machine on which it takes longer has shown nothing wrong.
build() {
    timeout "$((limit - SECONDS + began))" docker build "$@" . >"$log" 2>&1 && return
    local code=$?
    [ $code = 124 ] && skip "the image is not built within $limit s"
    tail -40 "$log"
    echo "FAILED  docker build"
    echo "0 passed, 1 failed, 0 skipped"
    exit 1
}
# The layer with the dependencies has a name, so that it outlives the clearing below.
build --target dependencies -t niwaki-test/dependencies
build -t "niwaki:$version" --build-arg "VERSION=$version" --build-arg "REVISION=$revision"
echo "        built in $((SECONDS - began)) s"
docker image prune -f >/dev/null # the layers of the build before
"${PYTHON:-python3}" tests/deploy/container.py --image "niwaki:$version" "$@"
