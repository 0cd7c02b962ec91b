# SPDX-License-Identifier: Apache-2.0
"""What a guest's kernel does with a shared folder: FUSE requests over the queues of the device, one at a time."""

import os
import struct

from virtio_rig import Rig

from kvmpy.virtio import SharedFolder, fuse
from kvmpy.virtio.fuse import Op

ROOT = 1
ENTRY_SIZE = fuse.ENTRY.size + fuse.ATTR.size
OPEN_IN = struct.Struct("<I4x")


class Client:
    """What a guest's kernel does with the device."""

    def __init__(self, path, threaded, **options):
        self.device = SharedFolder(path, "tag", threaded=threaded, **options)
        self.rig = Rig(self.device)
        self.unique = 0

    def start(self):
        self.rig.start()
        self.call(Op.INIT, 0, struct.pack("<IIII", 7, 31, 65536, 0xFFFF_FFFF))
        return self

    def raw(self, message, room=4096, queue=1):
        driver = self.rig.driver
        driver.free_all()
        return driver.queues[queue].request([message], [room])[0]

    def send(self, op, node, body=b"", room=4096, uid=0, gid=0):
        """(errno, answer)"""
        self.unique += 1
        header = struct.pack("<IIQQIII4x", 40 + len(body), op, self.unique, node, uid, gid, 1)
        reply = self.raw(header + body, 16 + room)
        size, error, unique = struct.unpack_from("<IiQ", reply)
        assert unique == self.unique and 16 <= size <= 16 + room and error <= 0
        return -error, reply[16:size]

    def call(self, op, node, body=b"", room=4096, **who):
        error, reply = self.send(op, node, body, room, **who)
        if error:
            raise OSError(error, os.strerror(error))
        return reply

    # -- shorthands

    def lookup(self, parent, name):
        return struct.unpack_from("<Q", self.call(Op.LOOKUP, parent, name + b"\0"))[0]

    def attr(self, node):
        reply = self.call(Op.GETATTR, node, bytes(16))
        return dict(
            zip(("ino", "size", "blocks", "atime", "mtime", "ctime"), struct.unpack_from("<6Q", reply, 16), strict=True)
        ) | {"mode": struct.unpack_from("<I", reply, 16 + 60)[0]}

    def open(self, node, flags=os.O_RDWR):
        return struct.unpack_from("<Q", self.call(Op.OPEN, node, OPEN_IN.pack(flags)))[0]

    def create(self, parent, name, mode=0o644, flags=os.O_RDWR):
        reply = self.call(Op.CREATE, parent, struct.pack("<II8x", flags | os.O_CREAT, mode) + name + b"\0")
        return struct.unpack_from("<Q", reply)[0], struct.unpack_from("<Q", reply, ENTRY_SIZE)[0]

    def read(self, node, handle, offset, size, room=None):
        body = struct.pack("<QQIIQII", handle, offset, size, 0, 0, 0, 0)
        return self.call(Op.READ, node, body, size if room is None else room)

    def write(self, node, handle, offset, data):
        body = struct.pack("<QQIIQII", handle, offset, len(data), 0, 0, 0, 0)
        return struct.unpack_from("<I", self.call(Op.WRITE, node, body + data))[0]

    def mkdir(self, parent, name, mode=0o755):
        return struct.unpack_from("<Q", self.call(Op.MKDIR, parent, struct.pack("<I4x", mode) + name + b"\0"))[0]

    def rename(self, parent, name, new_parent, new_name, flags=0):
        body = struct.pack("<QI4x", new_parent, flags) + name + b"\0" + new_name + b"\0"
        return self.call(Op.RENAME2, parent, body)

    def list(self, node, op=Op.READDIR, size=512):
        handle = struct.unpack_from("<Q", self.call(Op.OPENDIR, node, bytes(8)))[0]
        names, offset = [], 0
        while True:
            body = struct.pack("<QQIIQII", handle, offset, size, 0, 0, 0, 0)
            reply = self.call(op, node, body, size)
            if not reply:
                break
            while reply:
                extra = ENTRY_SIZE if op == Op.READDIRPLUS else 0
                _, offset, length, kind = struct.unpack_from("<QQII", reply, extra)
                names.append((reply[extra + 24 : extra + 24 + length], kind))
                reply = reply[(extra + 24 + length + 7) & ~7 :]
        self.call(Op.RELEASEDIR, node, struct.pack("<Q16x", handle))
        return names

    def setattr(self, node, valid, *, size=0, mode=0, uid=0, gid=0, atime=0, mtime=0, handle=0):
        body = struct.pack("<I4xQQ8xQQQIIII4xII4x", valid, handle, size, atime, mtime, 0, 0, 0, 0, mode, uid, gid)
        return self.call(Op.SETATTR, node, body)
