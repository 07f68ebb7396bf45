"""Reads the values of requests and writes those of answers, inside the sandbox (arguments.py and values.py have the other side).

An object that can change has a number. One with attributes is written behind the answer, in a list, so that objects may hold each
other in a ring. A list, a dict or the like is written where it stands; if it comes twice, all is written once more, and it too
stands behind the answer, once. This file imports as little as possible, because it is loaded once for each sample.
"""

import builtins
import sys
from _json import encode_basestring_ascii as quoted  # importing json takes as long as starting Python
from _operator import is_

MAX_DEPTH = 200
MAX_OWN_DEPTH = 40  # the rest of a linked list that is hashed by what it holds stays here
MAX_MADE = 4000  # objects with attributes in one answer; the rest of a long linked list stays here
MAX_COMPARED = 1000  # items of an object kept from an earlier call that are compared by identity
MAX_BITS = 10_000  # of an int in digits; Python reads at most 4,300 digits
BASES = (object, int, float, str, list, dict, set)  # of the problem's own classes, as in arguments.py
HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE
SCALARS = {type(None), bool, int, float, complex, str, bytes}
VALUE_CLASSES = {  # of the standard library; a program that answers with one has imported its module
    "collections": "Counter OrderedDict defaultdict deque",
    "fractions": "Fraction",
    "decimal": "Decimal",
    "datetime": "date time datetime timedelta",
}


class Values:
    """Reads the values of requests, and writes those of answers. `own` names classes that both sides have."""

    def __init__(self, module):
        self.module, self.own = module, set()
        self.handles, self.handle_of = [], {}  # objects that stay here
        self.given, self.kept, self.fresh = (
            [],
            [],
            0,
        )  # the call's arguments that can change, and all that later calls may change
        self.entries, self.before = [], []  # of the given: those kept from earlier calls, and what all of them held
        self.numbers, self.shared, self.again = {}, set(), set()
        self.loop = None  # in which asynchronous generators run

    # requests

    def receive(self, message):
        """Return a request. First come whether later calls may change the last call's arguments, and which of these are given."""
        keep, given, count, request, behind = message
        if keep:
            self.kept += [[value, parts(value)] for value in self.given[self.fresh :]]
        self.fresh = len(given)
        self.numbers, self.entries = {}, [self.kept[number] for number in given]
        self.given = [value for value, _ in self.entries] + [None] * (count - len(given))
        for number, *what in behind:
            self.given[number] = self.empty("o", what)
        request = self.read_all(request)
        for number, *what in behind:
            self.fill_own(self.given[number], what)
        self.before = [held for _, held in self.entries] + [parts(value) for value in self.given[self.fresh :]]
        return request

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
            return getattr(__import__(rest[0]), rest[1])
        if tag == "D":  # a dataclass's own default
            return getattr(self.module, rest[0]).__dataclass_fields__[rest[1]].default
        if tag == "v":  # a class of the standard library, made of its arguments
            module, name, arguments = rest
            return getattr(__import__(module), name)(*self.read_all(arguments))
        if tag == "e":
            return getattr(self.module, rest[0])[rest[1]]
        if tag == "E":
            return getattr(self.module, rest[0])(rest[1])
        if tag in ("n", "N"):  # a named tuple, of the problem's or the program's class
            cls = getattr(self.module, rest[0]) if tag == "n" else self.handles[rest[0]]
            return tuple.__new__(cls, self.read_all(rest[1]))
        number, *rest = rest
        self.given[number] = target = self.empty(tag, rest)  # before it is filled, because it may hold itself
        self.fill_own(target, rest) if tag == "o" else self.fill(target, rest[-1])
        return target

    def empty(self, tag, rest):
        """Return an empty object of the kind that can change."""
        if tag in ("l", "d", "s", "B"):
            return {"l": list, "d": dict, "s": set, "B": bytearray}[tag]()
        if tag == "o":  # its own __new__ may want arguments
            base = getattr(builtins, rest[1])
            return base.__new__(getattr(self.module, rest[0]), *rest[2] if base in (int, float, str) else ())
        if tag == "q":
            return __import__("collections").deque(maxlen=rest[0])
        if tag == "C":
            factory = rest[0] and getattr(builtins, rest[0])
            return __import__("collections").defaultdict(factory)
        return getattr(__import__("collections"), tag)()

    def fill(self, target, content):
        """Give an empty object what it holds."""
        values = content if isinstance(content, bytes) else self.read_all(content)
        if isinstance(target, dict):
            kind = type(target) if type(target).__name__ == "OrderedDict" else dict  # a Counter's own update() adds
            kind.update(target, zip(values[::2], values[1::2]))
        elif isinstance(target, set):
            set.update(target, values)
        else:
            (list if isinstance(target, list) else type(target)).extend(target, values)

    def fill_own(self, target, what):
        """Give an object of the problem's own class its attributes, and what it holds as one of a builtin class."""
        _, base, content, named = what
        pairs = list(zip(named[::2], named[1::2]))
        for name, value in pairs:  # plain ones first: a hash may need them
            if type(value) in SCALARS:
                object.__setattr__(target, name, value)
        if base in ("list", "dict", "set"):
            self.fill(target, content)
        for name, value in pairs:
            if type(value) not in SCALARS:
                object.__setattr__(target, name, self.read(value))

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
        if depth > MAX_DEPTH:
            raise ValueError(f"the answer is nested deeper than {MAX_DEPTH}")
        if kind is tuple:
            return f'{{"t":{self.write_all(value, depth)}}}'
        key = id(value)
        if key in self.numbers:
            number = self.numbers[key]
            if type(number) is int:
                return f'{{"a":{number}}}'
            self.again.add(key)  # it comes twice: all is written once more, with its number
            return "null"
        if kind is list and not self.shared:
            self.numbers[key] = value
            return f'{{"l":{self.write_all(value, depth)}}}'
        if self.is_object(value, kind):
            return self.write_object(value, kind, depth)
        if kind in (list, dict, set, bytearray) or self.is_of_library(kind, "collections"):
            if key in self.shared:
                return self.write_number(value, True)
            self.numbers[key] = value  # which also keeps it, so that no other has its id
        return self.write_open(value, kind, depth)

    def write_open(self, value, kind, depth):
        """Return what an object holds as JSON."""
        if kind is list:
            return f'{{"l":{self.write_all(value, depth)}}}'
        if kind is dict:
            return f'{{"d":{self.write_all(flat(value), depth)}}}'
        if self.is_object(value, kind):
            return f'{{"o":[{quoted(kind.__name__)},{self.write_own(value, base_of(kind), depth)}]}}'
        text = self.write_class(value, kind, depth)
        return self.write_subclass(value, kind, depth) if text is None else text

    def is_object(self, value, kind):
        """Return whether an object is of a class that both sides have, and has attributes that can be sent."""
        return self.is_own(kind) and not issubclass(kind, tuple) and not is_enum(value) and base_of(kind) is not None

    def is_of_library(self, kind, module):
        name = kind.__name__
        return name in VALUE_CLASSES[module].split() and getattr(sys.modules.get(module), name, None) is kind

    def write_object(self, value, kind, depth):
        """Number an object with attributes. One that is hashed by them is written here, because its hash is needed at once."""
        if kind.__hash__ in (None, object.__hash__):
            return self.write_handle(value) if len(self.made) >= MAX_MADE else self.write_number(value, True)
        if depth > MAX_OWN_DEPTH:
            return self.write_handle(value)
        return f'{{"m":[{self.write_number(value, False)},{self.write_open(value, kind, depth)}]}}'

    def write_number(self, value, is_behind):
        """Number an object of the answer. Return its reference, or only the number if it is not written behind the answer."""
        self.numbers[id(value)] = number = self.count
        self.count += 1
        if is_behind:
            self.made.append((number, value))
            return f'{{"a":{number}}}'
        self.alive.append(value)
        return number

    def answer(self, text, result, end=""):
        """Return an answer as JSON: the result between two texts, what has changed, and the objects of both."""
        self.shared, n_handles = set(), len(self.handles)
        while True:
            self.numbers, self.count = {id(v): i for i, v in enumerate(self.given)}, len(self.given)
            self.again, self.made, self.alive, self.after = set(), [], [], {}  # type: ignore[var-annotated]
            told = self.write(result)
            changed = self.write_changes() if self.given else ""
            behind = []
            for number, value in self.made:  # which grows meanwhile
                behind.append(f"[{number},{self.write_open(value, type(value), 1)}]")
            if not self.again:
                for number, held in self.after.items():
                    self.entries[number][1] = held
                made = f',"made":[{",".join(behind)}]' if behind else ""
                return f"{{{text}{told}{end}{changed}{made}}}"
            self.shared |= self.again
            for value in self.handles[n_handles:]:
                del self.handle_of[id(value)]
            del self.handles[n_handles:]

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
            if is_enum(value):
                is_flags = isinstance(value, sys.modules["enum"].Flag)
                told = self.write_int(value.value) if is_flags else quoted(value.name)
                return f'{{"{"E" if is_flags else "e"}":[{quoted(name)},{told}]}}'
        if kind is type and builtins.__dict__.get(name := type.__repr__(value)[8:-2]) is value:
            return f'{{"y":{quoted(name)}}}'
        if kind is range:
            return f'{{"r":[{",".join(map(self.write_int, (value.start, value.stop, value.step)))}]}}'
        if kind in (type({}.keys()), type({}.values()), type({}.items())):
            return f'{{"k":["{name}",{self.write_all(flat(value) if "items" in name else value, depth)}]}}'
        for module in VALUE_CLASSES:
            if self.is_of_library(kind, module):
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
            values = self.write_all(tuple.__iter__(value), depth)
            return f'{{"T":[{quoted(kind.__name__)},[{fields}],{values},{self.handle(kind)}]}}'
        for base, tag in ((list, "l"), (tuple, "t"), (set, "s"), (frozenset, "f")):
            if isinstance(value, base):
                return f'{{"{tag}":{self.write_all(base.__iter__(value), depth)}}}'  # type: ignore[arg-type]
        return self.write_handle(value)

    def write_own(self, value, base, depth):
        """Return the attributes of an object of the problem's own class, and what it holds as one of a builtin class."""
        text = self.write_all(flat(attributes(value)), depth)
        held = content_of(value, base)
        return text if base is object else f"{text},{self.write_all(held, depth)}"

    def write_handle(self, value):
        """Return the number of an object that stays here, or where a dataclass has it as a default."""
        if callable(value):
            for name in self.own:
                fields = getattr(self.module.__dict__.get(name), "__dataclass_fields__", {})
                for field in fields.values() if type(fields) is dict else ():
                    if field.default is value:
                        return f'{{"D":[{quoted(name)},{quoted(field.name)}]}}'
        number, kind = self.handle(value), type(value)
        tag = "G" if kind is type(_ for _ in ()) else "x" if hasattr(kind, "__next__") else "h"
        tag = "A" if tag == "h" and hasattr(kind, "__anext__") else tag
        tag = "w" if tag == "h" and hasattr(kind, "__await__") else "C" if tag == "h" and callable(value) else tag
        return f'{{"{tag}":[{number},{quoted(kind.__name__)}]}}'

    def handle(self, value):
        """Return the number of an object that stays here."""
        number = self.handle_of.setdefault(id(value), len(self.handles))
        if number == len(self.handles):
            self.handles.append(value)
        return number

    def write_changes(self):
        """Return the arguments that a call has changed as JSON, each with its number."""
        changed = []
        for number, (value, old) in enumerate(zip(self.given, self.before)):
            new, kind = parts(value), type(value)
            is_kept = number < self.fresh and len(new) > MAX_COMPARED  # compared after every step of a generator
            if len(new) != len(old) or not (new == old if is_kept else all(map(is_, new, old))):
                if isinstance(value, bytearray):
                    text = f'"{bytes(value).hex()}"'
                else:
                    is_own = self.is_object(value, kind)
                    text = f"[{self.write_own(value, base_of(kind), 1)}]" if is_own else self.write_all(new, 1)
                changed.append(f"[{number},{text}]")
                if number < self.fresh:
                    self.after[number] = new
        return f',"changed":[{",".join(changed)}]' if changed else ""


def base_of(kind):
    """Return the builtin class that holds the content of a class's objects, or None if such objects do not cross."""
    while kind.__flags__ & HEAP_TYPE:
        kind = kind.__base__
    return kind if kind in BASES else None


def content_of(value, base):
    """Return what an object holds as one of a builtin class. No method of its own class is used."""
    if base is dict:
        return flat(value)
    if base in (list, set):
        return list(base.__iter__(value))
    plain = {int: int.__int__, float: float.__float__, str: str.__str__}
    return [plain[base](value)] if base in plain else []


def is_enum(value):
    """Return whether a value is a member of an enumeration, without an import of enum."""
    return "enum" in sys.modules and isinstance(value, sys.modules["enum"].Enum)


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
    named = getattr(value, "__dict__", {})
    return {**found, **{name: held for name, held in named.items() if name != "__orig_class__"}}  # of Box[int](1)


def parts(value):
    """Return what an object that can change holds, in one list."""
    kind = type(value)
    if kind.__module__ in ("builtins", "collections"):
        return flat(value) if isinstance(value, dict) else list(value)
    base = base_of(kind)
    return (content_of(value, base) if base in (list, dict, set) else []) + flat(attributes(value))


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
