# SPDX-License-Identifier: Apache-2.0
"""The exit statuses of the `kvmpy` command.

Those above 64 follow sysexits.h where it has a fitting one, 124 is timeout(1)'s, 128 + N is the shell's for a
signal. A debug-exit device may give any of them too; `--json` always tells them apart.
"""

from __future__ import annotations

OK = 0  # done; of `run`: the guest powered off
FAILED = 1  # an error that has no number of its own
USAGE = 2  # argparse's: wrong words on the command line
BAD_IMAGE = 65  # a kernel, initrd, firmware or package that cannot be used
UNAVAILABLE = 69  # no processor engine, no permission, or a stock guest that cannot be had
GUEST_FAILED = 70  # the guest cannot go on: triple fault, emulation failure, unexpected exit
RESET = 71  # the guest asked for a reset (a machine runs once; start it again for the next boot)
HALTED = 72  # every processor has halted for good
HOST_ERROR = 74  # the host refused something else: a file, memory, a socket
TIMEOUT = 124  # --timeout is over
INTERRUPTED = 130  # Ctrl-C
TERMINATED = 143  # SIGTERM

TEXT = f"""\
exit status:
  {OK:<5} the guest powered off
  N     the guest wrote to the debug-exit port, and N is the status it chose
  {FAILED:<5} an error of kvmpy itself
  {USAGE:<5} wrong usage
  {BAD_IMAGE:<5} a kernel, initrd, firmware or option file cannot be loaded
  {UNAVAILABLE:<5} no usable processor engine, or a stock guest is not there (see kvmpy doctor, kvmpy guest)
  {GUEST_FAILED:<5} the guest failed: triple fault, emulation failure, unexpected exit (report on stderr)
  {RESET:<5} the guest asked for a reset
  {HALTED:<5} every processor halted for good
  {HOST_ERROR:<5} another error of the host (a file, memory, a socket)
  {TIMEOUT:<5} the time of --timeout is over
  {INTERRUPTED:<5} Ctrl-C ({TERMINATED}: SIGTERM)
"""
