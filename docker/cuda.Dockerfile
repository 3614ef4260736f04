# Octavo on NVIDIA GPUs (Hopper and newer):  docker build -f docker/cuda.Dockerfile -t octavo:cuda .
#   docker run --rm --gpus all --ipc=host -p 8000:8000 octavo:cuda --quantization ptpc_fp8 --kv-cache-dtype fp8
# The CUDA libraries are wheels that torch brings, so the base has none; the host's driver comes in by NVIDIA's container toolkit.
FROM debian:12.12-slim AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/octavo
COPY requirements.txt /src/
RUN /opt/octavo/bin/pip install --no-cache-dir -r /src/requirements.txt
COPY LICENSE README.md pyproject.toml setup.py /src/
COPY octavo /src/octavo
RUN /opt/octavo/bin/pip install --no-cache-dir --no-deps --no-build-isolation /src
# The kernels for Hopper that depend on no model are compiled here, and those of these models; what another lacks, its first
# start compiles. Triton's cache names its files by whole paths, so HOME is the user's of the image.
ARG MODELS="Llama-3.1-8B Llama-3.3-70B Qwen3-8B Qwen3-30B-A3B"
RUN export HOME=/home/octavo \
    && /opt/octavo/bin/python -m octavo.ops.hopper.all_kernels \
    && /opt/octavo/bin/python -m octavo.engine.image_kernels --accelerator h200 --models "$MODELS"

FROM debian:12.12-slim
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# For kernels that are not in the image Triton compiles a launcher with the C compiler, against Python's headers.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev python3 python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 octavo \
    && install -d -o octavo -g octavo /home/octavo/.cache/huggingface /home/octavo/.triton
COPY --from=build /opt/octavo /opt/octavo
COPY --from=build --chown=octavo:octavo /home/octavo/.cache/octavo /home/octavo/.cache/octavo
COPY --from=build --chown=octavo:octavo /home/octavo/.triton /home/octavo/.triton
ENV PATH=/opt/octavo/bin:/usr/local/bin:/usr/bin:/bin HOME=/home/octavo HF_HOME=/home/octavo/.cache/huggingface \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
WORKDIR /home/octavo
VOLUME ["/home/octavo/.cache/huggingface"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=1h \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["octavo", "serve"]
