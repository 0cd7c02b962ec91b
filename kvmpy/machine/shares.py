# SPDX-License-Identifier: Apache-2.0
"""The folders that a machine shares with its guest."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self

from kvmpy.machine import words
from kvmpy.virtio import SharedFolder, VirtioDevice


@dataclass(frozen=True, slots=True)
class Share:
    """A folder of the host for the guest: `Share("/srv/data", readonly=True)`.

    folder: its path. tag: what the guest mounts. readonly: the guest changes nothing.
    """

    folder: str | os.PathLike[str]
    tag: str = "host"
    readonly: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """A share from "FOLDER[,tag=TAG][,readonly=on]"; a comma in a path is doubled. Raises ValueError."""
        folder, options = words.split(text)
        if not folder:
            raise ValueError(f"{text!r} names no folder: it is FOLDER[,tag=TAG][,readonly=on]")
        return cls(folder, **words.convert(text, options, {"tag": str, "readonly": words.switch}))

    def device(self, name: str) -> VirtioDevice:
        """The virtio device. Raises OSError."""
        return SharedFolder(self.folder, self.tag, readonly=self.readonly, name=name)
