# SPDX-License-Identifier: Apache-2.0
"""One serial line to several back ends."""

from __future__ import annotations

from kvmpy.chardev.backend import CharBackend, Receive


class Tee:
    """Output goes to every back end in order, input comes from all; e.g. `Tee(Stdio(), File("log"))`."""

    def __init__(self, *backends: CharBackend) -> None:
        self.backends = backends

    def write(self, data: bytes) -> None:
        """Send `data` to each."""
        for backend in self.backends:
            backend.write(data)

    def attach(self, receive: Receive) -> None:
        """Give the input of each to `receive`."""
        for backend in self.backends:
            backend.attach(receive)

    def close(self) -> None:
        """Close each, also when one fails; then the failures are raised together."""
        errors = []
        for backend in self.backends:
            try:
                backend.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise ExceptionGroup("closing character back ends", errors)
