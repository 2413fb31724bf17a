# One image for the API, the workers and training: the command says which.
#
#   docker build -t guided-sampling-server:cuda .
#   docker build -t guided-sampling-server:cpu --build-arg TORCH_INDEX=<index of PyTorch's CPU wheels> .
#
# Debian's own Python: the releases of constraints.txt are tested on it, and Debian mends it.

FROM debian:bookworm-slim AS build
# Packages in the order they change: PyTorch, then what else is needed, then this project.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt pyproject.toml ./
# Where torch comes from; empty: where all else comes from, which on x86-64 means its CUDA build.
ARG TORCH_INDEX=""
ENV PATH=/opt/guided/bin:$PATH PIP_CONSTRAINT=/src/constraints.txt PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv /opt/guided \
    && pip install pip \
    && pip install --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
# The dependencies of an empty project, so that a change of the code does not install them again.
RUN mkdir clients model_core server worker \
    && touch LICENSE README.md \
    && pip install '.[all]' \
    && pip uninstall -y guided-sampling-server
COPY LICENSE README.md ./
COPY clients clients
COPY model_core model_core
COPY server server
COPY worker worker
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM debian:bookworm-slim
LABEL org.opencontainers.image.title="guided-sampling-server" \
    org.opencontainers.image.description="Classifier-guided diffusion (ADM) as a sampling server" \
    org.opencontainers.image.licenses="MIT"
# g++ and Python's headers: workers compile their models, and training does if told to. curl: health checks.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates curl g++ python3-dev tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /data --shell /usr/sbin/nologin guided \
    && install -d -o guided -g guided /data /models
COPY --from=build /opt/guided /opt/guided
ENV PATH=/opt/guided/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    GUIDED_HOST=0.0.0.0 \
    GUIDED_PORT=8000 \
    GUIDED_DATA_DIR=/data \
    GUIDED_MODELS_DIR=/models
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps --no-index /wheels/*.whl
COPY --chown=guided:guided models /models
USER 10001:10001
WORKDIR /data
VOLUME ["/data", "/models"]
EXPOSE 8000
# Of the API, alone or in 'guided up'; docker-compose.yml has one for workers.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["curl", "-fsS", "-o", "/dev/null", "http://127.0.0.1:8000/healthz"]
# tini passes SIGTERM on and reaps what compilers and training leave; an end by SIGTERM (143) is a good one.
ENTRYPOINT ["tini", "-e", "143", "--", "guided"]
CMD ["up"]
