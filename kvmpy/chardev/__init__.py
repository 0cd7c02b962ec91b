# SPDX-License-Identifier: Apache-2.0
"""Character back ends: where the bytes of a serial port go and where its input comes from.

| back end | output | input |
|---|---|---|
| `Console` | kept in memory, `expect()` | `send()` |
| `Stdio` | standard output | standard input; a terminal is in raw mode meanwhile |
| `Pty` | a pseudo terminal for `screen /dev/pts/N` | the same |
| `Socket` | a client of a unix socket, or a server | the same |
| `File` | a file | none |
| `Null` | nowhere | none |
| `Tee` | several back ends | all of them |
| `Mux` | one back end shared by several ports | the chosen port, Ctrl-A C switches |
"""

from kvmpy.chardev.backend import CharBackend as CharBackend
from kvmpy.chardev.backend import Receive as Receive
from kvmpy.chardev.console import Console as Console
from kvmpy.chardev.console import Found as Found
from kvmpy.chardev.file import File as File
from kvmpy.chardev.mux import Mux as Mux
from kvmpy.chardev.null import Null as Null
from kvmpy.chardev.pty import Pty as Pty
from kvmpy.chardev.socket import Socket as Socket
from kvmpy.chardev.stdio import Stdio as Stdio
from kvmpy.chardev.tee import Tee as Tee
