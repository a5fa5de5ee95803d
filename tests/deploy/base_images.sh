#!/usr/bin/env bash
# Makes local stand-ins for the base images that `Dockerfile` and `deploy/docker-compose.yml` name, for machines that
# reach no image registry, so that the unmodified files are what is built and run.
#
#   base_images.sh            the Rust image of the Dockerfile: Debian by debootstrap, this machine's own Rust toolchain,
#                             and what its cargo has already downloaded
#   base_images.sh rust-cross the same image with Debian's own toolchain, which has the library of arm64 too, for machines
#                             whose rustup reaches no server either; its version is Debian's
#   base_images.sh prometheus haproxy ...   images around single programs of this machine, under the tags given below
#
# An image that is there already (pulled, or made by an earlier run) is left alone. A machine that has a registry does
# not need this script.
set -euo pipefail
cd "$(dirname "$0")/../.."

work=$(mktemp -d)
trap 'rm -rf --one-file-system "$work"' EXIT

# What a Dockerfile's or a compose file's text says, so that a tag stands in one place only.
rust_tag() { sed -n 's/^FROM .*\(rust:[^ ]*\) AS .*/\1/p' Dockerfile | head -1; }
compose_tag() { sed -n "s|^ *image: *\(.*/$1:[^ ]*\)$|\1|p" deploy/docker-compose.yml | head -1; }

present() { docker image inspect "$1" >/dev/null 2>&1; }

# rust_image TAG: Debian with a C compiler, and the toolchain where the official image has it (/usr/local/{rustup,cargo}).
rust_image() {
    local tag=$1 root=$work/root sysroot version suite=${1##*-}
    version=${tag#*:} version=${version%%-*}
    sysroot=$(rustc "+$version" --print sysroot 2>/dev/null || rustc --print sysroot)
    case "$("$sysroot/bin/rustc" --version)" in
        "rustc $version."* | "rustc $version "*) ;;
        *) echo "the Dockerfile wants Rust $version, this machine has $("$sysroot/bin/rustc" --version)" >&2; return 1 ;;
    esac
    debootstrap --variant=minbase --include=gcc,libc6-dev,ca-certificates "$suite" "$root" >"$work/log" 2>&1 ||
        { tail -20 "$work/log" >&2; return 1; }
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale}
    mkdir -p "$root/usr/local/rustup/toolchain" "$root/usr/local/cargo/registry"
    tar -C "$sysroot" --exclude=share --exclude='bin/*clippy*' --exclude='bin/rustfmt' --exclude='bin/rust-gdb*' \
        -cf - bin lib | tar -C "$root/usr/local/rustup/toolchain" -xf -
    # Crates that are here need not be fetched again.
    for part in cache index; do
        [ -d "${CARGO_HOME:-$HOME/.cargo}/registry/$part" ] &&
            cp -a "${CARGO_HOME:-$HOME/.cargo}/registry/$part" "$root/usr/local/cargo/registry/"
    done
    # Whom this machine trusts, the image trusts.
    [ -e /etc/ssl/certs/ca-certificates.crt ] && cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
    tar -C "$root" -cf - . | docker import --change 'ENV RUSTUP_HOME=/usr/local/rustup CARGO_HOME=/usr/local/cargo' \
        --change 'ENV PATH=/usr/local/rustup/toolchain/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
        --change 'CMD ["bash"]' - "$tag" >/dev/null
}

# cross_image TAG: Debian with its Rust compiler (the one that its browsers are built with), arm64's library, and a `rustup`
# that can only say whether a target is there.
cross_image() {
    local tag=$1 root=$work/cross suite=${1##*-}
    debootstrap --variant=minbase --include=ca-certificates "$suite" "$root" >"$work/log" 2>&1 || { tail -20 "$work/log" >&2; return 1; }
    printf 'deb http://deb.debian.org/%s main\n' "debian $suite" "debian $suite-updates" "debian-security $suite-security" \
        >"$root/etc/apt/sources.list"
    cp -L /etc/resolv.conf "$root/etc/resolv.conf"
    chroot "$root" sh -ec 'dpkg --add-architecture arm64; apt-get -q update
        DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends gcc libc6-dev gcc-aarch64-linux-gnu \
            libc6-dev-arm64-cross rustc-web cargo-web libstd-rust-web-dev:arm64
        apt-get clean; rm -rf /var/lib/apt/lists/* /usr/share/doc /usr/share/man' >"$work/log" 2>&1 || { tail -20 "$work/log" >&2; return 1; }
    cat >"$root/usr/local/bin/rustup" <<'END'
#!/bin/sh
[ "$1 $2" = "target add" ] && [ -d "/usr/lib/rustlib/$3" ] || { echo "rustup: only targets that are there: $*" >&2; exit 1; }
END
    chmod +x "$root/usr/local/bin/rustup"
    mkdir -p "$root/usr/local/cargo/registry"
    for part in cache index; do
        [ -d "${CARGO_HOME:-$HOME/.cargo}/registry/$part" ] &&
            cp -a "${CARGO_HOME:-$HOME/.cargo}/registry/$part" "$root/usr/local/cargo/registry/"
    done
    [ -e /etc/ssl/certs/ca-certificates.crt ] && cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
    tar -C "$root" -cf - . | docker import --change 'ENV CARGO_HOME=/usr/local/cargo' --change 'CMD ["bash"]' - "$tag" >/dev/null
}

# program_image TAG PROGRAM TARGET CHANGE...: PROGRAM with the libraries it needs, as TARGET in an otherwise bare root.
program_image() {
    local tag=$1 program target=$3 root=$work/${2##*/}
    program=$(command -v "$2") || { echo "no $2 on this machine" >&2; return 1; }
    shift 3
    mkdir -p "$root"/{etc,tmp,var/lib} "$root$(dirname "$target")"
    cp -L "$program" "$root$target"
    # "libz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x...)", and the loader without an arrow
    ldd "$program" 2>/dev/null | grep -oE '/[^ ]+' | sort -u | while read -r library; do
        mkdir -p "$root$(dirname "$library")"
        cp -L "$library" "$root$library"
    done
    echo 'nobody:x:65534:65534:nobody:/:/none' >"$root/etc/passwd"
    chmod 1777 "$root/tmp"
    extra_files "${program##*/}" "$root"
    local changes=() change
    for change in "$@"; do changes+=(--change "$change"); done
    tar -C "$root" -cf - . | docker import "${changes[@]}" - "$tag" >/dev/null
}

# What the official images have beside the program.
extra_files() {
    case $1 in
        prometheus)
            mkdir -p "$2/prometheus" "$2/etc/prometheus" "$2/usr/share/prometheus/web"
            chown 65534:65534 "$2/prometheus"
            # Debian keeps the pages of the web interface beside the program.
            [ -d /usr/share/prometheus/web ] && cp -a /usr/share/prometheus/web/. "$2/usr/share/prometheus/web/"
            ;;
    esac
}

[ $# -gt 0 ] || set -- rust
for image in "$@"; do
    case $image in
        rust | rust-cross) tag=$(rust_tag) ;;
        prometheus) tag=$(compose_tag prometheus) ;;
        haproxy) tag=niwaki-test/haproxy ;;
        *) echo "no stand-in for $image" >&2; exit 1 ;;
    esac
    [ -n "$tag" ] || { echo "no tag for $image" >&2; exit 1; }
    if present "$tag"; then echo "$tag is there"; continue; fi
    case $image in
        rust) rust_image "$tag" ;;
        rust-cross) cross_image "$tag" ;;
        prometheus)
            program_image "$tag" prometheus /bin/prometheus 'USER 65534' 'WORKDIR /prometheus' 'EXPOSE 9090' \
                'ENTRYPOINT ["/bin/prometheus"]' \
                'CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]' ;;
        haproxy) program_image "$tag" haproxy /bin/haproxy 'USER 65534' 'ENTRYPOINT ["/bin/haproxy"]' ;;
    esac
    echo "made $tag"
done
