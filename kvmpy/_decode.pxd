# SPDX-License-Identifier: Apache-2.0

from kvmpy._exit cimport Exit, RunPage

cdef Exit decode_page(RunPage page)
cdef Exit interrupted(RunPage page)
cdef list history(RunPage page)
cdef dict exit_counts(RunPage page)
