# SPDX-License-Identifier: Apache-2.0
"""The first program of kvmpy's Linux guests: a shell script for busybox.

It prints `READY` as soon as it runs, so that a test or a benchmark can wait for one line, and obeys these
words of the kernel command line (make them with `parameters()`, which quotes):

    kvmpy.run="COMMAND"     run it with sh, print `EXIT_STATUS` and its status, power off
    kvmpy.run64=BASE64      the same, for commands that hold quotes
    kvmpy.exit=PORT         after the command, write its status to this I/O port (a debug-exit device) instead
    kvmpy.modules=A,B       load these modules too (the initramfs must hold them)
    kvmpy.reboot            end with a reset instead of a power-off
    root=DEVICE             mount it (also UUID=... or LABEL=..., of type rootfstype=, read-only unless "rw" is there),
                            and start its /sbin/init, or init=, as the first program

Without a command or a root there is a root shell on the console; the guest powers off when it ends.
"""

from __future__ import annotations

import base64

READY = "kvmpy: init reached"
EXIT_STATUS = "kvmpy: exit status"

SCRIPT = (
    f"""#!/bin/busybox sh
# A shell of its own comes first: nothing but the kernel and busybox is needed for this line.
echo "{READY}"
"""
    + r"""
B=/bin/busybox
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM="${TERM:-vt100}"
$B mount -t proc proc /proc
$B mount -t sysfs sysfs /sys
$B mount -t devtmpfs devtmpfs /dev
$B mkdir -p /dev/pts /dev/shm
$B mount -t devpts devpts /dev/pts
$B mount -t tmpfs tmpfs /dev/shm
$B mount -t tmpfs tmpfs /run
$B mount -t tmpfs tmpfs /tmp
$B --install -s
exec < /dev/console > /dev/console 2>&1
ip link set lo up
hostname kvmpy

# Words of the command line; one in double quotes may hold spaces.
command= run= exit_port= modules= reboot=
line=" $(cat /proc/cmdline) "
word() {  # NAME: print its value, or fail
    case $line in
        *" $1=\""*) rest=${line#*" $1=\""}; echo "${rest%%\"*}" ;;
        *" \"$1="*) rest=${line#*" \"$1="}; echo "${rest%%\"*}" ;;
        *" $1="*) rest=${line#*" $1="}; echo "${rest%% *}" ;;
        *) return 1 ;;
    esac
}
if command=$(word kvmpy.run64); then run=yes; command=$(echo "$command" | base64 -d)
elif command=$(word kvmpy.run); then run=yes
fi
exit_port=$(word kvmpy.exit)
modules=$(word kvmpy.modules)
case $line in *" kvmpy.reboot "*) reboot=yes ;; esac

# Drivers for the devices that are there. A transport brings devices of its own, hence twice.
if [ -e "/lib/modules/$(uname -r)/modules.dep" ]; then
    for pass in 1 2; do
        find /sys/devices -name modalias -exec cat {} + 2>/dev/null | sort -u |
            xargs -r modprobe -a -b -q 2>/dev/null
    done
    for module in $(echo "$modules" | tr , ' '); do
        modprobe "$module" || echo "kvmpy: no module $module"
    done
fi

# Another system's root: the kernel's own words, which it leaves to us as there is an initramfs.
if root=$(word root); then
    case $root in UUID=*|LABEL=*) find="findfs $root" ;; *) find="ls $root" ;; esac
    for attempt in 1 2 3 4 5 6 7 8 9 10; do device=$($find 2>/dev/null) && break; sleep 0.5; done
    type=$(word rootfstype) && type="-t $type"
    case $line in *" rw "*) how=rw ;; *) how=ro ;; esac
    program=$(word init) || program=/sbin/init
    if mount $type -o "$how" "${device:-$root}" /mnt; then
        for place in dev proc sys run; do mount --move "/$place" "/mnt/$place"; done
        exec switch_root /mnt "$program"
    fi
    echo "kvmpy: $root cannot be mounted"
fi

if [ "$run" ]; then
    sh -c "$command"
    status=$?
    echo "kvmpy: exit status $status"
    if [ "$exit_port" ]; then
        printf "\\$(printf %o "$status")" | dd of=/dev/port bs=1 seek=$((exit_port)) conv=notrunc 2>/dev/null
    fi
else
    echo "kvmpy: a shell on the console; it ends with 'exit', and the guest with it"
    setsid cttyhack sh
fi
sync
if [ "$reboot" ]; then reboot -f; else poweroff -f; fi
"""
)


def parameters(
    run: str | None = None,
    *,
    exit_port: int | None = None,
    modules: tuple[str, ...] = (),
    reboot: bool = False,
) -> str:
    """Make the words for the kernel command line that this init obeys, quoted as needed.

    Arguments: run, a shell command (it may hold anything but NUL); exit_port, I/O port of a debug-exit
    device; modules, names of modules to load; reboot, reset instead of powering off.
    Returns: the words, joined by spaces. Errors: ValueError.
    """
    words: list[str] = []
    if run is not None:
        if "\0" in run:
            raise ValueError("a command cannot hold NUL")
        # In plain text it is readable in the guest's log, but must not hold what init looks for.
        plain = run.isascii() and run.isprintable() and '"' not in run and "kvmpy." not in run and run != ""
        packed = base64.b64encode(run.encode()).decode()
        words.append(f'kvmpy.run="{run}"' if plain else f"kvmpy.run64={packed}")
    if exit_port is not None:
        if not 0 <= exit_port <= 0xFFFF:
            raise ValueError(f"exit_port={exit_port:#x} is no I/O port")
        words.append(f"kvmpy.exit={exit_port:#x}")
    if modules:
        for name in modules:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"{name!r} is no module name")
        words.append("kvmpy.modules=" + ",".join(modules))
    if reboot:
        words.append("kvmpy.reboot")
    return " ".join(words)
