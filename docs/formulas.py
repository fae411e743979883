"""Typesets the formulas of the docs, such as ``p -= lr (m/bc1) / (sqrt(v/bc2) + eps)``: from text to MathML.

Browsers draw MathML themselves, so that the site ships no script and no font for it. The notation: a product is two
factors side by side; ``/`` divides what stands before it in the product; ``x^y``; a name with no space before its
bracket is a function; ``b1``, ``mu_t`` and ``mu_{t+1}`` have an index, ``v_hat`` a hat, ``d'`` a prime.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence

Drawn = Callable[[bool], str]
"""Draws a part of a formula; given whether a quotient in it is to stand in one line."""

TOKEN = re.compile(
    r"\s*(?P<number>\d+(?:\.\d+)?(?:e-?\d+)?)|\s*(?P<name>[A-Za-z](?:[A-Za-z0-9]|_(?!\{))*(?:_\{[^}]*\})?'*)(?P<call>\()?"
    r"|\s*(?P<dots>\.\.\.)|\s*(?P<operator>\*\*|[-+*/]=|<=|>=|!=|[-+*/^=<>~(),;|\[\].])"
)
GREEK = {"alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "eps": "ε", "eta": "η", "theta": "θ"}
GREEK |= {"lambda": "λ", "lambd": "λ", "mu": "μ", "nu": "ν", "pi": "π", "rho": "ρ", "sigma": "σ", "tau": "τ"}
GREEK |= {"phi": "φ", "omega": "ω"}
RELATIONS = {"=": "=", "+=": "+=", "-=": "−=", "*=": "×=", "/=": "÷=", "~": "∼"}
RELATIONS |= {"<": "<", ">": ">", "<=": "≤", ">=": "≥", "!=": "≠"}
FENCES = {"abs": "|", "norm": "‖"}


class NotationError(ValueError):
    """What is not in the notation: it stays as it is written."""


def mathml(text: str) -> str:
    """The MathML of a formula; `NotationError` for a text that is none."""
    drawn = _Reader(text).formula()(False)
    return f'<span class="formula"><math displaystyle="true">{drawn}</math></span>'


def in_html(page: str) -> str:
    """A page of the site, its formulas typeset: the code after "Formula:", and in tables within class "formulas"."""
    page = re.sub(r"<p>Formula:.*?</p>", lambda found: _typeset(found[0]), page, flags=re.DOTALL)
    return re.sub(r'<div class="formulas">.*?</div>', lambda found: _columns(found[0]), page, flags=re.DOTALL)


def _columns(table: str) -> str:
    """A table, the formulas of its second column typeset."""
    row = re.compile(r"(<td[^>]*>.*?</td>\s*)(<td[^>]*>.*?</td>)", re.DOTALL)
    rows = re.split(r"(?=<tr)", table)
    return "".join([row.sub(lambda found: found[1] + _typeset(found[2]), line, count=1) for line in rows])


def _typeset(part: str) -> str:
    def one(found: re.Match[str]) -> str:
        try:
            return mathml(html.unescape(found[1]))
        except NotationError:
            return found[0]

    return re.sub(r"<code>([^<]*)</code>", one, part)


class _Reader:
    """Reads one formula."""

    def __init__(self, text: str):
        self.tokens: list[tuple[str, str]] = []
        at = 0
        while at < len(text.rstrip()):
            found = TOKEN.match(text, at)
            if found is None:
                raise NotationError(f"{text!r}: not in the notation of formulas: {text[at:]!r}")
            kind = str(found.lastgroup)
            if kind == "call":
                self.tokens.append(("function", found["name"]))
            else:
                self.tokens.append((kind, found[kind]))
            at = found.end()
        self.text = text
        self.bars = 0
        """How many bars are open."""

    # --- tokens -------------------------------------------------------------------------------------------------------

    def next_is(self, *operators: str) -> bool:
        """Whether one of these comes next."""
        return bool(self.tokens) and self.tokens[0][0] == "operator" and self.tokens[0][1] in operators

    def take(self, *operators: str) -> str:
        """Take one of these, which has to be there."""
        if not self.next_is(*operators):
            raise NotationError(f"{self.text!r}: not in the notation of formulas")
        return self.tokens.pop(0)[1]

    # --- the grammar: what is read is drawn later, when it is known whether it stands in a quotient -------------------

    def formula(self) -> Drawn:
        """All of it: relations."""
        parts = [self.sum()]
        while self.tokens:
            sign = self.take(",", *RELATIONS)
            parts += [_sign(RELATIONS.get(sign, sign)), self.sum()]
        return _row(parts)

    def sum(self) -> Drawn:
        """Products that are added and subtracted."""
        parts = []
        if self.next_is("-"):
            self.take("-")
            parts.append(_sign("−", prefix=True))
        parts.append(self.product())
        while self.next_is("+", "-"):
            parts += [_sign("+" if self.take("+", "-") == "+" else "−"), self.product()]
        return _row(parts)

    def product(self) -> Drawn:
        """Factors side by side, of which a quotient takes all that come before it."""
        parts = [self.power()]
        while self.tokens:
            if self.next_is("/"):
                self.take("/")
                parts = [_quotient(_row(parts), self.power())]
            elif self.next_is("*"):
                self.take("*")
                parts += [_sign("⋅"), self.power()]
            elif self.next_is("(") or self.tokens[0][0] != "operator" or (self.next_is("|") and not self.bars):
                parts += [SPACE, self.power()]
            else:
                break
        return _row(parts)

    def power(self) -> Drawn:
        """A factor, with an exponent where it has one."""
        base = self.factor()
        while self.next_is("^", "**"):
            self.take("^", "**")
            sign = []
            if self.next_is("-"):
                self.take("-")
                sign = [_sign("−", prefix=True)]
            base = _raised(base, _row([*sign, self.factor()]))
        return base

    def factor(self) -> Drawn:
        """A number, a name, a call, or what is in brackets."""
        if not self.tokens or (self.tokens[0][0] == "operator" and not self.next_is("(", "|")):
            raise NotationError(f"{self.text!r}: not in the notation of formulas")
        kind, text = self.tokens.pop(0)
        if text == "(" and kind == "operator":
            return _fenced("(", self.arguments(), ")")
        if kind == "operator":
            self.bars += 1
            inside = self.sum()
            self.bars -= 1
            self.take("|")
            return _fenced("|", inside, "|")
        if kind == "number":
            return _drawn(f"<mn>{text}</mn>")
        if kind == "dots":
            return _sign("…")
        if kind == "name":
            return _drawn(named(text))
        inside = self.arguments()
        if text == "sqrt":
            return lambda linear: f"<msqrt>{inside(linear)}</msqrt>"
        if text in FENCES:
            return _fenced(FENCES[text], inside, FENCES[text])
        return _row([_drawn(named(text)), _fenced("(", inside, ")")])

    def arguments(self) -> Drawn:
        """What is in brackets, up to the closing one."""
        bars, self.bars = self.bars, 0
        parts = [self.sum()]
        while not self.next_is(")"):
            sign = self.take(",", *RELATIONS)
            parts += [_sign(RELATIONS.get(sign, sign)), self.sum()]
        self.take(")")
        self.bars = bars
        return _row(parts)


# --- what is drawn ----------------------------------------------------------------------------------------------------


def _drawn(text: str) -> Drawn:
    return lambda linear: text


def _sign(sign: str, *, prefix: bool = False) -> Drawn:
    form = ' form="prefix"' if prefix else ""
    return _drawn(f"<mo{form}>{html.escape(sign)}</mo>")


SPACE = _drawn('<mspace width="0.17em"></mspace>')


def _row(parts: Sequence[Drawn]) -> Drawn:
    if len(parts) == 1:
        return parts[0]
    return lambda linear: f"<mrow>{''.join([part(linear) for part in parts])}</mrow>"


def _fenced(left: str, inside: Drawn, right: str) -> Drawn:
    def drawn(linear: bool) -> str:
        return f"<mrow><mo>{left}</mo>{inside(linear)}<mo>{right}</mo></mrow>"

    drawn.inside = inside if left == "(" else None  # type: ignore[attr-defined]
    return drawn


def _bare(part: Drawn) -> Drawn:
    """A part without brackets around all of it: a line, or an exponent's place, says the same."""
    return getattr(part, "inside", None) or part


def _quotient(above: Drawn, below: Drawn) -> Drawn:
    def drawn(linear: bool) -> str:
        if linear:
            return f"<mrow>{above(True)}<mo>/</mo>{below(True)}</mrow>"
        return f"<mfrac>{_bare(above)(True)}{_bare(below)(True)}</mfrac>"

    return drawn


def _raised(base: Drawn, exponent: Drawn) -> Drawn:
    return lambda linear: f"<msup>{base(linear)}{_bare(exponent)(True)}</msup>"


def named(name: str) -> str:
    """A name with its index, hat and primes."""
    primes = len(name) - len(name.rstrip("'"))
    name = name.rstrip("'")
    base, _, index = name.partition("_")
    if index == "hat":
        found = f"<mover>{named(base)}<mo>^</mo></mover>"
    elif index.startswith("{"):
        found = f"<msub>{named(base)}{_Reader(index[1:-1]).sum()(True)}</msub>"
    elif index and (len(index) == 1 or index.isdigit()) and not _is_word(base):
        found = f"<msub>{named(base)}{_letter(index)}</msub>"
    elif index or _is_word(name):
        found = f"<mtext>{html.escape(name)}</mtext>"
    else:
        split = re.fullmatch(r"([A-Za-z]+?)(\d+)", name)
        found = f"<msub>{_letter(split[1])}<mn>{split[2]}</mn></msub>" if split else _letter(name)
    return f"<msup>{found}<mo>{'′' * primes}</mo></msup>" if primes else found


def _is_word(name: str) -> bool:
    """Whether a name is to be read as a word, not as letters."""
    letters = name.rstrip("0123456789")
    return len(letters) > 2 and letters not in GREEK


def _letter(text: str) -> str:
    if text.isdigit():
        return f"<mn>{text}</mn>"
    if text in GREEK:
        return f"<mi>{GREEK[text]}</mi>"
    return f"<mi>{text}</mi>" if len(text) == 1 else f'<mi mathvariant="normal">{text}</mi>'
