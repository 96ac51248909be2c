"""Rows B1-B5: sources that are paths to elsewhere, addresses of others, or a hub that attacks."""

from __future__ import annotations

import contextlib
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from linker_core.errors import BadCheckpointError, InvalidRequestError, LinkerError, NotReadyError
from tests.server.advisories.attacks import refused
from tests.server.live import LiveServer
from tests.server.onboarding import fake_hub
from tests.server.onboarding.hub_site import WEIGHTS, Site, site

MODEL = "model.safetensors"


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Site]:
    """This server's side of the hub, and the hub; downloads go on in the test's own process."""
    with site(tmp_path) as found:
        yield found


@pytest.fixture
def other() -> Iterator[fake_hub.FakeHub]:
    """Another host, by its port, that the attacker reads the requests of."""
    with fake_hub.FakeHub().running() as found:
        yield found


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The hosts that anybody in this process asks the address of."""
    hosts: set[str] = set()
    resolve = socket.getaddrinfo

    def noted(host: str, *args: Any, **kwargs: Any) -> Any:
        hosts.add(host)
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", noted)
    return hosts


def offered(server: LiveServer, source: str, status: int) -> str:
    """Offers a source everywhere one is taken; returns what is said of it."""
    messages = set()
    for path, more in (("/models", {"name": "attack"}), ("/models/plan", {})):
        response = server.client.post(path, json={"source": source, **more})
        messages.add(refused(response, status, param="source"))
    assert server.client.get("/models/attack").status_code == 404
    return messages.pop()


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("../../../../../../etc", id="CVE-2023-31036"),
        pytest.param("/etc/passwd", id="absolute"),
        pytest.param("base/../../state", id="up-from-a-model"),
        pytest.param("/proc/self/root/etc", id="proc"),
        pytest.param("/proc/self/fd/0", id="descriptor"),
        pytest.param("....//....//etc", id="doubled"),
        pytest.param("%2e%2e/%2e%2e/etc", id="encoded"),
        pytest.param("/nowhere/at/all", id="missing"),
    ],
)
def test_path_outside_the_root(target: LiveServer, path: str) -> None:
    if path in ("....//....//etc", "%2e%2e/%2e%2e/etc"):  # names below the root, of nothing
        response = target.client.post("/models", json={"name": "attack", "source": path})
        assert "etc" not in refused(response, 400)
        return
    message = offered(target, path, 403)
    assert path.rpartition("/")[2] not in message  # it says nothing of what is there


@pytest.mark.parametrize("hidden", [False, True], ids=["link", "link-in-the-middle"])
def test_cve_2026_24208_link_out_of_the_root(
    target: LiveServer, root: Path, source: Path, tmp_path: Path, hidden: bool
) -> None:
    shutil.copytree(root / "base", tmp_path / "outside" / "model")
    shutil.rmtree(source)
    source.symlink_to(tmp_path / "outside" / ("" if hidden else "model"))
    offered(target, str(source / "model" if hidden else source), 403)
    source.unlink()


def test_triton_file_override_security_link_to_a_file(
    target: LiveServer, root: Path, source: Path
) -> None:
    for path in source.iterdir():
        path.unlink()
        path.symlink_to(root / "base" / path.name)
    response = target.onboard("attack", source, wait=False)
    assert "symbolic link" in refused(response, 400, "bad_checkpoint")


def test_cve_2026_47627_swapped_after_it_was_checked(
    real: LiveServer, root: Path, source: Path, tmp_path: Path
) -> None:
    shutil.copytree(root / "near", tmp_path / "secret")
    assert real.onboard("attack", source, donor=None).status_code == 201
    assert real.client.post("/models/unload", json={"model": "attack"}).status_code == 200
    shutil.rmtree(source)
    source.symlink_to(tmp_path / "secret")
    assert "secret" not in refused(real.chat("attack"), 503, "not_ready")
    source.unlink()
    shutil.copytree(tmp_path / "secret", source)  # in its place, but not what was checked
    refused(real.chat("attack"), 503, "not_ready")
    assert real.client.delete("/models/attack").status_code == 200


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("../../../../var/x", id="CVE-2026-47487"),
        pytest.param("sha256-../../../../etc/ssh/id", id="CVE-2024-37032"),
        pytest.param("a/b/c", id="three-parts"),
        pytest.param(".", id="dot"),
        pytest.param("a/..", id="dots"),
        pytest.param("/a", id="absolute"),
        pytest.param("a\x00b", id="nul"),
        pytest.param("a\nb", id="newline"),
        pytest.param("\uff41", id="wide"),
        pytest.param("x" * 4096, id="4kB"),
        pytest.param("plan", id="reserved"),
        pytest.param("", id="empty"),
    ],
)
def test_name_that_is_a_path(target: LiveServer, source: Path, name: str) -> None:
    state = target.services.settings.state_directory()
    before = {path.relative_to(state) for path in state.rglob("*")}
    refused(target.onboard(name, source, wait=False), 400, param="name")
    renamed = target.client.patch("/models/near", json={"alias": name})
    refused(renamed, 400, param="alias")
    refused(target.chat(name), 404, "model_not_found", param="model")
    refused(target.client.post("/models/load", json={"model": name}), 404)
    after = {path.relative_to(state) for path in state.rglob("*")}
    assert {path for path in after - before if path.suffix not in (".sqlite3-wal", "")} == set()


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("http://169.254.169.254/latest/meta-data", id="CVE-2023-43654"),
        pytest.param("file:///etc/passwd", id="file"),
        pytest.param("s3://bucket/model", id="s3"),
        pytest.param("https://huggingface.co/../../x", id="CVE-2024-35198"),
        pytest.param("hub:http://127.0.0.1:9/x", id="hub-url"),
        pytest.param("hub:acme/base@../../../x", id="hub-traversal"),
        pytest.param("hub:acme@evil.example/base", id="hub-userinfo"),
        pytest.param("hub:evil.example\\@acme/base", id="CVE-2026-24779"),
        pytest.param("hub:acme/base?x=1#y", id="hub-query"),
        pytest.param("hub:0x7f000001/x@y@z", id="hub-at-twice"),
    ],
)
def test_source_that_is_an_address(target: LiveServer, source: str, looked_up: set[str]) -> None:
    looked_up.clear()
    for path, more in (("/models", {"name": "attack"}), ("/models/plan", {})):
        response = target.client.post(path, json={"source": source, **more})
        assert response.status_code in (400, 403)
        refused(response, response.status_code)
    assert looked_up <= {"127.0.0.1"}  # the test's own client


@pytest.mark.parametrize(
    "location",
    [
        pytest.param("http://127.0.0.1@evil.example/x", id="CVE-2026-25960"),
        pytest.param("http://169.254.169.254/latest/meta-data", id="CVE-2026-34753"),
        pytest.param("http://evil.example\\@127.0.0.1/x", id="backslash"),
        pytest.param("http://2130706433/x", id="decimal"),
        pytest.param("http://[::ffff:169.254.169.254]/x", id="mapped"),
        pytest.param("gopher://127.0.0.1/x", id="scheme"),
        pytest.param("file:///etc/passwd", id="file"),
    ],
)
def test_redirect_of_the_hub_leads_elsewhere(
    there: Site, location: str, looked_up: set[str]
) -> None:
    there.hub.faults[MODEL] = [fake_hub.redirect(location)] * 9
    with pytest.raises((BadCheckpointError, NotReadyError, InvalidRequestError)):
        there.fetch(token="hf_secret")
    there.hub.api_fault = fake_hub.redirect(location)
    with pytest.raises((BadCheckpointError, NotReadyError, InvalidRequestError)):
        there.look(token="hf_secret")
    assert looked_up == {"127.0.0.1"}
    there.hub.api_fault = None
    there.hub.faults.clear()
    assert (there.fetch() / MODEL).read_bytes() == WEIGHTS


def test_dns_rebinding_connects_to_the_address_that_was_checked(
    there: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    resolve = socket.getaddrinfo

    def rebinding(host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        if host != "huggingface.co":
            return resolve(host, port, *args, **kwargs)
        asked.append(host)
        address = "93.184.216.34" if len(asked) == 1 else "169.254.169.254"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    connected: list[Any] = []

    def connect(_socket: socket.socket, address: Any) -> None:
        connected.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(NotReadyError):
        there.look(is_public=True, endpoint="https://huggingface.co")
    assert {address[0] for address in connected} == {"93.184.216.34"}


@pytest.mark.parametrize(
    "challenge",
    [
        pytest.param('Bearer realm="{url}/token"', id="GO-2025-3824"),
        pytest.param('Basic realm="{url}"', id="basic"),
    ],
)
def test_token_is_not_sent_where_a_challenge_points(
    there: Site, other: fake_hub.FakeHub, challenge: str
) -> None:
    fault = fake_hub.status(401, {"www-authenticate": challenge.format(url=other.endpoint)})
    there.hub.api_fault = fault
    with pytest.raises(LinkerError):
        there.look(token="hf_secret")
    there.hub.api_fault = None
    there.hub.faults[MODEL] = [fault] * 4
    with pytest.raises(LinkerError):
        there.fetch(token="hf_secret")
    assert other.asked == []


def test_cve_2024_6587_token_does_not_follow_a_redirect(
    there: Site, other: fake_hub.FakeHub
) -> None:
    there.hub.token = "hf_secret"
    there.hub.faults[MODEL] = [fake_hub.redirect(f"{other.endpoint}/x/{MODEL}")] * 4
    other.add("x", {MODEL: WEIGHTS})
    with pytest.raises(BadCheckpointError):
        there.fetch(token="hf_secret")
    assert other.asked == []
    there.hub.faults[MODEL] = [fake_hub.redirect(f"{other.endpoint}/store/x/{MODEL}")]
    there.fetch(token="hf_secret", stores=("127.0.0.1",), are_stores_public=False)
    assert [asked.authorization for asked in other.asked] == [None]


def endless_chunk_size(handler: fake_hub.HubHandler, _data: bytes, _begin: int) -> None:
    """A chunk whose size is written with ever more zeros."""
    handler.close_connection = True
    handler.start(200, {"transfer-encoding": "chunked"})
    with contextlib.suppress(ConnectionError):
        while True:
            handler.wfile.write(b"0" * 65536)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fake_hub.gzip_bomb, id="CVE-2024-12886"),
        pytest.param(endless_chunk_size, id="GHSA-vxq7-64xx-v4gw"),
        pytest.param(fake_hub.endless, id="endless"),
        pytest.param(fake_hub.trickle, id="trickle"),
    ],
)
def test_hub_answers_without_end(there: Site, fault: fake_hub.Fault) -> None:
    there.hub.faults[MODEL] = [fault] * 9
    with pytest.raises((BadCheckpointError, NotReadyError)):
        there.fetch(stall_timeout_s=0.3)
    left = sum(path.stat().st_size for path in there.directory.rglob("*") if path.is_file())
    assert left < 4 * len(WEIGHTS)
    there.hub.api_fault = fault
    with pytest.raises((BadCheckpointError, NotReadyError)):
        there.look(stall_timeout_s=0.3)


@pytest.mark.parametrize("fault", [fake_hub.zeros, fake_hub.other_bytes])
def test_foundry_local_issue_910_zeros_of_the_right_size(
    there: Site, fault: fake_hub.Fault
) -> None:
    there.hub.faults[MODEL] = [fault] * 9
    with pytest.raises(BadCheckpointError):
        there.fetch()
    assert not any(file.endswith((MODEL, ".part")) for file in there.files())
    there.hub.faults.clear()
    there.part().parent.mkdir(parents=True, exist_ok=True)
    there.part().write_bytes(bytes(len(WEIGHTS)))  # as a preallocation that was never filled
    assert (there.fetch() / MODEL).read_bytes() == WEIGHTS
