"""Runs inside the sandbox: loads an untrusted program, calls the functions that are requested, and answers in JSON.

    python -s -S -P -B -c CODE UID MEMORY_BYTES DISK_BYTES CPU_S PROCESSES ALARM_S MAX_BYTES

`process.py` starts it with this file's bytecode, writes requests to its standard input and reads answers from its standard
output. Four bytes with the length precede each. A request is marshalled by the trusted side; an answer is JSON (values.py has the
forms of both). No answer is a verdict: the program shares this process and can forge every answer, so a forged answer is at most
a wrong value. It imports as little as possible, because it is started once for each sample.
"""

import builtins
import marshal
import os
import sys
from _json import encode_basestring_ascii as quoted  # importing json takes as long as starting Python
from _operator import is_

MAX_DEPTH = 200
MAX_OWN_DEPTH = 40  # the rest of a linked list stays here
MAX_MESSAGE = 1000  # characters of an error's text
MAX_BITS = 10_000  # of an int in digits; Python reads at most 4,300 digits
SCALARS = {type(None), bool, int, float, complex, str, bytes}
VALUE_CLASSES = {  # of the standard library; a program that answers with one has imported its module
    "collections": "Counter OrderedDict defaultdict deque",
    "fractions": "Fraction",
    "decimal": "Decimal",
    "datetime": "date time datetime timedelta",
}


def confine(uid, memory_bytes, disk_bytes, cpu_s, processes, alarm_s):
    """Change from root to the given uid, and lower every limit for good; 0 leaves a limit as it is."""
    import _signal
    import resource

    _signal.alarm(alarm_s)

    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    limits = [("AS", memory_bytes), ("FSIZE", disk_bytes), ("CPU", cpu_s), ("NOFILE", 64), ("NPROC", processes)]
    for name, limit in [*limits, ("STACK", 2**23)]:
        if limit:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (1, 1))  # with 0, the host's crash reporter would still run (core(5))


class Values:
    """Reads the values of requests, and writes those of answers. `own` names classes that both sides have."""

    def __init__(self, module):
        self.module, self.own, self.handles = module, set(), []
        self.given, self.numbers = [], {}  # the arguments of the call that can change

    # requests

    def read(self, value):
        """Return the value that a part of a request stands for."""
        if type(value) in SCALARS:
            return value
        tag, *rest = value
        if tag in ("t", "f"):
            return (tuple if tag == "t" else frozenset)(self.read_all(rest[0]))
        if tag == "a":
            return self.given[rest[0]]
        if tag == "h":
            return self.handles[rest[0]]
        if tag == "g":
            return getattr(self.module, rest[0])
        if tag == "y":
            return getattr(builtins, rest[0])
        if tag == "v":  # a class of the standard library, made of its arguments
            module, name, arguments = rest
            return getattr(__import__(module), name)(*self.read_all(arguments))
        if tag == "e":
            return getattr(self.module, rest[0])[rest[1]]
        if tag == "n":
            cls = getattr(self.module, rest[0])
            return tuple.__new__(cls, self.read_all(rest[1]))
        return self.fill(self.empty(tag, rest), rest[-1])

    def empty(self, tag, rest):
        """Return an empty object of the kind that can change."""
        if tag in ("l", "d", "s", "B"):
            return {"l": list, "d": dict, "s": set, "B": bytearray}[tag]()
        if tag == "q":
            return __import__("collections").deque(maxlen=rest[0])
        if tag == "D":
            factory = rest[0] and getattr(builtins, rest[0])
            return __import__("collections").defaultdict(factory)
        if tag in ("Counter", "OrderedDict"):
            return getattr(__import__("collections"), tag)()
        return object.__new__(getattr(self.module, rest[0]))  # its own __new__ may want arguments

    def fill(self, target, content):
        """Number the object, and then fill it, because it may hold itself."""
        self.numbers[id(target)] = len(self.given)
        self.given.append(target)
        values = content if isinstance(content, bytes) else self.read_all(content)
        if isinstance(target, dict):
            for key, value in zip(values[::2], values[1::2]):
                target[key] = value
        elif isinstance(target, set):
            target.update(values)
        elif hasattr(target, "extend") and type(target).__name__ not in self.own:
            target.extend(values)
        else:
            for key, value in zip(values[::2], values[1::2]):
                object.__setattr__(target, key, value)
        return target

    def read_all(self, values):
        return [v if type(v) in SCALARS else self.read(v) for v in values]

    # answers

    def write(self, value, depth=0):
        """Return a value as JSON. An object that is not plain data stays here, and its number is sent instead."""
        kind = type(value)
        if value is None or value is True or value is False:
            return {None: "null", True: "true", False: "false"}[value]
        if kind is int:
            return self.write_int(value)
        if kind is str:
            return quoted(value)
        if kind is float:
            text = float.__repr__(value)
            return text if text.strip("-") not in ("inf", "nan") else f'{{"n":"{text}"}}'
        if id(value) in self.numbers:
            return f'{{"a":{self.numbers[id(value)]}}}'
        if depth > MAX_OWN_DEPTH and self.is_own(kind):
            return self.write_handle(value)
        if depth > MAX_DEPTH:
            raise ValueError(f"the answer is nested deeper than {MAX_DEPTH}")
        if kind is list:
            return f'{{"l":{self.write_all(value, depth)}}}'
        if kind is tuple:
            return f'{{"t":{self.write_all(value, depth)}}}'
        if kind is dict:
            return f'{{"d":{self.write_all(flat(value), depth)}}}'
        text = self.write_class(value, kind, depth)
        return self.write_subclass(value, kind, depth) if text is None else text

    def write_all(self, values, depth):
        return "[" + ",".join([self.write(v, depth + 1) for v in values]) + "]"

    def write_int(self, value):
        return int.__repr__(value) if int.bit_length(value) <= MAX_BITS else f'{{"i":"{int.__format__(value, "x")}"}}'

    def is_own(self, kind):
        return kind.__name__ in self.own and self.module.__dict__.get(kind.__name__) is kind

    def write_class(self, value, kind, depth):
        """Return an object of a class that both sides have as JSON, or None if its class is another."""
        name = kind.__name__
        if self.is_own(kind):
            if issubclass(kind, tuple):
                return f'{{"N":[{quoted(name)},{self.write_all(tuple.__iter__(value), depth)}]}}'
            if "enum" in sys.modules and isinstance(value, sys.modules["enum"].Enum):
                return f'{{"e":[{quoted(name)},{quoted(value.name)}]}}'
            return f'{{"o":[{quoted(name)},{self.write_all(flat(attributes(value)), depth)}]}}'
        if kind is type and builtins.__dict__.get(name := type.__repr__(value)[8:-2]) is value:
            return f'{{"y":{quoted(name)}}}'
        if kind is range:
            return f'{{"r":[{",".join(map(self.write_int, (value.start, value.stop, value.step)))}]}}'
        if kind in (type({}.keys()), type({}.values()), type({}.items())):
            return f'{{"k":["{name}",{self.write_all(flat(value) if "items" in name else value, depth)}]}}'
        for module, names in VALUE_CLASSES.items():
            if name in names.split() and module in sys.modules and getattr(sys.modules[module], name, None) is kind:
                return f'{{"v":["{name}",{self.write_all(arguments(value, name), depth)}]}}'
        return None

    def write_subclass(self, value, kind, depth):
        """Return an object as JSON by the builtin class that it is of. The class's own methods are used, not the subclass's."""
        if isinstance(value, int):
            return self.write_int(value)
        if isinstance(value, float):
            return self.write(float.__float__(value), depth)
        if isinstance(value, str):
            return quoted(str.__str__(value))
        if isinstance(value, complex):
            return f'{{"c":{self.write_all([value.real, value.imag], depth)}}}'
        if isinstance(value, (bytes, bytearray)):
            return f'{{"{"b" if isinstance(value, bytes) else "B"}":"{value.hex()}"}}'
        if isinstance(value, dict):
            return f'{{"d":{self.write_all(flat(value), depth)}}}'
        if isinstance(value, tuple) and isinstance(getattr(kind, "_fields", None), tuple):
            fields = ",".join([quoted(str.__str__(field)) for field in kind._fields])
            return f'{{"T":[{quoted(kind.__name__)},[{fields}],{self.write_all(tuple.__iter__(value), depth)}]}}'
        for base, tag in ((list, "l"), (tuple, "t"), (set, "s"), (frozenset, "f")):
            if isinstance(value, base):
                return f'{{"{tag}":{self.write_all(base.__iter__(value), depth)}}}'  # type: ignore[arg-type]
        return self.write_handle(value)

    def write_handle(self, value):
        self.handles.append(value)
        kind = type(value)
        tag = "G" if kind is type(_ for _ in ()) else "x" if hasattr(kind, "__next__") else "h"
        tag = "w" if tag == "h" and hasattr(kind, "__await__") else tag
        return f'{{"{tag}":[{len(self.handles) - 1},{quoted(kind.__name__)}]}}'

    def write_changes(self, before):
        """Return the arguments that a call has changed as JSON, each with its number."""
        changed = []
        for number, (value, old) in enumerate(zip(self.given, before)):
            new = parts(value)
            if len(new) != len(old) or not all(map(is_, new, old)):
                text = f'"{bytes(value).hex()}"' if isinstance(value, bytearray) else self.write_all(new, 1)
                changed.append(f"[{number},{text}]")
        return f',"changed":[{",".join(changed)}]' if changed else ""


def flat(mapping):
    """Return keys and values in one list, in turn."""
    if isinstance(mapping, dict):  # an OrderedDict keeps its order beside the dict
        ordered = getattr(sys.modules.get("collections"), "OrderedDict", dict)
        mapping = ordered.items(mapping) if type(mapping) is ordered else dict.items(mapping)
    return [part for pair in mapping for part in pair]


def attributes(value):
    """Return the attributes of an object, those in slots too."""
    slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ()) if name != "__weakref__"]
    found = {name: getattr(value, name) for name in slots if name != "__dict__" and hasattr(value, name)}
    return {**found, **getattr(value, "__dict__", {})}


def parts(value):
    """Return what an object that can change holds, in one list."""
    if isinstance(value, dict):
        return flat(value)
    if isinstance(value, (list, set, bytearray)) or type(value).__name__ == "deque":
        return list(value)
    return flat(attributes(value))


def arguments(value, name):
    """Return what an object of the standard library is made of, as its class takes it on the other side."""
    if name in ("Counter", "OrderedDict"):
        return flat(value)
    if name == "defaultdict":
        factory = value.default_factory
        return [factory if type(factory) is type else None, *flat(value)]
    if name == "deque":
        return [value.maxlen, *value]
    if name == "Fraction":
        return [value.numerator, value.denominator]
    if name == "timedelta":
        return [value.days, value.seconds, value.microseconds]
    return [value.isoformat() if name != "Decimal" else str(value)]


def perform(values, action, *rest):
    """Do what a request asks for, and return the answer."""
    if action == "load":
        source, own = rest
        values.own = set(own)
        exec(compile(source, "<program>", "exec", dont_inherit=True), values.module.__dict__)
        return None
    if action == "call":
        target, args, named = rest
        return target(*args, **named)
    if action == "get":
        return getattr(*rest)
    if action == "set":
        return setattr(*rest)
    if action == "item":
        return rest[0][rest[1]]
    if action == "setitem":
        rest[0][rest[1]] = rest[2]
        return None
    if action == "await":
        import asyncio

        async def awaited():
            return await rest[0]

        return asyncio.run(awaited())
    if action == "send":
        return rest[0].send(rest[1])
    return (len if action == "len" else iter if action == "iter" else next)(rest[0])


def error(values, e, kind="error"):
    """Return an error as JSON: the names of its classes, its text, and what it was raised with if that is plain.

    `kind` is error for one that the program raised, and unable for one in carrying its arguments or its answer.
    """
    try:
        message = str(e)[:MAX_MESSAGE]
        plain = all(type(v) in (str, int, float, bool, type(None)) and len(str(v)) <= MAX_MESSAGE for v in e.args)
        told = values.write(tuple(e.args[:10])) if plain else "null"
    except BaseException:
        message, told = "", "null"
    names = ",".join([quoted(cls.__name__[:MAX_MESSAGE]) for cls in type(e).__mro__[:20]])
    return f'"{kind}":[[{names}],{quoted(message)},{told}]'


def serve(requests, answers, max_bytes):
    """Answer requests until the input is closed."""
    module = type(sys)("solution")  # not __main__: code under `if __name__ == "__main__"` must not run
    sys.modules["solution"] = module
    values = Values(module)

    def receive(count):
        pieces = []
        while count:
            piece = os.read(requests, min(count, 2**20))
            if not piece:
                os._exit(0)
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)

    def send(text):
        data = text.encode("ascii")
        data = len(data).to_bytes(4, "big") + data
        while data:
            data = data[os.write(answers, data) :]

    send("null")  # ready
    while True:
        request = receive(int.from_bytes(receive(4), "big"))
        values.given, values.numbers, before = [], {}, []
        try:
            asked = values.read_all(marshal.loads(request))
            before = [parts(value) for value in values.given]
            try:
                result = perform(values, *asked)
            except BaseException as e:  # SystemExit and KeyboardInterrupt too
                answer = error(values, e)
            else:
                answer = f'"ok":{values.write(result)}'
            answer = f"{{{answer}{values.write_changes(before)}}}"
            if len(answer) > max_bytes:
                raise ValueError(f"the answer has {len(answer)} bytes and may have {max_bytes}")
        except BaseException as e:
            answer = f"{{{error(values, e, 'unable')}}}"
        send(answer)


if __name__ == "__main__":
    own_requests, own_answers = os.dup(0), os.dup(1)
    nothing = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):  # the program's output is dropped, and its input is empty
        os.dup2(nothing, standard)
    *limits, max_bytes = map(int, sys.argv[1:])
    confine(*limits)
    serve(own_requests, own_answers, max_bytes)
