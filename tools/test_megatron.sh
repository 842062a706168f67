#!/usr/bin/env bash
# Runs the contract tests (what is relied on in Megatron) against another Megatron than the one in
# .venv, which stays as it is:
#
#   tools/test_megatron.sh 0.19.0                  a release of megatron-core
#   tools/test_megatron.sh ../Megatron-LM          a checkout
#   tools/test_megatron.sh 0.19.0 tests/unit/step  other tests than tests/contract
#
# It is installed without its dependencies into .megatron/, which comes before .venv's on the path.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() {
    echo "test_megatron.sh: $*" >&2
    exit 2
}

[[ $# -ge 1 ]] || die "give a release, as 0.19.0, or the folder of a checkout."
WANTED=$1
shift
PYTHON=$PWD/.venv/bin/python
[[ -x "$PYTHON" ]] || die ".venv is missing; make setup"

if [[ -d "$WANTED" ]]; then
    [[ -f "$WANTED/megatron/core/package_info.py" ]] ||
        die "$WANTED has no megatron/core/package_info.py; give a checkout of Megatron-LM."
    # It may have changed since the last time.
    WHAT=$(cd "$WANTED" && pwd) TARGET=$PWD/.megatron/checkout
    rm -rf "$TARGET"
elif [[ "$WANTED" =~ ^[0-9]+\.[0-9]+\.[0-9]+[0-9a-z.]*$ ]]; then
    WHAT="megatron-core==$WANTED" TARGET=$PWD/.megatron/$WANTED
else
    die "'$WANTED' is neither a release, as 0.19.0, nor a folder."
fi
if [[ ! -f "$TARGET/done" ]]; then
    rm -rf "$TARGET"
    "$PYTHON" -m pip install --quiet --no-deps --target "$TARGET" "$WHAT" ||
        die "$WHAT cannot be installed."
    touch "$TARGET/done"
fi

export PYTHONPATH="$TARGET${PYTHONPATH:+:$PYTHONPATH}"
FOUND=$("$PYTHON" -c '
import importlib.metadata
from megatron.core import package_info
print(importlib.metadata.version("megatron-core"), package_info.__file__)
')
[[ "$FOUND" == *" $TARGET/"* ]] || die "it is not what is imported, but $FOUND."
echo "megatron-core ${FOUND%% *}"
if [[ $# -eq 0 ]]; then
    set -- tests/contract
fi
exec "$PYTHON" -m pytest -q "$@"
