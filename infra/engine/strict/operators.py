"""Operators of ATen, by name, and what becomes of them."""

from typing import Final

from infra.engine.strict.program import Code

ALIKE: Final = frozenset({"dropout", "to", "type_as", "contiguous", "clone", "alias", "detach_"})
"""Those that change nothing here: a program computes in single precision throughout."""

RESHAPING: Final = frozenset(
    {"view", "reshape", "transpose", "unsqueeze", "squeeze", "slice", "split", "chunk"}
    | {"permute", "expand", "select", "flatten", "split_with_sizes", "_unsafe_view"}
)
"""Those that only say anew where floats lie."""

FUNCTIONS: Final = {
    "neg": Code.NEGATIVE,
    "relu": Code.RELU,
    "tanh": Code.TANH,
    "sigmoid": Code.SIGMOID,
    "silu": Code.SILU,
    "rsqrt": Code.RSQRT,
    "exp": Code.EXP,
    "square": Code.SQUARE,
}
"""Functions of one float."""

POWERS: Final = {2: Code.SQUARE, 3: Code.CUBE}
"""Exponents."""

ARITHMETIC: Final = {
    "add": Code.ADD,
    "sub": Code.SUBTRACT,
    "mul": Code.MULTIPLY,
    "div": Code.DIVIDE,
}
"""Functions of two floats."""
