# The daemon and the command line in one small image: non-root, and content with a read-only root and a volume.
#
#   docker build -t ttlsweep:0.1.0 .
#   docker run --read-only -p 127.0.0.1:8080:8080 -v ttlsweep:/var/lib/ttlsweep \
#     -v $PWD/ttlsweep.toml:/etc/ttlsweep/ttlsweep.toml:ro ttlsweep:0.1.0
#
# In a container only others ask, so the settings need `listen = "0.0.0.0:8080"` and credentials below [api].

FROM rust:1.94-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
COPY src src
# Cargo.toml names the benches; they are not built here, but must exist.
COPY benches benches
RUN cargo build --release --locked --bin ttlsweep

FROM debian:bookworm-slim
LABEL org.opencontainers.image.title="ttlsweep" \
      org.opencontainers.image.description="Frees the memory of expired keys that Redis and Valkey still hold" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0"
# Time zones for windows and cron; certificates of public authorities for TLS to servers.
RUN apt-get update && apt-get install -y --no-install-recommends tzdata ca-certificates && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /var/lib/ttlsweep --create-home ttlsweep
COPY --from=build /src/target/release/ttlsweep /usr/local/bin/ttlsweep
USER 10001
WORKDIR /var/lib/ttlsweep
VOLUME /var/lib/ttlsweep
EXPOSE 8080
ENTRYPOINT ["ttlsweep"]
CMD ["serve", "--config", "/etc/ttlsweep/ttlsweep.toml"]
