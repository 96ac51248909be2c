"""A PostgreSQL of the tests' own: Debian's programs, a temporary directory and a socket in it."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from sqlalchemy.engine import URL

from tests.programs import absent

DEADLINE_S = 60.0
_DEBIAN = Path("/usr/lib/postgresql")
_USER = "postgres"
_ACCOUNT = "nobody"  # where we are root, which the server refuses to be


class Cluster:
    """A running PostgreSQL server; databases in it are cheap, so every test takes its own."""

    def __init__(self, programs: Path, directory: Path) -> None:
        self._programs = programs
        self._directory = directory
        self._prefix = _as_somebody(directory)
        self._numbers = itertools.count()
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    @contextmanager
    def running(cls, programs: Path) -> Iterator[Self]:
        """Makes a cluster and runs it until the block ends."""
        directory = Path(tempfile.mkdtemp(prefix="pg-"))  # short, as sockets' names must be
        cluster = cls(programs, directory)
        try:
            cluster._initialise()
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
            shutil.rmtree(directory)

    def start(self) -> None:
        """Starts the server and waits until it takes connections."""
        command = [str(self._programs / "postgres"), "-D", str(self._data)]
        # Nothing here must survive a power cut; a killed process loses nothing without fsync.
        for option in (
            "fsync=off",
            "listen_addresses=",
            f"unix_socket_directories={self._directory}",
        ):
            command += ["-c", option]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._prefix, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        give_up_at = time.monotonic() + DEADLINE_S
        while not self._takes_connections():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < give_up_at, self._log.read_text()
            time.sleep(0.02)

    def stop(self, *, how: signal.Signals = signal.SIGINT) -> None:
        """Ends the server and every connection."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(DEADLINE_S)
            self._process = None

    @contextmanager
    def crashed(self) -> Iterator[None]:
        """Ends the server without any care; it recovers after the block."""
        self.stop(how=signal.SIGQUIT)
        try:
            yield
        finally:
            self.start()

    def new_database(self) -> URL:
        """Returns the URL of an empty database that nobody else uses."""
        name = f"test{next(self._numbers)}"
        self.execute(self._url("postgres"), f"CREATE DATABASE {name}")
        return self._url(name)

    def execute(self, database: URL, statement: str) -> None:
        """Runs a statement of a test's own in a database."""
        with _connect(database) as connection:
            connection.execute(statement.encode())

    def rows(self, database: URL, query: str) -> list[tuple[object, ...]]:
        """Returns what a database answers."""
        with _connect(database) as connection:
            return connection.execute(query.encode()).fetchall()

    def disconnect_all(self, database: URL) -> None:
        """Cuts every connection to a database, as a network would."""
        others = "datname = current_database() AND pid <> pg_backend_pid()"
        # Returns once the connections are gone, and their locks with them.
        self.execute(
            database,
            f"SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE {others}",
        )

    @property
    def _data(self) -> Path:
        return self._directory / "data"

    @property
    def _log(self) -> Path:
        return self._directory / "log"

    def _url(self, database: str) -> URL:
        return URL.create(
            "postgresql+psycopg",
            username=_USER,
            database=database,
            query={"host": str(self._directory)},
        )

    def _initialise(self) -> None:
        options = ["--username", _USER, "--auth", "trust", "--encoding", "UTF8", "--no-sync"]
        subprocess.run(
            [*self._prefix, str(self._programs / "initdb"), "-D", str(self._data), *options],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd=self._directory,
        )

    def _takes_connections(self) -> bool:
        try:
            _connect(self._url("postgres")).close()
        except psycopg.OperationalError:
            return False
        return True


def _connect(url: URL) -> psycopg.Connection[tuple[object, ...]]:
    host = url.query["host"]
    assert isinstance(host, str)
    address = make_conninfo(host=host, user=url.username, dbname=url.database)
    return psycopg.connect(address, autocommit=True)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The PostgreSQL server of this run."""
    programs = _programs()
    if programs is None:
        absent("PostgreSQL server")
    with Cluster.running(programs) as running:
        yield running


def _programs() -> Path | None:
    """Returns the newest PostgreSQL's programs, or None: Debian keeps them off the path."""
    on_path = shutil.which("initdb")
    if on_path is not None:
        return Path(on_path).resolve().parent
    versions = [folder for folder in _DEBIAN.glob("*/bin") if (folder / "initdb").is_file()]
    return max(versions, key=lambda folder: float(folder.parent.name), default=None)


def _as_somebody(directory: Path) -> list[str]:
    """Returns what to put before a command so that it ends with us, and does not run as root."""
    command = ["setpriv", "--pdeathsig", "INT"]
    if os.geteuid() != 0:
        return command
    account = pwd.getpwnam(_ACCOUNT)
    os.chown(directory, account.pw_uid, account.pw_gid)
    owner = [f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
    return [*command, *owner]
