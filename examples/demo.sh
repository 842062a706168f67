#!/usr/bin/env bash
# The whole journey on a plain Linux machine without a GPU: build a corpus of real text with one
# known-corrupt domain, pre-train a small Llama on two ranks with a data weighting model that is
# itself learning, pre-train the same model with the stock trainer on the same tokens, export,
# generate, and report what the weights were. `make demo` calls it; a second call goes on where
# the first one stopped.
#
#   DEMO_DIR=demo_out     where everything goes
#   DEMO_ITERS=300        steps of each run
#   DEMO_APT=1            add the domains that come from Debian packages

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-.venv/bin/python}
OUT=${DEMO_DIR:-demo_out}
ITERS=${DEMO_ITERS:-300}
CORPUS=$OUT/corpus
DATA=$OUT/data
APT=--no-apt
[[ "${DEMO_APT:-0}" == 1 ]] && APT=
START=$SECONDS
export OMP_NUM_THREADS=1
mkdir -p "$DATA"

step() {
    printf '\n== [%3d s] %s\n' "$((SECONDS - START))" "$*"
}

step "1/6 corpus: real text of several domains, one of them corrupted on purpose"
# shellcheck disable=SC2086
"$PYTHON" tools/build_demo_corpus.py --out "$CORPUS" $APT

step "2/6 tokenizer: SentencePiece, 2048 pieces"
"$PYTHON" tools/train_tokenizer.py --input "$CORPUS"/train/*.jsonl --out "$CORPUS/tokenizer" \
    --vocab-size 2048 --skip-existing

step "3/6 Megatron data sets, with weight files: one for each domain, the meta and validation sets"
"$PYTHON" examples/demo_data.py "$CORPUS" "$DATA"

# Every good domain alike, and a third of all samples corrupt: enough for the weights to matter.
BLEND=()
for FILE in "$CORPUS"/train/*.jsonl; do
    NAME=$(basename "$FILE" .jsonl)
    WEIGHT=1
    [[ "$NAME" == corrupt ]] && WEIGHT=3
    BLEND+=("$WEIGHT" "$DATA/$NAME")
done

# A small Llama: 4 layers of 128. llm:2 starts the weighting model from the language model's own
# first layers, once those have learned something.
export GPUS_PER_NODE=2 MASTER_PORT=${MASTER_PORT:-29541}
export NUM_LAYERS=4 HIDDEN_SIZE=128 FFN_HIDDEN_SIZE=384 NUM_HEADS=4 NUM_QUERY_GROUPS=2
export SEQ_LENGTH=128 MICRO_BATCH_SIZE=8 GLOBAL_BATCH_SIZE=16
export TRAIN_ITERS=$ITERS LR=3e-3 MIN_LR=3e-4 LR_WARMUP_ITERS=20
export EVAL_INTERVAL=100 EVAL_ITERS=20 LOG_INTERVAL=10 SAVE_INTERVAL=100
export DATA_PATH="${BLEND[*]}" VALID_DATA_PATH="$DATA/valid" META_DATA_PATH="$DATA/meta"
export DATA_CACHE_DIR="$OUT/cache" TOKENIZER_MODEL="$CORPUS/tokenizer.model"
export DWM_INIT=llm:2 DWM_POOLING=mean DWM_STAGES=2 DWM_WARMUP_STEPS=$((ITERS / 4))
export DWM_META_BATCH_SIZE=16 DWM_HEAD_LR=${DWM_HEAD_LR:-3e-3} DWM_BACKBONE_LR=${DWM_BACKBONE_LR:-2e-4}

# run NAME [flags]: trains unless the run's last checkpoint is there, showing the main lines.
run() {
    local name=$1
    shift
    if [[ "$(cat "$OUT/$name/latest_checkpointed_iteration.txt" 2>/dev/null)" == "$ITERS" ]]; then
        echo "$OUT/$name is complete; remove it to train again"
        return
    fi
    if ! SAVE_DIR="$OUT/$name" TENSORBOARD_DIR="$OUT/$name/tensorboard" \
        bash examples/pretrain_dwm.sh --ckpt-format torch_dist --num-workers 0 "$@" 2>&1 |
        tee "$OUT/$name.log" |
        grep --line-buffered -E '^ *(\[[^]]*\] )?(dwm )?iteration +[0-9]|validation loss|^DWM|error:'; then
        echo "The run failed; its whole output is in $OUT/$name.log" >&2
        exit 1
    fi
}

step "4/6 pre-training with the data weighting model, $ITERS steps on two ranks"
DWM=1 run dwm --dwm-log-samples --dwm-sampling weights

step "5/6 the stock trainer on the same tokens"
DWM=0 run stock

step "6/6 export to Hugging Face, and a sample"
"$PYTHON" tools/convert export --megatron-path "$OUT/dwm" --hf-path "$OUT/hf" --force
"$PYTHON" examples/generate.py "$OUT/hf" "The people of the United States" | tee "$OUT/sample.txt"

step "summary"
"$PYTHON" tools/report.py --run "$OUT/dwm" --log "$OUT/dwm.log" --stock-log "$OUT/stock.log" \
    --good-domains books encyclopedia recipes speeches | tee "$OUT/summary.txt"
cat <<END

checkpoint           $OUT/dwm  (stage snapshots of the DWM: $OUT/dwm/dwm_stage_*)
Hugging Face model   $OUT/hf
generated sample     $OUT/sample.txt
log of the weights   $OUT/dwm/dwm_log.jsonl, TensorBoard in $OUT/dwm/tensorboard
whole output         $OUT/dwm.log, $OUT/stock.log
done in $((SECONDS - START)) s
END
