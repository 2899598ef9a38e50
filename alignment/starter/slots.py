"""Values for the ``{order}`` and ``{product}`` slots: order numbers of several shapes and product names."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from alignment.starter.corpus import Product

Part = Literal["training", "held_out"]

HELD_OUT_REMAINDER = 3  # order numbers whose digits sum to 3 modulo 7 are never trained on
_ONSETS = "b br c ch cl d dr f fl g gl gr h j k kl kr l m n p pl pr qu r s sh sk sl sp st t th tr v w y z"
_VOWELS = "a e i o u a e i o u ai ei oo au ia ea y"
_CODAS = "- - - - - - - - - - - - l m n r s t x k nd rn sk lt rk st sh v b p d ck mb"  # "-" is none
_ENDINGS = "- - - - - - - - a o i u el in ar en is us on e"


def is_held_out_number(digits: str) -> bool:
    """True for the order numbers kept for measuring."""
    return sum(int(digit) for digit in digits) % 7 == HELD_OUT_REMAINDER


def order_number(rng: random.Random, *, part: Part = "training") -> str:
    """An order number such as "48213", "KT-48213" or "#48213" that belongs to the part."""
    while True:
        digits = str(rng.randrange(10_000, 100_000))
        if is_held_out_number(digits) == (part == "held_out"):
            return rng.choice(("", "KT-", "#")) + digits


def invented_name(rng: random.Random, kinds: Sequence[str]) -> str:
    """A product name nobody sells, made of syllables and a kind such as "desk lamp"."""
    parts = [_ONSETS, _VOWELS, _CODAS] * rng.choice((1, 2, 2, 2, 3)) + [_ENDINGS]
    name = "".join(rng.choice(part.split()) for part in parts).replace("-", "")
    return f"{name.capitalize()} {rng.choice(kinds)}"


def product_kinds(products: Sequence[Product]) -> tuple[str, ...]:
    """The kinds of goods ("desk lamp") in the catalogue: each name without its first word."""
    return tuple(sorted({product.name.split(" ", 1)[1] for product in products}))


def spoken_name(name: str, rng: random.Random) -> str:
    """How a customer writes a product's name: in full, or now and then without a middle word."""
    words = name.split(" ")
    return f"{words[0]} {words[-1]}" if len(words) > 2 and rng.random() < 0.12 else name
