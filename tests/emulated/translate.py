"""PTX to C: each instruction becomes a call of the function of its name in machine.h, on registers of raw bits."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

WIDTHS = {"pred": "pred", "8": "uint8_t", "16": "b16", "32": "b32", "64": "b64"}
"""The C types of registers, by the bits in the name of a PTX type."""
SPECIAL = {f"%{name}.x": f"thread->{name}" for name in ("tid", "ntid", "ctaid", "nctaid")}
UNTYPED = ("mov", "selp")
"""Instructions that move bits, whatever their type says that these mean."""
STATEMENT = re.compile(r"\s*(?:(?P<label>[$\w]+):|(?P<brace>[{}])|(?P<text>[^;]+);)")
DECLARATION = r"\.(?:align (\d+) )?\.?(\w+) ([$\w]+)(?:\[(\d+)\])?"


def translate(ptx: str) -> str:
    """The C source of the one kernel of a PTX module. Raises ValueError for what this machine does not have."""
    text = re.sub(r"//[^\n]*", "", ptx.rstrip("\0"))
    entry = re.search(r"\.entry\s+([$\w]+)\s*\(([^)]*)\)[^{]*\{(.*)\}\s*$", text, re.DOTALL)
    if entry is None or text.count(".entry") != 1 or re.search(r"\.func\b|\.local\b|\.extern\b", text):
        raise ValueError("PTX: must be one kernel without functions, local memory or external symbols")
    return _Kernel().translated(entry[2], entry[3])


def _bits(kind: str) -> str:
    """What of a PTX type decides about its C type: ``"pred"``, or the number of bits."""
    return kind if kind == "pred" else kind[1:]


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


@dataclass
class _Kernel:
    scopes: list[dict[str, str]] = field(default_factory=lambda: [{}])
    """The C names of registers, by their PTX names; those of an inner block hide those of an outer one."""
    registers: dict[str, str] = field(default_factory=dict)
    """C types, by C name."""
    shared: dict[str, int] = field(default_factory=dict)
    """Where shared arrays begin."""
    shared_size: int = 0
    parameters: dict[str, int] = field(default_factory=dict)
    """Where arguments begin."""
    code: list[str] = field(default_factory=list)
    sites: list[str] = field(default_factory=lambda: [""])
    units: list[int] = field(default_factory=lambda: [8])
    """The sizes of all accesses to memory."""
    barriers: int = 0

    def translated(self, parameters: str, body: str) -> str:
        sizes, offsets = self._arguments(parameters)
        at = 0
        while match := STATEMENT.match(body, at):
            at = match.end()
            if match["label"]:
                self.code.append(f"{_identifier(match['label'])}:;")
            elif match["brace"]:
                self.scopes = [*self.scopes, {}] if match["brace"] == "{" else self.scopes[:-1]
            else:
                self._statement(" ".join(match["text"].split()))
        if body[at:].strip():
            raise ValueError(f"PTX: must be a list of statements, got {body[at:].strip()[:60]!r}")
        code = "\n".join(self.code)
        used = [name for name in self.registers if re.search(rf"\br->{name}\b", code)]
        fields = "".join(f"{self.registers[name]} {name}; " for name in used)
        resumes = "".join(f" case {k}: goto resume_{k};" for k in range(1, self.barriers + 1))
        sites = ", ".join(f'"{site}"' for site in self.sites)
        return f"""#include "machine.h"
typedef struct {{ {fields}uint8_t none; }} Registers;
static b32 body(Thread *thread) {{
Registers *r = thread->registers;
switch (thread->barrier) {{ case 0: break;{resumes} }}
{code}
}}
static const b32 offsets[] = {{{", ".join(map(str, offsets))}}}, sizes[] = {{{", ".join(map(str, sizes))}}};
static const char *const sites[] = {{{sites}}};
const Kernel kernel = {{body, sizeof(Registers), {self.shared_size}, {min(self.units)}, {len(sizes)}, offsets, sizes,
                       sites}};
"""

    def _arguments(self, parameters: str) -> tuple[list[int], list[int]]:
        """The size and the place of each argument."""
        sizes, offsets, end = [], [], 0
        for kind, name in re.findall(r"\.param\s+\.(\w+)[^,]*?([$\w]+)\s*(?:,|$)", parameters):
            size = int(_bits(kind)) // 8
            end = -(-end // size) * size
            self.parameters[name] = end
            sizes.append(size)
            offsets.append(end)
            end += size
        if len(sizes) != parameters.count(".param"):
            raise ValueError("PTX: arguments must be numbers")
        return sizes, offsets

    # --- statements ---------------------------------------------------------------------------------------------------

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self._declare(text)
        elif text.startswith(".shared"):
            match = re.fullmatch(rf"\.shared {DECLARATION}", text)
            if match is None or match[4] is None:
                raise ValueError(f"PTX: shared memory must be arrays of a known size, got {text!r}")
            size = int(_bits(match[2])) // 8 * int(match[4])
            start = -(-self.shared_size // 16) * 16
            self.shared[match[3]], self.shared_size = start, start + size
        elif not text.startswith(".pragma"):
            predicate = re.match(r"@(!?)(%\w+) (.*)", text)
            if predicate:
                self.code.append(f"if ({predicate[1]}{self._register(predicate[2])})")
                text = predicate[3]
            operation, _, operands = text.partition(" ")
            listed = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", operands)
            self.code.append(self._instruction(operation.split("."), listed, text))

    def _declare(self, text: str) -> None:
        kind, names = re.fullmatch(r"\.reg \.(\w+) (.*)", text).groups()  # type: ignore[union-attr]
        for name in re.split(r",\s*", names.strip()):
            numbered = re.fullmatch(r"([%$\w]+)<(\d+)>", name)
            count = int(numbered[2]) if numbered else 1
            for each in [f"{numbered[1]}{k}" for k in range(count)] if numbered else [name]:
                mine = f"{_identifier(each)}_{len(self.registers)}"
                self.scopes[-1][each] = mine
                self.registers[mine] = WIDTHS[_bits(kind)]

    def _register(self, name: str) -> str:
        found = next((scope[name] for scope in reversed(self.scopes) if name in scope), None)
        if found is None:
            raise ValueError(f"PTX: must be a register, got {name!r}")
        return f"r->{found}"

    def _operand(self, operand: str) -> str:
        """A register, a constant, an address of shared memory, or the number of a thread or a block."""
        if operand.startswith("!"):
            return f"!{self._operand(operand[1:])}"
        if operand in SPECIAL:
            return SPECIAL[operand]
        if operand in self.shared:
            return f"(SHARED + {self.shared[operand]})"
        if match := re.fullmatch(r"0[fd]([0-9A-F]{8}|[0-9A-F]{16})", operand, re.IGNORECASE):
            return f"0x{match[1]}ull"
        if re.fullmatch(r"-?(\d+|0x[0-9a-fA-F]+)U?", operand):
            return "(-0x7fffffffffffffffll - 1)" if operand == str(-(2**63)) else f"{operand.rstrip('U')}ll"
        return self._register(operand)

    def _address(self, operand: str) -> str:
        base, sign, offset = re.fullmatch(r"\[([%$\w]+)(?:([+-])(-?\d+))?\]", operand).groups()  # type: ignore[union-attr]
        start = str(self.parameters[base]) if base in self.parameters else self._operand(base)
        return f"{start} {sign} ({offset})" if sign else start

    # --- instructions -------------------------------------------------------------------------------------------------

    def _instruction(self, words: list[str], operands: list[str], text: str) -> str:
        name = words[0]
        if name in ("ld", "st"):
            return self._access(words, operands, text)
        if name == "ret":
            return "return 0;"
        if name == "bra":
            return f"goto {_identifier(operands[0])};"
        if words[:2] == ["bar", "sync"] and operands == ["0"]:
            return self._wait("0")
        if words == ["bar", "red", "or", "pred"] and operands[1] == "0":
            return f"{self._wait(self._operand(operands[2]))} {self._register(operands[0])} = thread->vote;"
        if words == ["mov", "b32"] and "{" in operands[0] + operands[1]:  # two halves of a register
            return self._halves(operands)
        if name == "cvta":  # one address space holds all memory
            words = ["mov", f"b{_bits(words[-1])}"]
        words = [word for word in words if word != "rn"]  # what all that is in machine.h does
        if name in UNTYPED:
            words[-1] = f"b{_bits(words[-1])}" if words[-1] != "pred" else "pred"
        if name == "setp" and words[-1].startswith("b"):  # the same bits, or not
            words[-1] = f"u{_bits(words[-1])}"
        given = ", ".join(map(self._operand, operands[1:]))
        return f"{self._register(operands[0])} = {'_'.join(words)}({given});"

    def _halves(self, operands: list[str]) -> str:
        to, given = ([half.strip() for half in operand.strip("{}").split(",")] for operand in operands[:2])
        if len(given) == 2:
            low, high = map(self._operand, given)
            return f"{self._register(to[0])} = (b32){low} | (b32){high} << 16;"
        whole = self._operand(given[0])
        return f"{{ b32 both = {whole}; {self._register(to[0])} = (b16)both; {self._register(to[1])} = both >> 16; }}"

    def _wait(self, brought: str) -> str:
        self.barriers += 1
        return f"WAIT({self.barriers}, {brought})"

    def _access(self, words: list[str], operands: list[str], text: str) -> str:
        """A load or a store, of one number or of a vector."""
        writes = words[0] == "st"
        values, address = (operands[1], operands[0]) if writes else (operands[0], operands[1])
        bits = int(_bits(words[-1]))
        where = self._address(address)
        if "param" in words:
            return f"memcpy(&{self._register(values)}, thread->arguments + {where}, {bits // 8});"
        each = [value.strip() for value in values.strip("{}").split(",")]
        site = len(self.sites)
        self.sites.append(text)
        self.units.append(bits // 8)
        moves = ""
        for k, value in enumerate(each):
            place = f"at + {k * bits // 8}"
            if writes:
                moves += f" store{bits}({place}, {self._operand(value)});"
            else:
                load = f"load{bits}_signed" if words[-1] == "s8" else f"load{bits}"
                moves += f" {self._register(value)} = {load}(thread, {place}, {site});"
        size = bits // 8 * len(each)
        return f"{{ uint8_t *at = thread->reach(thread, {where}, {size}, {int(writes)}, {site});{moves} }}"
