# The edge in an image: nginx with the web page, in front of the service. docs/edge.md explains its settings.
#   docker build --file deploy/container/edge.Dockerfile --tag caption-edge .
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm
FROM ${BASE_IMAGE}
# Debian's versions leave its mirrors when they are replaced: pinning them would break every later build.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends nginx-light tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*
WORKDIR /srv/edge
COPY requirements/constraints.txt requirements/web.txt requirements/
# Swagger UI's files; the package's own requirements are for another use of it.
RUN python -m venv --without-pip /opt/venv \
    && python -m pip --python /opt/venv/bin/python install --no-cache-dir --no-deps --requirement requirements/web.txt
COPY scripts/__init__.py scripts/edge.py scripts/
COPY deploy/nginx deploy/nginx
COPY samples samples
COPY web web
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    EDGE_LISTEN=0.0.0.0:8090
USER 10001:10001
EXPOSE 8090
HEALTHCHECK --interval=15s --timeout=5s --start-period=10s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8090/', timeout=4)"]
ENTRYPOINT ["tini", "--"]
CMD ["python", "-m", "scripts.edge"]
