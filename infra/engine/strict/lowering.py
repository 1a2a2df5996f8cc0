"""From a transformers model to a program: its own code is traced, and the graph lowered.

``torch.export`` writes down what the model does to ``rows`` tokens. In that graph

* what depends on weights alone is computed at once;
* what depends on the positions alone (learned positions, rotary angles) is computed at once for
  every position there is, by the model's own code, and becomes a table;
* reshaping, slicing and transposing only change where a value's floats are said to lie;
* the rest becomes operations. Whatever is not known here is refused by name.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.fx import Node

from infra.engine.forward import Shape, Unsupported
from infra.engine.kv_store import Geometry
from infra.engine.strict import linear
from infra.engine.strict.program import (
    NOWHERE,
    Code,
    Domain,
    Mode,
    Operand,
    Operation,
    Program,
    share_memory,
)

TRACED: Final = "cacher-traced"
"""The attention that transformers calls while a model is traced."""


@torch.library.custom_op("cacher::attend", mutates_args=())
def _attend(
    query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float, window: int, cap: float
) -> Tensor:
    """Stands for attention in a traced graph; never run."""
    raise NotImplementedError


@_attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float, window: int, cap: float
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def _traced(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    layer: Any = module.layer_idx
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return (
        torch.ops.cacher.attend(
            query, key, value, layer, scale, sliding_window or 0, softcap or 0.0
        ),
        None,
    )


transformers.AttentionInterface.register(TRACED, _traced)


class _Traced(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, positions: Tensor, wanted: Tensor) -> Any:
        return self.model(
            input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=wanted
        ).logits


@dataclass(frozen=True)
class _Rows:
    """A value of each row: where it lies in a slot, told by a tensor without data for one row."""

    slot: int
    shape: Tensor
    domain: Domain


@dataclass(frozen=True)
class _Table:
    """A value of each position: as the model computes it for all of them."""

    tensor: Tensor
    axis: int


@dataclass(frozen=True)
class _Input:
    name: str


_Value = Any
_ALIKE: Final = frozenset({"dropout", "to", "type_as", "contiguous", "clone", "alias", "detach_"})
_RESHAPING: Final = frozenset(
    {"view", "reshape", "transpose", "unsqueeze", "squeeze", "slice", "split", "chunk"}
    | {"permute", "expand", "select", "flatten", "split_with_sizes", "_unsafe_view"}
)
_FUNCTIONS: Final = {
    "neg": Code.NEGATIVE,
    "relu": Code.RELU,
    "tanh": Code.TANH,
    "sigmoid": Code.SIGMOID,
    "silu": Code.SILU,
    "rsqrt": Code.RSQRT,
    "exp": Code.EXP,
}
_POWERS: Final = {2: Code.SQUARE, 3: Code.CUBE}
_ARITHMETIC: Final = {
    "add": Code.ADD,
    "sub": Code.SUBTRACT,
    "mul": Code.MULTIPLY,
    "div": Code.DIVIDE,
}


def lower(model: Any, shape: Shape) -> Program:
    """The program of a causal language model.

    Raises:
        Unsupported: there is no kernel for something it does.
    """
    model.set_attn_implementation(TRACED)
    model.config.pad_token_id = None
    rows, wanted = torch.export.Dim("rows", min=2), torch.export.Dim("wanted", min=2)
    example = torch.arange(min(16, shape.context))
    try:
        with torch.no_grad():
            exported = torch.export.export(
                _Traced(model),
                (torch.zeros_like(example)[None], example[None], example[:8]),
                dynamic_shapes=({1: rows}, {1: rows}, {0: wanted}),
                strict=False,
            )
    except Exception as error:
        raise Unsupported(f"torch.export cannot trace it: {error}") from error
    with torch.no_grad():
        program = _Lowering(exported, shape.geometry, shape.context).run()
    program.vocabulary = shape.vocabulary
    share_memory(program)
    return program


class _Lowering:
    def __init__(self, exported: Any, geometry: Geometry, context: int) -> None:
        self._exported = exported
        self._geometry = geometry
        self._context = context
        self._program = Program()
        self._values: dict[Node, _Value] = {}
        self._layers = 0

    def run(self) -> Program:
        graph = self._exported.graph
        inputs = self._inputs()
        for node in graph.nodes:
            if node.op == "placeholder":
                self._values[node] = inputs[node.name]
            elif node.op == "output":
                (result,) = node.args[0]
                self._finish(self._values[result])
            elif node.op == "call_function":
                self._values[node] = self._lower(node)
            else:
                raise Unsupported(f"a graph node of kind {node.op}")
        return self._program

    def _inputs(self) -> dict[str, _Value]:
        """What each placeholder of the graph stands for."""
        constants = {**self._exported.state_dict, **self._exported.constants}
        found: dict[str, _Value] = {}
        users = iter(("tokens", "positions", "wanted"))
        for spec in self._exported.graph_signature.input_specs:
            if spec.target is not None:
                found[spec.arg.name] = constants[spec.target].detach()
                continue
            name = next(users)
            every = torch.arange(self._context)[None]
            found[spec.arg.name] = _Table(every, 1) if name == "positions" else _Input(name)
        return found

    def _finish(self, value: _Value) -> None:
        if not isinstance(value, _Rows) or value.domain != Domain.WANTED:
            raise Unsupported("logits that do not come from the wanted rows")
        self._program.logits = value.slot

    def _lower(self, node: Node) -> _Value:
        target: Any = node.target
        name = target.__name__.split(".")[0] if hasattr(target, "__name__") else str(target)
        if name in ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size"):
            return None
        values = [self._values[n] for n in node.all_input_nodes]
        if name == "sym_size":
            return _Input("size")
        if target is operator.getitem:
            sequence, index = node.args
            return self._values[sequence][index]  # type: ignore[index]
        rows = any(isinstance(value, _Rows | list) for value in values)
        tokens = any(isinstance(v, _Input) and v.name in ("tokens", "wanted") for v in values)
        if not rows and not tokens:
            return self._evaluate(node)
        if name in _ALIKE:
            return values[0]
        if name in _RESHAPING:
            return self._reshape(node)
        method: Callable[[Node, str], _Value] | None = getattr(self, f"_lower_{name}", None)
        if method is not None:
            return method(node, name)
        if name in _FUNCTIONS:
            return self._unary(_FUNCTIONS[name], self._value(node.args[0]))
        if name in _ARITHMETIC:
            return self._binary(node, _ARITHMETIC[name])
        raise Unsupported(f"the operation {name}")

    def _value(self, argument: Any) -> _Value:
        return self._values[argument] if isinstance(argument, Node) else argument

    def _evaluate(self, node: Node) -> _Value:
        """Compute what depends on weights and positions alone."""

        def known(argument: Node) -> Any:
            value = self._values[argument]
            if isinstance(value, _Table):
                return value.tensor
            return self._context if isinstance(value, _Input) else value

        arguments, options = torch.fx.map_arg((node.args, node.kwargs), known)
        target: Any = node.target
        result = target(*arguments, **options)
        if not any(isinstance(self._values[n], _Table) for n in node.all_input_nodes):
            return result
        if isinstance(result, Tensor):
            return _Table(result, self._axis(node.meta["val"]))
        return [
            _Table(part, self._axis(val))
            for part, val in zip(result, node.meta["val"], strict=True)
        ]

    @staticmethod
    def _axis(example: Tensor) -> int:
        """The one dimension that counts rows."""
        axes = [axis for axis, size in enumerate(example.shape) if not isinstance(size, int)]
        if len(axes) != 1 or not str(example.shape[axes[0]]).isidentifier():
            raise Unsupported(f"a tensor of shape {tuple(example.shape)}")
        return axes[0]

    def _reshape(self, node: Node) -> _Value:
        """Say anew where a value lies; its floats stay."""
        source = self._value(node.args[0])
        if isinstance(source, _Input):
            return source
        if not isinstance(source, _Rows):
            raise Unsupported(f"{node.target} of {type(source).__name__}")

        def single(argument: Node) -> Any:
            value = self._values[argument]
            return value.shape if isinstance(value, _Rows) else 1

        examples = node.meta["val"]
        for example in examples if isinstance(examples, list | tuple) else [examples]:
            self._axis(example)
        arguments: Any
        arguments, options = torch.fx.map_arg((node.args, node.kwargs), single)
        target: Any = node.target
        if target is torch.ops.aten.reshape.default and not _viewable(*arguments[:2]):
            source = self._copied(source)
            arguments = (source.shape, *arguments[1:])
        result = target(*arguments, **options)
        if isinstance(result, Tensor):
            return _Rows(source.slot, result, source.domain)
        return [_Rows(source.slot, part, source.domain) for part in result]

    def _new(self, shape: Sequence[int], domain: Domain, width: int | None = None) -> _Rows:
        size = math.prod(shape)
        slot = self._program.slot(size if width is None else width, domain)
        return _Rows(slot, torch.empty(tuple(shape), device="meta"), domain)

    def _emit(self, *arguments: Any, **options: Any) -> None:
        self._program.operations.append(Operation(*arguments, **options))

    def _hold(self, tensor: Tensor) -> int:
        """Keep a tensor for as long as the program; its address."""
        self._program.alive.append(tensor)
        return tensor.data_ptr()

    def _operand(
        self, value: _Value, shape: torch.Size, domain: Domain
    ) -> tuple[Operand, list[int]]:
        """Where a value lies, and its strides once it has ``shape``."""
        if isinstance(value, _Rows):
            wide = value.shape.expand(shape)
            mode = Mode.ROW if value.domain == domain else Mode.WANTED
            place = Operand(mode, int(value.shape.storage_offset()), 0, 0, 0, value.slot)
            return place, list(wide.stride())
        if isinstance(value, _Table):
            if domain != Domain.ROWS:
                raise Unsupported("positions of wanted rows")
            table = value.tensor.movedim(value.axis, 0).contiguous().float()
            one = torch.empty(table.shape[1:], device="meta").unsqueeze(value.axis)
            place = Operand(Mode.POSITION, self._hold(table), one.numel(), 0, 0)
            return place, list(one.expand(shape).stride())
        tensor = torch.as_tensor(value, dtype=torch.float32).contiguous()
        place = Operand(Mode.FIXED, self._hold(tensor), 0, 0, 0)
        return place, list(tensor.to("meta").expand(shape).stride())

    def _shape(self, value: _Value) -> torch.Size:
        """Shape of a value for one row."""
        if isinstance(value, _Rows):
            return value.shape.shape
        if isinstance(value, _Table):
            sizes = list(value.tensor.shape)
            sizes[value.axis] = 1
            return torch.Size(sizes)
        return value.shape if isinstance(value, Tensor) else torch.Size()

    def _apply(self, code: Code, result: _Rows, *values: _Value) -> _Rows:
        """Emit an operation that computes ``result`` float by float."""
        shape = result.shape.shape
        operands, strides = zip(
            *(self._operand(v, shape, result.domain) for v in (result, *values)), strict=True
        )
        (outer, inner), steps = _two_loops(shape, strides)
        placed = [
            Operand(o.mode, o.address, o.row, step[0], step[1], o.slot)
            for o, step in zip(operands, steps, strict=True)
        ]
        self._emit(code, result.domain, outer, inner, placed[0], tuple(placed[1:]))
        return result

    def _unary(self, code: Code, value: _Rows) -> _Rows:
        return self._apply(code, self._new(value.shape.shape, value.domain), value)

    def _binary(self, node: Node, code: Code) -> _Rows:
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None:
            raise Unsupported(f"{node.target} with {node.kwargs}")
        left, right = (self._value(argument) for argument in node.args[:2])
        domain = max(v.domain for v in (left, right) if isinstance(v, _Rows))
        shape = np.broadcast_shapes(self._shape(left), self._shape(right))
        return self._apply(code, self._new(shape, domain), left, right)

    def _copied(self, value: _Rows) -> _Rows:
        return self._unary(Code.COPY, value)

    def _straight(self, value: _Rows) -> _Rows:
        """The value with its floats one after the other."""
        return value if value.shape.is_contiguous() else self._copied(value)

    def _lower_embedding(self, node: Node, _: str) -> _Value:
        weight, tokens = (self._value(argument) for argument in node.args[:2])
        if not isinstance(tokens, _Input) or not isinstance(weight, Tensor):
            raise Unsupported("an embedding of something other than tokens")
        width = weight.shape[1]
        result = self._new((1, 1, width), Domain.ROWS)
        out = Operand(Mode.ROW, 0, 0, 0, 1, result.slot)
        extra = (self._hold(weight.contiguous()), int(weight.dtype == torch.bfloat16))
        self._emit(Code.EMBED, Domain.ROWS, 1, width, out, (), extra)
        return result

    def _lower_index(self, node: Node, _: str) -> _Value:
        source, index = node.args
        value = self._value(source)
        places = [self._value(place) for place in index if place is not None]  # type: ignore[union-attr]
        if not isinstance(value, _Rows) or places != [_Input("wanted")]:
            raise Unsupported("an index of something other than the wanted rows")
        return self._apply(Code.COPY, self._new(value.shape.shape, Domain.WANTED), value)

    def _lower_pow(self, node: Node, _: str) -> _Value:
        value, exponent = (self._value(argument) for argument in node.args)
        if exponent not in _POWERS:
            raise Unsupported(f"a power of {exponent}")
        return self._unary(_POWERS[exponent], value)

    def _lower_square(self, node: Node, _: str) -> _Value:
        return self._unary(Code.SQUARE, self._value(node.args[0]))

    def _lower_gelu(self, node: Node, _: str) -> _Value:
        tanh = node.kwargs.get("approximate", "none") == "tanh"
        return self._unary(Code.GELU_TANH if tanh else Code.GELU, self._value(node.args[0]))

    def _lower_mean(self, node: Node, _: str) -> _Value:
        value, dims = self._value(node.args[0]), node.args[1]
        keep = len(node.args) > 2 and node.args[2]
        if dims not in ([-1], [value.shape.dim() - 1]) or not keep:
            raise Unsupported(f"a mean over {dims}")
        value = self._straight(value)
        size = value.shape.shape[-1]
        result = self._new((*value.shape.shape[:-1], 1), value.domain)
        count = result.shape.numel()
        out = Operand(Mode.ROW, 0, 0, 1, 1, result.slot)
        place = Operand(Mode.ROW, int(value.shape.storage_offset()), 0, size, 1, value.slot)
        self._emit(Code.MEAN, value.domain, count, size, out, (place,))
        return result

    def _lower_cat(self, node: Node, _: str) -> _Value:
        parts = [self._value(part) for part in node.args[0]]  # type: ignore[union-attr]
        parts = [part for part in parts if self._shape(part).numel()]
        dim: Any = node.args[1] if len(node.args) > 1 else 0
        shapes = [self._shape(part) for part in parts]
        sizes = list(shapes[0])
        sizes[dim] = sum(shape[dim] for shape in shapes)
        domain = max(part.domain for part in parts if isinstance(part, _Rows))
        result = self._new(sizes, domain)
        pieces = result.shape.split([shape[dim] for shape in shapes], dim)  # type: ignore[no-untyped-call]
        for part, piece in zip(parts, pieces, strict=True):
            self._apply(Code.COPY, _Rows(result.slot, piece, domain), part)
        return result

    def _lower_layer_norm(self, node: Node, _: str) -> _Value:
        value, shape, weight, bias, epsilon = (
            self._value(argument) for argument in (*node.args, None, None, 1e-5)[:5]
        )
        value = self._straight(value)
        if tuple(shape) != tuple(value.shape.shape[-1:]) or value.shape.numel() != shape[0]:
            raise Unsupported(f"a layer norm over {shape}")
        result = self._new(value.shape.shape, value.domain)
        out = Operand(Mode.ROW, 0, 0, 0, 1, result.slot)
        place = Operand(Mode.ROW, int(value.shape.storage_offset()), 0, 0, 1, value.slot)
        extra = tuple(
            0 if each is None else self._hold(each.float().contiguous()) for each in (weight, bias)
        )
        self._emit(
            Code.LAYER_NORM, value.domain, 1, shape[0], out, (place,), extra, (float(epsilon),)
        )
        return result

    def _lower_linear(self, node: Node, _: str) -> _Value:
        x, weight, bias = (self._value(argument) for argument in (*node.args, None)[:3])
        return self._linear(x, weight, bias)

    def _lower_addmm(self, node: Node, _: str) -> _Value:
        bias, x, weight = (self._value(argument) for argument in node.args)
        return self._linear(x, weight.t(), bias)

    def _linear(self, x: _Rows, weight: Tensor, bias: Tensor | None) -> _Rows:
        outputs, inputs = weight.shape
        x = self._straight(x)
        if x.shape.numel() != inputs:
            raise Unsupported(f"a linear layer on rows of shape {tuple(x.shape.shape)}")
        width = linear.padded(outputs)
        result = self._new((*x.shape.shape[:-1], outputs), x.domain, width)
        full = torch.zeros(width)
        if bias is not None:
            full[:outputs] = bias
        packed = linear.pack(weight)
        extra = (
            self._hold(packed),
            self._hold(full),
            inputs,
            width // linear.PANEL,
            int(weight.dtype == torch.bfloat16),
        )
        out = Operand(Mode.ROW, 0, 0, 0, 1, result.slot)
        place = Operand(Mode.ROW, int(x.shape.storage_offset()), 0, 0, 1, x.slot)
        self._emit(Code.LINEAR, x.domain, 1, outputs, out, (place,), extra)
        return result

    def _lower_attend(self, node: Node, _: str) -> _Value:
        query, key, value = (self._near(self._value(argument)) for argument in node.args[:3])
        layer, scaling, window, cap = node.args[3:]
        heads, dim = query.shape.shape[1], query.shape.shape[3]
        expected = (self._geometry.query_heads, self._geometry.head_dim)
        if (heads, dim) != expected or value.shape.shape != key.shape.shape:
            raise Unsupported(f"attention with {heads} heads of {dim} where {expected} is expected")
        places = [
            Operand(Mode.ROW, int(v.shape.storage_offset()), 0, v.shape.stride(1), 1, v.slot)
            for v in (query, key, value)
        ]
        extra = (layer, window)
        self._emit(Code.STORE, Domain.ROWS, 1, dim, NOWHERE, tuple(places[1:]), extra)
        result = self._new((1, 1, heads, dim), Domain.ROWS)
        out = Operand(Mode.ROW, 0, 0, dim, 1, result.slot)
        real = (float(scaling), float(cap))  # type: ignore[arg-type]
        self._emit(Code.ATTEND, Domain.ROWS, heads, dim, out, (places[0],), extra, real)
        return result

    def _near(self, value: _Rows) -> _Rows:
        """The value with each head's floats one after the other."""
        return value if value.shape.stride(3) == 1 else self._copied(value)


def _viewable(tensor: Tensor, shape: Sequence[int]) -> bool:
    try:
        tensor.view(shape)
    except RuntimeError:
        return False
    return True


def _two_loops(
    shape: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Sizes and strides with dimensions joined until at most two are left.

    Raises:
        Unsupported: more are needed.
    """
    dims = [
        (size, [stride[axis] for stride in strides]) for axis, size in enumerate(shape) if size > 1
    ]
    joined: list[tuple[int, list[int]]] = []
    for size, steps in dims:
        if joined and all(a == b * size for a, b in zip(joined[-1][1], steps, strict=True)):
            joined[-1] = (joined[-1][0] * size, steps)
        else:
            joined.append((size, steps))
    if len(joined) > 2:
        raise Unsupported(f"arithmetic over {len(joined)} strides")
    none = (1, [0] * len(strides))
    (outer, far), (inner, near) = (none, none, *joined)[-2:]
    return (outer, inner), list(zip(far, near, strict=True))
