# An image with Longhaul and its packages, each from a file whose SHA-256 setup/hashes.txt has (torch's own excepted).
#
#   docker build -t longhaul .
#   docker run --rm --gpus all --shm-size=8g -v "$PWD/data:/opt/longhaul/data" -v "$PWD/runs:/opt/longhaul/runs" longhaul \
#       train/launch.py --standalone --nproc_per_node=auto:8 train/pretrain.py --config train/configs/gpt2-124m.yaml
#
# Without GPUs: docker build --build-arg TORCH_INDEX=URL, with PyTorch's index of CPU builds. slurm/longhaul.def is the
# same for Apptainer.
#
# BASE: another image with Python 3.11 or newer, venv and apt, such as a copy of a registry that the network has.
ARG BASE=python:3.12-slim-bookworm
FROM $BASE

# a compiler for torch.compile, git for provenance, make for the environment
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/longhaul
# what the environment is made from comes first: a change of the sources leaves this layer alone
COPY Makefile requirements.txt requirements-dev.txt constraints.txt ./
COPY setup setup
COPY common common
ARG TORCH_INDEX=
RUN make environment PYTHON=python3 TORCH_INDEX="$TORCH_INDEX" FREE_GIB=0 && rm -rf /root/.cache

COPY . .
ENV PATH=/opt/longhaul/.venv/bin:$PATH
ENTRYPOINT ["python"]
CMD ["train/pretrain.py", "--help"]
