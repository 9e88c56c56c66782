"""No test may use the network: nothing is downloaded, and a socket that leaves here fails.

And how tests run the scripts: importing torch and transformers takes seconds, so one child imports
them once and forks for each run.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported, so set before
os.environ["HF_DATASETS_OFFLINE"] = "1"
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

import common  # noqa: E402
from tiny_policy import make_policy  # noqa: E402

torch.set_num_threads(1)  # the models here are too small to share out


def pytest_configure(config):
    about = "notebooks: executes the notebooks of tutorials/; -m 'not notebooks' leaves them out"
    config.addinivalue_line("markers", about)


@pytest.fixture(scope="session", autouse=True)
def no_network():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            connect = getattr(socket.socket, name)

            def local_only(self, address, connect=connect):
                if self.family != socket.AF_UNIX:
                    raise RuntimeError(f"a test tried to reach {address}")
                return connect(self, address)

            patch.setattr(socket.socket, name, local_only)
        yield


@pytest.fixture
def model():
    """The policy small enough to enumerate."""
    return make_policy()


@pytest.fixture
def tokenizer():
    return common.build_tokenizer()


# ---------------------------------------------------------------------------- the scripts as runs

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
ENV.pop("NO_COLOR", None)

SERVER = """
import json, os, signal, sys, tempfile, time
import torch, common, spo, mpo, reset_po
with tempfile.TemporaryDirectory() as folder:  # what is slow the first time is done before the fork
    common.build_policy(257).save_pretrained(folder)
    common.build_tokenizer().save_pretrained(folder)
    common.load_policy(folder, torch.device("cpu"))
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if not pid:
        for number, path in enumerate(job["files"], 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(job["cwd"])
        os.environ.update(job["env"])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.alarm(400)  # a hang ends
        torch.seed()  # as in a fresh interpreter: no two runs share the global generator
        sys.argv = [job["script"] + ".py", *job["args"]]
        exec(job["patch"])
        code = 0
        try:
            common.cli(sys.modules[job["script"]].main)
        except SystemExit as stop:  # as at the end of an interpreter, which would take 2 s
            code = stop.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
        sys.stdout.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    options = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV)
    with subprocess.Popen([sys.executable, "-c", SERVER], **options) as process:
        process.files = [str(tmp_path_factory.mktemp("server") / name) for name in ("out", "err")]
        yield process
        process.stdin.close()


@pytest.fixture
def run(server, tmp_path):
    """run(*args): `python spo.py *args`. patch: Python run first; meanwhile(pid): called beside."""

    def run(
        *args, cwd=tmp_path, patch="", env={}, out=None, script="spo", meanwhile=lambda pid: None
    ) -> Done:
        files = [out or server.files[0], server.files[1]]
        job = dict(args=args, cwd=str(cwd), patch=patch, env=env, files=files, script=script)
        print(json.dumps(job), file=server.stdin, flush=True)
        meanwhile(int(server.stdout.readline()))
        code = int(server.stdout.readline())
        texts = ["" if out else Path(server.files[0]).read_bytes().decode(errors="replace")]
        texts.append(Path(server.files[1]).read_bytes().decode(errors="replace"))
        return Done(code, *texts)

    return run


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A directory with one whole run in it, never stopped, and what that run printed."""
    import runs

    cwd = tmp_path_factory.mktemp("base")
    done = runs.python(cwd, *runs.BASE)
    assert done.code == 0, done.err
    return cwd, done


@pytest.fixture
def warm(base, tmp_path):
    """tmp_path, with the base run's warm start in it."""
    shutil.copytree(base[0] / "runs" / "warm_start", tmp_path / "runs" / "warm_start")
    return tmp_path
