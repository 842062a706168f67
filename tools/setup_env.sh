#!/usr/bin/env bash
# Make the environment that everything here runs in: .venv, with pinned packages and the
# built data engine. A call that finds nothing to do takes well under a second.
set -euo pipefail

usage() {
    cat <<'EOF'
Usage: tools/setup_env.sh [--check-only | --print-python | --help]

Makes .venv in the repository: finds a Python 3.12 or 3.13, installs the packages of
constraints.txt and builds the C++ data engine. Safe to call again at any time, also after
an interrupted call; only what has changed is done.

  --check-only    say whether this machine has what is needed; change nothing
  --print-python  print the interpreter that would be used; change nothing

Environment:
  PYTHON             the interpreter to use, instead of searching for one
  SETUP_MIN_FREE_GB  free disk space to insist on (for a CPU-only torch 3 is enough)
  PIP_INDEX_URL, HTTPS_PROXY, ...  whatever pip understands
EOF
}

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
STAMPS=$VENV/.setup

# Gigabytes that a full installation was seen to take, rounded up: the unpacked packages,
# and twice the downloads (pip keeps a temporary and a cached copy).
VENV_GB=6
DOWNLOAD_GB=3

SECONDS=0
say() { printf '[setup %4ds] %s\n' "$SECONDS" "$*"; }
die() {
    printf 'setup: error: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '  %s\n' "$@" >&2
    exit 1
}

# ---------------------------------------------------------------------------------------
# The interpreter
# ---------------------------------------------------------------------------------------

# Prints "VERSION|PREFIX|INCLUDE|MISSING" of an interpreter, where MISSING names standard
# modules that a virtual environment needs. Isolated mode, so that no variable or user
# package of the caller's changes the answer. A version manager's shim may be on PATH and
# still refuse to run, which is why candidates are run and not only looked up.
describe_python() {
    "$1" -I - 2>/dev/null <<'EOF'
import importlib
import sys
import sysconfig

missing = []
for name in ("venv", "ensurepip", "ssl", "zlib", "ctypes"):
    try:
        importlib.import_module(name)
    except ImportError:
        missing.append(name)
version = "%d.%d.%d" % sys.version_info[:3]
include = sysconfig.get_paths()["include"]
print("|".join((version, sys.base_prefix, include, " ".join(missing))))
EOF
}

# Prints the first C++ compiler that can build an extension: $CXX, or a usual name.
find_compiler() {
    local compiler
    # $CXX may carry options, so it is left to split into words.
    for compiler in ${CXX:+"$CXX"} c++ g++ clang++; do
        # shellcheck disable=SC2086
        if printf '#include <vector>\nint main() { return 0; }\n' |
            $compiler -std=c++17 -fsyntax-only -x c++ - >/dev/null 2>&1; then
            printf '%s\n' "$compiler"
            return 0
        fi
        [ -z "${CXX:-}" ] || return 1
    done
    return 1
}

# All interpreters worth running, one per line, in the order of preference.
list_candidates() {
    local name base
    for name in python3.12 python3.13 python3; do
        type -aP "$name" 2>/dev/null || true
    done
    for base in ${PYENV_ROOT:+"$PYENV_ROOT/versions"} ${HOME:+"$HOME/.pyenv/versions"}; do
        printf '%s\n' "$base"/3.12*/bin/python "$base"/3.13*/bin/python
    done
    printf '%s\n' /usr/local/bin/python3.12 /usr/local/bin/python3.13 /usr/local/bin/python3
    for base in ${CONDA_EXE:+"${CONDA_EXE%/*}/.."} ${HOME:+"$HOME/miniconda3"} \
        ${HOME:+"$HOME/miniforge3"} ${HOME:+"$HOME/anaconda3"} /opt/conda; do
        printf '%s\n' "$base/bin/python" "$base"/envs/*/bin/python
    done
    if [ -n "${CONDA_PREFIX:-}" ]; then printf '%s\n' "$CONDA_PREFIX/bin/python"; fi
    if [ -n "${HOME:-}" ]; then printf '%s\n' "$HOME"/.local/share/uv/python/*/bin/python3; fi
}

# Judges one interpreter. Sets VERDICT to "ok" or to the reason against it, and VERSION and
# PREFIX when it runs; the status says whether it is fit.
judge_python() {
    local description include missing
    VERSION='' PREFIX='' VERDICT=''
    if ! description=$(describe_python "$1") || [ -z "$description" ]; then
        VERDICT='does not run'
        return 1
    fi
    IFS='|' read -r VERSION PREFIX include missing <<<"$description"
    case $VERSION in
        3.12.* | 3.13.*) ;;
        *)
            VERDICT="is Python $VERSION; 3.12 or 3.13 is needed (megatron-core 0.19 has wheels for no other)"
            return 1
            ;;
    esac
    if [ -n "$missing" ]; then
        VERDICT="is Python $VERSION without the standard module(s) $missing (on Debian and Ubuntu: apt install python${VERSION%.*}-venv)"
        return 1
    fi
    if [ ! -e "$include/Python.h" ]; then
        VERDICT="is Python $VERSION without the header Python.h in $include (Debian, Ubuntu: apt install python${VERSION%.*}-dev; Fedora: dnf install python${VERSION%.*}-devel)"
        return 1
    fi
    VERDICT=ok
}

# Sets PY to a fit interpreter, with VERSION and PREFIX of it, or ends the script.
find_python() {
    local candidate wanted seen=$'\n' rejected=()
    if [ -n "${PYTHON:-}" ]; then
        judge_python "$PYTHON" || die "PYTHON=$PYTHON $VERDICT" \
            'Set PYTHON to another interpreter, or unset it to have one searched for.'
        PY=$PYTHON
        return
    fi
    # Two rounds, because 3.12 is preferred wherever it lies: more wheels exist for it.
    for wanted in 3.12 3.13; do
        while IFS= read -r candidate; do
            [ -x "$candidate" ] || continue
            # What one round has found unfit need not be run again in the other.
            case $seen in *$'\n'"$candidate"$'\n'*) continue ;; esac
            if judge_python "$candidate"; then
                case $VERSION in
                    "$wanted".*)
                        PY=$candidate
                        return
                        ;;
                esac
            else
                seen+=$candidate$'\n'
                rejected+=("$candidate $VERDICT")
            fi
        done < <(list_candidates)
    done
    die 'no Python 3.12 or 3.13 was found that can build an environment.' \
        "${rejected[@]/#/looked at: }" \
        'Install one of these, then call this again:' \
        '  Ubuntu 24.04, Debian 13:  apt install python3 python3-venv python3-dev' \
        '  Fedora:                   dnf install python3.12 python3.12-devel' \
        '  conda:                    conda create -n py312 python=3.12' \
        '  pyenv:                    pyenv install 3.12' \
        'or name an interpreter: PYTHON=/path/to/python3.12 make setup'
}

require_compiler() {
    if COMPILER=$(find_compiler); then
        # setuptools would otherwise insist on the compiler that Python itself was built with.
        export CXX=$COMPILER
        return
    fi
    die "no C++17 compiler was found (tried ${CXX:-c++, g++, clang++})." \
        'The data engine is built from csrc/. Install one of these, then call this again:' \
        '  Debian, Ubuntu:  apt install build-essential' \
        '  Fedora:          dnf install gcc-c++' \
        '  conda:           conda install -c conda-forge cxx-compiler' \
        'or name a compiler: CXX=/path/to/g++ make setup'
}

require_platform() {
    case $(uname -s)-$(uname -m) in
        Linux-x86_64 | Linux-aarch64) ;;
        *) die "this machine is $(uname -s) on $(uname -m); megatron-core has wheels for Linux on x86_64 and aarch64 only." \
            'Use such a machine, a container or a virtual machine.' ;;
    esac
}

# ---------------------------------------------------------------------------------------
# Disk space
# ---------------------------------------------------------------------------------------

# Prints "DEVICE FREE_KILOBYTES" of the file system that a (perhaps future) path lies on.
disk_of() {
    local path=$1
    while [ ! -e "$path" ]; do path=$(dirname "$path"); done
    df -Pk "$path" | awk 'NR == 2 {print $1, $4}'
}

require_disk() {
    local cache device free need path gigabytes place places
    cache=${PIP_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/pip}
    if [ -n "${SETUP_MIN_FREE_GB:-}" ]; then
        [[ $SETUP_MIN_FREE_GB =~ ^[0-9]{1,6}$ ]] ||
            die "SETUP_MIN_FREE_GB=$SETUP_MIN_FREE_GB is not a whole number of gigabytes."
        places=("$((10#$SETUP_MIN_FREE_GB)):$VENV")
    else
        places=("$VENV_GB:$VENV" "$DOWNLOAD_GB:${TMPDIR:-/tmp}" "$DOWNLOAD_GB:$cache")
    fi
    # Places on one file system share its space, so their needs are added up.
    local -A need_of=() free_of=() paths_of=()
    for place in "${places[@]}"; do
        gigabytes=${place%%:*} path=${place#*:}
        read -r device free <<<"$(disk_of "$path")"
        [[ $free =~ ^[0-9]+$ ]] || continue
        need_of[$device]=$((${need_of[$device]:-0} + gigabytes))
        free_of[$device]=$free
        paths_of[$device]="${paths_of[$device]:+${paths_of[$device]}, }$path"
    done
    for device in "${!need_of[@]}"; do
        need=${need_of[$device]}
        ((free_of[$device] / 1048576 >= need)) ||
            die "too little disk space: about $need GB are needed for ${paths_of[$device]}, and $((free_of[$device] / 1048576)) GB are free." \
                'Free some space, point TMPDIR and PIP_CACHE_DIR at a roomier disk, or (when a CPU-only torch' \
                'is installed through PIP_EXTRA_INDEX_URL) lower the bar with SETUP_MIN_FREE_GB=3.'
    done
}

# ---------------------------------------------------------------------------------------
# Stamps: a step that has been finished leaves the hash of what it depends on
# ---------------------------------------------------------------------------------------

hash_of() { (cd "$ROOT" && sha256sum "$@" | sha256sum | cut -d' ' -f1); }
# Scripts in .venv/bin and the editable install hold absolute paths.
place_stamp() { printf '%s\n' "$ROOT"; }
packages_stamp() { hash_of constraints.txt pyproject.toml setup.py; }
engine_stamp() { (cd "$ROOT" && hash_of setup.py csrc/*); }
stamped() { [ -f "$STAMPS/$1" ] && [ "$(<"$STAMPS/$1")" = "$2" ]; }
stamp() {
    mkdir -p "$STAMPS"
    # Renamed into place, so that a stamp is whole or absent.
    printf '%s\n' "$2" >"$STAMPS/.$1" && mv "$STAMPS/.$1" "$STAMPS/$1"
}

venv_usable() { stamped place "$(place_stamp)" && "$VENV/bin/python" -I -c '' 2>/dev/null; }
engine_built() {
    # An interrupted `make clean` or a checkout can remove it behind the stamp's back.
    compgen -G "$ROOT/megatron_dwm/_data_engine.*.so" >/dev/null
}
ready() {
    venv_usable && python_unchanged && stamped packages "$(packages_stamp)" &&
        stamped engine "$(engine_stamp)" && engine_built
}
# An environment made with one interpreter is no answer to a call that names another.
python_unchanged() {
    [ -n "${PYTHON:-}" ] || return 0
    judge_python "$PYTHON" || die "PYTHON=$PYTHON $VERDICT" \
        'Set PYTHON to another interpreter, or unset it to have one searched for.'
    stamped python "$VERSION $PREFIX"
}
say_ready() {
    local version
    version=$(sed -n 's/^version *= *//p' "$VENV/pyvenv.cfg")
    say "the environment is ready: .venv (Python $version)"
}

# ---------------------------------------------------------------------------------------
# The steps
# ---------------------------------------------------------------------------------------

# Changes whenever pip adds or removes a package.
packages_changed_at() { stat -c %y "$VENV"/lib/python3*/site-packages; }

pip_install() {
    local status=0 before
    before=$(packages_changed_at)
    "$VENV/bin/python" -m pip install --disable-pip-version-check -c "$ROOT/constraints.txt" "$@" ||
        status=$?
    [ "$status" -ne 0 ] || return 0
    # A failure while downloading leaves an environment that the next call can go on with.
    [ "$before" != "$(packages_changed_at)" ] || stamp place "$(place_stamp)"
    die "pip stopped with exit code $status; its message is above. If it could not download: check the connection (HTTPS_PROXY, PIP_INDEX_URL) and call this again, finished downloads are kept."
}

make_venv() {
    require_platform
    find_python
    require_compiler
    require_disk
    say "making .venv with $PY (Python $VERSION)"
    # --clear, because a package of which only a part was written looks installed to pip.
    "$PY" -m venv --clear "$VENV" || die "$PY -m venv could not make $VENV; its message is above."
    stamp python "$VERSION $PREFIX"
}

install_packages() {
    require_compiler
    rm -f "$STAMPS/packages" "$STAMPS/engine" "$STAMPS/place"
    say 'installing the build tools'
    pip_install setuptools setuptools-scm pybind11
    say 'installing the packages and building the data engine (downloads about 3 GB the first time)'
    (cd "$ROOT" && pip_install --no-build-isolation -e '.[demo,test]')
    # The place goes last: without it the next call starts from an empty environment.
    stamp packages "$1"
    stamp engine "$2"
    stamp place "$(place_stamp)"
}

build_engine() {
    require_compiler
    rm -f "$STAMPS/engine"
    say 'building the data engine'
    # --force, because a change of a header or of a flag need not make an object file older.
    (cd "$ROOT" && "$VENV/bin/python" setup.py -q build_ext --inplace --force) ||
        die 'csrc/ did not compile; the compiler message is above.'
    stamp engine "$1"
}

setup() {
    local packages engine
    # Taken before the work, so that a file changed meanwhile is noticed by the next call.
    packages=$(packages_stamp)
    engine=$(engine_stamp)
    if ! venv_usable || ! python_unchanged; then make_venv; fi
    if ! stamped packages "$packages"; then
        install_packages "$packages" "$engine"
    elif ! stamped engine "$engine" || ! engine_built; then
        build_engine "$engine"
    fi
}

# Settings of the caller's that would make pip or Python look elsewhere.
unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX PIP_USER
export PYTHONNOUSERSITE=1
# Without a terminal pip would wait for an answer that nobody gives.
export PIP_NO_INPUT=1

case ${1:-} in
    '') ;;
    --print-python)
        find_python
        printf '%s\n' "$PY"
        exit 0
        ;;
    --check-only)
        require_platform
        find_python
        require_compiler
        require_disk
        say "this machine has what is needed: $PY (Python $VERSION), $COMPILER, enough disk space"
        exit 0
        ;;
    -h | --help)
        usage
        exit 0
        ;;
    *)
        usage >&2
        die "unknown option $1"
        ;;
esac

if ! ready; then
    # Two calls at once (make -j, two terminals) take turns; the second finds the work done.
    if command -v flock >/dev/null; then
        exec 9>"$ROOT/.venv.lock"
        if ! flock -n 9; then
            say 'another call is setting up this environment: waiting for it'
            flock 9
        fi
        ready || setup
    else
        setup
    fi
fi
say_ready
