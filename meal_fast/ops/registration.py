"""One declaration an op: `@registered` beside a public function makes `torch.ops.meal_fast.NAME`.

torch.compile keeps such an op whole. An op that is being compiled calls its registered self; run by
hand it does not, for the dispatcher costs more per call than a small op. The body of a registered
op is the eager function, so checks, choice of an implementation and numbers are the same. The
schema is read off the signature. Three shapes of op:

- values: NAME gives the results, NAME_backward calls the function again for its gradients (so going
  back through a compiled `linear_logprob` makes its forward pass again);
- a loss: NAME gives the loss and the gradients with it, in one pass, and going back is a product;
- neither: nothing is differentiated.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from . import reference

Given = dict[str, Any]  # the arguments of an op by their names
Function = TypeVar("Function", bound=Callable[..., Any])
SCALARS = {float: "float", int: "SymInt", str: "str", bool: "bool"}
REQUIRED = inspect.Parameter.empty

OPS: dict[str, Op] = {}


def registered(
    *differentiable: str,
    fake: Callable[[Given], Any] | None = None,
    report: Callable[[Given, Tensor, Tensor], dict[str, Tensor]] | None = None,
    prepare: Callable[[Given], Given] | None = None,
) -> Callable[[Function], Function]:
    """Register the decorated function as `torch.ops.meal_fast.NAME`, and route torch.compile to it.

    Args:
        differentiable: the arguments that get gradients.
        fake: gives results that are empty but of the right shapes, dtypes and device.
        report: for a loss, (loss, metrics): the metrics from the arguments, the count of tokens and
            the tensor of reference.FIGURES. A loss needs no fake.
        prepare: turns arguments that a schema has no word for into tensors and numbers.

    Raises:
        TypeError: an annotation that has no counterpart in a schema.
    """

    def declare(function: Function) -> Function:
        op = Op(function, differentiable, prepare, report is not None)
        OPS[function.__name__] = op
        if report is not None:
            op.register_loss()
        elif differentiable:
            op.register_values(fake)
        else:
            op.register_plain(fake)

        @functools.wraps(function)
        def public(*arguments: Any, **options: Any) -> Any:
            if not torch.compiler.is_compiling():
                return function(*arguments, **options)
            given = op.bind(arguments, options)
            if report is None:
                return op.registered(*op.flat(given))
            loss, tokens, figures, *_ = op.registered(*op.flat(given), op.needs(given))
            return loss, report(given, tokens, figures)

        return cast(Function, public)

    return declare


@dataclass(frozen=True)
class Parameter:
    """Map an argument of a function to the one, two or three of the schema that carry it."""

    name: str
    default: Any
    kind: str  # "one", "pair", "number" or "tensors"
    schema: tuple[str, ...]
    made_of: Any = None  # kind "tensors": the class

    @staticmethod
    def of(name: str, hint: Any, default: Any) -> Parameter:
        union = typing.get_origin(hint) in (types.UnionType, typing.Union)
        members = list(typing.get_args(hint)) if union else [hint]
        optional = "?" if types.NoneType in members else ""
        members = [m for m in members if m is not types.NoneType]
        if hint == tuple[float, float]:
            return Parameter(name, default, "pair", (f"float {name}_0", f"float {name}_1"))
        if set(members) == {float, Tensor}:
            schema = (f"float? {name}", f"Tensor? {name}_tensor")
            return Parameter(name, default, "number", schema)
        if Tensor in members:
            for member in members:
                if hasattr(member, "from_tensors"):
                    rest = (f"Tensor? {name}_{i}" for i in range(1, member.TENSORS))
                    return Parameter(name, default, "tensors", (f"Tensor {name}", *rest), member)
            return Parameter(name, default, "one", (f"Tensor{optional} {name}",))
        if len(members) == 1 and members[0] in SCALARS:
            return Parameter(name, default, "one", (f"{SCALARS[members[0]]}{optional} {name}",))
        raise TypeError(f"{name}: {hint} has no counterpart in a schema; annotate it otherwise")

    def flat(self, value: Any) -> tuple[Any, ...]:
        if self.kind == "pair":
            return (value[0], value[1])
        if self.kind == "number":
            return (None, value) if isinstance(value, Tensor) else (value, None)
        if self.kind == "tensors":
            if isinstance(value, Tensor):
                return (value, *[None] * (len(self.schema) - 1))
            return tuple(value.to_tensors())
        return (value,)

    def value(self, flat: Sequence[Any]) -> Any:
        if self.kind == "pair":
            return flat[0], flat[1]
        if self.kind == "number":
            return flat[0] if flat[1] is None else flat[1]
        if self.kind == "tensors":
            return flat[0] if None in flat[1:] else self.made_of.from_tensors(*flat)
        return flat[0]


class Op:
    """Hold a function, its schema, and the way between their arguments."""

    registered: Any  # torch.ops.meal_fast.NAME

    def __init__(
        self,
        function: Callable[..., Any],
        differentiable: tuple[str, ...],
        prepare: Callable[[Given], Given] | None,
        is_loss: bool,
    ) -> None:
        self.function, self.differentiable, self.prepare = function, differentiable, prepare
        self.is_loss = is_loss
        self.name = function.__name__
        hints = typing.get_type_hints(function)
        signature = inspect.signature(function).parameters.values()
        self.parameters = [Parameter.of(p.name, hints[p.name], p.default) for p in signature]
        self.positional = sum(p.kind is not p.KEYWORD_ONLY for p in signature)
        self.returned = hints["return"]
        entries = [entry for p in self.parameters for entry in p.schema]
        self.schema = ", ".join(entries)
        names = [entry.split()[1] for entry in entries]
        self.places = [names.index(name) for name in differentiable]

    # --- arguments -----------------------------------------------------------------------------

    def bind(self, arguments: tuple[Any, ...], options: Given) -> Given:
        """Name the arguments of a call, and fill in the defaults."""
        given = {p.name: p.default for p in self.parameters}
        if len(arguments) > self.positional:
            takes = f"takes {self.positional} positional arguments, got {len(arguments)}"
            raise TypeError(f"{self.name}() {takes}")
        by_place = dict(zip(given, arguments, strict=False))
        given.update(by_place)
        for name, value in options.items():
            if name not in given:
                raise TypeError(f"{self.name}() got an unexpected keyword argument {name!r}")
            if name in by_place:
                raise TypeError(f"{self.name}() got multiple values for argument {name!r}")
            given[name] = value
        for name, value in given.items():
            if value is REQUIRED:
                raise TypeError(f"{self.name}() needs the argument {name!r}")
        return given if self.prepare is None else self.prepare(given)

    def flat(self, given: Given) -> list[Any]:
        return [x for p in self.parameters for x in p.flat(given[p.name])]

    def arguments(self, *arguments: Any, **options: Any) -> tuple[Any, ...]:
        """Give the registered op's arguments for a call of the function."""
        given = self.bind(arguments, options)
        return *self.flat(given), *([self.needs(given)] if self.is_loss else [])

    def given(self, flat: Sequence[Any]) -> Given:
        given, at = {}, 0
        for p in self.parameters:
            given[p.name] = p.value(flat[at : at + len(p.schema)])
            at += len(p.schema)
        return given

    def needs(self, given: Given) -> list[bool]:
        return needs_gradient(*(given[name] for name in self.differentiable))

    def leaves(self, flat: Sequence[Any], needs: list[bool]) -> tuple[Given, list[Tensor]]:
        """Give the arguments, those that need a gradient made leaves; and these alone."""
        values, wanted = list(flat), []
        for place, n in zip(self.places, needs, strict=True):
            if n:
                values[place] = values[place].detach().requires_grad_()
                wanted.append(values[place])
        return self.given(values), wanted

    def gradients(self, made: Sequence[Tensor | None], arguments: int) -> tuple[Any, ...]:
        """Put each gradient in its argument's place, as a backward pass returns them."""
        out: list[Any] = [None] * arguments
        for place, gradient in zip(self.places, made, strict=True):
            out[place] = gradient
        return tuple(out)

    # --- the three shapes ----------------------------------------------------------------------

    def define(self, name: str, body: Any, schema: str, fake: Any) -> Any:
        op = torch.library.custom_op(f"meal_fast::{name}", body, mutates_args=(), schema=schema)
        op.register_fake(fake)
        return op

    def register_plain(self, fake: Any) -> Any:
        single = self.returned is Tensor
        returns = ["Tensor"] * (1 if single else len(typing.get_args(self.returned)))
        results = returns[0] if single else f"({', '.join(returns)})"

        def body(*flat: Any) -> Any:
            with torch.no_grad():
                return self.function(**self.given(flat))

        op = self.define(
            self.name, body, f"({self.schema}) -> {results}", lambda *flat: fake(self.given(flat))
        )
        self.registered = getattr(torch.ops.meal_fast, self.name)
        return op

    def register_values(self, fake: Any) -> None:
        def backward_body(upstream: list[Tensor], needs: list[bool], *flat: Any) -> list[Tensor]:
            with autograd_inside():
                given, wanted = self.leaves(flat, needs)
                outputs = self.function(**given)
                used = [(o, g) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad]
                made, by = zip(*used, strict=True)
                gradients = torch.autograd.grad(made, wanted, by, materialize_grads=True)
            return [g.contiguous() for g in gradients]

        def backward_fake(upstream: list[Tensor], needs: list[bool], *flat: Any) -> list[Tensor]:
            wanted = [flat[place] for place, n in zip(self.places, needs, strict=True) if n]
            return [x.new_empty(x.shape) for x in wanted]

        op = self.register_plain(fake)
        backward_op = self.define(
            f"{self.name}_backward",
            backward_body,
            f"(Tensor[] upstream, bool[] needs, {self.schema}) -> Tensor[]",
            backward_fake,
        )

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
            ctx.others = [None if isinstance(x, Tensor) else (x,) for x in inputs]

        def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
            tensors = iter(ctx.saved_tensors)
            flat = [next(tensors) if x is None else x[0] for x in ctx.others]
            needs = [ctx.needs_input_grad[place] for place in self.places]
            made = iter(backward_op(list(upstream), needs, *flat))
            return self.gradients([next(made) if n else None for n in needs], len(flat))

        op.register_autograd(backward, setup_context=setup_context)

    def register_loss(self) -> None:
        """Register NAME, which takes one argument more: which of the differentiable get a gradient.

        It gives the loss, how many tokens, the other metrics in the order of reference.FIGURES (0
        where there is none), and a gradient for each of those: empty where it is not needed.
        """

        def body(*flat_and_needs: Any) -> tuple[Tensor, ...]:
            *flat, needs = flat_and_needs
            made: Iterator[Tensor] = iter(())
            with autograd_inside():
                given, wanted = self.leaves(flat, needs)
                loss, metrics = self.function(**given)
                if wanted:
                    made = iter(torch.autograd.grad(loss, wanted, materialize_grads=True))
            loss = loss.detach()
            figures = [metrics.get(name, torch.zeros_like(loss)) for name in reference.FIGURES]
            gradients = (next(made).contiguous() if n else loss.new_empty(0) for n in needs)
            return loss, metrics["tokens"].clone(), torch.stack(figures), *gradients

        def fake(*flat_and_needs: Any) -> tuple[Tensor, ...]:
            *flat, needs = flat_and_needs
            given = [flat[place] for place in self.places]
            loss = given[0].new_empty((), dtype=reference.compute_dtype(*given))
            gradients = (
                x.new_empty(x.shape) if n else loss.new_empty(0)
                for x, n in zip(given, needs, strict=True)
            )
            tokens = loss.new_empty((), dtype=torch.int64)
            return loss, tokens, loss.new_empty(len(reference.FIGURES)), *gradients

        results = ", ".join(["Tensor"] * (3 + len(self.places)))
        op = self.define(self.name, body, f"({self.schema}, bool[] needs) -> ({results})", fake)
        self.registered = getattr(torch.ops.meal_fast, self.name)

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.mark_non_differentiable(*output[1:])
            ctx.save_for_backward(*output[3:])
            ctx.needs, ctx.arguments = inputs[-1], len(inputs)

        def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
            made = [
                g * upstream.to(g.dtype) if n else None
                for g, n in zip(ctx.saved_tensors, ctx.needs, strict=True)
            ]
            return self.gradients(made, ctx.arguments)

        op.register_autograd(backward, setup_context=setup_context)


def needs_gradient(*tensors: Tensor | None) -> list[bool]:
    enabled = torch.is_grad_enabled()
    return [enabled and x is not None and x.requires_grad for x in tensors]


@contextmanager
def autograd_inside() -> Iterator[None]:
    """Switch autograd on in the body of an op: the dispatcher left it behind on the way there."""
    key = torch._C.DispatchKey.AutogradFunctionality
    before = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, before)
