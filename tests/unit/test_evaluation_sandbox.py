"""Generated programs: which pass, and what they cannot do."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest

from srde_ds.errors import SRDEError
from srde_ds.evaluation import sandbox
from srde_ds.evaluation.sandbox import Sandbox, check_sandbox, passes_tests, program_in

ADD = "def add(a, b):\n    return a + b\n"
TESTS = "assert add(1, 2) == 3\nassert add('a', 'b') == 'ab'"


def _starts() -> bool:
    try:
        check_sandbox("bubblewrap")
    except SRDEError:
        return False
    return True


pytestmark = pytest.mark.skipif(not _starts(), reason="bubblewrap does not start on this machine")


@pytest.mark.parametrize("sandbox", get_args(Sandbox))
def test_a_right_program_passes(sandbox: Sandbox) -> None:
    assert passes_tests(ADD, TESTS, sandbox)


@pytest.mark.parametrize("sandbox", get_args(Sandbox))
@pytest.mark.parametrize(
    "program",
    [
        "def add(a, b):\n    return a - b\n",
        "def add(a, b:\n",
        "",
        "import sys\nsys.exit(0)\n",
        "import os\nos._exit(0)\n",
        ADD + "input()\n",
        ADD + "raise ValueError\n",
        "def add(a, b):\n    raise SystemExit(0)\n",
        "def add(a, b):\n    import os\n    os._exit(0)\n",
    ],
)
def test_a_wrong_program_fails(program: str, sandbox: Sandbox) -> None:
    assert not passes_tests(program, TESTS, sandbox)


def test_what_is_run_by_hand_is_left_out() -> None:
    assert passes_tests(ADD + "if __name__ == '__main__':\n    print(input())\n", TESTS)


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("Here:\n```python\nx = 1\n```\nBetter:\n```python\ny = x\n```", "y = x\n"),
        ("```python\ndef f(): ...\n```\nUse it:\n```python\nf()\n```", "def f(): ...\n"),
        ("```bash\npip install x\n```\nThen:\n```python\nx = 1\n```", "x = 1\n"),
        ("```\nx = 1\n```\n```text\n1\n```", "x = 1\n"),
        ("```python3\r\nx = 1\r\n```\r\n", "x = 1\n"),
        ("say ```x = 0``` or\n```Python\nx = 1\n```", "x = 1\n"),
        ("<think>\n```python\nx = 0\n```\n</think>\n```python\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1\n", "x = 1\n"),
        ("x = 1", "x = 1"),
    ],
)
def test_the_last_block_of_python_is_the_program(text: str, program: str) -> None:
    assert program_in(text) == program


def test_of_an_answer_that_was_cut_only_a_closed_block_is_the_program() -> None:
    text = "```python\nx = 1\n```\nBetter:\n```python\nx ="
    assert program_in(text) == "x =" and program_in(text, cut=True) == "x = 1\n"
    assert program_in("x = 1", cut=True) == ""


SHAPES = """
import math
from collections import Counter, deque, namedtuple
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum, IntEnum
from fractions import Fraction

LIMIT = 10 ** 5000

class Empty(Exception):
    def __init__(self, what, code):
        super().__init__(what)
        self.code = code

class Deeper(Empty):
    pass

@dataclass
class Point:
    x: int
    y: int = 0
    def __add__(self, other):
        return Point(self.x + other.x, self.y + other.y)
    def __lt__(self, other):
        return self.x < other.x

class Stack:
    def __init__(self, items=()):
        self.items = list(items)
    def push(self, item):
        self.items.append(item)
        return self
    def pop(self):
        if not self.items:
            raise Deeper("empty", 7)
        return self.items.pop()
    def __len__(self):
        return len(self.items)
    def __contains__(self, item):
        return item in self.items
    def __iter__(self):
        return iter(self.items)
    def __getitem__(self, index):
        return self.items[index]
    def __enter__(self):
        return self
    def __exit__(self, *error):
        self.items.clear()

class Color(Enum):
    RED = 1

class Level(IntEnum):
    LOW = 1

def count(text): return Counter(text)
def numbers(n):
    for i in range(n): yield i
def sort_in_place(items): items.sort()
def fill(table): table['new'] = [1, {2}]
def same(items): return items
def nested(items): items[0].append(5); return items
def apply(function, items): return [function(item) for item in items]
def compose(f, g): return lambda x: f(g(x))
def fail(kind): raise kind('no')
def half(n): return Fraction(n, 2), Decimal('0.5'), complex(1, 2), deque([1]), range(3), b'x', {1: (2, frozenset({3}))}
def reverse(node):
    before = None
    while node:
        node.next, before, node = before, node, node.next
    return before
def total(items): return sum(i.value for i in items)
"""


@pytest.mark.parametrize(
    "tests",
    [
        "assert count('aab') == {'a': 2, 'b': 1}",
        "assert list(numbers(3)) == [0, 1, 2] and sum(numbers(4)) == 6\n"
        "assert [*zip(numbers(2), 'ab')] == [(0, 'a'), (1, 'b')]",
        "items = [3, 1, 2]\nsort_in_place(items)\nassert items == [1, 2, 3]",
        "table = {}\nfill(table)\nassert table == {'new': [1, {2}]}",
        "items = [1]\nassert same(items) is items",
        "inner = [1]\nouter = [inner, inner]\nassert nested(outer) is outer and inner == [1, 5] and outer[1] is inner",
        "loop = []\nloop.append(loop)\nassert same(loop) is loop and loop[0] is loop",
        "assert apply(lambda x: x * 2, [1, 2]) == [2, 4] and apply(len, ['abc']) == [3] and apply(str, [1]) == ['1']",
        "assert compose(lambda x: x + 1, abs)(-3) == 4",
        "import fractions, decimal, collections\n"
        "assert half(3) == (fractions.Fraction(3, 2), decimal.Decimal('0.5'), 1 + 2j, collections.deque([1]), "
        "range(3), b'x', {1: (2, frozenset({3}))})",
        "s = Stack([1])\ns.push(2).push(3)\nassert len(s) == 3 and s.pop() == 3 and 2 in s and list(s) == [1, 2]\n"
        "assert s[0] == 1 and s.items == [1, 2] and isinstance(s, Stack) and not isinstance(3, Stack)",
        "with Stack([1]) as s:\n    assert len(s) == 1\nassert not s",
        "try:\n    Stack().pop()\nexcept Empty as error:\n    assert str(error) == 'empty' and error.code == 7\n"
        "else:\n    assert False",
        "for kind in (ValueError, KeyError, ZeroDivisionError, AssertionError):\n"
        "    try:\n        fail(kind)\n    except kind as error:\n        assert error.args == ('no',)\n"
        "    else:\n        raise RuntimeError",
        "assert Point(1, 2) == Point(1, 2) != Point(1, 3) and Point(1) + Point(2) == Point(3) and Point(1) < Point(2)\n"
        "assert Point(1, 2).x == 1 and sorted([Point(2), Point(1)]) == [Point(1), Point(2)] and str(Point(1)) == "
        "'Point(x=1, y=0)' and f'{Point(1)}' == repr(Point(1))",
        "assert Color.RED is Color.RED and Color.RED == Color(1) and Color.RED.name == 'RED' and Level.LOW == 1",
        "assert math.isclose(math.pi, 3.14159, abs_tol=1e-4) and LIMIT == 10 ** 5000",
        "class Node:\n    def __init__(self, value, after=None):\n        self.value, self.next = value, after\n"
        "first = Node(1, Node(2))\nlast = reverse(first)\nassert last.value == 2 and last.next is first\n"
        "assert total([Node(1), Node(5)]) == 6",
        "def check(candidate):\n    for i in range(100):\n        assert candidate([i]) == [i]\ncheck(same)",
        "import numpy as np\nassert np.allclose(same([1.0, 2.0]), [1, 2])",
    ],
)
def test_plain_tests_see_the_program_as_if_it_were_there(tests: str) -> None:
    # What is shown here to pass must hold in one interpreter, too.
    exec(SHAPES + "\n" + tests, {"__name__": "tests"})
    assert passes_tests(SHAPES, tests)
    assert not passes_tests(SHAPES, tests + "\nassert same(1) == 2")


def test_numbers_of_numpy_are_numbers() -> None:
    assert passes_tests(
        "import numpy as np\ndef f(x):\n    return np.float32(x), np.bool_(True)", "assert f(2) == (2.0, True)"
    )


def test_a_program_may_bear_the_name_of_a_builtin() -> None:
    assert passes_tests("def sum(a, b):\n    return a * b", "assert sum(10, 15) == 150")


ALWAYS = """
class Always:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __getattr__(self, name): return Always()
    def __call__(self, *arguments, **named): return Always()
    def __sub__(self, other): return 0
    def __rsub__(self, other): return 0
    def __hash__(self): return 3
    def __instancecheck__(self, other): return True
"""
LINK = "\nimport json, os, sys\nlink = int(sys.orig_argv[-5])\n"


@pytest.mark.parametrize(
    "program",
    [
        # The result of everything, equal to everything.
        ALWAYS + "def add(a, b): return Always()",
        ALWAYS + "add = Always()",
        ALWAYS + "def add(a, b): return [Always()]",
        # The tests' own names, and what they are made of.
        "import builtins\ndef add(a, b): return 0\nbuiltins.AssertionError = type('Quiet', (BaseException,), {})\n"
        "def all(items): return True\ndef abs(x): return 0\ndef sorted(x): return []",
        # Ends: of the process, of a loop, of the tests.
        "def add(a, b): raise StopIteration",
        "def add(a, b): raise GeneratorExit",
        "import os, signal\ndef add(a, b): os.kill(os.getppid(), signal.SIGKILL)",
        # The verdict is written on a descriptor: on all of them, before and during the tests.
        "import os\nfor number in range(64):\n    try: os.write(number, b'ready\\npassed\\n')\n"
        "    except OSError: pass",
        "import os\ndef add(a, b):\n  for number in range(64):\n    try: os.write(number, b'ready\\npassed\\n')\n"
        "    except OSError: pass",
        # The program's own messages to the tests.
        LINK + "os.write(link, json.dumps(['names', ['dict', [['add', ['builtin', 'max']]]]]).encode() + b'\\n')\n"
        "os.write(link, b'[\"done\", true, []]\\n' * 100)\nos._exit(0)",
        LINK + "for name in ('exec', 'eval'):\n"
        "    call = ['do', 'call', [['builtin', name], ['tuple', ['__import__(\"os\").write(5, b\"passed\\\\n\")']], "
        "['dict', []]]]\n"
        "    os.write(link, json.dumps(['names', ['dict', [['add', ['mine', 0]]]]]).encode() + b'\\n')\n"
        "    os.write(link, json.dumps(call).encode() + b'\\n')\nimport time\ntime.sleep(1)",
        LINK + "for kind in ('_init__', '_class__', 'new', '_setattr__', 'items'):\n"
        "    os.write(link, json.dumps(['names', [kind, 'link', None]]).encode() + b'\\n')",
        LINK + "os.write(link, b'[' * 1000000 + b'\\n')",
        LINK + "os.write(link, b'7\\n')",
    ],
)
def test_a_pass_cannot_be_forged(program: str) -> None:
    for tests in (
        TESTS,
        "assert abs(add(1, 2) - 3) < 1e-6",
        "assert isinstance(add(1, 2), int) and sorted([add(1, 2)]) == [3]",
        "assert all(add(x, 1) == x + 1 for x in [1, 2, 3])",
        "for got, expected in zip(map(add, [1], [2]), [3]):\n    assert got == expected\nassert add(2, 2) == 4",
        "try:\n    add(1, 2)\nexcept:\n    pass\nassert add(1, 2) == 3",
    ):
        assert not passes_tests(program, tests)


def test_what_is_forged_above_is_understood() -> None:
    names = "['names', ['dict', [['add', ['builtin', 'max']]]]]"
    program = LINK + f"os.write(link, json.dumps({names}).encode() + b'\\n')\nos._exit(0)"
    assert passes_tests(program, "assert add(1, 2) == 2")


def test_what_a_program_answers_about_its_own_objects_is_believed() -> None:
    """As docs/security.md says under "What remains"."""
    program = ALWAYS + "    def __contains__(self, item): return True\ndef add(a, b): return Always()"
    for weak in ("assert add(1, 2)", "assert 3 in add(1, 2)", "assert add(1, 2).startswith('3')"):
        assert passes_tests(program, weak)


def test_the_program_cannot_reach_into_what_tests_give_it() -> None:
    program = (
        "def steal(function):\n"
        "    try:\n        function.__globals__['__builtins__']\n"
        "    except TypeError:\n        return 'refused'\n"
        "def deeper(node):\n"
        "    try:\n        node.__class__.__init__.__globals__\n"
        "    except TypeError:\n        return 'refused'\n"
    )
    tests = "class Node:\n    pass\nassert steal(lambda: 1) == 'refused' and steal(Node) == 'refused'\n"
    assert passes_tests(program, tests)
    # Its own stand-in has a class, which is the program's already.
    assert not passes_tests(program, "class Node:\n    pass\nassert deeper(Node()) == 3")


# An interpreter that lies under /tmp is seen there.
_PREFIXES = {Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix)}
OF_PYTHON = [prefix.parts[2] for prefix in _PREFIXES if prefix.parts[:2] == ("/", "tmp")]


def test_the_program_does_not_see_the_tests() -> None:
    program = (
        "import gc, os\nSEEN = [str(x) for x in gc.get_objects() if isinstance(x, str) and 'hid' + 'den' in x]\n"
        "def look(): return [*SEEN, *os.listdir('/tmp'), os.path.exists('/proc/self')]"
    )
    assert passes_tests(program, f"assert look() == [*{OF_PYTHON}, False], 'hidden'")


@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(3 << 30)",
        "with open('big', 'wb') as file:\n    file.write(bytes(17 << 20))",
        "import os\nfor n in range(8):\n    with open(str(n), 'wb') as file:\n        file.write(bytes(15 << 20))",
        "files = [open('/dev/null') for _ in range(100)]",
    ],
)
def test_memory_and_files_are_limited(program: str) -> None:
    assert not passes_tests(program, "")


def test_time_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)
    monkeypatch.setattr(sandbox, "WALL_SECONDS", 2)
    started = time.monotonic()
    assert not passes_tests("while True:\n    pass", "")
    assert not passes_tests("import time\ntime.sleep(600)", "")
    assert not passes_tests("def f():\n    while True:\n        pass", "f()")
    assert not passes_tests("", "while True:\n    pass")
    assert time.monotonic() - started < 200


def _left(mark: str) -> list[str]:
    """Command lines of processes that hold `mark`, once those that were killed have gone."""
    for _ in range(50):
        running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
        found = [line for line in running if mark in line]
        if not found:
            break
        time.sleep(0.1)
    return found


@pytest.mark.parametrize(
    "deed",
    [
        "import os\nos.fork()",
        "import subprocess\nsubprocess.Popen(['sleep', '300'])",
        "import os\nos.posix_spawn('/usr/bin/sleep', ['sleep', '300'], {})",
        "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000) < 0: raise OSError",
        "import ctypes\nif ctypes.CDLL(None).ptrace(0, 0, 0, 0) < 0: raise OSError",
        "import multiprocessing\np = multiprocessing.Process(target=print)\np.start()",
    ],
)
def test_a_program_starts_no_process(deed: str) -> None:
    if "ptrace" not in deed:  # a program of the test's own does all of this
        ended = subprocess.run([sys.executable, "-c", deed.replace("'300'", "'0'")], capture_output=True)
        assert ended.returncode == 0
    assert not passes_tests(deed, "")


def test_clone3_is_not_there() -> None:
    program = "import ctypes\nlibrary = ctypes.CDLL(None, use_errno=True)\nlibrary.syscall(435, b'0' * 88, 88)\n"
    assert passes_tests(program + "number = ctypes.get_errno()", f"assert number == {errno.ENOSYS}")


def test_refused_system_calls() -> None:
    """Those of the filter, and mounts, which need a capability that the program lacks."""
    calls = sandbox._DENIED[platform.machine()] | sandbox._DENIED_EVERYWHERE
    assert {"bpf", "keyctl", "ptrace", "setns", "unshare", "io_uring_setup", "fsopen"} <= calls.keys()
    program = f"""
import ctypes
library, found = ctypes.CDLL(None, use_errno=True), {{}}
for name, number in {calls!r}.items():
    if library.syscall(number, 0, 0, 0, 0, 0) != -1:
        os._exit(1)  # vfork, for instance
    found[name] = ctypes.get_errno()
library.mount(b"/tmp", b"/tmp", b"tmpfs", 0, None)
found["mount"] = ctypes.get_errno()
"""
    assert passes_tests("import os" + program, f"assert set(found.values()) == {{{errno.EPERM}}}, found")


def test_a_program_may_have_threads() -> None:
    program = """
import threading
seen = []
def f():
    thread = threading.Thread(target=seen.append, args=[1])
    thread.start()
    thread.join()
    return seen
"""
    assert passes_tests(program, "assert f() == [1]")


def test_nothing_lives_on(monkeypatch: pytest.MonkeyPatch) -> None:
    # It clears its parent-death signal, leaves its session and becomes another program.
    monkeypatch.setattr(sandbox, "WALL_SECONDS", 2)
    mark = f"srde-left-{os.getpid()}"
    program = (
        "import ctypes, os\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\n"
        "try:\n    os.setsid()\nexcept OSError:\n    pass\n"
        f"os.execv('/bin/sh', ['sh', '-c', 'while :; do :; done; : {mark}'])"
    )
    assert not passes_tests(program, "")
    assert not _left(mark)


def test_nothing_lives_on_when_the_evaluation_is_killed() -> None:
    mark = f"srde-left-{os.getpid()}"
    program = (
        "import ctypes, os\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\n"
        f"os.execv('/bin/sh', ['sh', '-c', 'while :; do :; done; : {mark}'])"
    )
    code = f"from srde_ds.evaluation.sandbox import passes_tests\npasses_tests({program!r}, '')"
    with subprocess.Popen([sys.executable, "-c", code]) as evaluation:
        for _ in range(200):
            running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
            if f"done; : {mark}" in running.replace(code, ""):
                break
            time.sleep(0.1)
        else:
            pytest.fail("the program did not start")
        evaluation.kill()
    assert not [line for line in _left(mark) if "passes_tests" not in line]


def test_nothing_outside_can_be_changed_or_read(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    os.chmod(tmp_path, 0o777)
    os.chmod(kept, 0o666)
    before = kept.stat()
    places = [str(kept), sandbox.__file__, "/usr/bin/env", sys.executable, str(Path(sys.executable).resolve())]
    program = f"""
import os
deeds = {{
    "open": lambda place: open(place, "a"),
    "truncate": lambda place: os.truncate(place, 0),
    "remove": os.remove,
    "chmod": lambda place: os.chmod(place, 0o600),
    "utime": lambda place: os.utime(place, (1, 1)),
    "setxattr": lambda place: os.setxattr(place, "user.x", b"1"),
    "link": lambda place: os.link(place, "/tmp/x"),
    "mkdir": lambda place: os.mkdir(os.path.dirname(place) + "/folder"),
}}
done = []
for place in {places!r}:
    for name, deed in deeds.items():
        try:
            deed(place)
            done.append((name, place))
        except OSError:
            pass
"""
    assert passes_tests(program, "assert done == []")
    assert kept.read_text() == "as it was" and [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept.stat().st_mode, kept.stat().st_mtime) == (before.st_mode, before.st_mtime)
    for place in (
        str(kept),
        sandbox.__file__,
        "/etc/passwd",
        "/proc/1/environ",
        "/sys/kernel",
        "/run",
        "/var",
        "/home",
    ):
        assert not passes_tests(f"import os\nos.stat({place!r})", "")


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    program = "import os\ndef look(): return dict(os.environ), os.listdir(), os.getppid()"
    tests = "names, files, parent = look()\nassert {*names} <= {'PWD', 'LC_CTYPE'}\n"
    assert passes_tests(program, f"{tests}assert files == {OF_PYTHON}")
    assert not passes_tests("open('/proc/1/environ')", "") and not passes_tests("open('/proc/self/environ')", "")


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0srde-{os.getpid()}")
        abstract.listen()
        for family, address in (("AF_INET", server.getsockname()), ("AF_UNIX", abstract.getsockname())):
            reach = f"import socket\nsocket.socket(socket.{family}).connect({address!r})"
            exec(reach, {})
            assert not passes_tests(reach, "")
    assert not passes_tests(
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 9))", ""
    )


@pytest.mark.parametrize("sandbox", get_args(Sandbox))
@pytest.mark.parametrize(
    "program",
    [
        "import os\nfor _ in range(1500):\n    os.mkdir('d')\n    os.chdir('d')",
        "import os\nfor name in ('passed', 'program.py', 'verdict'):\n    os.symlink('/dev/zero', name)",
        "import os\nf = os.open('sparse', os.O_CREAT | os.O_WRONLY)\nos.ftruncate(f, 16 << 20)",
        "import sys\nfor _ in range(20000):\n    print('x' * 1000)\n    print('y' * 1000, file=sys.stderr)",
    ],
)
def test_odd_files_and_floods_of_output_cost_nothing(program: str, sandbox: Sandbox) -> None:
    before = set(Path("/tmp").glob("srde-code-*"))
    assert passes_tests(program + "\n" + ADD, TESTS, sandbox)
    assert not passes_tests(program + "\n" + ADD, TESTS + "\nassert False", sandbox)
    assert set(Path("/tmp").glob("srde-code-*")) <= before


def test_a_flood_of_messages_costs_that_item_alone() -> None:
    assert not passes_tests(LINK + "while True:\n    os.write(link, b'x' * 65536)", TESTS)
    assert passes_tests(ADD, TESTS)


def test_a_missing_sandbox_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = shutil.which("bwrap")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SRDEError, match=r"'bwrap' is missing.*apt-get install bubblewrap.*--sandbox none"):
        check_sandbox("bubblewrap")
    check_sandbox("none")
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    with pytest.raises(
        SRDEError, match=r"does not start here \(bwrap: No permissions to create new namespace\)"
    ) as error:
        check_sandbox("bubblewrap")
    assert "\n" not in str(error.value)
    with pytest.raises(SRDEError, match="did not start"):
        passes_tests(ADD, TESTS)
    assert found
