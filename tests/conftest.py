"""No test may use the network: nothing is downloaded, and a socket that leaves here fails."""

import os
import socket
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported, so set before
os.environ["HF_DATASETS_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest  # noqa: E402
import torch  # noqa: E402

import common  # noqa: E402
from tiny_policy import make_policy  # noqa: E402

torch.set_num_threads(1)  # the models here are too small to share out


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
