"""The inner side of the sandbox: run as a script, never imported; standard library only.

`enter` goes into namespaces (where the job says so) and becomes `run` in a fresh interpreter:
ctypes, which Python 3.11 needs for the first, must not be in the memory of the second.
`run` sets the limits, installs the audit hook and runs the program. `try` says by its exit
status whether namespaces can be had.
"""

from __future__ import annotations

import marshal
import os
import sys

_NEWUSER, _NEWPID, _NEWNET, _NEWIPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_NOBODY = 65534
_FLAGS = ("-s", "-P", "-S", "-B", "-u")  # as sandbox.py starts this

# Native code that opens files, starts processes or makes interpreters without the hook's knowing.
_NATIVE = """
ctypes _ctypes cffi _cffi_backend _posixsubprocess _xxsubinterpreters _interpreters _testcapi
_testinternalcapi _sqlite3 _dbm _gdbm _tkinter readline pwd grp spwd nis
"""
# Audit events whose first argument is a path that is read, or written.
_READING = "os.listdir os.scandir os.chdir os.walk os.fwalk glob.glob"
_WRITING = """
os.chmod os.chown os.chflags os.mkdir os.remove os.rename os.rmdir os.truncate os.utime
os.setxattr os.removexattr
"""
_REFUSED = """
os.exec os.fork os.forkpty os.kill os.killpg os.link os.posix_spawn os.spawn os.startfile os.symlink
os.system os.getxattr os.listxattr pty.spawn subprocess.Popen signal.pthread_kill sys.remote_exec
resource.setrlimit resource.prlimit gc.get_objects gc.get_referrers gc.get_referents
"""
_REFUSED_FAMILIES = "socket. ctypes. sqlite3. ensurepip. http.client. urllib."


def enter(job_fd: int, status_fd: int) -> None:
    """Become `run`, inside namespaces where the job says so."""
    with open(job_fd, "rb", closefd=False) as file:
        inside = marshal.load(file)["namespaces"]
    os.lseek(job_fd, 0, os.SEEK_SET)
    again = [sys.executable, *_FLAGS, __file__, "run", str(job_fd), str(status_fd)]
    if inside:
        prctl = _unshare()
        pid = os.fork()  # the first process of the new namespace; all in it dies with it
        if pid:
            os.close(status_fd)
            os.waitpid(pid, 0)
            os._exit(0)
        prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0)
    os.execv(sys.executable, again)


def _unshare():  # type: ignore[no-untyped-def]
    """Enter new namespaces, as a user without any rights there; give back libc's prctl."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(_NEWUSER | _NEWNET | _NEWPID | _NEWIPC):
        raise OSError(ctypes.get_errno(), "unshare")
    # Not mapped to root: exec then drops the capabilities that come with the namespace.
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{_NOBODY} {uid} 1"),
        ("gid_map", f"{_NOBODY} {gid} 1"),
    ):
        file = os.open(f"/proc/self/{name}", os.O_WRONLY)
        os.write(file, text.encode())
        os.close(file)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return libc.prctl


def run(job_fd: int, status_fd: int) -> None:
    """Run the job's program and say on `status_fd` how it ended."""
    with open(job_fd, "rb") as file:
        job = marshal.load(file)
    _limit(job["limits"])
    os.set_inheritable(status_fd, False)
    main = type(sys)("__main__")
    main.__dict__["__builtins__"] = __builtins__
    program = job["code"].encode("utf-8", "surrogatepass")
    sys.argv = ["program.py"]
    sys.path.insert(0, job["folder"])
    # behind builtin and frozen modules
    sys.meta_path.insert(2, _Packages(job["packages"]))  # type: ignore[arg-type]
    sys.modules["_posixsubprocess"] = _no_processes()
    if job["packages"]:
        sys.modules["ctypes"] = _sizes_only()
    words = {w: f"{job['token']} {w}\n".encode() for w in ("complete", "left", "error", "memory")}
    del job["token"]
    sys.addaudithook(_hook(job))
    own = sys.modules["__main__"]  # kept: its functions need it
    sys.modules["__main__"] = main
    word = _ending(program, main.__dict__)
    if word == "memory":
        os.write(2, b"MemoryError\n")
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            stream.flush()  # type: ignore[union-attr]
        except BaseException:  # closed, replaced by something else, or the file too large
            if word == "complete" and stream is sys.__stdout__:
                word = "error"
    os.write(status_fd, words[word])
    del own
    os._exit(0)


def _ending(program: bytes, names: dict[str, object]) -> str:
    """Run the program; how it ended. An exception is printed as the interpreter prints it."""
    try:
        exec(compile(program, "program.py", "exec"), names)
        _finish()
        return "complete"
    except SystemExit as leaving:
        if leaving.code is None or leaving.code == 0:
            return "left"
        if not isinstance(leaving.code, int):
            sys.stderr.write(f"{leaving.code}\n")
        return "error"
    except MemoryError:
        return "memory"
    except BaseException as error:
        try:
            trace = _own(error.__traceback__)
            sys.__excepthook__(type(error), error.with_traceback(trace), trace)
        except MemoryError:
            return "memory"
        return "error"


def _own(trace):  # type: ignore[no-untyped-def]
    """A traceback without the frames of this file, at its beginning and its end."""
    trace = trace and trace.tb_next
    at = trace
    while at is not None:
        if at.tb_next is not None and at.tb_next.tb_frame.f_code.co_filename == __file__:
            at.tb_next = None
        at = at.tb_next
    return trace


def _limit(limits: dict[str, int]) -> None:
    import resource

    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is None:
            continue
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (OSError, ValueError):  # macOS refuses one on the address space
            continue


def _finish() -> None:
    """What the interpreter does at the end: wait for threads, call what atexit holds."""
    threading = sys.modules.get("threading")
    if threading is not None:
        for thread in threading.enumerate():
            if thread is not threading.main_thread() and not thread.daemon:
                thread.join()
    import atexit

    atexit._run_exitfuncs()


def _no_processes():  # type: ignore[no-untyped-def]
    """In the place of the module that starts processes without telling the hook."""

    def fork_exec(*_: object) -> int:
        raise PermissionError("the sandbox starts no processes")

    module = type(sys)("_posixsubprocess")
    module.fork_exec = fork_exec  # type: ignore[attr-defined]
    return module


def _sizes_only():  # type: ignore[no-untyped-def]
    """In the place of ctypes: what sympy asks of it, the size of C's long."""
    module = type(sys)("ctypes")
    module.c_long = type("c_long", (), {"bytes": (sys.maxsize.bit_length() + 1) // 8})  # type: ignore[attr-defined]
    module.sizeof = lambda kind: kind.bytes  # type: ignore[attr-defined]
    return module


class _Packages:
    """Finds the allowed packages, and nothing else of what lies beside them."""

    def __init__(self, folders: dict[str, str]) -> None:
        from importlib.machinery import PathFinder

        found = {name: PathFinder.find_spec(name, [folder]) for name, folder in folders.items()}
        self._specs = {name: spec for name, spec in found.items() if spec is not None}

    def find_spec(self, name: str, *_: object) -> object:
        return self._specs.get(name)


def _hook(job: dict):  # type: ignore[no-untyped-def]
    """The audit hook. All it needs is bound here: the program may change what modules hold."""
    folder = job["folder"]
    packages = [f"{where}/{name}" for name, where in job["packages"].items()]
    libraries = [f"{where}/{name}.libs" for name, where in job["packages"].items()]
    readable = (folder, *job["readable"], *packages, *libraries)
    devices = ("/dev/null", "/dev/urandom", "/dev/random")
    changing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    native, reading, writing, refused = (
        frozenset(names.split()) for names in (_NATIVE, _READING, _WRITING, _REFUSED)
    )
    families = tuple(_REFUSED_FAMILIES.split())
    getcwd, fspath, fsdecode = os.getcwd, os.fspath, os.fsdecode
    kinds = (str, bytes)

    def allowed(path, roots):  # type: ignore[no-untyped-def]
        if type(path) is int:
            return True  # an open file: it was opened under these rules
        if path is None:
            path = "."
        path = fspath(path)
        if type(path) not in kinds:
            return False
        text = fsdecode(path)
        if text in devices:
            return True
        if not text.startswith("/"):
            text = f"{getcwd()}/{text}"
        if "/../" in f"{text}/":  # relative to an open folder it could lead anywhere
            return False
        return any(text == root or text.startswith(f"{root}/") for root in roots)

    def hook(event, arguments):  # type: ignore[no-untyped-def]
        if event == "open":
            path, mode, flags = arguments
            written = bool(flags & changing) if flags is not None else mode != "r"
            if not allowed(path, (folder,) if written else readable):
                raise PermissionError(f"outside the sandbox: {path!r}")
        elif event == "import":
            name, path = arguments[0], arguments[1]
            if name in native:
                raise ImportError(f"not available in the sandbox: {name}")
            if path is not None and fsdecode(path).startswith(f"{folder}/"):
                raise ImportError(f"native code is not loaded from here: {path!r}")
        elif event in reading:
            if not allowed(arguments[0], readable):
                raise PermissionError(f"outside the sandbox: {arguments[0]!r}")
        elif event in writing:
            paths = arguments[:2] if event == "os.rename" else arguments[:1]
            for path in paths:
                if not allowed(path, (folder,)):
                    raise PermissionError(f"outside the sandbox: {path!r}")
        elif event in refused or event.startswith(families):
            raise PermissionError(f"not allowed in the sandbox: {event}")

    return hook


def _try() -> None:
    """Exit status 0 when a child in new namespaces can run Python."""
    try:
        _unshare()
        pid = os.fork()
        if not pid:
            os._exit(0 if os.getpid() == 1 else 1)
        _, status = os.waitpid(pid, 0)
    except (OSError, AttributeError, ImportError):
        os._exit(1)
    os._exit(1 if status else 0)


if __name__ == "__main__":
    if sys.argv[1] == "try":
        _try()
    {"enter": enter, "run": run}[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]))
