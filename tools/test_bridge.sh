#!/usr/bin/env bash
# Runs the contract tests of the adapter for Megatron-Bridge, which is not in .venv:
#
#   tools/test_bridge.sh ../Megatron-Bridge        a checkout, of 0.6
#   tools/test_bridge.sh 0.6.2                     a release
#
# What its trainer imports on the CPU is installed into .megatron/bridge, a venv that sees .venv's
# packages; of its other dependencies (kernels, trackers, diffusion) the tests need none.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() {
    echo "test_bridge.sh: $*" >&2
    exit 2
}

[[ $# -ge 1 ]] || die "give the folder of a checkout, or a release, as 0.6.2."
WANTED=$1
shift
[[ -x .venv/bin/python ]] || die ".venv is missing; make setup"
VENV=$PWD/.megatron/bridge
PYTHON=$VENV/bin/python

if [[ ! -f "$VENV/done" ]]; then
    rm -rf "$VENV"
    .venv/bin/python -m venv "$VENV"
    SITE=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    .venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$SITE/venv.pth"
    "$PYTHON" -m pip install --quiet nvidia-modelopt megatron-energon omegaconf "hydra-core<1.4" \
        einops peft accelerate datasets httpx requests defusedxml nvidia-ml-py ||
        die "its dependencies cannot be installed."
    # Its wheels are for a newer glibc than some systems have; what is imported is Python.
    "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --dest "$VENV/wheels" \
        --platform "manylinux_2_39_$(uname -m)" "nvidia-resiliency-ext>=0.6,<0.7" ||
        die "nvidia-resiliency-ext cannot be downloaded."
    for wheel in "$VENV"/wheels/*.whl; do
        "$PYTHON" -m zipfile -e "$wheel" "$SITE"
    done
    touch "$VENV/done"
fi

if [[ -d "$WANTED" ]]; then
    MEGATRON_BRIDGE=$(cd "$WANTED" && pwd)
    [[ -d "$MEGATRON_BRIDGE/src/megatron/bridge" || -d "$MEGATRON_BRIDGE/megatron/bridge" ]] ||
        die "$WANTED has no src/megatron/bridge; give a checkout of Megatron-Bridge."
elif [[ "$WANTED" =~ ^[0-9]+\.[0-9]+\.[0-9]+[0-9a-z.]*$ ]]; then
    MEGATRON_BRIDGE=$PWD/.megatron/bridge-$WANTED
    if [[ ! -f "$MEGATRON_BRIDGE/done" ]]; then
        rm -rf "$MEGATRON_BRIDGE"
        "$PYTHON" -m pip install --quiet --no-deps --target "$MEGATRON_BRIDGE" \
            "megatron-bridge==$WANTED" || die "megatron-bridge $WANTED cannot be installed."
        touch "$MEGATRON_BRIDGE/done"
    fi
else
    die "'$WANTED' is neither a folder nor a release, as 0.6.2."
fi

export MEGATRON_BRIDGE PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m pytest -q -p no:xdist -rs tests/contract/test_bridge_contract.py "$@"
