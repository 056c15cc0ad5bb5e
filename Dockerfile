# One static binary on nothing: no shell, no libc, no packages to update.
#
#   docker build -t tidegate:0.1.0 .
#   docker build -t tidegate-demo-backend:0.1.0 --target demo-backend .   the backend of k8s/overlays
#   .ci/image                                                             both without a daemon, and tried out
#
# Each platform is built on itself (`docker buildx build --platform linux/amd64,linux/arm64 .`), natively or emulated:
# a cross toolchain would be one more thing that differs between the platforms.
#
# tidegate is built for what it does most, as counted while a load went through a first build of it (.ci/static): no two countings are
# the same. --build-arg TIDEGATE_PROFILE=none does without, in a third of the time.
#
# To get the same bytes again: the same commit, the Rust image by its digest (docker buildx build --build-context
# rust:1.95-slim-bookworm=docker-image://rust@sha256:...), the counts of the build that is repeated (docker build --target profile
# --output . with it, one platform at a time, then --build-arg TIDEGATE_PROFILE=tidegate.profdata), and the time of the commit for that of the files
# (SOURCE_DATE_EPOCH=$(git log -1 --format=%ct), --output type=oci,rewrite-timestamp=true,dest=tidegate.tar; buildah has
# --timestamp). Crates are pinned by Cargo.lock, and the binaries have no time or name of the machine in them.

# Not older than rust-version in Cargo.toml. The variant brings gcc and the static libc, so nothing is installed here.
FROM rust:1.95-slim-bookworm AS build
WORKDIR /build
COPY . .
ARG TARGETARCH
ARG TIDEGATE_PROFILE
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked .ci/static tidegate /tidegate

# Not needed, and so not built, for tidegate alone.
FROM build AS build-demo-backend
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked .ci/static demo-backend /demo-backend

FROM scratch AS demo-backend
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="tidegate-demo-backend" \
      org.opencontainers.image.description="A WebSocket backend that echoes, to try tidegate with" \
      org.opencontainers.image.licenses="Apache-2.0 OR MIT" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
COPY --from=build /build/LICENSE-APACHE /build/LICENSE-MIT /licenses/
COPY --from=build-demo-backend /demo-backend /demo-backend
USER 65532:65532
# It listens on loopback until --listen says otherwise, so there is no port to name.
ENTRYPOINT ["/demo-backend"]

# What was counted for tidegate, to build the same once more.
FROM scratch AS profile
COPY --from=build /tidegate.profdata /

# Last, so that it is what is built when no target is named.
FROM scratch AS tidegate
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
