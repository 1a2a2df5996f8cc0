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
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from infra.engine.forward import Shape, Site, Unsupported, Weighing
from infra.engine.kv_store import Geometry
from infra.engine.memory import zeros
from infra.engine.strict import linear
from infra.engine.strict.exact import evaluate
from infra.engine.strict.operators import ALIKE, ARITHMETIC, FUNCTIONS, POWERS, RESHAPING
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
from infra.engine.strict.sites import Sites
from infra.engine.strict.tracing import trace
from infra.engine.strict.values import Input, Rows, Table, row_axis, two_loops, viewable

_Value = Any


def lower(model: Any, shape: Shape) -> Program:
    """The program of a causal language model.

    Raises:
        Unsupported: there is no kernel for something it does.
    """
    exported = trace(model, shape.context)
    with torch.no_grad():
        program = _Lowering(exported, shape.geometry, shape.context).run()
    program.vocabulary = shape.vocabulary
    program.watched = replace(program)
    program.sites = {}
    for each in (program, program.watched):
        share_memory(each)
    return program


class _Lowering:
    def __init__(self, exported: Any, geometry: Geometry, context: int) -> None:
        self._exported = exported
        self._geometry = geometry
        self._context = context
        self._program = Program()
        self._values: dict[Node, _Value] = {}
        self._sites = Sites()

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
        self._program.sites = self._sites.places()
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
            found[spec.arg.name] = Table(every, 1) if name == "positions" else Input(name)
        return found

    def _finish(self, value: _Value) -> None:
        if not isinstance(value, Rows) or value.domain != Domain.WANTED:
            raise Unsupported("logits that do not come from the wanted rows")
        self._program.logits = value.slot

    def _lower(self, node: Node) -> _Value:
        target: Any = node.target
        name = target.__name__.split(".")[0] if hasattr(target, "__name__") else str(target)
        if name in ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size"):
            return None
        values = [self._values[n] for n in node.all_input_nodes]
        if name == "sym_size":
            return Input("size")
        if target is operator.getitem:
            sequence, index = node.args
            return self._values[sequence][index]  # type: ignore[index]
        rows = any(isinstance(value, Rows | list) for value in values)
        tokens = any(isinstance(v, Input) and v.name in ("tokens", "wanted") for v in values)
        if not rows and not tokens:
            return self._evaluate(node, name)
        if name in ALIKE:
            return values[0]
        if name in RESHAPING:
            return self._reshape(node)
        method: Callable[[Node, str], _Value] | None = getattr(self, f"_lower_{name}", None)
        if method is not None:
            return method(node, name)
        if name in FUNCTIONS:
            return self._unary(FUNCTIONS[name], self._value(node.args[0]))
        if name in ARITHMETIC:
            return self._binary(node, ARITHMETIC[name])
        raise Unsupported(f"the operation {name}")

    def _value(self, argument: Any) -> _Value:
        return self._values[argument] if isinstance(argument, Node) else argument

    def _evaluate(self, node: Node, name: str) -> _Value:
        """Compute what depends on weights and positions alone."""

        def known(argument: Node) -> Any:
            value = self._values[argument]
            if isinstance(value, Table):
                return value.tensor
            return self._context if isinstance(value, Input) else value

        arguments, options = torch.fx.map_arg((node.args, node.kwargs), known)
        target: Any = node.target
        result = evaluate(target, name, arguments, options)
        if not any(isinstance(self._values[n], Table) for n in node.all_input_nodes):
            return result
        if isinstance(result, Tensor):
            return Table(result, row_axis(node.meta["val"]))
        return [
            Table(part, row_axis(val)) for part, val in zip(result, node.meta["val"], strict=True)
        ]

    def _reshape(self, node: Node) -> _Value:
        """Say anew where a value lies; its floats stay."""
        source = self._value(node.args[0])
        if isinstance(source, Input):
            return source
        if not isinstance(source, Rows):
            raise Unsupported(f"{node.target} of {type(source).__name__}")

        def single(argument: Node) -> Any:
            value = self._values[argument]
            return value.shape if isinstance(value, Rows) else 1

        examples = node.meta["val"]
        for example in examples if isinstance(examples, list | tuple) else [examples]:
            row_axis(example)
        arguments: Any
        arguments, options = torch.fx.map_arg((node.args, node.kwargs), single)
        target: Any = node.target
        if target is torch.ops.aten.reshape.default and not viewable(*arguments[:2]):
            source = self._copied(source)
            arguments = (source.shape, *arguments[1:])
        result = target(*arguments, **options)
        if isinstance(result, Tensor):
            return Rows(source.slot, result, source.domain)
        return [Rows(source.slot, part, source.domain) for part in result]

    def _new(self, shape: Sequence[int], domain: Domain, width: int | None = None) -> Rows:
        size = math.prod(shape)
        slot = self._program.slot(size if width is None else width, domain)
        return Rows(slot, torch.empty(tuple(shape), device="meta"), domain)

    def _emit(self, *arguments: Any, **options: Any) -> None:
        self._program.operations.append(Operation(*arguments, **options))

    def _hold(self, tensor: Tensor) -> int:
        """Keep a tensor for as long as the program; its address."""
        self._program.alive.append(tensor)
        return tensor.data_ptr()

    def _own(self, tensor: Tensor) -> int:
        """Keep a copy in single precision: what was loaded is a view of its whole file."""
        return self._hold(tensor.to(torch.float32, copy=True).contiguous())

    def _operand(
        self, value: _Value, shape: torch.Size, domain: Domain
    ) -> tuple[Operand, list[int]]:
        """Where a value lies, and its strides once it has ``shape``."""
        if isinstance(value, Rows):
            wide = value.shape.expand(shape)
            mode = Mode.ROW if value.domain == domain else Mode.WANTED
            place = Operand(mode, int(value.shape.storage_offset()), 0, 0, 0, value.slot)
            return place, list(wide.stride())
        if isinstance(value, Table):
            if domain != Domain.ROWS:
                raise Unsupported("positions of wanted rows")
            table = value.tensor.movedim(value.axis, 0).contiguous()
            one = torch.empty(table.shape[1:], device="meta").unsqueeze(value.axis)
            place = Operand(Mode.POSITION, self._own(table), one.numel(), 0, 0)
            return place, list(one.expand(shape).stride())
        tensor = torch.as_tensor(value).contiguous()
        place = Operand(Mode.FIXED, self._own(tensor), 0, 0, 0)
        return place, list(tensor.to("meta").expand(shape).stride())

    def _shape(self, value: _Value) -> torch.Size:
        """Shape of a value for one row."""
        if isinstance(value, Rows):
            return value.shape.shape
        if isinstance(value, Table):
            sizes = list(value.tensor.shape)
            sizes[value.axis] = 1
            return torch.Size(sizes)
        return value.shape if isinstance(value, Tensor) else torch.Size()

    def _apply(self, code: Code, result: Rows, *values: _Value) -> Rows:
        """Emit an operation that computes ``result`` float by float."""
        shape = result.shape.shape
        operands, strides = zip(
            *(self._operand(v, shape, result.domain) for v in (result, *values)), strict=True
        )
        (outer, inner), steps = two_loops(shape, strides)
        placed = [
            Operand(o.mode, o.address, o.row, step[0], step[1], o.slot)
            for o, step in zip(operands, steps, strict=True)
        ]
        self._emit(code, result.domain, outer, inner, placed[0], tuple(placed[1:]))
        return result

    def _unary(self, code: Code, value: Rows) -> Rows:
        return self._apply(code, self._new(value.shape.shape, value.domain), value)

    def _binary(self, node: Node, code: Code) -> Rows:
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None:
            raise Unsupported(f"{node.target} with {node.kwargs}")
        left, right = (self._value(argument) for argument in node.args[:2])
        domain = max(v.domain for v in (left, right) if isinstance(v, Rows))
        shape = np.broadcast_shapes(self._shape(left), self._shape(right))
        return self._apply(code, self._new(shape, domain), left, right)

    def _copied(self, value: Rows) -> Rows:
        return self._unary(Code.COPY, value)

    def _straight(self, value: Rows) -> Rows:
        """The value with its floats one after the other."""
        return value if value.shape.is_contiguous() else self._copied(value)

    def _lower_embedding(self, node: Node, _: str) -> _Value:
        weight, tokens = (self._value(argument) for argument in node.args[:2])
        if not isinstance(tokens, Input) or not isinstance(weight, Tensor):
            raise Unsupported("an embedding of something other than tokens")
        width = weight.shape[1]
        result = self._new((1, 1, width), Domain.ROWS)
        out = Operand(Mode.ROW, 0, 0, 0, 1, result.slot)
        table = zeros(weight.shape, weight.dtype).copy_(weight)
        extra = (self._hold(table), int(weight.dtype == torch.bfloat16))
        self._emit(Code.EMBED, Domain.ROWS, 1, width, out, (), extra)
        return result

    def _lower_index(self, node: Node, _: str) -> _Value:
        source, index = node.args
        value = self._value(source)
        places = [self._value(place) for place in index if place is not None]  # type: ignore[union-attr]
        if not isinstance(value, Rows) or places != [Input("wanted")]:
            raise Unsupported("an index of something other than the wanted rows")
        return self._apply(Code.COPY, self._new(value.shape.shape, Domain.WANTED), value)

    def _lower_pow(self, node: Node, _: str) -> _Value:
        value, exponent = (self._value(argument) for argument in node.args)
        if exponent not in POWERS:
            raise Unsupported(f"a power of {exponent}")
        return self._unary(POWERS[exponent], value)

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
        domain = max(part.domain for part in parts if isinstance(part, Rows))
        result = self._new(sizes, domain)
        pieces = result.shape.split([shape[dim] for shape in shapes], dim)  # type: ignore[no-untyped-call]
        for part, piece in zip(parts, pieces, strict=True):
            self._apply(Code.COPY, Rows(result.slot, piece, domain), part)
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
        extra = tuple(0 if each is None else self._own(each) for each in (weight, bias))
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

    def _linear(self, x: Rows, weight: Tensor, bias: Tensor | None) -> Rows:
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
        layer, scaling, window, cap = (self._value(argument) for argument in node.args[3:])
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
        weighing = Weighing(float(scaling), window, float(cap))
        real = (weighing.scaling, weighing.softcap)
        before = len(self._program.operations)
        self._sites.note(Site("queries", layer), query, (1, 3), before, weighing)
        self._emit(Code.ATTEND, Domain.ROWS, heads, dim, out, (places[0],), extra, real)
        self._sites.note(Site("heads", layer), result, (2, 3), before + 1)
        return result

    def _lower_see(self, node: Node, _: str) -> _Value:
        rows, kind, index = (self._value(argument) for argument in node.args)
        self._sites.note(Site(kind, index), rows, (1,), len(self._program.operations))
        return None

    def _near(self, value: Rows) -> Rows:
        """The value with each head's floats one after the other."""
        return value if value.shape.stride(3) == 1 else self._copied(value)
