# A small image with the program, which is daemon and command line, time zones and the certificates of public authorities. There is no
# shell. It runs as non-root, with a read-only root file system and a volume.
#
#   docker build -t ttlsweep:0.2.0 .
#   docker run --read-only -p 127.0.0.1:8080:8080 -v ttlsweep:/var/lib/ttlsweep \
#     -v $PWD/ttlsweep.toml:/etc/ttlsweep/ttlsweep.toml:ro ttlsweep:0.2.0
#
# All requests to a container come from outside, so the settings need `listen = "0.0.0.0:8080"` and credentials below [api].

FROM rust:1.94-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev tzdata ca-certificates && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
COPY src src
# The benches are not built here, but Cargo.toml names them, so the files must exist.
COPY benches benches
# The program is linked statically. With --target the flags do not apply to build scripts and procedural macros.
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
# If the settings have another port, or TLS, set TTLSWEEP_SERVER, such as https://127.0.0.1:8443
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["ttlsweep", "health"]
ENTRYPOINT ["ttlsweep"]
CMD ["serve", "--config", "/etc/ttlsweep/ttlsweep.toml"]
