"""The update of a rule with states of 8 bits: blocks of codes are decoded into the cache, updated, and coded again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from fastopt.kernels.bind import bind
from fastopt.kernels.codes import MOST, codec, unit_of_block
from fastopt.kernels.contract import CODED, CODES, N_CHUNK, N_PLACE, PROCEEDS, Chunk, Place, Storage
from fastopt.kernels.elements import scalar
from fastopt.kernels.intrinsics import at_address, put_values, record, rooms_for, values_at, window, windows
from fastopt.source import written

# --- what `bind` supplies ---------------------------------------------------------------------------------------------

P_TYPE: Any
G_TYPE: Any
READ: Callable[..., Any]
READ_GRAD: Callable[..., Any]
WRITE: Callable[..., Any]
DITHERED: Callable[..., Any]
STOCHASTIC: bool
ELEMENT: Callable[..., Any]
HYPERPARAMETERS: Callable[..., Any]
ZERO: Any
ZERO_GRAD: bool
"""As in elementwise.py."""
NUMBERS: tuple[Any, ...]
NO_BITS: tuple[Any, ...]
CODES_OF: Callable[..., Any]
UNITS_OF: Callable[..., Any]
BUFFERS: Callable[..., Any]
DECODED: Callable[..., Any]
LARGER_OF: Callable[..., Any]
SCALED: Callable[..., Any]
ENCODED: Callable[..., Any]
"""What `functions_of` returns."""

ROOMS = rooms_for(CODES)


def functions_of(storage: Storage, constants: dict[str, Any]) -> dict[str, Any]:
    """Return what the loop does with all coded states of an element, in tuples.

    - NUMBERS, NO_BITS: a 0 for each, as a number and as the bits of one.
    - CODES_OF and UNITS_OF ``(states)``: their arrays.
    - BUFFERS ``(p, states, rooms, first, size)``: the buffers of the update, which has decoded states in rooms.
    - DECODED ``(codes, units)``: numbers.
    - LARGER_OF ``(largest, new)``: the bits of the largest so far, with those of an element of p and all states.
    - SCALED ``(largest)``: the units, and the inverse ones.
    - ENCODED ``(numbers, inverses, seed, index)``: codes.
    """
    count = len(storage.states)
    coded = [k for k, form in enumerate(storage.states) if form in CODED]
    functions: dict[str, Any] = {"WINDOW": window}
    for place, k in enumerate(coded):
        form = storage.states[k]
        parts = codec(form, place, storage.stochastic, types, intrinsic)
        functions |= {f"{name.upper()}_{place}": part for name, part in parts._asdict().items()}
        own = {**constants, "OF_BITS": parts.of_bits, "SHARE": np.float32(1.0 / MOST[form]), "ONE": np.float32(1)}
        functions[f"UNIT_{place}"] = bind(unit_of_block, own, label="unit_of_block", scalar=scalar)

    def each(item: str) -> str:
        """The source of a tuple of an item for each coded state: `place` is its place among them, `k` that of all."""
        return "(" + "".join([item.format(place=place, k=k) + ", " for place, k in enumerate(coded)]) + ")"

    def made(name: str, parameters: list[str], *lines: str) -> Any:
        return written(name, parameters, lines, functions, __name__)

    rooms = [f"rooms[{coded.index(k)}]" if k in coded else f"WINDOW(states[{k}], first, size)" for k in range(count)]
    larger = each("LARGER_{place}(largest[{place}], SIZE_BITS_{place}(new[{k} + 1]))")
    noise = "NOISE_{place}(seed, index)" if storage.stochastic else "0"
    share = "OF_BITS_{place}(SIZE_BITS_{place}(numbers[{place}])) * inverses[{place}]"
    units, inverses = each("found[{place}][0]"), each("found[{place}][1]")
    codes = each(f"CODE_{{place}}(numbers[{{place}}], {share}, {noise})")
    return {
        "NUMBERS": (np.float32(0),) * len(coded),
        "NO_BITS": (np.int32(0),) * len(coded),
        "CODES_OF": made("codes_of", ["states"], f"return {each('states[{k}]')}"),
        "UNITS_OF": made("units_of", ["states"], f"return {each(f'states[{count} + {{place}}]')}"),
        "BUFFERS": made("buffers", ["p", "states", "rooms", "first", "size"], f"return (p, {', '.join(rooms)})"),
        "DECODED": made(
            "decoded", ["codes", "units"], f"return {each('NUMBER_{place}(codes[{place}], units[{place}])')}"
        ),
        "LARGER_OF": made("larger_of", ["largest", "new"], f"return {larger}"),
        "SCALED": made(
            "scaled", ["largest"], f"found = {each('UNIT_{place}(largest[{place}])')}", f"return {units}, {inverses}"
        ),
        "ENCODED": made("encoded", ["numbers", "inverses", "seed", "index"], f"return {codes}"),
    }


# --- the loop ---------------------------------------------------------------------------------------------------------


def coded(places, states, table, chunks, first, last):
    """Update chunks by a rule whose every element stands alone; backwards where `last` is the smaller."""
    table[0, PROCEEDS] = ZERO
    rooms, codes, units = ROOMS(NUMBERS), CODES_OF(states), UNITS_OF(states)
    all_codes = codes[0].size
    backwards = last < first
    count = first - last if backwards else last - first
    for k in range(count):
        chunk = record(Chunk, chunks, (first - 1 - k if backwards else first + k) * N_CHUNK)
        place = record(Place, places, chunk.place * N_PLACE)
        step, h = HYPERPARAMETERS(table, chunk.group)
        for start in range(chunk.start, chunk.stop, CODES):
            size = min(CODES, chunk.stop - start)
            at = place.state + start
            p = at_address(P_TYPE, place.p, start, size)
            g = (at_address(G_TYPE, place.g, chunk.grad + start - chunk.start, size),)
            updated = BUFFERS(p, states, rooms, at, size)
            if at < all_codes:
                stored = windows(codes, at, size)
                unit = values_at(units, at // CODES)
                for i in range(size):
                    put_values(rooms, i, DECODED(values_at(stored, i), unit))
            else:
                numbers = windows(units, at - all_codes + all_codes // CODES, size)
                for i in range(size):
                    put_values(rooms, i, values_at(numbers, i))
            largest = NO_BITS
            for i in range(size):
                values = READ(updated, i)
                new = ELEMENT(step, values[0], READ_GRAD(g, i)[0], *values[1:], h)
                if STOCHASTIC:
                    WRITE(updated, i, DITHERED(new, step.noise, at + i))
                else:
                    WRITE(updated, i, new)
                largest = LARGER_OF(largest, new)
                if ZERO_GRAD:
                    g[0][i] = G_TYPE(0)
            if at < all_codes:
                stored = windows(codes, at, size)
                unit, inverse = SCALED(largest)
                put_values(units, at // CODES, unit)
                for i in range(size):
                    put_values(stored, i, ENCODED(values_at(rooms, i), inverse, step.noise, at + i))
            else:
                numbers = windows(units, at - all_codes + all_codes // CODES, size)
                for i in range(size):
                    put_values(numbers, i, values_at(rooms, i))
