#!/usr/bin/env bash
# Builds the kernels of csrc/ (without Python) with run-time checks, and runs them through their
# edge cases.
#
#   tests/csrc/run_sanitized.sh [address|thread]
#
# address: memory errors, leaks and undefined behaviour. thread: data races.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

case ${1:-address} in
    address) checks=address,undefined,float-cast-overflow ;;
    thread) checks=thread ;;
    *)
        echo "run_sanitized.sh: unknown check $1; expected address or thread" >&2
        exit 2
        ;;
esac

build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
"${CXX:-g++}" -std=c++17 -O1 -g -Wall -Wextra -Werror -ffp-contract=off -fno-trapping-math -pthread \
    -fsanitize="$checks" -fno-sanitize-recover=all -fno-omit-frame-pointer \
    -I csrc tests/csrc/kernels.cpp -o "$build/kernels"
"$build/kernels"
