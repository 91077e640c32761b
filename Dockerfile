# Pellucid's image: operator, node and canary. Debian with Python 3.11 or later and nft, and a virtual environment; nothing of it needs a shell.
#   docker build -t pellucid .
#   buildah bud --build-arg BASE_IMAGE=… --build-arg BUILD_IMAGE=… .     bases that have the packages: no apt-get runs
ARG BASE_IMAGE=debian:bookworm-slim
ARG BUILD_IMAGE=${BASE_IMAGE}

FROM ${BUILD_IMAGE} AS build
RUN command -v gcc >/dev/null && command -v python3 >/dev/null || { apt-get update && \
    apt-get install -y --no-install-recommends python3 python3-venv python3-dev gcc libc6-dev ca-certificates; }
WORKDIR /src
COPY requirements.lock requirements-image.lock ./
# What runs, as locked
RUN python3 -m venv --without-pip /opt/pellucid && python3 -m venv /build && \
    /build/bin/pip --python /opt/pellucid/bin/python install --quiet --no-cache-dir --require-hashes --only-binary :all: -r requirements-image.lock
# What makes the wheel; of its own, for it changes seldom
RUN /build/bin/pip install --quiet --no-cache-dir --require-hashes --only-binary :all: -r requirements.lock
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY tools/build_compiled.py tools/
COPY policy policy
COPY proxy proxy
COPY operator operator
COPY cli cli
RUN PELLUCID_COMPILE=require /build/bin/python -m hatchling build -t wheel -d /wheel && \
    /build/bin/pip --python /opt/pellucid/bin/python install --quiet --no-cache-dir --no-deps --no-index /wheel/*.whl && \
    /opt/pellucid/bin/python -m compileall -q /opt/pellucid/lib

FROM ${BASE_IMAGE}
RUN command -v nft >/dev/null && command -v python3 >/dev/null && [ -e /etc/protocols ] || { apt-get update && \
    apt-get install -y --no-install-recommends python3 nftables netbase && rm -rf /var/lib/apt/lists/*; }
COPY --from=build /opt/pellucid /opt/pellucid
ENV PATH=/opt/pellucid/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
ENTRYPOINT ["pellucid"]
CMD ["--help"]
