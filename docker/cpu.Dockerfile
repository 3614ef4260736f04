# Octavo on a CPU:  docker build -f docker/cpu.Dockerfile -t octavo:cpu .
#                   docker run --rm -p 8000:8000 octavo:cpu --quantization ptpc_fp8 --kv-cache-dtype fp8
FROM debian:12.12-slim AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/octavo
# requirements.txt pins every wheel; torch's index has the builds for a CPU under the same version.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements.txt /src/
RUN /opt/octavo/bin/pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" -r /src/requirements.txt
# The C kernels are compiled here, so that the image itself needs no compiler.
COPY LICENSE README.md pyproject.toml setup.py /src/
COPY octavo /src/octavo
RUN /opt/octavo/bin/pip install --no-cache-dir --no-deps --no-build-isolation /src

FROM debian:12.12-slim
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 octavo \
    && install -d -o octavo -g octavo /home/octavo/.cache/huggingface
COPY --from=build /opt/octavo /opt/octavo
ENV PATH=/opt/octavo/bin:/usr/local/bin:/usr/bin:/bin HOME=/home/octavo HF_HOME=/home/octavo/.cache/huggingface
USER 1000:1000
WORKDIR /home/octavo
VOLUME ["/home/octavo/.cache/huggingface"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=1h \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["octavo", "serve"]
