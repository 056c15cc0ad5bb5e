# One static binary on nothing: no shell, no libc, no packages to update.
#
# Each platform is built on itself (`docker buildx build --platform linux/amd64,linux/arm64 .`), natively or emulated:
# a cross toolchain would be one more thing that differs between the platforms.

# Not older than rust-version in Cargo.toml. The variant brings gcc and the static libc, so nothing is installed here.
FROM rust:1.95-slim-bookworm AS build
WORKDIR /build
COPY . .
# --target also where it is the host: without it the flags would apply to build scripts and proc macros too, and a
# proc macro cannot be linked statically. TARGETARCH comes from the builder; without BuildKit, the machine says it.
ARG TARGETARCH
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    case "${TARGETARCH:-$(uname -m)}" in \
        amd64|x86_64) target=x86_64-unknown-linux-gnu ;; \
        arm64|aarch64) target=aarch64-unknown-linux-gnu ;; \
        *) echo "no build is known for ${TARGETARCH:-$(uname -m)}" >&2; exit 1 ;; \
    esac \
    && RUSTFLAGS="-C target-feature=+crt-static" cargo build --release --locked --bin tidegate --target "$target" \
    && mv "target/$target/release/tidegate" /tidegate

FROM scratch
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="tidegate" \
      org.opencontainers.image.description="A reverse-proxy sidecar for WebSocket backends that never ends a connection abortively" \
      org.opencontainers.image.licenses="Apache-2.0 OR MIT" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
COPY --from=build /build/LICENSE-APACHE /build/LICENSE-MIT /licenses/
# The defaults, said: mount your own directory over this one.
COPY --from=build /build/proxy.toml /etc/tidegate/proxy.toml
COPY --from=build /tidegate /tidegate
# A number, because there is no /etc/passwd, and because runAsNonRoot can only judge numbers.
USER 65532:65532
# Clients; the admin listener, which is on loopback until admin.address says otherwise.
EXPOSE 8080 9090
# The exec form: tidegate is process 1 and gets the SIGTERM that begins the drain.
ENTRYPOINT ["/tidegate"]
CMD ["run"]
