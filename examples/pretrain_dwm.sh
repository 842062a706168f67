#!/usr/bin/env bash
# Pre-trains a Llama-style model with learned sample weights, on one node or many.
#
#   DATA_PATH=corpus_text_document META_DATA_PATH=meta_text_document \
#   TOKENIZER_MODEL=tokenizer.model bash examples/pretrain_dwm.sh [more trainer flags]
#
# Everything is set by environment variables; the sections below name them with their defaults.
# Words after the script's name are appended to the command, so they win over what is set here.
#
#   DWM=0         the stock trainer on the same data, without sample weights
#   DRY_RUN=1     print the command and exit
#   SCRIPT=FILE   another training script that takes the same flags
#
# On several nodes start it once on each, with the same MASTER_ADDR and MASTER_PORT, and with
# NODE_RANK 0, 1, ... (pretrain_dwm.slurm does that). Without a GPU it trains on the CPU.

set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
# Megatron overlaps communication with computation by the order of kernels in one queue.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

die() {
    echo "pretrain_dwm.sh: $*" >&2
    exit 2
}

# require NAME HINT: stops when the variable NAME is empty.
require() {
    [[ -n "${!1:-}" ]] || die "$1 is not set; set it to $2."
}

if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python
    [[ -x "$REPO/.venv/bin/python" ]] && PYTHON="$REPO/.venv/bin/python"
fi

DWM=${DWM:-1}
[[ "$DWM" == 0 || "$DWM" == 1 ]] || die "DWM is '$DWM'; allowed are 0 (stock trainer) and 1."

# ------------------------------------------------------------------------------------- nodes

NNODES=${NNODES:-1}
if ((NNODES > 1)); then
    require NODE_RANK "this node's number, 0 to $((NNODES - 1)), as NNODES is $NNODES"
    require MASTER_ADDR "the host name or address of the node with NODE_RANK 0, as NNODES is $NNODES"
fi

TP=${TP:-1} # tensor parallel size
PP=${PP:-1} # pipeline parallel size

PARALLEL_ARGS=(
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
)

# ------------------------------------------------------------------------------------- model

# The defaults are 374M parameters with a vocabulary of 32000:
#   2 x 32000 x 1024 (embedding and output) + 1024 (last norm)
#   + 24 x (4 x 1024^2 (attention) + 3 x 1024 x 2816 (MLP) + 2 x 1024 (norms)) = 373,867,520
SEQ_LENGTH=${SEQ_LENGTH:-2048}
NUM_HEADS=${NUM_HEADS:-16}

MODEL_ARGS=(
    --num-layers "${NUM_LAYERS:-24}"
    --hidden-size "${HIDDEN_SIZE:-1024}"
    --ffn-hidden-size "${FFN_HIDDEN_SIZE:-2816}"
    --num-attention-heads "$NUM_HEADS"
    --group-query-attention
    --num-query-groups "${NUM_QUERY_GROUPS:-$NUM_HEADS}"
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "${MAX_POSITION_EMBEDDINGS:-$SEQ_LENGTH}"
    --position-embedding-type rope
    --rotary-base "${ROTARY_BASE:-10000}"
    --swiglu
    --normalization RMSNorm
    --norm-epsilon 1e-5
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0
    --hidden-dropout 0
    --init-method-std 0.02
)

# ---------------------------------------------------------------------------------- training

# The defaults are 512 x 2048 = 1.05M tokens a step and 30.0B tokens in all.
TRAIN_ITERS=${TRAIN_ITERS:-28610}

TRAINING_ARGS=(
    --micro-batch-size "${MICRO_BATCH_SIZE:-8}"
    --global-batch-size "${GLOBAL_BATCH_SIZE:-512}"
    --train-iters "$TRAIN_ITERS"
    --lr "${LR:-3e-4}"
    --min-lr "${MIN_LR:-3e-5}"
    --lr-decay-style cosine
    --lr-decay-iters "$TRAIN_ITERS"
    --lr-warmup-iters "${LR_WARMUP_ITERS:-$((TRAIN_ITERS / 100))}"
    --adam-beta1 0.9
    --adam-beta2 0.95
    --weight-decay "${WEIGHT_DECAY:-0.1}"
    --clip-grad "${CLIP_GRAD:-1.0}"
    --seed "${SEED:-1234}"
)

# -------------------------------------------------------------------------------------- data

# Paths are prefixes of .bin/.idx pairs. DATA_PATH, VALID_DATA_PATH and META_DATA_PATH may be
# blends: "0.7 first_prefix 0.3 second_prefix". Without VALID_DATA_PATH a part of DATA_PATH
# (SPLIT) is held out. With `--mock-data` none of them is needed.
EXTRA_ARGS=("$@")
DATA_ARGS=(--no-create-attention-mask-in-dataloader)
MOCK_DATA=0
[[ " ${EXTRA_ARGS[*]} " == *" --mock-data "* ]] && MOCK_DATA=1
if ((!MOCK_DATA)); then
    require DATA_PATH "the prefix of the training data's .bin and .idx files, or a blend"
    read -ra TRAIN_BLEND <<<"$DATA_PATH"
    if [[ -n "${VALID_DATA_PATH:-}" ]]; then
        read -ra VALID_BLEND <<<"$VALID_DATA_PATH"
        DATA_ARGS+=(--train-data-path "${TRAIN_BLEND[@]}" --valid-data-path "${VALID_BLEND[@]}")
    else
        DATA_ARGS+=(--data-path "${TRAIN_BLEND[@]}" --split "${SPLIT:-99,1,0}")
    fi
fi
if [[ -n "${DATA_CACHE_DIR:-}" ]]; then
    DATA_ARGS+=(--data-cache-path "$DATA_CACHE_DIR")
fi

# TOKENIZER_TYPE: any of Megatron's. The default follows TOKENIZER_MODEL: a folder is a Hugging
# Face tokenizer, a file a SentencePiece model. NullTokenizer takes VOCAB_SIZE and no model.
if [[ "${TOKENIZER_TYPE:-}" == NullTokenizer ]]; then
    require VOCAB_SIZE "the number of token ids in the data, as TOKENIZER_TYPE is NullTokenizer"
    DATA_ARGS+=(--tokenizer-type NullTokenizer --vocab-size "$VOCAB_SIZE")
else
    require TOKENIZER_MODEL "a SentencePiece model file or a Hugging Face tokenizer folder"
    [[ -d "$TOKENIZER_MODEL" ]] && FOUND=HuggingFaceTokenizer || FOUND=SentencePieceTokenizer
    DATA_ARGS+=(--tokenizer-type "${TOKENIZER_TYPE:-$FOUND}" --tokenizer-model "$TOKENIZER_MODEL")
fi

# -------------------------------------------------------------------------- data weighting

# DWM_POLICY: learned, another policy of `--dwm-policy`, or your own as package.module:Class.
# DWM_FORM: head (scores from the LLM's own states) or model (a separate transformer). Whatever is
# unset is left to the defaults of `--dwm-*`.
ANY_FORM=(FORM RULE MAP SLOPE GATE FORGETTING RIDGE SCHEDULE STAGES STAGE_META_STEPS WARMUP_STEPS
    META_INTERVAL META_DENSE_STEPS META_BATCH_SIZE ESTIMATOR LOOKAHEAD OVERHEAD_BUDGET TEMPERATURE
    MIN_EFFECTIVE_SAMPLES UNIFORM_MIX MAX_WEIGHT SAMPLING LOAD SEED)
# DWM_INIT: random, llm:K (the LLM's embedding and first K layers) or hf:DIR (a Llama folder).
# llm:K and hf:DIR set the shape (DWM_NUM_LAYERS, DWM_HIDDEN_SIZE, ...).
ONLY_MODEL=(INIT POOLING NUM_LAYERS HIDDEN_SIZE FFN_HIDDEN_SIZE NUM_ATTENTION_HEADS
    NUM_QUERY_GROUPS HEAD_LR BACKBONE_LR CLIP_GRAD REPLAY REPLAY_STEPS TEACHER)
DWM_ARGS=()
if [[ "$DWM" == 1 ]]; then
    DWM_POLICY=${DWM_POLICY:-learned}
    DWM_ARGS=(--dwm --dwm-policy "$DWM_POLICY")
fi
if [[ "$DWM" == 1 && "$DWM_POLICY" != uniform ]]; then
    if [[ "$DWM_POLICY" == model || "${DWM_FORM:-}" == model ]]; then
        ANY_FORM+=("${ONLY_MODEL[@]}")
    fi
    for NAME in "${ONLY_MODEL[@]}"; do
        VARIABLE=DWM_$NAME
        [[ -z "${!VARIABLE:-}" || " ${ANY_FORM[*]} " == *" $NAME "* ]] ||
            die "$VARIABLE is about the separate model; set DWM_FORM=model, or unset it."
    done
    for NAME in "${ANY_FORM[@]}"; do
        VARIABLE=DWM_$NAME
        FLAG=${NAME//_/-}
        if [[ -n "${!VARIABLE:-}" ]]; then
            DWM_ARGS+=("--dwm-${FLAG,,}" "${!VARIABLE}")
        fi
    done
    NEEDS_META=0
    case "$DWM_POLICY" in
        linupper | quadratic | extremes | truncation) META_DATA_PATH= ;; # by the loss alone
        static | curriculum | rho) META_DATA_PATH= ;;                    # by what is known of documents
        influence) NEEDS_META=1 ;;
        learned | shuffled | head | model | domains)
            if [[ "${DWM_SCHEDULE:-}" == frozen ]]; then META_DATA_PATH=; else NEEDS_META=1; fi
            ;;
    esac
    if ((NEEDS_META && !MOCK_DATA)); then
        require META_DATA_PATH "the prefix of the meta set's .bin and .idx files, or a blend"
    fi
    if [[ -n "${META_DATA_PATH:-}" ]] && ((!MOCK_DATA)); then
        read -ra META_BLEND <<<"$META_DATA_PATH"
        DWM_ARGS+=(--dwm-meta-data-path "${META_BLEND[@]}")
    fi
fi

# ------------------------------------------------------------------- checkpoints and logging

LOGGING_ARGS=(
    --log-interval "${LOG_INTERVAL:-10}"
    --eval-interval "${EVAL_INTERVAL:-1000}"
    --eval-iters "${EVAL_ITERS:-10}"
)
if [[ -n "${TENSORBOARD_DIR:-}" ]]; then
    LOGGING_ARGS+=(--tensorboard-dir "$TENSORBOARD_DIR")
fi

# A run that is started again continues from its own SAVE_DIR unless LOAD_DIR says otherwise.
CHECKPOINT_ARGS=()
LOAD_DIR=${LOAD_DIR:-${SAVE_DIR:-}}
if [[ -n "${SAVE_DIR:-}" ]]; then
    CHECKPOINT_ARGS+=(--save "$SAVE_DIR" --save-interval "${SAVE_INTERVAL:-1000}")
fi
if [[ -n "$LOAD_DIR" ]]; then
    CHECKPOINT_ARGS+=(--load "$LOAD_DIR")
fi

# -------------------------------------------------------------------------------------- host

# First line: the number of GPUs; then the trainer flags that this host needs (none on a GPU).
HOST=$("$PYTHON" -c '
import torch
from megatron_dwm.hosts import cpu
print(torch.cuda.device_count(), *cpu.default_flags(), sep="\n")
') || die "'$PYTHON' cannot import torch and megatron_dwm; set PYTHON to one that can."
mapfile -t HOST_ARGS <<<"$HOST"
GPUS_FOUND=${HOST_ARGS[0]}
HOST_ARGS=("${HOST_ARGS[@]:1}")

if ((${#HOST_ARGS[@]} == 0)); then
    TRANSFORMER_IMPL=${TRANSFORMER_IMPL:-transformer_engine}
    HOST_ARGS=(--bf16 --transformer-impl "$TRANSFORMER_IMPL")
    if [[ "$TRANSFORMER_IMPL" == local ]]; then
        # These kernels come with Transformer Engine or Apex.
        HOST_ARGS+=(--no-gradient-accumulation-fusion --no-persist-layer-norm)
    else
        # Without Transformer Engine or Apex, Megatron cannot load this optimizer's checkpoints.
        # Fully reshardable, they can be loaded at another TP and PP.
        HOST_ARGS+=(--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable)
        if ((TP > 1)); then
            HOST_ARGS+=(--sequence-parallel)
        fi
    fi
fi

DISTRIBUTED_ARGS=(
    --nproc-per-node "${GPUS_PER_NODE:-$((GPUS_FOUND > 0 ? GPUS_FOUND : 1))}"
    --nnodes "$NNODES"
    --node-rank "${NODE_RANK:-0}"
    --master-addr "${MASTER_ADDR:-127.0.0.1}"
    --master-port "${MASTER_PORT:-29500}"
)

# --------------------------------------------------------------------------------------- run

COMMAND=(
    "$PYTHON" -m torch.distributed.run
    "${DISTRIBUTED_ARGS[@]}"
    "${SCRIPT:-$REPO/examples/pretrain_dwm.py}"
    "${HOST_ARGS[@]}"
    "${PARALLEL_ARGS[@]}"
    "${MODEL_ARGS[@]}"
    "${TRAINING_ARGS[@]}"
    "${DATA_ARGS[@]}"
    "${DWM_ARGS[@]}"
    "${LOGGING_ARGS[@]}"
    "${CHECKPOINT_ARGS[@]}"
    "${EXTRA_ARGS[@]}"
)

if [[ "${DRY_RUN:-0}" == 1 ]]; then
    printf '%q ' "${COMMAND[@]}"
    echo
else
    exec "${COMMAND[@]}"
fi
