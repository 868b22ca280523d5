# One image for every role; the command line chooses which: docker run rollstream match CONFIG.
ARG PYTHON_IMAGE=python:3.11-slim
FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/rollstream
COPY constraints.txt ./
# torch first and alone: the layer stays while the code changes. TORCH_INDEX: the package index of its CPU or
# CUDA wheels, as torch's page of installation names it; empty: pip's own
ARG TORCH_INDEX=
RUN /opt/rollstream/bin/pip install -q -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY pyproject.toml README.md LICENSE ./
COPY broker_schemas broker_schemas
COPY configs configs
COPY producers producers
COPY consumers consumers
COPY learner learner
COPY rollstream rollstream
ARG EXTRAS=local
RUN /opt/rollstream/bin/pip install -q -c constraints.txt ".[${EXTRAS}]"

FROM ${PYTHON_IMAGE}
RUN useradd --create-home --uid 10001 rollstream \
 && mkdir -p /srv/rollstream/data /srv/rollstream/models /srv/rollstream/runs /srv/rollstream/hub \
 && chown -R rollstream:rollstream /srv/rollstream
COPY --from=build /opt/rollstream /opt/rollstream
ENV PATH=/opt/rollstream/bin:$PATH PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
WORKDIR /srv/rollstream
COPY --chown=rollstream:rollstream configs configs
USER rollstream
VOLUME ["/srv/rollstream/data", "/srv/rollstream/models", "/srv/rollstream/runs", "/srv/rollstream/hub"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["rollstream"]
CMD ["--help"]
