#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Runs tests with the compiled parts under ASan and UBSan, in a copy of the tree (build/asan; building it takes minutes):
#
#     tools/with_asan.sh -q tests/virtio
#     KVMPY_FUZZ_SECONDS=300 tools/with_asan.sh -q tests/virtio/test_virtio_fuzz.py -k vsock
#
# So the C code beneath what is written in Python is looked at too. PYTHON is the interpreter (.venv/bin/python).
set -eu
[ $# -gt 0 ] || { echo "usage: $0 PYTEST-ARGUMENTS..." >&2; exit 2; }
cd "$(dirname "$0")/.."
root=$PWD copy=$PWD/build/asan
PYTHON=${PYTHON:-$root/.venv/bin/python}
mkdir -p "$copy"
git ls-files -z | xargs -0 cp --parents -u -p -t "$copy"
cd "$copy"
KVMPY_BUILD=asan "$PYTHON" setup.py -q build_ext --inplace >&2
mkdir -p build/plain
for tool in qemu-img qemu-io qemu-nbd qemu-system-x86_64 nbdkit gdb; do # they hang or stop under a sanitizer that is not theirs
    path=$(command -v "$tool") || continue
    printf '#!/bin/sh\nunset LD_PRELOAD\nexec %s "$@"\n' "$path" > "build/plain/$tool"
    chmod +x "build/plain/$tool"
done
PATH="$copy/build/plain:$PATH"
LD_PRELOAD="$(cc -print-file-name=libasan.so) $(cc -print-file-name=libubsan.so)"
ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 # Python leaves memory to the end of the process
UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export PATH LD_PRELOAD ASAN_OPTIONS UBSAN_OPTIONS PYTHONPATH="$copy"
exec "$PYTHON" -m pytest -p no:cacheprovider -o faulthandler_timeout=7200 "$@"
