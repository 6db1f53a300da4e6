"""Model-written Python can do nothing to its user: every misbehaviour ends, and is named."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path

import pytest

from mergekit_unconstrained.evaluation import sandbox
from mergekit_unconstrained.evaluation.sandbox import OUTPUT_LIMIT, Ran, namespaces, run_python

pytestmark = pytest.mark.skipif(os.name != "posix", reason="model-written Python needs POSIX")


def run(code: str, seconds: float = 10.0, memory_mb: int = 256, **more) -> Ran:
    return run_python(code, seconds=seconds, memory_mb=memory_mb, **more)


ATTEMPTS = """
import json, sys
for code in json.loads(sys.stdin.read()):
    try:
        exec(code, {"__name__": "attempt"})
    except BaseException as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
    else:
        print(json.dumps("it worked"))
"""


def attempts(codes: list[str]) -> dict[str, str]:
    """What comes of each piece of code; all in one program, to save time."""
    ran = run(ATTEMPTS, stdin=json.dumps(codes))
    assert (ran.status, ran.complete) == ("ok", True), ran.stderr
    return dict(zip(codes, map(json.loads, ran.stdout.splitlines()), strict=True))


@pytest.fixture(params=["namespaces", "bare"])
def either_way(request, monkeypatch):
    """With namespaces, where this machine has them, and as on one that has none."""
    if request.param == "bare":
        monkeypatch.setattr(sandbox, "namespaces", lambda: False)
    elif not namespaces():
        pytest.skip("no namespaces on this machine")


def test_a_program_runs(either_way):
    ran = run("import math\nprint(math.comb(5, 2), 'ß')")
    assert (ran.status, ran.complete, ran.stdout, ran.stderr) == ("ok", True, "10 ß\n", "")
    assert not ran.cut


def test_it_reads_its_input_and_its_files_and_writes_in_its_folder():
    code = """
import sys, helper, os
print(sys.stdin.read(), helper.n, open("sub/data.txt").read())
with open("made.txt", "w") as file:
    file.write("kept")
os.makedirs("a/b"); os.rename("made.txt", "a/b/c.txt")
print(open("a/b/c.txt").read(), sorted(os.listdir(".")))
"""
    ran = run(code, stdin="hé", files={"helper.py": "n = 3", "sub/data.txt": "text"})
    listed = "['a', 'helper.py', 'program.py', 'sub']"
    assert (ran.status, ran.stdout) == ("ok", f"hé 3 text\nkept {listed}\n")


@pytest.mark.parametrize("name", ["../out.txt", "/tmp/out.txt", "a/../../out.txt"])
def test_its_files_lie_in_its_folder(name):
    with pytest.raises(ValueError, match="lies in the program's folder"):
        run("", files={name: ""})


def test_an_exception_is_reported_as_python_reports_it():
    ran = run("def f():\n    return 1 / 0\nf()")
    assert (ran.status, ran.complete) == ("error", False)
    assert ran.stderr.startswith('Traceback (most recent call last):\n  File "program.py", line 3')
    assert ran.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert "sandbox_child" not in ran.stderr


def test_leaving_early_is_not_completion():
    assert (run("import sys\nsys.exit()").status, run("raise SystemExit(0)").complete) == (
        "ok",
        False,
    )
    ran = run("raise SystemExit('no')")
    assert (ran.status, ran.stderr) == ("error", "no\n")
    assert run("import os\nprint('all passed')\nos._exit(0)").status == "killed"


def test_success_cannot_be_claimed_in_the_pipe():
    code = """
import os
for fd in range(3, 20):
    try:
        os.write(fd, b"complete\\n" if fd % 2 else b"0 complete\\n")
    except OSError:
        pass
os._exit(0)
"""
    assert run(code).status in ("killed", "error")
    assert not run(code).complete


def test_threads_and_exit_functions_are_waited_for():
    code = """
import atexit, threading, time
atexit.register(print, "left")
threading.Thread(target=lambda: (time.sleep(0.05), print("thread"))).start()
print("main")
"""
    assert run(code).stdout == "main\nthread\nleft\n"


@pytest.mark.parametrize("code", ["while True: pass", "import time\nprint(1)\ntime.sleep(99)"])
def test_endless_programs_end_in_time(code, either_way):
    began = time.monotonic()
    ran = run(code, seconds=0.5)
    assert ran.status == "timeout"
    assert 0.5 <= time.monotonic() - began < 5
    assert ran.stdout == ("1\n" if "print" in code else "")  # what it said till then is kept


def test_a_program_that_catches_everything_ends_in_time():
    code = """
import signal
for number in range(1, 32):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    try:
        while True: pass
    except BaseException:
        pass
"""
    assert run(code, seconds=0.5).status == "timeout"


PROCESSES = [
    "import os\nos.fork()",
    "import os\nwhile True: os.fork()",
    "import os\nos.system('true')",
    "import os\nos.execv('/bin/true', ['true'])",
    "import os\nos.posix_spawn('/bin/true', ['true'], {})",
    "import subprocess\nsubprocess.run(['true'])",
    "import subprocess\nsubprocess._fork_exec()",
    "import multiprocessing as m\nm.get_context('fork').Process(target=print).start()",
    "import os\nos.kill(os.getppid(), 9)",
    "import os\nos.killpg(0, 9)",
    "import os, signal\nsignal.pthread_kill(0, 9)",
    "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
]


def test_processes_are_not_started_and_not_killed(either_way):
    for code, came in attempts(PROCESSES).items():
        assert came.startswith("PermissionError: "), code
        assert "sandbox" in came, code


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_processes_started_past_the_hook_are_killed_too(either_way, monkeypatch, tmp_path):
    # The same child, but its hook lets fork pass: what is left are the operating system's means.
    child = Path(sandbox.__file__).with_name("sandbox_child.py").read_text(encoding="utf-8")
    lax = tmp_path / "lax_child.py"
    lax.write_text(child.replace("os.exec os.fork ", ""), encoding="utf-8")
    monkeypatch.setattr(sandbox, "_CHILD", lax)
    ran = run(
        """
import os, time
for depth in range(3):
    if os.fork() == 0:
        time.sleep(60)
time.sleep(60)
""",
        seconds=0.5,
    )
    assert ran.status == "timeout"
    time.sleep(0.1)
    assert [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(lax) in _read(p)] == []


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


REACHING_OUT = [
    "open('/etc/passwd')",
    "open('../../../../etc/passwd')",
    "import os\nos.open('/etc/passwd', os.O_RDONLY)",
    "import os\nd = os.open('.', os.O_RDONLY)\nos.open('../x', os.O_RDONLY, dir_fd=d)",
    "import pathlib\npathlib.Path('/etc/passwd').read_text()",
    "import pathlib\nlist(pathlib.Path('/home').iterdir())",
    "import os\nos.listdir('/')",
    "import os\nos.scandir(os.path.dirname(os.getcwd()))",
    "import os\nos.chdir('/')",
    "import os\nos.symlink('/etc', 'etc')",
    "import os\nos.link('/etc/passwd', 'p')",
    "import os\nos.rename('program.py', '/tmp/stolen.py')",
    "import os\nos.remove(USER)",
    "import shutil\nshutil.copy(USER, 'mine')",
    "open(USER).read()",
    "open(USER, 'a')",
    "import os\nopen(os.__file__, 'a')",
    "class P(str):\n    def startswith(self, *_): return True\nopen(P(USER))",
    "import io\nio.FileIO(USER)",
    "import sqlite3",
    "import pwd",
    "import ctypes",
    "import sys\nsys.modules.pop('_posixsubprocess')\nimport _posixsubprocess",
    "import gc\ngc.get_objects()",
]


def test_files_of_the_user_and_ways_round_the_hook_are_out_of_reach(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("keep me", encoding="utf-8")
    for code, came in attempts(
        [c.replace("USER", repr(str(secret))) for c in REACHING_OUT]
    ).items():
        assert came.startswith(("PermissionError: ", "ImportError: ")), (code, came)
        assert "sandbox" in came, (code, came)
    assert secret.read_text(encoding="utf-8") == "keep me"


def test_native_code_is_not_loaded_from_the_folder():
    code = """
import importlib.machinery, sys
suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
open("native" + suffix, "wb").write(b"")
import native
"""
    assert "native code is not loaded from here" in run(code).stderr


NETWORK = [
    "import socket\nsocket.socket()",
    "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)",
    "import socket\nsocket.getaddrinfo('localhost', 80)",
    "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:PORT')",
    "import asyncio\nasyncio.run(asyncio.open_connection('127.0.0.1', PORT))",
]


def test_there_is_no_network(either_way):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        port = str(server.getsockname()[1])
        for code, came in attempts([code.replace("PORT", port) for code in NETWORK]).items():
            assert "not allowed in the sandbox" in came, (code, came)
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.skipif(not namespaces(), reason="no namespaces on this machine")
def test_without_the_hook_there_is_still_no_network(monkeypatch, tmp_path):
    child = Path(sandbox.__file__).with_name("sandbox_child.py").read_text(encoding="utf-8")
    lax = tmp_path / "lax_child.py"
    lax.write_text(child.replace('"socket. ', '"'), encoding="utf-8")
    monkeypatch.setattr(sandbox, "_CHILD", lax)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ran = run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)")
    assert ran.status == "error"
    assert "Network is unreachable" in ran.stderr or "Connection refused" in ran.stderr


@pytest.mark.skipif(not namespaces(), reason="no namespaces on this machine")
def test_in_namespaces_it_has_no_rights_and_sees_no_other_process():
    ran = run("import os\nprint(os.getpid(), os.getppid(), os.getuid())\nos.setuid(0)")
    assert ran.stdout == "1 0 65534\n"
    assert ran.status == "error"


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not limit memory")
@pytest.mark.parametrize(
    "code", ["x = []\nwhile True: x.append(bytes(10**6))", "x = 'a' * 10**10", "[0] * 10**10"]
)
def test_memory_has_an_end(code):
    ran = run(code, memory_mb=128)
    assert (ran.status, ran.stderr) == ("memory", "MemoryError\n")


def test_endless_output_is_cut_and_blocks_nobody():
    ran = run("while True: print('x' * 4095)", seconds=5)
    assert ran.status in ("error", "timeout")
    assert len(ran.stdout) == OUTPUT_LIMIT
    assert ran.cut


def test_of_much_the_beginning_of_the_output_and_the_end_of_the_errors_are_kept():
    code = """
import sys
print("first"); print("x" * 200_000)
sys.stderr.write("y" * 200_000 + "last")
"""
    ran = run(code)
    assert (ran.status, ran.complete, ran.cut) == ("ok", True, True)
    assert ran.stdout.startswith("first\n")
    assert ran.stderr.endswith("last")
    assert (len(ran.stdout), len(ran.stderr)) == (OUTPUT_LIMIT, OUTPUT_LIMIT)


def test_files_cannot_grow_without_end():
    ran = run("f = open('big', 'wb')\nwhile True: f.write(bytes(10**6))")
    assert ran.status == "error"
    assert "File too large" in ran.stderr


def test_it_inherits_nothing(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    ran = run("import os, sys\nprint(dict(os.environ), sys.argv, os.path.expanduser('~'))")
    assert "hf_secret" not in ran.stdout
    assert "PATH'" not in ran.stdout
    assert ran.stdout.startswith("{'HOME': '")
    assert f"['program.py'] {Path.home()}\n" not in ran.stdout
    assert "['program.py'] " in ran.stdout


def test_equal_programs_print_equal_things():
    code = "print({str(i) for i in range(50)}, hash('a'))"
    assert run(code).stdout == run(code).stdout


def test_a_crash_of_the_interpreter_is_no_success():
    ran = run(
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return [*map(lambda _: f(), 'a')]\nf()"
    )
    assert ran.status in ("killed", "memory", "error")


def test_only_the_named_packages_are_there():
    code = "import numpy\nprint(numpy.arange(3).sum())"
    ran = run(code, packages=("numpy", "no_such_package"), memory_mb=1024)
    assert (ran.status, ran.stdout) == ("ok", "3\n")
    assert "No module named 'numpy'" in run(code).stderr
    beside = run("import torch", packages=("numpy",), memory_mb=1024)
    assert "No module named 'torch'" in beside.stderr


def test_nothing_is_left_behind(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir())) if descriptors.is_dir() else 0
    run("import os\nos.makedirs('a')\nopen('a/b', 'w').write('c')\nos.chmod('a', 0)")
    run("while True: pass", seconds=0.2)
    assert list(tmp_path.iterdir()) == []
    assert (len(list(descriptors.iterdir())) if descriptors.is_dir() else 0) == before
