"""One half of a test: the program, or the tests that call it. `evaluation.sandbox` starts both; standard library only.

    python -I -S run_limited.py program LINK CPU_SECONDS MEMORY_BYTES FILE_BYTES LIBRARIES
    python -I -S run_limited.py tests LINK CPU_SECONDS MEMORY_BYTES FILE_BYTES LIBRARIES VERDICT

The source is read from standard input. LINK and VERDICT are descriptors, LIBRARIES is a folder of packages. The two
processes communicate over LINK: the tests see the program's names, and what they call runs in the program's process.
Plain values are copied; everything else stays where it was made and is represented by a `Remote`. Only the tests'
process can write to VERDICT, and the program never sees the tests.
"""

from __future__ import annotations

import builtins
import importlib
import json
import operator
import os
import resource
import site
import sys
import types
from collections.abc import Callable
from typing import Any

READY, PASSED = b"ready\n", b"passed\n"
LONGEST_MESSAGE = 16 << 20

# Types that are copied although they are not JSON, with what their constructors take.
_PARTS: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    "builtins.complex": lambda v: (v.real, v.imag),
    "builtins.bytearray": lambda v: (bytes(v),),
    "builtins.range": lambda v: (v.start, v.stop, v.step),
    "builtins.slice": lambda v: (v.start, v.stop, v.step),
    "collections.deque": lambda v: (list(v), v.maxlen),
    "decimal.Decimal": lambda v: (str(v),),
    "fractions.Fraction": lambda v: (v.numerator, v.denominator),
    "datetime.date": lambda v: (v.year, v.month, v.day),
    "datetime.time": lambda v: (v.hour, v.minute, v.second, v.microsecond),
    "datetime.datetime": lambda v: (v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond),
    "datetime.timedelta": lambda v: (v.days, v.seconds, v.microseconds),
}
_BINARY = [
    *("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor", "lshift", "rshift"),
    *("eq", "ne", "lt", "le", "gt", "ge"),
]
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, arguments, named: function(*arguments, **named),
    **{"getattr": getattr, "setattr": setattr, "delattr": delattr, "isinstance": isinstance, "issubclass": issubclass},
    **{"bool": bool, "len": len, "iter": iter, "next": next, "str": str, "repr": repr, "hash": hash, "format": format},
    **{"int": int, "float": float, "abs": abs, "round": round, "reversed": reversed},
    **{name: getattr(operator, name) for name in (*_BINARY, "neg", "pos", "invert", "index")},
    **{name: getattr(operator, name) for name in ("getitem", "setitem", "delitem", "contains")},
}


class LinkClosed(BaseException):
    """The other process has ended. Not an Exception, so that tests cannot take it for the program's error."""


class Remote:
    """Represents an object of the other process. Operations on it run there."""

    __slots__ = ("_handle", "_link")
    _link: Link
    _handle: int

    def __init__(self, link: Link, handle: int) -> None:
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_handle", handle)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call the other process's object."""
        return self._link.ask("call", self, arguments, named)

    def __enter__(self) -> Any:
        return self._link.ask("getattr", self, "__enter__")()

    def __exit__(self, *error: Any) -> Any:
        return self._link.ask("getattr", self, "__exit__")(None, None, None)

    def __instancecheck__(self, instance: Any) -> Any:
        return self._link.ask("isinstance", instance, self)

    def __subclasscheck__(self, subclass: Any) -> Any:
        return self._link.ask("issubclass", subclass, self)


def _give_operations() -> None:
    def unary(name: str) -> Callable[..., Any]:
        return lambda self, *others: self._link.ask(name, self, *others)

    def binary(name: str) -> Callable[..., Any]:
        # Whatever it claims, a program's object never equals a plain value, and their difference is never 0.
        return lambda self, other: self._link.ask(name, self, other) if isinstance(other, Remote) else NotImplemented

    for name in ("bool", "len", "iter", "next", "str", "repr", "hash", "format", "int", "float", "abs", "round"):
        setattr(Remote, f"__{name}__", unary(name))
    for name in ("neg", "pos", "invert", "index", "getitem", "setitem", "delitem", "contains", "reversed"):
        setattr(Remote, f"__{name}__", unary(name))
    for name in ("getattr", "setattr", "delattr"):
        setattr(Remote, f"__{name}__", unary(name))
    for name in _BINARY:
        setattr(Remote, f"__{name.rstrip('_')}__", binary(name))


_give_operations()


class Link:
    """Calls to and from the other process, as lines of JSON.

    Args:
        guarded: the other process may only call and iterate over what it was given, and use the public attributes of
            objects whose class the tests define. Otherwise it may do everything.
    """

    def __init__(self, descriptor: int, *, guarded: bool) -> None:
        # They are open until the process ends.
        self._incoming = open(descriptor, "rb")  # noqa: SIM115
        self._outgoing = open(descriptor, "wb", closefd=False)  # noqa: SIM115
        self._guarded = guarded
        self._exported: list[Any] = []
        self._handles: dict[int, int] = {}
        self._remotes: dict[int, Any] = {}
        self._handle_of_exception: dict[type, int] = {}
        self.closed = False

    def send(self, *message: Any) -> None:
        """Send a message. If nobody reads it, the link closes."""
        try:
            self._outgoing.write(json.dumps(message).encode() + b"\n")
            self._outgoing.flush()
        except OSError:
            self._close()

    def receive(self) -> Any:
        """Wait for a message. An incomplete or overlong line closes the link."""
        try:
            line = self._incoming.readline(LONGEST_MESSAGE)
        except OSError:
            self._close()
        if not line.endswith(b"\n"):
            self._close()
        return json.loads(line)

    def _close(self) -> None:
        self.closed = True
        raise LinkClosed

    def ask(self, operation: str, *arguments: Any) -> Any:
        """Have the other process do `operation`. Lists, dictionaries and sets that it changes are also changed here."""
        sent = _Encoder(self, [])
        self.send("do", operation, [sent.encode(argument) for argument in arguments])
        while (message := self.receive())[0] == "do":
            self.answer(message)
        kind, value, changes = message
        reader = _Decoder(self, list(sent.containers))
        value = reader.decode(value)
        for container, content in zip(sent.containers, changes, strict=True):
            _replace(container, reader.items(container, content))
        if kind == "done":
            return value
        # Otherwise it would silently end a loop of the tests.
        if isinstance(value, StopIteration) and operation != "next":
            raise RuntimeError("the program raised StopIteration")
        raise value

    def answer(self, message: Any) -> None:
        """Do what the other process asks for."""
        _, operation, arguments = message
        reader = _Decoder(self, [])
        try:
            values = [reader.decode(argument) for argument in arguments]
            if self._guarded:
                self._check(operation, arguments, values)
            kind, value = "done", _OPERATIONS[operation](*values)
        except LinkClosed:
            raise
        except BaseException as error:
            kind, value = "raised", error
        made = list(reader.made)
        writer = _Encoder(self, made)
        answer = writer.exception(value) if kind == "raised" else writer.encode(value)
        self.send(kind, answer, [writer.content(container) for container in made[: len(reader.made)]])

    def _check(self, operation: str, arguments: list[Any], values: list[Any]) -> None:
        given = isinstance(arguments[0], list) and arguments[0][0] == "yours"
        own = getattr(type(values[0]), "__module__", None) == "tests"
        private = operation.endswith("attr") and str(values[1]).startswith("_")
        if not given or private or not (own or operation in ("call", "iter", "next")):
            raise TypeError(f"the program may not use {operation} on this object of the tests")

    def export(self, value: Any) -> int:
        """The number by which the other process knows an object, which is kept alive from now on."""
        if id(value) not in self._handles:
            self._handles[id(value)] = len(self._exported)
            self._exported.append(value)
        return self._handles[id(value)]

    def exported(self, handle: int) -> Any:
        """This process's object with a number."""
        return self._exported[handle]

    def remote(self, handle: int) -> Any:
        """The representation of the other process's object with a number."""
        return self._remotes.setdefault(handle, Remote(self, handle))

    def remote_exception(self, handle: int, name: str, base: type) -> Any:
        """A local class for an exception of the other process, for `except`."""
        if handle not in self._remotes:
            made = type(name, (base,), {"__str__": lambda self: self.__dict__["_text"]})
            self._remotes[handle], self._handle_of_exception[made] = made, handle
        return self._remotes[handle]

    def handle_of(self, value: Any) -> int | None:
        """The number of an object of the other process."""
        if isinstance(value, Remote):
            return int(object.__getattribute__(value, "_handle"))
        return self._handle_of_exception.get(value) if isinstance(value, type) else None


class _Encoder:
    """Turns values into JSON. Lists, dictionaries and sets are numbered in order, to preserve identity."""

    def __init__(self, link: Link, containers: list[Any]) -> None:
        self.link, self.containers = link, containers
        self._numbers = {id(container): number for number, container in enumerate(containers)}

    def encode(self, value: Any) -> Any:
        kind = type(value)
        if value is None or kind in (bool, float, str):
            return value
        if (handle := self.link.handle_of(value)) is not None:
            return ["yours", handle]
        if isinstance(value, int):  # Also enumerations. Hexadecimal, since Python refuses to convert long decimals.
            return int(value) if abs(value) < 1 << 1000 else ["int", hex(value)]
        if isinstance(value, float):
            return float(value)
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, bytes):
            return ["bytes", value.hex()]
        if isinstance(value, tuple | frozenset):
            return ["tuple" if isinstance(value, tuple) else "frozenset", [self.encode(item) for item in value]]
        if isinstance(value, list | dict | set):
            return self._container(value)
        return self._other(value)

    def _container(self, value: Any) -> Any:
        if id(value) in self._numbers:
            return ["seen", self._numbers[id(value)]]
        self._numbers[id(value)] = len(self.containers)
        self.containers.append(value)
        kind = "list" if isinstance(value, list) else "dict" if isinstance(value, dict) else "set"
        return [kind, self.content(value)]

    def content(self, container: Any) -> list[Any]:
        pairs = isinstance(container, dict)
        return (
            [[self.encode(k), self.encode(v)] for k, v in container.items()]
            if pairs
            else [*map(self.encode, container)]
        )

    def _other(self, value: Any) -> Any:
        kind = type(value)
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name in _PARTS:
            return ["made", name, [self.encode(part) for part in _PARTS[name](value)]]
        if kind.__module__ == "numpy" and getattr(value, "ndim", None) == 0:
            return self.encode(value.item())
        if isinstance(value, types.ModuleType):
            return ["module", value.__name__]
        own = getattr(value, "__name__", None)
        if isinstance(own, str) and getattr(builtins, own, None) is value:
            return ["builtin", own]
        if isinstance(value, type) and issubclass(value, BaseException):
            base = next(c for c in value.__mro__[1:] if issubclass(c, BaseException))
            return ["exception_class", self.link.export(value), value.__name__, self.encode(base)]
        if isinstance(value, BaseException):
            return self.exception(value)
        return ["mine", self.link.export(value)]

    def exception(self, error: BaseException) -> Any:
        """The class, arguments, attributes and text of an exception, without its traceback."""
        try:
            return ["exception", *map(self.encode, (type(error), error.args, dict(vars(error)), str(error)))]
        except Exception:  # a class of the program may do anything in its __str__
            return ["exception", ["builtin", "RuntimeError"], ["tuple", []], self.encode({}), type(error).__name__]


class _Decoder:
    """Turns JSON back into values; `made` holds the numbered containers."""

    def __init__(self, link: Link, made: list[Any]) -> None:
        self.link, self.made = link, made

    def decode(self, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        kind, *rest = value
        if kind not in _KINDS:
            raise TypeError(f"the other process sent {kind!r}")
        return getattr(self, f"_{kind}")(*rest)

    def items(self, container: Any, content: list[Any]) -> list[Any]:
        """The items of a list, dictionary or set."""
        if isinstance(container, dict):
            return [(self.decode(key), self.decode(value)) for key, value in content]
        return [self.decode(item) for item in content]

    def _new(self, container: Any, content: list[Any]) -> Any:
        self.made.append(container)
        _replace(container, self.items(container, content))
        return container

    def _list(self, content: list[Any]) -> Any:
        return self._new([], content)

    def _dict(self, content: list[Any]) -> Any:
        return self._new({}, content)

    def _set(self, content: list[Any]) -> Any:
        return self._new(set(), content)

    def _seen(self, number: int) -> Any:
        return self.made[number]

    def _int(self, digits: str) -> int:
        return int(digits, 16)

    def _bytes(self, digits: str) -> bytes:
        return bytes.fromhex(digits)

    def _tuple(self, content: list[Any]) -> Any:
        return tuple(map(self.decode, content))

    def _frozenset(self, content: list[Any]) -> Any:
        return frozenset(map(self.decode, content))

    def _made(self, name: str, parts: list[Any]) -> Any:
        if name not in _PARTS:
            raise TypeError(name)
        module, _, kind = name.rpartition(".")
        return getattr(importlib.import_module(module), kind)(*map(self.decode, parts))

    def _module(self, name: str) -> Any:
        return importlib.import_module(name)

    def _builtin(self, name: str) -> Any:
        return getattr(builtins, name)

    def _yours(self, handle: int) -> Any:
        return self.link.exported(handle)

    def _mine(self, handle: int) -> Any:
        return self.link.remote(handle)

    def _exception_class(self, handle: int, name: str, base: Any) -> Any:
        return self.link.remote_exception(handle, name, self.decode(base))

    def _exception(self, kind: Any, arguments: Any, attributes: Any, text: str) -> Any:
        decoded, values, named = self.decode(kind), self.decode(arguments), self.decode(attributes)
        try:
            if not issubclass(decoded, BaseException):
                raise TypeError
            error = decoded.__new__(decoded, *values)
            error.args = values
            error.__dict__.update(named, _text=text)
        except TypeError:  # a few built-in exceptions need other arguments than `args`
            error = RuntimeError(text)
        return error


_KINDS = {name[1:] for name in vars(_Decoder) if name[0] == "_" != name[1] and name != "_new"}


def _replace(container: Any, items: list[Any]) -> None:
    if isinstance(container, list):
        container[:] = items
    else:
        container.clear()
        container.update(items)


def run_program(link: Link, source: str) -> None:
    """Run the program, send its names to the tests, and serve their requests until they end."""
    module = types.ModuleType("program")
    # Not as __main__, so that code for use by hand, such as asking for input, does not run.
    sys.modules["program"] = module
    exec(compile(source, "program.py", "exec"), module.__dict__)
    names = {name: value for name, value in vars(module).items() if not name.startswith("__")}
    link.send("names", _Encoder(link, []).encode(names))
    while True:
        link.answer(link.receive())


def run_tests(link: Link, source: str) -> bool:
    """Whether the tests run to their end with the program's names."""
    module = types.ModuleType("tests")
    sys.modules["tests"] = module
    kind, encoded = link.receive()
    names = _Decoder(link, []).decode(encoded)
    code = compile(source, "tests.py", "exec")
    if any(not hasattr(builtins, name) for name in _names_in(code)):
        # Otherwise a program could define an `all` or a `sorted` that makes any test pass.
        names = {name: value for name, value in names.items() if not hasattr(builtins, name)}
    module.__dict__.update(names)
    exec(code, module.__dict__)
    return kind == "names" and not link.closed


def _names_in(code: types.CodeType) -> set[str]:
    """Global names and attributes that a piece of code uses."""
    inner = [_names_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*inner)


def main() -> None:
    """Set this process's limits and play its role; the arguments come from `sandbox.py`."""
    role, link, cpu_seconds, memory, file_size, libraries, *verdict = sys.argv[1:]
    source = sys.stdin.buffer.read().decode(errors="replace")
    for number, value in (
        (resource.RLIMIT_CPU, int(cpu_seconds)),
        (resource.RLIMIT_AS, int(memory)),
        (resource.RLIMIT_FSIZE, int(file_size)),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(number, (value, value))
    sys.argv = [f"{role}.py"]
    # Python's usual start, with the .pth files of all packages, would take longer than most programs.
    site.setquit()
    sys.path.append(libraries)
    if role == "program":
        run_program(Link(int(link), guarded=False), source)
    report = int(verdict[0])
    os.write(report, READY)
    if run_tests(Link(int(link), guarded=True), source):
        os.write(report, PASSED)
    # Ends without waiting for threads or exit handlers.
    os._exit(0)


if __name__ == "__main__":
    main()
