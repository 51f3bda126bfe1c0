# For a machine with an NVIDIA GPU: the wheels of torch bring the CUDA libraries, the host brings the driver.
#   docker build -t tokenprune .
#   docker run --gpus all -v "$PWD/runs:/data/runs" -v "$HOME/.cache/huggingface:/models" tokenprune demo
FROM python:3.12-slim

# Triton compiles a launcher for each kernel when it first runs. No versions are pinned: Debian keeps only the last one.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# The big layer first: it stays while only our code changes.
WORKDIR /opt/tokenprune
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN grep -E '^(torch|transformers|triton|numpy|datasets|accelerate)==' constraints.txt > /tmp/big.txt \
    && pip install --no-cache-dir -c constraints.txt -r /tmp/big.txt
COPY tokenprune tokenprune
COPY adapters adapters
COPY kernels kernels
COPY evals evals
COPY configs configs
RUN pip install --no-cache-dir -c constraints.txt '.[tune]'

# Nobody's code runs as root; results and models are mounted.
RUN useradd --create-home --uid 1000 tokenprune && mkdir -p /data/runs /models && chown -R tokenprune /data /models
USER 1000
WORKDIR /data
ENV HF_HOME=/models
ENTRYPOINT ["tokenprune"]
CMD ["--help"]
