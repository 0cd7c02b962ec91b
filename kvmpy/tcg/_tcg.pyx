# SPDX-License-Identifier: Apache-2.0
# cython: auto_pickle=False
"""The software CPU as an engine; everything behind the door is C that knows no Python."""

from cpython.pycapsule cimport PyCapsule_New

cdef extern from "engine.h" nogil:
    """
    extern const struct kvmpy_engine kvmpy_tcg_engine;
    """
    ctypedef struct kvmpy_engine:
        pass
    const kvmpy_engine kvmpy_tcg_engine
    const char *KVMPY_ENGINE_CAPSULE


def engine():
    """The engine, as the capsule that Kvm() takes."""
    return PyCapsule_New(<void *> &kvmpy_tcg_engine, KVMPY_ENGINE_CAPSULE, NULL)
