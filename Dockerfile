# The daemon and the command line in one small image: the program, time zones and certificates of public authorities, and nothing else,
# no shell either. Non-root, and content with a read-only root and a volume.
#
#   docker build -t ttlsweep:0.2.0 .
#   docker run --read-only -p 127.0.0.1:8080:8080 -v ttlsweep:/var/lib/ttlsweep \
#     -v $PWD/ttlsweep.toml:/etc/ttlsweep/ttlsweep.toml:ro ttlsweep:0.2.0
#
# In a container only others ask, so the settings need `listen = "0.0.0.0:8080"` and credentials below [api].

FROM rust:1.94-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev tzdata ca-certificates && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
COPY src src
# Cargo.toml names the benches; they are not built here, but must exist.
COPY benches benches
# The C library goes into the program. With a target named, the flags are for that alone and not for what runs while it is compiled.
RUN target=$(rustc -vV | sed -n 's/^host: //p') \
    && RUSTFLAGS="-C target-feature=+crt-static" cargo build --profile dist --locked --bin ttlsweep --target "$target" \
    && mkdir -p /image/usr/local/bin /image/usr/share /image/etc/ssl/certs /home-of/ttlsweep \
    && cp "target/$target/dist/ttlsweep" /image/usr/local/bin/ \
    && cp -r /usr/share/zoneinfo /image/usr/share/ && rm -rf /image/usr/share/zoneinfo/right /image/usr/share/zoneinfo/posix \
    && cp /etc/ssl/certs/ca-certificates.crt /image/etc/ssl/certs/ \
    && echo 'ttlsweep:x:10001:10001::/var/lib/ttlsweep:/sbin/nologin' >/image/etc/passwd \
    && echo 'ttlsweep:x:10001:' >/image/etc/group

FROM scratch
LABEL org.opencontainers.image.title="ttlsweep" \
      org.opencontainers.image.description="Frees the memory of expired keys that Redis and Valkey still hold" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0"
COPY --from=build /image /
COPY --from=build --chown=10001:10001 /home-of /var/lib
ENV PATH=/usr/local/bin
USER 10001
WORKDIR /var/lib/ttlsweep
VOLUME /var/lib/ttlsweep
EXPOSE 8080
# Where the settings name another port, or TLS, TTLSWEEP_SERVER says so: https://127.0.0.1:8443
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["ttlsweep", "health"]
ENTRYPOINT ["ttlsweep"]
CMD ["serve", "--config", "/etc/ttlsweep/ttlsweep.toml"]
