#!/usr/bin/env bash
# The whole journey on a plain Linux machine without a GPU: build a corpus of real text with one
# known-corrupt domain; pre-train a small Llama on two ranks three times on the same samples in the
# same order (with the stock trainer, with loss-based weights, and with the data weighting model);
# export, generate, and compare the three at equal tokens and at equal time. `make demo` calls it; a
# second call resumes where the first one stopped.
#
#   DEMO_DIR=demo_out     where everything goes
#   DEMO_ITERS=400        steps of each run
#   DEMO_SEED=1234        of the models and of the data's order; another one has a folder of its own
#   DEMO_APT=1            add the domains that come from Debian packages

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-.venv/bin/python}
OUT=${DEMO_DIR:-demo_out}
ITERS=${DEMO_ITERS:-400}
SEED=${DEMO_SEED:-1234}
CORPUS=$OUT/corpus
DATA=$OUT/data
RUNS=$OUT
[[ "$SEED" == 1234 ]] || RUNS=$OUT/seed_$SEED
APT=--no-apt
[[ "${DEMO_APT:-0}" == 1 ]] && APT=
START=$SECONDS
export OMP_NUM_THREADS=1

die() {
    echo "demo.sh: $*" >&2
    exit 2
}

for NAME in ITERS SEED; do
    [[ "${!NAME}" =~ ^[1-9][0-9]{0,8}$ ]] ||
        die "DEMO_$NAME is '${!NAME}'; give a whole number above 0."
done
# Runs of other settings can be neither resumed nor compared with.
SETTINGS="DEMO_ITERS=$ITERS DEMO_APT=${DEMO_APT:-0}"
FOUND=$(cat "$RUNS/settings.txt" 2>/dev/null || true)
if [[ "$FOUND" != "$SETTINGS" ]]; then
    for NAME in stock loss_based dwm; do
        [[ ! -e "$RUNS/$NAME" ]] ||
            die "$RUNS/$NAME is a run with ${FOUND:-other settings}, but now $SETTINGS;" \
                "remove $RUNS, or set DEMO_DIR to another folder."
    done
fi
mkdir -p "$DATA" "$RUNS"
echo "$SETTINGS" >"$RUNS/settings.txt"

step() {
    printf '\n== [%3d s] %s\n' "$((SECONDS - START))" "$*"
}

step "1/7 corpus: real text of several domains, one of them corrupted on purpose"
# shellcheck disable=SC2086
"$PYTHON" tools/build_demo_corpus.py --out "$CORPUS" $APT

step "2/7 tokenizer: SentencePiece, 2048 pieces"
"$PYTHON" -m megatron_dwm tokenizer --input "$CORPUS"/train/*.jsonl \
    --out "$CORPUS/tokenizer" --vocab-size 2048 --skip-existing

step "3/7 Megatron data sets: one for each domain, the meta and validation sets"
"$PYTHON" examples/demo_data.py "$CORPUS" "$DATA"

# Every good domain alike, and a third of all samples corrupt: enough for the weights to matter.
BLEND=()
for FILE in "$CORPUS"/train/*.jsonl; do
    NAME=$(basename "$FILE" .jsonl)
    WEIGHT=1
    [[ "$NAME" == corrupt ]] && WEIGHT=3
    BLEND+=("$WEIGHT" "$DATA/$NAME")
done

# A small Llama: 4 layers of 128.
export GPUS_PER_NODE=2 MASTER_PORT=${MASTER_PORT:-29541} SCRIPT=examples/demo_train.py
export NUM_LAYERS=4 HIDDEN_SIZE=128 FFN_HIDDEN_SIZE=384 NUM_HEADS=4 NUM_QUERY_GROUPS=2
export SEQ_LENGTH=128 MICRO_BATCH_SIZE=8 GLOBAL_BATCH_SIZE=32
export TRAIN_ITERS=$ITERS LR=3e-3 MIN_LR=3e-4 LR_WARMUP_ITERS=$((ITERS / 15)) SEED
export EVAL_INTERVAL=50 EVAL_ITERS=15 LOG_INTERVAL=10 SAVE_INTERVAL=100
export DATA_PATH="${BLEND[*]}" VALID_DATA_PATH="$DATA/valid" META_DATA_PATH="$DATA/meta"
export DATA_CACHE_DIR="$OUT/cache" TOKENIZER_MODEL="$CORPUS/tokenizer.model"

# run NAME: trains unless the run's last checkpoint is there, showing the main lines.
run() {
    local name=$1 last=''
    local lines='^ *(\[[^]]*\] )?(dwm )?iteration +[0-9]|validation loss|^DWM|error:'
    last=$(cat "$RUNS/$name/latest_checkpointed_iteration.txt" 2>/dev/null || true)
    if [[ "$last" == "$ITERS" ]]; then
        echo "$RUNS/$name is complete; remove it to train again"
        return
    fi
    # A run that is resumed adds to its log.
    [[ -n "$last" ]] || rm -f "$RUNS/$name.log"
    if ! SAVE_DIR="$RUNS/$name" TENSORBOARD_DIR="$RUNS/$name/tensorboard" \
        bash examples/pretrain_dwm.sh --ckpt-format torch_dist --num-workers 0 2>&1 |
        tee -a "$RUNS/$name.log" |
        grep --line-buffered -E "$lines"; then
        echo "The run failed; its whole output is in $RUNS/$name.log" >&2
        exit 1
    fi
}

step "4/7 the stock trainer, $ITERS steps on two ranks"
DWM=0 run stock

step "5/7 the same samples, weighted by their loss (--dwm-policy truncation)"
DWM=1 DWM_POLICY=truncation run loss_based

step "6/7 the same samples, weighted by the data weighting model"
# Such a short run starts weighting early, and has its dense meta steps in its first eighth.
DWM=1 DWM_WARMUP_STEPS=$LR_WARMUP_ITERS DWM_META_BATCH_SIZE=16 DWM_META_INTERVAL=16 \
    DWM_META_DENSE_STEPS=32 DWM_SEED=$SEED run dwm

step "7/7 export to Hugging Face, and a sample"
"$PYTHON" -m megatron_dwm convert export --megatron-path "$RUNS/dwm" --hf-path "$RUNS/hf" --force
"$PYTHON" examples/generate.py "$RUNS/hf" "The people of the United States" | tee "$RUNS/sample.txt"

step "summary"
"$PYTHON" -m megatron_dwm report --run "$RUNS/dwm" \
    --compare "stock trainer=$RUNS/stock.log" \
    --compare "loss-based=$RUNS/loss_based.log" --compare "DWM=$RUNS/dwm.log" \
    --plot "$RUNS/report.png" --good-domains books encyclopedia recipes speeches |
    tee "$RUNS/summary.txt"
cat <<END

plot                 $RUNS/report.png
checkpoint           $RUNS/dwm  (stage snapshots of the DWM: $RUNS/dwm/dwm_stage_*)
Hugging Face model   $RUNS/hf
generated sample     $RUNS/sample.txt
log of the weights   $RUNS/dwm/dwm_log.jsonl, TensorBoard in $RUNS/dwm/tensorboard
whole output         $RUNS/stock.log, $RUNS/loss_based.log, $RUNS/dwm.log
done in $((SECONDS - START)) s
END
