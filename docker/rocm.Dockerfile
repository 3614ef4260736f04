# Octavo on AMD Instinct:  docker build -f docker/rocm.Dockerfile -t octavo:rocm .
#   docker run --rm --device /dev/kfd --device /dev/dri --group-add=video --ipc=host -p 8000:8000 octavo:rocm --quantization fp8
# Not built and not run: no registry and no such GPU was at hand.
FROM rocm/dev-ubuntu-24.04:7.2.4 AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/octavo
# requirements.txt pins every wheel; torch's index has the builds for ROCm under the same version.
ARG TORCH_INDEX=https://download.pytorch.org/whl/rocm7.2
COPY requirements.txt /src/
RUN /opt/octavo/bin/pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" -r /src/requirements.txt
COPY LICENSE README.md pyproject.toml setup.py /src/
COPY octavo /src/octavo
RUN /opt/octavo/bin/pip install --no-cache-dir --no-deps --no-build-isolation /src
# The kernels of these models are compiled here; what another lacks, its first start compiles. Triton's cache names its files by
# whole paths, so HOME is the user's of the image.
ARG MODELS="Llama-3.1-8B Llama-3.3-70B Qwen3-8B Qwen3-30B-A3B"
RUN export HOME=/home/octavo \
    && /opt/octavo/bin/python -m octavo.engine.image_kernels --accelerator mi300x --models "$MODELS" \
    && /opt/octavo/bin/python -m octavo.engine.image_kernels --accelerator mi355x --models "$MODELS"

FROM rocm/dev-ubuntu-24.04:7.2.4
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# For kernels that are not in the image Triton compiles a launcher with the C compiler, against Python's headers. Ubuntu's own first user has the id 1000.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev python3 python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1001 --groups video octavo \
    && install -d -o octavo -g octavo /home/octavo/.cache/huggingface /home/octavo/.triton
COPY --from=build /opt/octavo /opt/octavo
COPY --from=build --chown=octavo:octavo /home/octavo/.triton /home/octavo/.triton
ENV PATH=/opt/octavo/bin:/opt/rocm/bin:/usr/local/bin:/usr/bin:/bin HOME=/home/octavo HF_HOME=/home/octavo/.cache/huggingface
USER 1001:1001
WORKDIR /home/octavo
VOLUME ["/home/octavo/.cache/huggingface"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=1h \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["octavo", "serve"]
