"""The update of a rule with states of 8 bits: a block of threads decodes a block of codes, updates it, and codes it."""

# Kernels are typed by numba, for every dtype; `bind` supplies the upper-case constants.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import float32, int32

from fastopt.kernels.bind import bind
from fastopt.kernels.codes import MOST, unit_of_block
from fastopt.kernels.contract import CODED, CODES, FLOAT32, N_CHUNK, N_PLACE, Chunk, Place, Storage
from fastopt.kernels.cuda.memory import codec, memory
from fastopt.kernels.cuda.target import THREADS, cuda, device
from fastopt.source import written

# --- what `bind` supplies ---------------------------------------------------------------------------------------------

UPDATED: Callable[..., Any]
"""``updated`` of elementwise.py."""
HYPERPARAMETERS: Callable[..., Any]
"""``hyperparameters`` of elementwise.py, bound to the rule."""
LOAD: Callable[..., Any]
STORE: Callable[..., Any]
"""``memory`` of memory.py, of one element in each of BUFFERS."""
OPAQUE: Callable[..., Any]
"""``opaque`` of memory.py."""
BUFFERS: Callable[..., Any]
OPENED: Callable[..., Any]
PUT: Callable[..., Any]
UNCODED: Callable[..., Any]
LEFT: Callable[..., Any]
MERGED: Callable[..., Any]
CLOSED: Callable[..., Any]
"""What `functions_of` returns."""
DITHERED: Callable[..., Any]
STOCHASTIC: bool
UNPACK_PLACE: Callable[..., Any]
UNPACK_CHUNK: Callable[..., Any]
ITEMSIZE: int
P_BYTES: int
P_SHIFT: int
G_BYTES: int
G_SHIFT: int
"""As in elementwise.py."""
NO_BITS: tuple[Any, ...]
"""A 0 for each coded state."""
N_NUMBERS: int
N_MAXIMA: int
"""How many numbers of a block, and how many maxima, all coded states have in shared memory."""
LOAD_CODE: Callable[..., Any]
STORE_CODE: Callable[..., Any]
LOAD_UNIT: Callable[..., Any]
STORE_UNIT: Callable[..., Any]
"""``memory`` of memory.py, of one code, and of one unit."""
NUMBER: Callable[..., Any]
CODE: Callable[..., Any]
NOISE: Callable[..., Any]
SIZE_BITS: Callable[..., Any]
OF_BITS: Callable[..., Any]
"""Of `fastopt.kernels.codes.Codec`."""
UNIT_OF_BLOCK: Callable[..., Any]
"""``unit_of_block`` of codes.py."""
NOISY: bool
"""Whether codes are rounded at random."""

UNIT_BYTES = 4

# --- one state --------------------------------------------------------------------------------------------------------


def opened(codes, units, coded, at):
    """A number of a state. codes, units : addresses. coded : how many numbers have codes; behind are such without."""
    if at < coded:
        unit = LOAD_UNIT((units,), UNIT_BYTES * (at // CODES))[0][0]
        return NUMBER(LOAD_CODE((codes,), at)[0][0], unit)
    return LOAD_UNIT((units,), UNIT_BYTES * (at - coded + coded // CODES))[0][0]


def closed(codes, units, coded, at, first, number, largest, seed):
    """Write a number of a state. first : whether it is that of its block which writes the unit."""
    if at < coded:
        unit, inverse = UNIT_OF_BLOCK(largest)
        share = OF_BITS(SIZE_BITS(number)) * inverse
        if NOISY:  # noqa: SIM108
            code = CODE(number, share, NOISE(seed, at))
        else:
            code = CODE(number, share, int32(0))
        STORE_CODE((codes,), at, ((code,),))
        if first:
            STORE_UNIT((units,), UNIT_BYTES * (at // CODES), ((unit,),))
    else:
        STORE_UNIT((units,), UNIT_BYTES * (at - coded + coded // CODES), ((number,),))


# --- all of them ------------------------------------------------------------------------------------------------------


def functions_of(storage: Storage, constants: dict[str, Any]) -> dict[str, Any]:
    """What the kernel does with all states of an element.

    - BUFFERS ``(p, states, g)``: the addresses of p, of the states without codes, and of g.
    - OPENED ``(found, states, at)``: the values of an element, of which `found` are in these buffers.
    - UNCODED ``(new)``: those of the new values that belong there.
    - PUT ``(rooms, i, new, largest)``: keep the others in a room each; the bits of the largest so far.
    - LEFT ``(maxima, thread, largest)``, MERGED ``(maxima, thread, other)``: leave them, and take the larger ones.
    - CLOSED ``(states, at, first, rooms, i, maxima, seed)``: write the others.
    """
    count, reads, writes = len(storage.states), constants["READS_GRADIENT"], constants["ZERO_GRAD"]
    places = [k for k, form in enumerate(storage.states) if form in CODED]
    functions: dict[str, Any] = {}
    buffers, opening, uncoded = ["p"], ["found[0]"], ["new[0]"]
    for k in range(count):
        if k in places:
            place = places.index(k)
            opening.append(f"OPEN_{place}(states[{k}], states[{count + place}], states[-1], at)")
        else:
            opening.append(f"found[{len(buffers)}]")
            buffers.append(f"states[{k}]")
            uncoded.append(f"new[{k + 1}]")
    formats = [storage.params, *[form for form in storage.states if form not in CODED]]
    if reads:
        formats.append(storage.grads)
        buffers.append("g")
        opening.append("found[-1]")
    if writes:
        uncoded.append("new[-1]")
    putting, leaving, merging, closing, found = [], [], [], [], []
    for place, k in enumerate(places):
        form = storage.states[k]
        parts = codec(form, place, storage.stochastic)
        own = {**constants, **{name.upper(): part for name, part in parts._asdict().items()}}
        own |= {"NOISY": storage.stochastic, "SHARE": np.float32(1.0 / MOST[form]), "ONE": np.float32(1)}
        own["LOAD_CODE"], own["STORE_CODE"] = memory(np.dtype(form), 1, True)
        own["LOAD_UNIT"], own["STORE_UNIT"] = memory(np.dtype(FLOAT32), 1, True)
        own["UNIT_OF_BLOCK"] = bind(unit_of_block, own, label="unit_of_block", scalar=device)
        functions[f"OPEN_{place}"] = bind(opened, own, label="opened", scalar=device)
        functions[f"CLOSE_{place}"] = bind(closed, own, label="closed", scalar=device)
        functions |= {"LARGER": parts.larger, "SIZE_BITS": parts.size_bits}
        room, line = f"rooms[{CODES * place} + i]", f"maxima[{THREADS * place} + thread]"
        other = f"maxima[{THREADS * place} + other]"
        putting.append(f"{room} = new[{k + 1}]")
        found.append(f"LARGER(largest[{place}], SIZE_BITS(new[{k + 1}]))")
        leaving.append(f"{line} = largest[{place}]")
        merging.append(f"{line} = LARGER({line}, {other})")
        arguments = (
            f"states[{k}], states[{count + place}], states[-1], at, first, {room}, maxima[{THREADS * place}], seed"
        )
        closing.append(f"CLOSE_{place}({arguments})")

    def made(name: str, parameters: list[str], lines: list[str]) -> Any:
        return written(name, parameters, lines, functions, __name__)

    load, store = memory(np.dtype(FLOAT32), 1, True, tuple(formats))
    return {
        "LOAD": load,
        "STORE": store,
        "N_NUMBERS": len(places) * CODES,
        "N_MAXIMA": len(places) * THREADS,
        "NO_BITS": (np.int32(0),) * len(places),
        "BUFFERS": made("buffers", ["p", "states", "g"], [f"return ({', '.join(buffers)},)"]),
        "OPENED": made("opened_all", ["found", "states", "at"], [f"return ({', '.join(opening)},)"]),
        "UNCODED": made("uncoded", ["new"], [f"return ({', '.join(uncoded)},)"]),
        "PUT": made("put_all", ["rooms", "i", "new", "largest"], [*putting, f"return ({', '.join(found)},)"]),
        "LEFT": made("left_all", ["maxima", "thread", "largest"], [*leaving, "return None"]),
        "MERGED": made("merged_all", ["maxima", "thread", "other"], [*merging, "return None"]),
        "CLOSED": made(
            "closed_all", ["states", "at", "first", "rooms", "i", "maxima", "seed"], [*closing, "return None"]
        ),
    }


# --- the kernel -------------------------------------------------------------------------------------------------------


def coded(places, states, table, chunks, n):
    """Update n chunks by a rule whose every element stands alone.

    states : the addresses of the buffers of states, and last how many numbers have codes.
    """
    rooms = cuda.shared.array(N_NUMBERS, float32)
    maxima = cuda.shared.array(N_MAXIMA, int32)
    thread = cuda.threadIdx.x
    c = cuda.blockIdx.x
    while c < n:
        chunk = Chunk(*UNPACK_CHUNK(chunks, N_CHUNK * c))
        place = Place(*UNPACK_PLACE(places, N_PLACE * chunk.place))
        context = HYPERPARAMETERS(table, chunk.group)
        start = chunk.start
        while start < chunk.stop:
            size = min(CODES, chunk.stop - start)
            at = place.state + start
            first = OPAQUE(ITEMSIZE * at)
            p = OPAQUE(place.p + P_BYTES * start - (first >> P_SHIFT))
            g = OPAQUE(place.g + G_BYTES * (chunk.grad + start - chunk.start) - (first >> G_SHIFT))
            buffers = BUFFERS(p, states, g)
            largest = NO_BITS
            i = thread
            while i < size:
                values = OPENED(LOAD(buffers, first + ITEMSIZE * i)[0], states, at + i)
                new, _, _ = UPDATED(values, context)
                if STOCHASTIC:
                    new = DITHERED((new,), context[0].noise, at + i)[0]
                STORE(buffers, first + ITEMSIZE * i, (UNCODED(new),))
                largest = PUT(rooms, i, new, largest)
                i += THREADS
            LEFT(maxima, thread, largest)
            cuda.syncthreads()
            width = THREADS // 2
            while width > 0:
                if thread < width:
                    MERGED(maxima, thread, thread + width)
                cuda.syncthreads()
                width //= 2
            i = thread
            while i < size:
                CLOSED(states, at + i, i == 0, rooms, i, maxima, context[0].noise)
                i += THREADS
            cuda.syncthreads()
            start += CODES
        c += cuda.gridDim.x
