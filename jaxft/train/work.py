"""What a device does in one run of a traced program: its kernels with their operations and bytes, and the most memory of what it makes.

A device runs a program as kernels. A product is one, and so is a reduction, with the elementwise operations before it; what a kernel reads
and writes lies in memory, what is made inside of one doesn't. That is how XLA fuses, told from the program alone: on no device, compiled
for none.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal
from jax.interpreters import partial_eval

_SAME = ("reshape", "squeeze", "expand_dims", "transpose", "copy", "copy_p", "sharding_constraint", "name", "stop_gradient", "pvary")
_PARTS = ("slice", "dynamic_slice", "gather")  # read so many elements as they return
_STORED = (  # whose result lies in memory, beside reductions
    "concatenate",
    "scatter",
    "scatter-add",
    "scatter_add",
    "sort",
    "top_k",
    "cumsum",
    "cumlogsumexp",
    "cummax",
    "argmax",
    "argmin",
    "conv_general_dilated",
    "optimization_barrier",
    "pure_callback",
)
_CHEAP = ("broadcast_in_dim", "convert_element_type", "iota", "copy", "select_n")  # each kernel makes them for itself
_NO_PRODUCT = ""  # in the place of a type


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What one kernel does."""

    operations: int  # of its product; two for each multiplication and addition
    dtype: str  # of the factors; empty for what is no product
    bytes: int  # read and written


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program does."""

    kernels: dict[Kernel, int]  # and how often each runs
    peak_bytes: int  # of what it makes, its arguments and what may lie in their place aside

    @property
    def operations(self) -> int:
        """The operations of all products."""
        return sum(kernel.operations * count for kernel, count in self.kernels.items())

    @property
    def bytes(self) -> int:
        """What all kernels read and write."""
        return sum(kernel.bytes * count for kernel, count in self.kernels.items())


@dataclasses.dataclass(eq=False)
class _Array:
    """A value: in memory, a part of one that is (`base`), or made inside of the kernels that read it, from `roots`."""

    bytes: int
    stored: bool = True
    base: "_Array | None" = None
    roots: tuple["_Array", ...] = ()
    costly: bool = False  # to make again in each kernel that reads it
    held: int = 0  # bytes that it adds to the memory
    last: int = -1  # the event that reads it last

    def sources(self) -> tuple["_Array", ...]:
        """What a kernel reads for it."""
        return (self,) if self.stored else self.roots


def work(function: Any, *arguments: Any) -> Work:
    """Returns what `function` does with arguments of these shapes; results are taken to lie in the arguments' place.

    >>> a, b = jax.ShapeDtypeStruct((3, 4), "float32"), jax.ShapeDtypeStruct((4, 5), "float32")
    >>> found = work(lambda a, b: jax.lax.scan(lambda c, _: (c, jax.numpy.tanh(a @ b)), 0, length=7)[1].sum(), a, b)
    >>> found.operations, found.peak_bytes  # seven products, and those of all turns with the one that is being made
    (840, 480)
    """
    traced = jax.make_jaxpr(function)(*arguments).jaxpr
    program, used = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    walk = _Walk()
    given = [_Array(_bytes(variable.aval)) for variable, reads in zip(traced.invars, used, strict=True) if reads]
    for made in walk.inside(program, given):
        walk.store(made, held=0)
    return Work(dict(walk.kernels), walk.peak())


class _Walk:
    """Goes through a program's equations in their order, and notes what lies in memory when."""

    def __init__(self) -> None:
        self.kernels: collections.Counter[Kernel] = collections.Counter()
        self._born: list[list[_Array]] = []  # by event
        self._beside: list[int] = []  # bytes that an event needs for itself

    def peak(self) -> int:
        """The most bytes of arrays that live at one event, and of what it needs for itself."""
        change = np.zeros(len(self._born) + 1, np.int64)
        for event, arrays in enumerate(self._born):
            for array in arrays:
                change[event] += array.held
                change[max(array.last, event) + 1] -= array.held
        return int((np.cumsum(change)[:-1] + np.asarray(self._beside, np.int64)).max(initial=0))

    def event(self, reads: Iterable[_Array], makes: Sequence[_Array] = (), beside: int = 0) -> int:
        """Notes one event; returns the bytes that it reads."""
        self._born.append(list(makes))
        self._beside.append(beside)
        sources = {id(source): source for array in reads for source in array.sources()}.values()
        for source in sources:
            part: _Array | None = source
            while part is not None:
                part.last, part = len(self._born) - 1, part.base
        return sum(source.bytes for source in sources)

    def kernel(self, reads: Iterable[_Array], makes: Sequence[_Array], operations: int = 0, dtype: str = _NO_PRODUCT) -> None:
        """Notes one kernel."""
        moved = self.event(reads, makes) + sum(array.bytes for array in makes)
        self.kernels[Kernel(operations, dtype, moved)] += 1

    def store(self, array: _Array, held: int | None = None) -> _Array:
        """Puts a value in memory that isn't there yet."""
        if not array.stored:
            reads, array.stored, array.roots = _Array(0, False, roots=array.roots), True, ()
            array.held = array.bytes if held is None else held
            self.kernel([reads], [array])
        return array

    def inside(self, program: Any, given: Sequence[_Array]) -> list[_Array]:
        """Goes through a program; returns its results."""
        known: dict[Any, _Array] = dict(zip(program.invars, given, strict=True))
        known |= {variable: _Array(_bytes(variable.aval)) for variable in program.constvars}

        def value(variable: Any) -> _Array:
            return _Array(0, False) if isinstance(variable, Literal) else known[variable]

        reads = collections.Counter(
            variable for equation in program.eqns for variable in equation.invars if not isinstance(variable, Literal)
        )
        for equation in program.eqns:
            made = self._made(equation, [value(variable) for variable in equation.invars])
            for variable, array in zip(equation.outvars, made, strict=True):
                if array.costly and reads[variable] > 1:  # several kernels read it, and none makes it for itself
                    self.store(array)
            known |= dict(zip(equation.outvars, made, strict=True))
        return [value(variable) for variable in program.outvars]

    def _made(self, equation: Any, given: list[_Array]) -> list[_Array]:
        name, parameters = equation.primitive.name, equation.params
        if name == "scan":
            return self._scan(equation, given)
        if name == "cond":
            return self._branches(parameters["branches"], given[1:], equation)
        if name == "while":
            return self._loop(equation, given)
        if name == "dot_general":
            return self._product(equation, given)
        if (inner := _called(parameters)) is not None:
            return self.inside(inner, given)
        return self._plain(equation, given)

    def _plain(self, equation: Any, given: list[_Array]) -> list[_Array]:
        name, sizes = equation.primitive.name, [_bytes(variable.aval) for variable in equation.outvars]
        if name == "device_put":
            return [self._moved(array, variable) for array, variable in zip(given, equation.outvars, strict=True)]
        if name in _SAME:
            return [given[0]]
        if name in _PARTS and given[0].stored:
            part = _Array(sizes[0], base=given[0])
            return [part if name == "slice" else _Array(sizes[0], False, roots=(part, *_roots(given[1:])))]
        if name in _STORED or (name.startswith("reduce_") and name != "reduce_precision"):
            made = [_Array(size, held=size) for size in sizes]
            self.kernel(given, made)
            return made
        costly = name not in _CHEAP or any(array.costly and not array.stored for array in given)
        return [_Array(size, False, roots=_roots(given), costly=costly) for size in sizes]

    def _moved(self, array: _Array, variable: Any) -> _Array:
        """A copy in the memory of the host, which is no device's, or from there."""
        if variable.aval.memory_space == jax.memory.Space.Host:
            made = _Array(array.bytes)
        elif array.stored and array.held == 0 and array.base is None:
            made = _Array(array.bytes, held=array.bytes)
        else:
            return array
        self.event([array], [made])
        return made

    def _product(self, equation: Any, given: list[_Array]) -> list[_Array]:
        (contracted, _), _ = equation.params["dimension_numbers"]
        left, result = equation.invars[0].aval, equation.outvars[0].aval
        operations = 2 * math.prod(left.shape[axis] for axis in contracted) * math.prod(result.shape)
        size = _bytes(result)
        made = _Array(size, held=size)
        self.kernel([self.store(array) for array in given], [made], operations, str(left.dtype))
        return [made]

    def _scan(self, equation: Any, given: list[_Array]) -> list[_Array]:
        parameters, length = equation.params, equation.params["length"]
        fixed, carried = parameters["num_consts"], parameters["num_carry"]
        given = [self.store(array) for array in given]
        body = _Walk()
        inner = [_Array(array.bytes if place < fixed + carried else array.bytes // max(length, 1)) for place, array in enumerate(given)]
        made = body.inside(parameters["jaxpr"].jaxpr, inner)
        for before, after in zip(inner[fixed : fixed + carried], made[:carried], strict=True):
            in_place = not after.stored and before in after.roots
            body.store(after, held=0 if in_place else None)
        body.kernel(made[carried:], [_Array(array.bytes) for array in made[carried:]])
        sizes = [_bytes(variable.aval) for variable in equation.outvars]
        stacked = [_Array(size, held=size) for size in sizes[carried:]]
        self._join(body, length)
        self.event(given, stacked, body.peak())
        last = [_Array(size, held=size) for size in sizes[:carried]]
        self.event((), last)
        return last + stacked

    def _loop(self, equation: Any, given: list[_Array]) -> list[_Array]:
        """A loop of unknown length, taken to run once."""
        parameters = equation.params
        body, own = parameters["body_jaxpr"].jaxpr, given[parameters["cond_nconsts"] :]
        return self._branches([parameters["body_jaxpr"]] if len(body.invars) == len(own) else [], own, equation)

    def _branches(self, branches: Sequence[Any], given: list[_Array], equation: Any) -> list[_Array]:
        """The longest of several programs."""
        given = [self.store(array) for array in given]
        walks = []
        for branch in branches:
            walk = _Walk()
            for array in walk.inside(branch.jaxpr, [_Array(array.bytes) for array in given]):
                walk.store(array, held=0)
            walks.append(walk)
        longest = max(walks, key=lambda walk: Work(dict(walk.kernels), 0).operations, default=_Walk())
        self._join(longest, 1)
        made = [_Array(size, held=size) for size in (_bytes(variable.aval) for variable in equation.outvars)]
        self.event(given, made, max((walk.peak() for walk in walks), default=0))
        return made

    def _join(self, other: "_Walk", times: int) -> None:
        for kernel, count in other.kernels.items():
            self.kernels[kernel] += count * times


def _roots(arrays: Iterable[_Array]) -> tuple[_Array, ...]:
    return tuple({id(source): source for array in arrays for source in array.sources()}.values())


def _called(parameters: dict[str, Any]) -> Any:
    """The one program that an equation calls, or None."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if (found := parameters.get(name)) is not None:
            return getattr(found, "jaxpr", found)
    return None


def _bytes(aval: Any) -> int:
    dtype = getattr(aval, "dtype", None)
    if dtype is None or jax.dtypes.issubdtype(dtype, jax.dtypes.extended):  # a token, or a random key of two words
        return 8 * math.prod(getattr(aval, "shape", ()))
    return int(math.prod(aval.shape) * jax.dtypes.itemsize_bits(dtype) // 8)
