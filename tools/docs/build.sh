#!/usr/bin/env bash
# Builds the documentation as a site in build/site; `make docs` calls it. Warnings are errors.
#
#   DOCS_PYTHON=PATH   an interpreter that has the site builder, instead of adding it to .venv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

PYTHON=${PYTHON:-.venv/bin/python}
# The extra's packages alone: the project itself is installed already.
if [[ -z "${DOCS_PYTHON:-}" ]]; then
    DOCS_PYTHON=$PYTHON
    if ! "$PYTHON" -c 'import latex2mathml, material, mkdocstrings_handlers.python' 2>/dev/null; then
        mapfile -t PACKAGES < <("$PYTHON" -c '
import tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["project"]["optional-dependencies"]["docs"], sep="\n")')
        "$PYTHON" -m pip install --disable-pip-version-check -q -c constraints.txt "${PACKAGES[@]}"
    fi
fi

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$PYTHON" tools/docs/tables.py --check
# What they print and draw, in build/tutorials; those that have not changed are not run again.
"$PYTHON" -W ignore tools/docs/tutorials.py
NO_MKDOCS_2_WARNING=1 "$DOCS_PYTHON" -m mkdocs build --quiet
echo "the site is in build/site: open build/site/index.html"
