# The service in an image: TorchServe, the handler and a packed model. docs/deploy/docker.md explains its arguments.
#
# A tag can move. Where images must be reproducible to the byte, give the digest that your registry shows for the tag:
#   --build-arg BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm@sha256:…
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm

# Java for TorchServe's frontend, without what a desktop, a debugger or a compiler would need: 54 MB instead of the 270 of
# Debian's package with all that it depends on.
FROM ${BASE_IMAGE} AS java
RUN apt-get update \
    && apt-get install -y --no-install-recommends openjdk-17-jdk-headless \
    && jlink --add-modules java.se,jdk.crypto.ec,jdk.management,jdk.unsupported,jdk.zipfs --output /opt/java \
      --compress=2 --strip-java-debug-attributes --no-header-files --no-man-pages \
    && /opt/java/bin/java -Xshare:dump

# What everything else stands on. Without an init as process 1 the JVM's orphans are never reaped and SIGTERM is ignored
# until the runtime kills the container.
FROM ${BASE_IMAGE} AS runtime
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*

# The Python packages, in a virtual environment that is copied as a whole. Built again only when requirements/ changes.
FROM runtime AS packages
# Where torch comes from; empty is PyPI, whose torch brings CUDA. requirements/serve.txt has the version.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
WORKDIR /build
COPY requirements/constraints.txt requirements/serve.lock requirements/serve.txt requirements/
# Everything is compared with its hash but torch and torchvision, of which each index has files of its own.
# torchvision comes from PyPI in either case, as scripts/setup does it: it is needed for its model definition alone.
# hadolint ignore=DL3003,SC2046
RUN set -eu; \
    python -m venv --without-pip /opt/venv; \
    pip="python -m pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check"; \
    $pip --no-deps --require-hashes --requirement requirements/serve.lock; \
    if [ -n "$TORCH_INDEX_URL" ]; then \
      $pip --index-url "$TORCH_INDEX_URL" $(grep -E '^torch(vision)?==' requirements/serve.txt); \
    fi; \
    $pip --requirement requirements/serve.txt; \
    # C++ headers, test programs and the packages' own tests: nothing that answers a request.
    cd /opt/venv/lib/python3.*/site-packages; \
    rm -rf torch/include torch/test torch/share torch/bin/*test* torch/bin/protoc* torchgen/packaged; \
    find . -type d \( -name tests -o -name test \) -not -path './torch/*' -prune -exec rm -rf {} +; \
    find . -name '*.a' -delete

# The model archive. A new checkpoint changes this layer and no other; the same input gives the same bytes.
FROM packages AS model
# A checkpoint's directory, in this checkout.
ARG CHECKPOINT=weights/en
ENV PATH=/opt/venv/bin:$PATH
COPY handler handler
COPY scripts/__init__.py scripts/package_mar.py scripts/export.py scripts/
COPY deploy/torchserve/model-config.yaml deploy/torchserve/sitecustomize.py deploy/torchserve/
# A checkpoint may name files outside of its directory, such as the encoder that several share.
COPY weights weights
RUN python -m scripts.package_mar --checkpoint "$CHECKPOINT"

FROM runtime
ARG VERSION=1.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="caption-server" \
      org.opencontainers.image.description="Captions for photos: ResNet50 and LSTM with beam search, served by TorchServe" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="docker.io/library/python:3.11-slim-bookworm"
WORKDIR /srv/caption
COPY --from=java /opt/java /opt/java
COPY --from=packages /opt/venv /opt/venv
COPY deploy/container/serve /usr/local/bin/serve
COPY config.properties ./
COPY deploy/torchserve deploy/torchserve
COPY handler/__init__.py handler/machine.py handler/
COPY scripts/__init__.py scripts/authorization.py scripts/class_archive.py scripts/models.py scripts/probe.py scripts/server.py \
     scripts/serving.py scripts/
COPY --from=model /build/model_store model_store
# One start of the service, whose classes Java keeps for the next: those are half a second faster.
RUN PATH=/opt/venv/bin:/opt/java/bin:$PATH python -m scripts.class_archive
# The inference port is the image's purpose; management and metrics stay on the container's loopback unless a deployment
# opens them. Tokens are on, since whoever runs the image with a published port opens it to the network: see
# docs/deploy/docker.md for the keys. A key lives as long as its container (the number is ten years, in minutes).
# hadolint ignore=DL3064
ENV PATH=/opt/venv/bin:/opt/java/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    CAPTION_KEY_FILE=/tmp/key_file.json \
    TS_INFERENCE_ADDRESS=http://0.0.0.0:8080 \
    TS_DISABLE_TOKEN_AUTHORIZATION=false \
    TS_TOKEN_EXPIRATION_MIN=5256000
# A number, so that Kubernetes can check `runAsNonRoot` without looking into the image.
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
# Healthy means ready: every worker has loaded the model. TorchServe's own /ping says so long before.
HEALTHCHECK --interval=15s --timeout=10s --start-period=180s --retries=3 CMD ["python", "-m", "scripts.probe"]
ENTRYPOINT ["tini", "--"]
CMD ["serve"]
