#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Runs a command where there is no /dev/kvm: in a mount namespace of its own, with a /dev of the few nodes that
# programs need. For trying what users see on machines without KVM:
#
#     tools/without_kvm.sh make demo
set -eu
[ $# -gt 0 ] || { echo "usage: $0 COMMAND..." >&2; exit 2; }
if [ -z "${KVMPY_HIDDEN_DEV:-}" ]; then
    KVMPY_HIDDEN_DEV=$(mktemp -d)
    export KVMPY_HIDDEN_DEV
    user=
    [ "$(id -u)" = 0 ] || user=--map-root-user
    status=0
    unshare --mount $user "$0" "$@" || status=$?
    rmdir "$KVMPY_HIDDEN_DEV"
    exit $status
fi
dev=$KVMPY_HIDDEN_DEV
mount -t tmpfs -o mode=755 tmpfs "$dev"
for node in null zero full random urandom tty userfaultfd; do
    [ -e "/dev/$node" ] || continue
    : > "$dev/$node"
    mount --bind "/dev/$node" "$dev/$node"
done
for folder in pts shm net; do
    [ -d "/dev/$folder" ] || continue
    mkdir "$dev/$folder"
    mount --rbind "/dev/$folder" "$dev/$folder"
done
ln -s pts/ptmx "$dev/ptmx"
for link in fd stdin stdout stderr; do
    ln -s "/proc/self/fd/$(case $link in stdin) echo 0 ;; stdout) echo 1 ;; stderr) echo 2 ;; *) echo . ;; esac)" "$dev/$link"
done
mount --rbind "$dev" /dev
unset KVMPY_HIDDEN_DEV
exec "$@"
