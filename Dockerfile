# Training image on NVIDIA's PyTorch, which brings torch, Transformer Engine and Apex for GPUs.
# Not built in CI, which has no GPU; choose a release whose Python is 3.12 or later.
#
#   docker build -t megatron-dwm .
#   docker run --gpus all --ipc host -v /data:/data megatron-dwm \
#       torchrun --nproc-per-node 8 -m megatron_dwm train pretrain_gpt.py YOUR FLAGS --dwm ...
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:25.09-py3
FROM ${BASE_IMAGE}

WORKDIR /opt/megatron_dwm
COPY . .
# What the image has stays as it is: torch above all.
RUN python -c "import sys; assert sys.version_info >= (3, 12), sys.version" \
    && pip freeze | grep -i -E '^(torch|transformer.engine|apex|flash.attn)' > /tmp/kept.txt || true \
    && pip install --no-cache-dir -c /tmp/kept.txt ".[convert,log,report]" \
    && python -c "import megatron_dwm._data_engine"
WORKDIR /workspace
