#!/bin/sh
# Checks for what pip cannot install: a C compiler, Python's headers and GMP's, which libp2p's dependency fastecdsa is built with
# where there is no wheel for it. Usage: system-packages.sh PYTHON
set -eu
python=$1

fail() {
    echo "error: $1" >&2
    exit 2
}

command -v "$python" >/dev/null 2>&1 || fail "$python is not here; install Python 3.11, 3.12 or 3.13, or run make PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' ||
    fail "$("$python" --version) is not supported; run make PYTHON=python3.11 (or 3.12, 3.13)"

probe=$(mktemp -d)
trap 'rm -rf "$probe"' EXIT
printf '#include <Python.h>\n#include <gmp.h>\nint main(void) { return 0; }\n' >"$probe/probe.c"
include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
has_all() {
    command -v "${CC:-cc}" >/dev/null 2>&1 && "${CC:-cc}" -I"$include" "$probe/probe.c" -lgmp -o "$probe/probe" 2>/dev/null &&
        "$python" -c 'import ensurepip, venv' 2>/dev/null
}
has_all && exit 0

packages="gcc libc6-dev python3-dev python3-venv libgmp-dev"
if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
    echo "installing $packages: libp2p needs a C compiler and GMP's headers"
    apt-get update -qq && apt-get install -y -qq --no-install-recommends $packages >/dev/null
    has_all && exit 0
    fail "still no C compiler with the headers of $python and GMP; install the -dev package of this Python"
fi
if command -v apt-get >/dev/null 2>&1; then
    fail "libp2p needs a C compiler and GMP's headers; run: sudo apt-get install $packages"
elif command -v brew >/dev/null 2>&1; then
    fail "libp2p needs a C compiler and GMP's headers; run: xcode-select --install; brew install gmp"
fi
fail "libp2p needs a C compiler, the headers of $python and those of GMP; install them with your system's package manager"
