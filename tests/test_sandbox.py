"""Ways out of the sandbox and ways to fool the judge, each tried for real, as the user who runs the tests and, where that is root, as a plain user too."""
import contextlib
import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthlab.checks import sandbox
from synthlab.checks.sandbox import Limits, SandboxUnavailable, available, check_code, extract_code, run_many, run_python
from synthlab.checks.verify import VerifierPool, verify

ROOT = Path(__file__).parent.parent


def missing():
    "Why there can be no sandbox on this machine, found out without the code under test."
    if not shutil.which("bwrap"): return "bubblewrap is not installed: apt-get install bubblewrap"
    return subprocess.run(["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"], capture_output=True, text=True).stderr.strip()


REASON = missing()
pytestmark = pytest.mark.skipif(bool(REASON), reason=f"no sandbox here: {REASON}")
LIMITS = {"seconds": 3.0, "memory_mb": 192, "disk_mb": 8, "output_kb": 64, "processes": 12}
SECRET = "token-7f3a"

# Bombs have a bound of their own: a limit that is broken should fail a test, not the machine. Each program prints ESCAPED when it got what it should not have. {...} is filled in: a secret file and a writable folder of the host, ports, this process.
ESCAPES = {
    "connect to the internet": "import socket; socket.create_connection(('1.1.1.1', 53), 1); print('ESCAPED')",
    "send a datagram": "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('1.1.1.1', 53)); print('ESCAPED')",
    "connect to the host's loopback": "import socket; socket.create_connection(('127.0.0.1', {port}), 1); print('ESCAPED')",
    "connect to an abstract socket": "import socket; s = socket.socket(socket.AF_UNIX); s.connect('\\0{abstract}'); print('ESCAPED')",
    "connect to a socket file": "import socket; s = socket.socket(socket.AF_UNIX); s.connect('{folder}/socket'); print('ESCAPED')",
    "resolve a name": "import socket; print('ESCAPED', socket.gethostbyname('example.org'))",
    "open a raw socket": "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW); print('ESCAPED')",
    "read a file of the host": "print('ESCAPED', open('{secret}').read())",
    "read the users": "print('ESCAPED', open('/etc/passwd').read())",
    "read it through a symbolic link": "import os; os.symlink('{secret}', 'x'); print('ESCAPED', open('x').read())",
    "read it through a symbolic link of a folder": "import os; os.symlink('/proc/1/root{folder}', 'x'); print('ESCAPED', open('x/secret').read())",
    "read it through another root": "import os\nfor p in os.listdir('/proc'):\n    try: print('ESCAPED', open(f'/proc/{{p}}/root{secret}').read())\n    except OSError: pass",
    "read it through a current folder": "import os\nfor p in os.listdir('/proc'):\n    try: print('ESCAPED', open(f'/proc/{{p}}/cwd{secret}').read())\n    except OSError: pass",
    "see the home folders": "import os\nfor p in ('/root', '/home', '/work', '/mnt', '/srv', '/var', '/run'):\n"
                            "    n = [x for x in (os.listdir(p) if os.path.isdir(p) else []) if not os.path.realpath(__import__('sys').prefix).startswith(os.path.join(p, x))]\n"
                            "    if n: print('ESCAPED', p, n)",
    "see the project": "import os\nif os.path.exists('{project}/settings.ini'): print('ESCAPED')",
    "write to the system": "open('/usr/lib/escaped', 'w'); print('ESCAPED')",
    "write to the root folder": "open('/escaped', 'w'); print('ESCAPED')",
    "write to the interpreter": "import os; open(os.__file__, 'a'); print('ESCAPED')",
    "write to a folder of the host": "open('{folder}/written', 'w'); print('ESCAPED')",
    "link to the system": "import os, sys; os.link(os.path.realpath(sys.executable), 'x'); print('ESCAPED')",
    "read secrets from the environment": "import os\nif '{token}' in str(os.environ) or 'HOME' in os.environ: print('ESCAPED')",
    "read other environments": "import os\nfor p in os.listdir('/proc'):\n    try:\n        if '{token}' in open(f'/proc/{{p}}/environ').read(): print('ESCAPED')\n    except OSError: pass",
    "use an inherited file": "import os\nfor n in os.listdir('/proc/self/fd'):\n    if int(n) > 2:\n        try: print('ESCAPED', os.readlink(f'/proc/self/fd/{{n}}'))\n        except FileNotFoundError: pass",
    "fork bomb": "import os\nfor i in range(40):\n    if os.fork() == 0: __import__('time').sleep(60)\nprint('ESCAPED')",
    "fork bomb that ignores errors": "import os, time\nfor i in range(6):\n    try: os.fork()\n    except OSError: pass\nif sum(p.isdigit() for p in os.listdir('/proc')) > 14: print('ESCAPED')\ntime.sleep(60)",
    "thread bomb": "import threading, time\nfor i in range(99): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\nprint('ESCAPED')",
    "zombies": "import os\nfor i in range(9):\n    if os.fork() == 0: os._exit(0)\n__import__('time').sleep(60)",
    "daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        for fd in (0, 1, 2): os.close(fd)\n        time.sleep(61.{mark})\n    os._exit(0)",
    "ignore every signal": "import signal, time\nfor s in set(signal.Signals) - {{signal.SIGKILL, signal.SIGSTOP}}: signal.signal(s, signal.SIG_IGN)\ntime.sleep(62.{mark})",
    "flood standard output": "while True: print('x' * 9999)",
    "flood standard error": "import sys\nwhile True: sys.stderr.write('x' * 9999)",
    "flood with holes": "import os; os.lseek(1, 1 << 40, 0); os.write(1, b'x'); print('ESCAPED')",
    "signal the parent": "import os, signal\nos.kill(os.getppid(), 0) if os.getppid() > 1 else 1 / 0\nprint('ESCAPED')",
    "signal the host's process": "import os, signal; os.kill({pid}, signal.SIGTERM); print('ESCAPED')",
    "signal everyone": "import os, signal; os.kill(-1, signal.SIGKILL)",
    "see other processes": "import os\nn = sum(p.isdigit() for p in os.listdir('/proc'))\nif n > 3: print('ESCAPED', n)",
    "write to /proc/sys": "import os; os.write(os.open('/proc/sys/kernel/hostname', os.O_WRONLY), b'x'); print('ESCAPED')",
    "write to sysrq": "import os; os.write(os.open('/proc/sysrq-trigger', os.O_WRONLY), b'h'); print('ESCAPED')",
    "raise the score of the memory killer": "import os; os.write(os.open('/proc/self/oom_score_adj', os.O_WRONLY), b'-1000'); print('ESCAPED')",
    "burn the clock": "while True: pass",
    "burn the clock in many processes": "import os\nfor i in range(3): os.fork()\nwhile True: pass",
    "sleep": "import time; time.sleep(1000)",
    "set the clock": "import time; time.clock_settime(time.CLOCK_REALTIME, 0); print('ESCAPED')",
    "memory bomb": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "memory bomb in many processes": "import os, time\nfor i in range(3): os.fork()\nx = bytearray(100 << 20)\ntime.sleep(60)\nprint('ESCAPED')",
    "memory that no limit counts": "import os; os.memfd_create('x'); print('ESCAPED')",
    "shared memory of System V": "import ctypes\nif ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) >= 0: print('ESCAPED')",
    "fill the disk with one file": "f = open('x', 'wb')\nfor i in range(64): f.write(bytes(1 << 20))\nf.flush(); print('ESCAPED')",
    "fill the disk with many files": "for i in range(64):\n    with open(f'x{{i}}', 'wb') as f: f.write(bytes(1 << 20))\nprint('ESCAPED')",
    "fill /dev": "with open('/dev/x', 'wb') as f: f.write(bytes(1 << 20))\nprint('ESCAPED')",
    "fill /dev/shm": "for i in range(64):\n    with open(f'/dev/shm/x{{i}}', 'wb') as f: f.write(bytes(1 << 20))\nprint('ESCAPED')",
    "become root": "import os; os.setuid(0); print('ESCAPED')",
    "use a set-user-id program": "import subprocess\nr = subprocess.run(['su', '-c', 'id'], capture_output=True, text=True)\nif 'uid=0' in r.stdout: print('ESCAPED')",
    "mount": "import ctypes\nif ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, 0) == 0: print('ESCAPED')",
    "unmount": "import ctypes\nif ctypes.CDLL(None).umount2(b'/tmp', 2) == 0: print('ESCAPED')",
    "new user namespace": "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000) == 0: print('ESCAPED')",
    "change the root": "import os; os.chroot('/tmp'); print('ESCAPED')",
    "trace the first process": "import ctypes\nif ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0: print('ESCAPED')",
    "limit the first process": "import resource; resource.prlimit(1, resource.RLIMIT_CPU, (0, 0)); print('ESCAPED')",
    "raise a limit": "import resource as r; r.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY, r.RLIM_INFINITY)); print('ESCAPED')",
    "make a device": "import os; os.mknod('x', 0o600 | 0o60000, os.makedev(8, 0)); print('ESCAPED')",
    "open devices": "for n in ('sda', 'vda', 'mem', 'kmsg', 'kvm', 'fuse'):\n    try: print('ESCAPED', open('/dev/' + n, 'rb'))\n    except OSError: pass",
    "read the kernel's log": "import ctypes\nif ctypes.CDLL(None).klogctl(3, ctypes.create_string_buffer(99), 99) > 0: print('ESCAPED')",
    "rename the machine": "import socket; socket.sethostname('x'); print('ESCAPED')",
    "run a program in the kernel": "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\nif c.syscall(321, 0, ctypes.create_string_buffer(128), 128) >= 0 or ctypes.get_errno() != 1: print('ESCAPED', ctypes.get_errno())",
    "type into the terminal": "import fcntl, termios\nfor fd in (0, 1, 2): fcntl.ioctl(fd, termios.TIOCSTI, b'x')\nprint('ESCAPED')",
    "leave a core file": "import os; os.abort()",
    "overflow the C stack": "import sys\nsys.setrecursionlimit(10**9)\nf = lambda: f()\nf()",
    "break the interpreter": "import ctypes; ctypes.string_at(0)",
}
ENDED = {"fork bomb that ignores errors": "timeout", "zombies": "timeout", "daemon": "ok", "ignore every signal": "timeout", "flood standard output": "output limit",
         "flood standard error": "output limit", "burn the clock": "timeout", "burn the clock in many processes": "timeout", "sleep": "timeout", "memory bomb": "memory",
         "memory bomb in many processes": "memory", "leave a core file": "killed", "break the interpreter": "killed"}  # the others end by an exception, or find nothing

TRY = """
import json, sys
from synthlab.checks.sandbox import Limits, available, run_many
job = json.load(sys.stdin)
reason = available()
runs = [] if reason else run_many(job["programs"], workers=3, progress=False, limits=Limits(**job["limits"]))
print(json.dumps({"reason": reason, "runs": [[r.cause, "ESCAPED" in r.stdout and "ESCAPED " + r.stdout[-200:], r.error] for r in runs]}))
"""


@contextlib.contextmanager
def host():
    "A host with something to steal: a readable secret, a folder anyone may write to, listening sockets, a process to hit."
    folder = Path(tempfile.mkdtemp(prefix="synthlab-host-"))
    folder.chmod(0o777)
    (folder / "secret").write_text(SECRET)
    listeners = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        listeners[1].bind(f"\0synthlab-{os.getpid()}")
        listeners[2].bind(str(folder / "socket"))
        for s in listeners: s.listen(); s.setblocking(False)
        (folder / "socket").chmod(0o777)
        names = {"secret": folder / "secret", "folder": folder, "port": listeners[0].getsockname()[1], "abstract": f"synthlab-{os.getpid()}", "pid": victim.pid,
                 "project": ROOT, "token": SECRET, "mark": os.getpid()}
        yield [code.format(**names) for code in ESCAPES.values()]
        for s in listeners:
            with pytest.raises(BlockingIOError): s.accept()
        assert victim.poll() is None, "the victim was hit"
        assert sorted(os.listdir(folder)) == ["secret", "socket"] and (folder / "secret").read_text() == SECRET
        left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if f".{os.getpid()}".encode() in read(p)]
        assert not left, "a process outlived its run"
    finally:
        victim.kill()
        victim.wait()
        for s in listeners: s.close()
        shutil.rmtree(folder)


def read(path):
    try: return path.read_bytes()
    except OSError: return b""


def not_contained(runs):
    "Programs that got out, or did not end as they should."
    cases = zip(ESCAPES, runs, strict=True)
    return {name: (cause, out, error) for name, (cause, out, error) in cases if out or cause != ENDED.get(name, cause)}


def attempt(command, folder, programs):
    "Try the programs in another process, whose environment holds a secret."
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(folder), "API_KEY": SECRET, "HOME": str(folder)}
    done = subprocess.run([*command, "-c", TRY], input=json.dumps({"programs": programs, "limits": LIMITS}), capture_output=True, text=True, env=env, cwd="/", timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_where_it_can_work_it_does(): assert available() == "" and available("rlimits") == ""


def test_there_are_enough_ways_out(): assert len(ESCAPES) >= 60 and set(ENDED) <= set(ESCAPES)


def test_no_escape():
    with host() as programs: assert not_contained(attempt([sys.executable], ROOT, programs)["runs"]) == {}


def plain_python():
    "A new enough interpreter that any user can run."
    for path in dict.fromkeys([os.path.realpath(sys.executable), "/usr/bin/python3"]):
        with contextlib.suppress(OSError):
            prefix = subprocess.run([path, "-c", "import sys; print(sys.base_prefix if sys.version_info >= (3, 11) else '')"], capture_output=True, text=True).stdout.strip()
            if prefix and sandbox._open_to_all(prefix): return path


@pytest.mark.skipif(os.geteuid() != 0, reason="the tests run as a plain user already")
def test_no_escape_for_a_plain_user():
    if not (python := plain_python()): pytest.skip("no Python 3.11 that a plain user could run")
    copy = Path(tempfile.mkdtemp(prefix="synthlab-copy-"))
    try:
        for name in ("__init__.py", "core.py", "checks/__init__.py", "checks/verify.py", "checks/sandbox.py"):
            (copy / "synthlab" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / "synthlab" / name, copy / "synthlab" / name)
        subprocess.run(["chmod", "-R", "a+rX", copy], check=True)
        with host() as programs:
            done = attempt(["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", python], copy, programs)
            if done["reason"]: pytest.skip(f"no sandbox for a plain user: {done['reason']}")
            assert not_contained(done["runs"]) == {}
    finally: shutil.rmtree(copy)


def test_nothing_is_left_after_an_interrupt():
    "Ctrl-C in the middle of a run ends the run."
    code = "from synthlab.checks.sandbox import run_python\nprint('go', flush=True)\nrun_python('import time; time.sleep(63.{0})')".format(os.getpid())
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})
    mark = f"63.{os.getpid()}".encode()
    inside = lambda: [q for q in Path("/proc").glob("[0-9]*") if b"synthlab" not in read(q / "comm") and mark in read(q / "cmdline") and int(q.name) != p.pid]
    try:
        p.stdout.readline()
        time.sleep(1.5)
        children = Path(f"/proc/{p.pid}/task/{p.pid}/children").read_text().split()
        assert children, "the program runs"
        p.send_signal(signal.SIGINT)
        assert p.wait(20) != 0
        assert not inside() and not any(Path(f"/proc/{c}").exists() for c in children)
    finally:
        p.kill()
        p.stdout.close()


def test_nothing_is_left_when_the_caller_is_killed():
    code = "from synthlab.checks.sandbox import run_python\nrun_python('import time; time.sleep(64)')"
    p = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        def family(pid):
            found = [q for t in Path(f"/proc/{pid}/task").glob("*/children") for q in read(t).decode().split()]
            return found + [g for c in found for g in family(c)]
        end = time.monotonic() + 20
        while len(tree := family(p.pid)) < 3 and time.monotonic() < end: time.sleep(.1)
        assert len(tree) >= 3, "bubblewrap, the first process inside, the program"
    finally:
        p.kill()
        p.wait()
    end = time.monotonic() + 10
    while any(alive := [c for c in tree if Path(f"/proc/{c}").exists()]) and time.monotonic() < end: time.sleep(.05)
    assert not alive


def test_a_limit_that_does_not_hold_is_noticed(monkeypatch):
    "The probe tries the limit on processes before any program relies on it."
    real = sandbox._prlimit
    monkeypatch.setattr(sandbox, "_prlimit", lambda limits, count: [a for a in real(limits, count) if "nproc" not in a])
    monkeypatch.setattr(sandbox, "_sound", set())
    assert "processes" in available()
    with pytest.raises(SandboxUnavailable, match="processes"): run_python("print(1)")


def test_runs_do_not_leak_files_or_users():
    run_python("print(1)")
    before, users = len(os.listdir("/proc/self/fd")), sandbox._USERS.qsize()
    for code in ("print(1)", "1/0", "while True: pass"): run_python(code, limits=Limits(seconds=.5))
    with pytest.raises(SandboxUnavailable): sandbox._run(sandbox._Job(["-c", "0"], b"", Limits(), {"a/" * 3000 + "x": b""}, False), "bwrap")
    assert len(os.listdir("/proc/self/fd")) == before and sandbox._USERS.qsize() == users


def test_many_threads_at_once():
    runs = run_many([(f"print(int(input()) * {i})", "7") for i in range(24)], workers=6, progress=False)
    assert [r.stdout for r in runs] == [f"{7 * i}\n" for i in range(24)]


def test_the_filter_is_a_sound_program():
    "Run the packet-filter program in Python: what it refuses, and that every jump lands inside."
    import struct
    for machine, audit, column in (("x86_64", 0xC000003E, 0), ("aarch64", 0xC00000B7, 1)):
        raw = sandbox._filter(machine)
        program = [struct.unpack_from("HBBI", raw, i) for i in range(0, len(raw), 8)]
        def decide(number, arch, argument=0, program=program):
            data, at, a = {0: number, 4: arch, 16: argument}, 0, 0
            while True:
                code, yes, no, k = program[at]
                at += 1
                if code == 0x20: a = data[k]
                elif code == 6: return k == 0x7FFF0000
                else: at += yes if (a == k if code == 0x15 else a >= k) else no
        assert all(not decide(n[column], audit) for n in sandbox._REFUSED.values())
        assert all(decide(n[column], audit, 0) and not decide(n[column], audit, 1) for n in sandbox._OWN_ONLY.values())
        assert not decide(1, 0x40000003) and decide(63, audit) and decide(57, audit) and len(program) < 4096
    assert sandbox._filter("riscv64") == b""


@pytest.mark.parametrize("complaint, remedy", [
    ("bwrap: Unknown option --disable-userns", "0.8"),
    ("bwrap: unknown option --json-status-fd", "0.8"),
    ("bwrap: No permissions to create new namespace, likely because the kernel does not allow non-privileged user namespaces.", "unprivileged_userns"),
    ("bwrap: setting up uid map: Permission denied", "apparmor_restrict_unprivileged_userns"),
    ("bwrap: Creating new namespace failed: Operation not permitted", "seccomp=unconfined"),
    ("bwrap: Can't mount proc on /newroot/proc: Operation not permitted", "systempaths=unconfined"),
    ("unshare: unshare failed: Operation not permitted", "seccomp=unconfined"),
    ("[Errno 2] No such file or directory: 'bwrap'", "apt-get install bubblewrap"),
    ("", "bwrap --ro-bind"),
])
def test_every_complaint_has_a_remedy(complaint, remedy):
    advice = sandbox._advice(complaint)
    assert remedy in advice and "backend='rlimits'" in advice


def test_a_bubblewrap_that_fails_is_reported(monkeypatch):
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    fake = folder / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", path := f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(sandbox, "_ENVIRONMENT", sandbox._ENVIRONMENT | {"PATH": path})
    reason = available()
    assert "setting up uid map" in reason and "sysctl" in reason
    v = check_code("def f(): return 1", "", {"tests": "assert f() == 1"})
    assert v.value is None and v.cause == "no sandbox"
    shutil.rmtree(folder)


# The judge

EQUAL = "class Any:\n    def __init__(self, *a): pass\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n    __hash__ = lambda self: 0\n"
ANY = EQUAL + "".join(f"    def __{n}__(self, *a): return {v}\n" for n, v in [
    ("contains", "True"), ("sub", "0"), ("rsub", "0"), ("lt", "True"), ("gt", "True"), ("le", "True"), ("ge", "True"), ("abs", "0"), ("len", "2"), ("iter", "iter([])"), ("bool", "True")])
PRIME = "import re, os, sys, gc, json, time, builtins, types, ctypes, signal, threading\n"
TESTS = ["import math", "assert f(7) == 1234567", "assert abs(f(7) - 1234567) < 1e-6", "assert 1234567 in [f(7)] and f(7) in (1234567, 7654321)", "assert math.isclose(f(7), 1234567)",
         "assert all([f(7) == 1234567, isinstance(f(7), int)])", "assert str(f(7)).startswith('1234567')"]
CHEATS = {
    "exit at once": "sys.exit(0)", "exit hard": "os._exit(0)", "exit in the call": "def f(x): os._exit(0)", "exit from a call": "def f(x): sys.exit(0)",
    "raise through the judge": "def f(x): raise GeneratorExit", "raise an interrupt": "def f(x): raise KeyboardInterrupt",
    "equal to everything": "f = lambda x: Any()", "number equal to everything": "class N(int):\n    __eq__ = lambda s, o: True\nf = lambda x: N()",
    "list equal to everything": "class N(list):\n    __eq__ = lambda s, o: True\nf = lambda x: N()", "class in place of a function": "class f(Any): pass",
    "class that lies about its name": "class F(Any): pass\nf = F", "metaclass": "class M(type):\n    __eq__ = lambda s, o: True\n    __call__ = lambda s, *a: s\n    __hash__ = type.__hash__\nclass f(metaclass=M): pass",
    "text that starts with everything": "class S(Any):\n    def startswith(self, *a): return True\n    __str__ = lambda s: 'x'\nf = lambda x: S()",
    "own builtins": "all = any = isinstance = lambda *a: True\nabs = lambda x: 0\nf = lambda x: 0", "own math": "class math:\n    isclose = lambda *a: True\nf = lambda x: 0.5",
    "patched builtins": "builtins.all = builtins.isinstance = lambda *a: True\nbuiltins.abs = lambda x: 0\nbuiltins.AssertionError = Warning\nf = lambda x: 0",
    "patched modules": "import math\nmath.isclose = lambda *a: True\nsys.modules['tests'] = sys.modules['solution']\nf = lambda x: 0",
    "patched machinery": "for n, c in list(sys.modules['__main__'].__dict__.items()):\n    if isinstance(c, types.FunctionType): sys.modules['__main__'].__dict__[n] = lambda *a, **k: True\nf = lambda x: 0",
    "exit hooks": "import atexit\natexit.register(print, 'passed')\nsys.excepthook = sys.unraisablehook = print\nf = lambda x: 0",
    "replies in advance": "for fd in range(3, 99):\n    try: [os.write(fd, b'[\"value\", [1, [], \"\"]]\\n') for _ in range(99)]\n    except OSError: pass\nf = lambda x: 0",
    "a report of its own": "for fd in range(99):\n    try: os.write(fd, b'\\n{\"passed\": 7, \"total\": 7, \"failure\": \"\", \"broken\": \"\", \"at\": \"\", \"lost\": \"\", \"strange\": \"\"}\\n')\n    except OSError: pass\nos._exit(0)",
    "a report through /proc": "for p in ('1', 'self'):\n    for fd in range(20):\n        try: open(f'/proc/{p}/fd/{fd}', 'w').write('{\"passed\": 7, \"total\": 7, \"lost\": \"\", \"broken\": \"\", \"strange\": \"\", \"failure\": \"\"}\\n')\n        except OSError: pass\nos._exit(0)",
    "read the judge's memory": "def f(x):\n    m = open('/proc/1/mem', 'rb')\n    for line in open('/proc/1/maps'):\n        a, b = (int(v, 16) for v in line.split()[0].split('-'))\n        m.seek(a)\n        if b'1234567' in m.read(b - a): return 1234567",
    "read the judge's files": "def f(x):\n    for p in ('/proc/1/fd/0', '/proc/1/environ', '/proc/1/cmdline', 'judge', 'main.py', '/proc/self/fd/0'):\n        try:\n            if b'1234567' in open(p, 'rb').read(): return 1234567\n        except OSError: pass",
    "search its own memory": "def f(x):\n    for line in open('/proc/self/maps'):\n        a, b = (int(v, 16) for v in line.split()[0].split('-'))\n        if 'rw' in line and b - a < 1 << 26:\n"
                             "            m = open('/proc/self/mem', 'rb', 0); m.seek(a); found = re.search(rb'== (\\d{7})', m.read(b - a))\n            if found: return int(found[1])",
    "search the objects": "def f(x):\n    for o in gc.get_objects():\n        if isinstance(o, dict) and 'units' in o: return 1234567\n    frame = sys._getframe()\n    while frame:\n        if 'units' in str(frame.f_locals)[:10**6] or 'tests' in frame.f_globals: return 1234567\n        frame = frame.f_back",
    "trace the judge": "def f(x):\n    c = ctypes.CDLL(None)\n    if c.ptrace(16, 1, 0, 0) == 0: return 1234567", "kill the judge": "os.kill(1, 9)\nf = lambda x: 0",
    "stop the judge": "for s in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGSEGV, signal.SIGUSR1): os.kill(1, s)\nf = lambda x: 0", "kill everyone": "os.kill(-1, 9)",
    "starve the judge": "import resource\ntry: resource.prlimit(1, resource.RLIMIT_CPU, (0, 0))\nexcept OSError: pass\nf = lambda x: 0",
    "plant modules": "for n in ('math', 'unittest', 'decimal', 'fractions', 'datetime', 'marshal', 'asyncio'): open(n + '.py', 'w').write('isclose = lambda *a: True')\nf = lambda x: 0.5",
    "endless reply": "def f(x): return 'x' * (1 << 26)", "unreadable reply": "for fd in range(3, 99):\n    try: os.write(fd, b'\\xff{[\\n')\n    except OSError: pass\nf = None",
    "deep reply": "for fd in range(3, 99):\n    try: os.write(fd, b'[\"value\",' + b'[' * 100000 + b'\\n')\n    except OSError: pass\nf = None",
    "odd reply": "for fd in range(3, 99):\n    try: os.write(fd, b'[\"value\", [{\"own\": 0}, [[0, 1]], 7]]\\n[\"get\", [{\"own\": 5}, \"x\"]]\\n')\n    except OSError: pass\nf = None",
    "orders to the judge": "for fd in range(3, 99):\n    try: os.write(fd, b'[\"call\", [{\"builtin\": \"exec\"}, [\"import os; os._exit(0)\"], {\"dict\": []}]]\\n[\"load\", [\"1\"]]\\n[\"do\", [\"__pow__\", 9, 99]]\\n')\n    except OSError: pass\nf = lambda x: 0",
    "endless orders": "def g():\n    for fd in range(3, 99):\n        try:\n            os.set_blocking(fd, True)\n            while True: os.write(fd, b'[\"load\", [\"1\"]]\\n')\n        except OSError: pass\ng()",
    "a child that stays": "if os.fork() == 0: time.sleep(100)\nos._exit(0)", "a thread that goes on": "threading.Thread(target=lambda: time.sleep(100)).start()\nf = lambda x: 0",
    "fork bomb": "for i in range(6):\n    try: os.fork()\n    except OSError: pass\nwhile True: pass", "memory bomb": "x = [0] * 10**10", "closed line": "for fd in range(3, 99):\n    try: os.close(fd)\n    except OSError: pass\nf = lambda x: 0",
    "syntax error": "def f(x:", "nothing": "pass", "not callable": "f = 1234567", "overflow": "def f(x): return f(x)", "nan": "f = lambda x: float('nan')", "cycle": "def f(x):\n    x = []\n    x.append(x)\n    return x",
}


def verdict(code, tests=TESTS, **context): return check_code(PRIME + ANY + code, "", {"tests": tests, "entry": "f", "timeout": 3, **context})


def test_no_cheat_passes():
    found = sandbox._in_threads(lambda c: verdict(c), list(CHEATS.values()), 3, "", False)
    assert {name: v for name, v in zip(CHEATS, found) if v.value is not False} == {} and len(CHEATS) >= 45
    assert verdict("f = lambda x: 1234567").value is True, "an honest program passes the same tests"


@pytest.mark.parametrize("test, cheat", [
    ("assert f(3) == 5", "f = lambda x: Any()"), ("assert 5 == f(3)", "f = lambda x: Any()"), ("assert not f(3) != 5", "f = lambda x: Any()"), ("assert f(3) < 5", "f = lambda x: Any()"),
    ("assert f(3) == [5]", "f = lambda x: [Any()]"), ("assert 5 in f(3)", "f = lambda x: Any()"), ("assert f(3) - 5 == 0", "f = lambda x: Any()"), ("assert f(3)[0] == 5", "class G(Any):\n    __getitem__ = lambda *a: Any()\nf = lambda x: G()"),
    ("assert f(3).v == 5", "Any.v = Any()\nf = lambda x: Any()"), ("assert f(3).startswith('a')", "Any.startswith = lambda *a: True\nf = lambda x: Any()"), ("assert f(3).issubset({5})", "Any.issubset = lambda *a: True\nf = lambda x: Any()"),
    ("assert {f(3)} == {5}", "f = lambda x: Any()"), ("assert {5: 1}[f(3)]", "Any.__hash__ = lambda s: 5\nf = lambda x: Any()"), ("assert sorted([f(3), 1]) == [1, 5]", "f = lambda x: Any()"),
    ("assert all([f(3) == 5])", "all = lambda *a: True\nf = lambda x: 4"), ("assert math.isclose(f(3), 5)", "class math:\n    isclose = lambda *a: True\nf = lambda x: 4"),
    ("from decimal import Decimal\nassert Decimal(f(3)) == 5", "open('decimal.py', 'w').write('class Decimal:\\n    __init__ = lambda *a: None\\n    __eq__ = lambda s, o: True')\nf = lambda x: 4"),
    ("import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(3), 5)", "f = lambda x: Any()"), ("def check(c): assert c(3) == 5", "f = lambda x: Any()"),
    ("from solution import f\nassert f(3) == 5", "f = lambda x: Any()"), ("import solution\nassert solution.f(3) == 5", "f = lambda x: Any()"),
    ("s = Solution()\nassert s.go(3) == 5", "class Solution:\n    def go(self, x): return Any()"), ("x = [1]\nf(x)\nassert x == [5]", "def f(x): x[:] = [Any()]"),
    ("try: f(3); ok = False\nexcept ValueError as e: ok = str(e) == '5'\nassert ok", "class V(ValueError):\n    __str__ = lambda s: 'x'\ndef f(x): raise V(Any())"),
    ("g = lambda x: x == 5\nassert f(g)", "def f(g): return g.__globals__ is None"), ("h = lambda: 5\nassert f(h) == 6", "def f(h): return h.__code__.co_consts[1] + 1"),
    ("class N:\n    hidden = 5\n    _secret = 5\nassert f(N()) == 5", "def f(n): return n._secret"), ("def gen(): yield 5\nassert f(gen()) == 6", "def f(g): return g.gi_frame.f_globals"),
])
def test_objects_cannot_pretend_to_be_values(test, cheat): assert verdict(cheat, test).value is False


def test_a_class_that_a_test_makes_itself_is_asked():
    assert verdict("class Money:\n    def __init__(s, v): s.v = v\n    def __eq__(s, o): return s.v == (o.v if isinstance(o, Money) else o)\n    def __contains__(s, x): return x == s.v\n    def __rmul__(s, k): return Money(k * s.v)",
                   "assert Money(5) == 5 and Money(5) != 6 and 5 in Money(5) and 6 not in Money(5) and 2 * Money(5) == Money(10)").value is True


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.complex_numbers(allow_nan=False) | st.decimals(allow_nan=False) | st.fractions()
    | st.dates() | st.datetimes().map(lambda d: d.replace(fold=0)) | st.times().map(lambda t: t.replace(fold=0)) | st.timedeltas() | st.builds(range, st.integers(-9, 9), st.integers(-9, 9)),
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers(), st.text()), inner, max_size=4)
    | st.sets(st.integers() | st.text()) | st.frozensets(st.integers()) | st.builds(bytearray, st.binary()), max_leaves=12)


@settings(max_examples=300, deadline=None)
@given(plain)
def test_data_crosses_unchanged(value):
    back = sandbox._unpack(json.loads(json.dumps(sandbox._pack(value, repr))), repr)
    assert back == value and shape(back) == shape(value)


def shape(value):
    "The types of a value and of everything in it."
    inner = [p for pair in value.items() for p in pair] if isinstance(value, dict) else value if isinstance(value, (list, tuple, set, frozenset)) else []
    inner = [shape(v) for v in inner]
    return type(value), sorted(inner, key=repr) if isinstance(value, (set, frozenset)) else inner


def test_kinds_of_numbers_survive():
    for value in (True, 1, 1.0, -0.0, 2**53, -2**200, Decimal("1.10"), Fraction(1, 3), float("inf")):
        back = sandbox._unpack(json.loads(json.dumps(sandbox._pack(value, repr))), repr)
        assert type(back) is type(value) and repr(back) == repr(value)
    assert type(sandbox._unpack(sandbox._pack(type("N", (int,), {"__eq__": lambda s, o: True})(3), repr), repr)) is int


@settings(max_examples=300, deadline=None)
@given(st.text() | st.binary().map(lambda b: b.decode("latin1")) | st.text(alphabet="`python\n def():x=1 "))
def test_extraction_never_raises(text):
    found = extract_code(text)
    assert found is None or isinstance(found, str) and found.strip()


def test_the_judge_can_be_made_from_its_functions():
    "Everything that runs inside is in the list, and nothing else is needed."
    names = {f.__name__ for f in sandbox._INSIDE}
    used = {n for f in sandbox._INSIDE for code in codes(f) for n in code.co_names if n.startswith("_") and not n.startswith("__") and callable(getattr(sandbox, n, None))}
    assert used - names <= {"_Lost"}


def codes(f):
    todo = [f.__code__] if isinstance(f, types.FunctionType) else [m.__code__ for m in vars(f).values() if isinstance(m, types.FunctionType)]
    while todo:
        code = todo.pop()
        yield code
        todo += [c for c in code.co_consts if inspect.iscode(c)]


def test_sixty_candidates_through_the_pool():
    "Right, wrong, cheating, hanging and unjudgeable programs in one batch, each with its own verdict, and the pool alive."
    fence = "```"
    text = lambda code: f"Here you are:\n{fence}python\n{code}\n{fence}\nDone."
    task = {"tests": ["assert double(2) == 4", "assert double('a') == 'aa'"], "entry": "double", "timeout": 2}
    kinds = [("def double(x): return x * 2", task, True), ("def double(x): return x + x", task, True), ("def double(x): return x ** 2", task, False), ("import os; os._exit(0)", task, False),
             ("def double(x):\n    while True: pass", task, False), ("x = [0] * 10**10", task, False), ("def double(x) return", task, False),
             ("print(int(input()) * 2)", {"io": [{"stdin": "4", "stdout": "8"}]}, True), ("print(input())", {"io": [{"stdin": "4", "stdout": "8"}]}, False), ("def double(x): return 2 * x", {"tests": "import colours"}, None)]
    jobs = [(text(code), "", context) for code, context, _ in kinds] * 6
    want = [value for _, _, value in kinds] * 6
    with VerifierPool(workers=2) as pool:
        verdicts = pool.verify_many(jobs, "code")
        assert [v.value for v in verdicts] == want and all(v.cause for v in verdicts)
        assert pool.verify_many([("I would rather not.", "", task)], "code")[0].value is False
        assert pool.verify_many([("\\boxed{4}", "4")], "math")[0].value is True
    assert verify(text("def double(x): return x * 2"), "", "code", task).value is True


def test_a_time_out_in_a_thread_hits_only_its_own_run():
    results = {}
    threads = [threading.Thread(target=lambda n=n, c=c: results.update({n: run_python(c, limits=Limits(seconds=1.5)).cause})) for n, c in enumerate(["while True: pass", "print(1)", "import time; time.sleep(.3)"])]
    for t in threads: t.start()
    for t in threads: t.join()
    assert results == {0: "timeout", 1: "ok", 2: "ok"}
