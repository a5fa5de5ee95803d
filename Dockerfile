# One static binary, its model inside, on an empty base: no shell, no package manager, nothing to patch but niwaki.
#
#   docker build -t niwaki .                                     for this machine's architecture
#   docker buildx build --platform linux/amd64,linux/arm64 .     for both, cross-compiled, nothing emulated
#   docker build --build-arg TARGETARCH=arm64 .                  one without BuildKit, which labels it as of its own architecture
#
# Builds with BuildKit and with the older builder, so it uses no mounts; what is cached is the stage of dependencies.
FROM --platform=${BUILDPLATFORM:-linux/amd64} rust:1.95-bookworm AS dependencies
WORKDIR /build
ARG TARGETARCH
# Rust's and Debian's names of the target; a compiler for it where it is not the building machine's own.
RUN set -eu; \
    case "${TARGETARCH:-$(uname -m)}" in \
        amd64 | x86_64) cpu=x86_64 debian=amd64 ;; \
        arm64 | aarch64) cpu=aarch64 debian=arm64 ;; \
        *) echo "no such architecture: ${TARGETARCH}" >&2; exit 1 ;; \
    esac; \
    echo "$cpu-unknown-linux-gnu" >/target; \
    if [ "$cpu" != "$(uname -m)" ]; then \
        apt-get -q update; \
        apt-get -q install -y --no-install-recommends \
            "gcc-$(echo "$cpu" | tr _ -)-linux-gnu" "libc6-dev-$debian-cross"; \
        rustup target add "$(cat /target)"; \
    fi
# A static C library, so that nothing is needed beside the binary. Names are still resolved: glibc has its DNS and file
# lookups inside. The linkers count only for the target that they are named after.
ENV RUSTFLAGS="-C target-feature=+crt-static" \
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
    CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_LINKER=x86_64-linux-gnu-gcc

# Without a line of ours: this layer is built again only when these two files change.
COPY Cargo.toml Cargo.lock ./
RUN mkdir src && echo 'fn main() {}' >src/main.rs && touch src/lib.rs && \
    cargo build --locked --profile dist --target "$(cat /target)" && \
    rm -rf src "target/$(cat /target)/dist/niwaki" target/*/dist/.fingerprint/niwaki-*

FROM dependencies AS build
COPY src src
COPY models models
# Beside the binary: a place for downloaded models that a volume can take the owner from.
RUN cargo build --locked --profile dist --target "$(cat /target)" && \
    mkdir -p /image/data && cp "target/$(cat /target)/dist/niwaki" /image/niwaki

FROM scratch
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
LABEL org.opencontainers.image.title="niwaki" \
    org.opencontainers.image.description="Compressed Transformer inference over HTTP on ordinary CPUs" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="$VERSION" \
    org.opencontainers.image.revision="$REVISION" \
    org.opencontainers.image.created="$CREATED"
# For downloads with --model-id. Mount another file here to trust other authorities.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build --chown=65532:65532 /image/data/ /data/
COPY LICENSE /LICENSE
COPY --from=build /image/niwaki /niwaki
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    HUGGINGFACE_HUB_CACHE=/data
USER 65532:65532
EXPOSE 3000
STOPSIGNAL SIGTERM
# It sees the environment and not the flags of the server: a port or TLS is set by PORT, TLS_CERT and TLS_KEY.
HEALTHCHECK --interval=5s --timeout=6s --start-period=60s --retries=3 CMD ["/niwaki", "health"]
ENTRYPOINT ["/niwaki"]
CMD ["serve"]
