"""Downloads from a hub that fails in every way it can; row numbers are those of the catalogue."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from linker_core.errors import (
    BadCheckpointError,
    InsufficientCapacityError,
    InvalidRequestError,
    NotReadyError,
    UnsupportedFormatError,
)
from server.onboarding.hub import disk, transport
from server.onboarding.hub.source import HubSource
from tests.server.onboarding import fake_hub
from tests.server.onboarding.hub_site import CONFIG, FILES, REPO, WEIGHTS, Site, site

# The watch on stalls has the signal that a timeout would use.
pytestmark = pytest.mark.timeout(method="thread")
MODEL = "model.safetensors"


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path) as found:
        yield found


def test_branch_becomes_the_commit_it_is_now(there: Site) -> None:
    assert there.look() == {"source": str(there.source), "kind": "checkpoint"}
    assert there.look(f"hub:{REPO}@{there.source.revision}")["source"] == str(there.source)
    assert not there.directory.exists()  # a look stores nothing


def test_download_has_every_file_and_nothing_unfinished(there: Site) -> None:
    path = there.fetch()
    assert {entry.name: entry.read_bytes() for entry in path.iterdir()} == FILES
    record = f"records/{there.source.key}.json"
    assert there.files() == {record, *(f"trees/{path.name}/{name}" for name in FILES)}


def test_everything_is_asked_for_without_compression_and_at_the_commit(there: Site) -> None:
    there.fetch()
    assert {asked.headers["accept-encoding"] for asked in there.hub.asked} == {"identity"}
    commit = there.source.revision
    assert all(commit in asked.path for asked in there.hub.asked)


def test_second_fetch_of_a_commit_asks_for_no_weights(there: Site) -> None:
    there.fetch()
    there.fetch()
    assert len(there.hub.asked_for(MODEL)) == 1


def test_other_files_are_never_asked_for(there: Site) -> None:
    others = {
        "pytorch_model.bin": b"pickle",
        "training_args.bin": b"pickle",
        "modeling_acme.py": b"import os",
        "README.md": b"#",
        "original/model.safetensors": b"x",
        "consolidated.safetensors": b"x",
    }
    there.hub.add(REPO, {**FILES, **others})
    path = there.fetch()
    assert {entry.name for entry in path.iterdir()} == set(FILES)
    assert not any(there.hub.asked_for(name) for name in others if name != f"original/{MODEL}")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "model.pt", "flax.msgpack"])
def test_a13_repository_without_safetensors_is_refused_before_anything_is_asked(
    there: Site, name: str
) -> None:
    there.hub.add(REPO, {"config.json": FILES["config.json"], name: b"pickle"})
    with pytest.raises(UnsupportedFormatError, match="safetensors"):
        there.look()
    assert [asked for asked in there.hub.asked if "/resolve/" in asked.path] == []


def test_a14_config_of_another_model_is_refused_before_the_weights(there: Site) -> None:
    config = {**CONFIG, "architectures": ["EvilForCausalLM"], "auto_map": {"AutoModel": "x.Y"}}
    there.hub.add(REPO, {**FILES, "config.json": json.dumps(config).encode()})
    with pytest.raises(UnsupportedFormatError):
        there.fetch()
    assert there.hub.asked_for(MODEL) == []


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "model-9.safetensors"])
def test_a10_index_that_names_what_is_not_listed_is_refused_before_the_weights(
    there: Site, shard: str
) -> None:
    index = json.dumps({"weight_map": {"a": MODEL, "b": shard}}).encode()
    there.hub.add(REPO, {**FILES, "model.safetensors.index.json": index})
    with pytest.raises(BadCheckpointError, match="index"):
        there.fetch()
    assert there.hub.asked_for(MODEL) == []


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/model.safetensors", "model\0.safetensors"]
)
def test_a10_listed_names_that_are_paths_are_passed_over(there: Site, name: str) -> None:
    there.hub.add(REPO, {**FILES, name: b"x" * 9000})
    path = there.fetch()
    assert {entry.name for entry in path.iterdir()} == set(FILES)
    assert there.files() >= {f"trees/{path.name}/{MODEL}"}


@pytest.mark.parametrize("fault", [fake_hub.other_bytes, fake_hub.zeros])
@pytest.mark.parametrize("name", [MODEL, "config.json"])
def test_a11_wrong_bytes_of_the_right_size_are_refused_and_removed(
    there: Site, name: str, fault: fake_hub.Fault
) -> None:
    there.hub.faults[name] = [fault] * 4
    with pytest.raises(BadCheckpointError, match="digest"):
        there.fetch()
    assert there.cache.find(there.source) is None
    assert not any(name in file for file in there.files())


@pytest.mark.parametrize("listed", [{"size": None}, {"lfs": None, "blobId": "x"}, {"size": "1"}])
def test_a11_file_that_cannot_be_checked_is_refused(there: Site, listed: dict[str, object]) -> None:
    there.hub.repositories[REPO].listed[MODEL] = listed
    with pytest.raises(BadCheckpointError, match="digest"):
        there.fetch()


def test_a11_listed_size_that_is_too_small_ends_the_download_there(there: Site) -> None:
    there.hub.repositories[REPO].listed[MODEL] = {"size": 5000}
    with pytest.raises(BadCheckpointError, match="more bytes"):
        there.fetch()
    assert not there.part().exists()


def test_left_over_zeros_of_the_right_size_are_downloaded_anew(there: Site) -> None:
    there.cache.open_unfinished(there.source)
    there.part().write_bytes(bytes(len(WEIGHTS)))
    assert (there.fetch() / MODEL).read_bytes() == WEIGHTS


def test_a11_finished_file_that_is_not_the_listed_one_is_downloaded_anew(there: Site) -> None:
    folder = there.cache.open_unfinished(there.source)
    for name, content in FILES.items():
        (folder / name).write_bytes(bytes(len(content)))
    tree = there.fetch()
    assert {name: (tree / name).read_bytes() for name in FILES} == FILES


def test_finished_file_is_not_asked_for_again(there: Site) -> None:
    (there.cache.open_unfinished(there.source) / MODEL).write_bytes(WEIGHTS)
    assert (there.fetch() / MODEL).read_bytes() == WEIGHTS
    assert there.hub.asked_for(MODEL) == []


def test_weights_whose_name_no_disk_takes_are_none(there: Site) -> None:
    named = f"model{'a' * 300}.safetensors"
    there.hub.add("acme/long", {"config.json": FILES["config.json"], named: WEIGHTS})
    with pytest.raises(UnsupportedFormatError):
        there.fetch(there.at_commit("acme/long"))


# --- the network ------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("announced", [False, True])
def test_broken_connection_is_resumed_where_it_broke(
    there: Site, reset: bool, announced: bool
) -> None:
    there.hub.faults[MODEL] = [fake_hub.truncated(40_000, reset=reset, announced=announced)]
    assert (there.fetch() / MODEL).read_bytes() == WEIGHTS
    first, second = there.hub.asked_for(MODEL)
    assert first.range is None
    assert second.range is not None
    begin = int(second.range.removeprefix("bytes=").removesuffix("-"))
    assert 0 < begin <= 40_000 if not reset else begin <= 40_000


def test_tries_that_bring_much_are_not_counted(there: Site) -> None:
    there.hub.faults[MODEL] = [fake_hub.truncated(4_000)] * 12
    assert (there.fetch(stall_timeout_s=3) / MODEL).read_bytes() == WEIGHTS


def test_tries_that_bring_little_end(there: Site) -> None:
    there.hub.faults[MODEL] = [fake_hub.truncated(10)] * 50
    with pytest.raises(NotReadyError, match="reached"):
        there.fetch()
    assert len(there.hub.asked_for(MODEL)) < 10


def test_tries_that_bring_nothing_end(there: Site) -> None:
    there.hub.faults[MODEL] = [fake_hub.truncated(0)] * 50
    with pytest.raises(NotReadyError, match="reached"):
        there.fetch()
    assert len(there.hub.asked_for(MODEL)) < 10


@pytest.mark.parametrize("fault", [fake_hub.without_ranges, fake_hub.status(416)])
def test_hub_that_knows_no_ranges_is_asked_for_the_whole(
    there: Site, fault: fake_hub.Fault
) -> None:
    there.cache.open_unfinished(there.source)
    there.part().write_bytes(WEIGHTS[:1000])
    there.hub.faults[MODEL] = [fault]
    assert (there.fetch() / MODEL).read_bytes() == WEIGHTS


def test_other_part_than_was_asked_for_is_not_taken(there: Site) -> None:
    there.hub.faults[MODEL] = [fake_hub.wrong_range]
    with pytest.raises(BadCheckpointError, match="part"):
        there.fetch()


def test_complete_part_is_checked_and_not_asked_for(there: Site) -> None:
    there.cache.open_unfinished(there.source)
    there.part().write_bytes(WEIGHTS)
    assert (there.fetch() / MODEL).read_bytes() == WEIGHTS
    assert there.hub.asked_for(MODEL) == []


@pytest.mark.parametrize("number", [408, 429, 500, 503])
def test_passing_refusal_is_tried_again(there: Site, number: int) -> None:
    there.hub.faults[MODEL] = [fake_hub.status(number, {"retry-after": 0})] * 2
    assert (there.fetch() / MODEL).read_bytes() == WEIGHTS


def test_429_with_a_long_wait_is_said_instead_of_waited_for(there: Site) -> None:
    there.hub.faults[MODEL] = [fake_hub.status(429, {"retry-after": 100_000})] * 9
    with pytest.raises(NotReadyError, match="429"):
        there.fetch()
    assert len(there.hub.asked_for(MODEL)) == 1


def test_listing_that_is_refused_for_now_is_not_ready(there: Site) -> None:
    there.hub.api_fault = fake_hub.status(503)
    with pytest.raises(NotReadyError, match="503"):
        there.look()


def test_hub_that_is_not_there_is_not_ready(there: Site) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(NotReadyError, match="reached"):
            there.look(endpoint=endpoint)


@pytest.mark.parametrize(
    ("source", "words"),
    [("hub:acme/none", "no repository"), (f"hub:{REPO}@v9", "no revision v9")],
)
def test_what_the_hub_does_not_know_is_a_bad_request(there: Site, source: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        there.look(source)
    assert caught.value.param == "source"


def test_file_that_is_listed_and_missing_is_a_bad_request(there: Site) -> None:
    there.hub.faults[MODEL] = [fake_hub.status(404)]
    with pytest.raises(InvalidRequestError, match="404"):
        there.fetch()


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"[]", b"{}", b"nonsense", b'{"sha": null, "siblings": []}', b"\xff\xfe"),
        b"[" * 100_000,
    ],
    ids=["nothing", "list", "empty", "nonsense", "null", "no text", "deep"],
)
def test_listing_that_is_none_is_refused(there: Site, body: bytes) -> None:
    def answer(handler: fake_hub.HubHandler, _data: bytes, _begin: int) -> None:
        handler.start(200, {"content-length": len(body)})
        handler.wfile.write(body)

    there.hub.api_fault = answer
    with pytest.raises(BadCheckpointError, match=r"hub\.endpoint"):
        there.look()


def test_hub_that_names_another_commit_is_refused(there: Site) -> None:
    asked = there.source
    there.hub.add(REPO, {**FILES, "config.json": FILES["config.json"] + b"\n"})
    there.hub.repositories[REPO].revisions = ("main", asked.revision)
    with pytest.raises(BadCheckpointError, match="another commit"):
        there.fetch(asked)


# --- B5 ---------------------------------------------------------------------------------------


def test_b5_gzip_bomb_is_not_opened(there: Site) -> None:
    there.hub.faults[MODEL] = [fake_hub.gzip_bomb] * 4
    with pytest.raises(BadCheckpointError, match="compressed"):
        there.fetch()
    there.hub.api_fault = fake_hub.gzip_bomb
    with pytest.raises(BadCheckpointError, match="compressed"):
        there.look()


def test_b5_endless_body_ends_at_the_listed_size(there: Site) -> None:
    there.hub.faults[MODEL] = [fake_hub.endless] * 4
    with pytest.raises(BadCheckpointError, match="more bytes"):
        there.fetch()
    there.hub.api_fault = fake_hub.endless
    with pytest.raises(BadCheckpointError, match="more bytes"):
        there.look()


@pytest.mark.parametrize("fault", [fake_hub.trickle, fake_hub.trickled_headers])
def test_b5_cve_2024_12886_trickle_is_a_stall(there: Site, fault: fake_hub.Fault) -> None:
    there.hub.faults[MODEL] = [fault] * 4
    with pytest.raises(NotReadyError, match="1024 bytes a second"):
        there.fetch(stall_timeout_s=0.3)
    there.hub.api_fault = fault
    with pytest.raises(NotReadyError, match="1024 bytes a second"):
        there.look(stall_timeout_s=0.3)


def test_b5_byte_cap_is_held_against_the_listing(there: Site) -> None:
    with pytest.raises(InsufficientCapacityError, match=r"hub\.max_bytes"):
        there.look(max_bytes=len(WEIGHTS))
    assert len(there.hub.asked) == 1
    there.look(max_bytes=sum(map(len, FILES.values())))


# --- B3, B4 -----------------------------------------------------------------------------------


@pytest.fixture
def stores() -> Iterator[fake_hub.FakeHub]:
    """What large files are redirected to: another host by its port."""
    with fake_hub.FakeHub().running() as store:
        store.add(REPO, FILES)
        yield store


def test_b4_token_goes_to_the_endpoint_and_not_to_the_store(
    there: Site, stores: fake_hub.FakeHub
) -> None:
    there.hub.token, there.hub.store = "hf_secret", stores.endpoint
    path = there.fetch(token="hf_secret", stores=("127.0.0.1",), are_stores_public=False)
    assert (path / MODEL).read_bytes() == WEIGHTS
    assert {asked.authorization for asked in there.hub.asked} == {"Bearer hf_secret"}
    assert [asked.authorization for asked in stores.asked] == [None]
    assert not any("secret" in str(asked.headers) for asked in stores.asked)


def test_b4_private_repository_without_a_token_says_what_to_set(there: Site) -> None:
    there.hub.token = "hf_secret"
    with pytest.raises(InvalidRequestError, match="HF_TOKEN"):
        there.look()
    with pytest.raises(InvalidRequestError, match="HF_TOKEN"):
        there.look(token="hf_wrong")


def test_b4_stored_token_of_the_user_is_not_used(
    there: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("hf_stored")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    there.fetch()
    assert {asked.authorization for asked in there.hub.asked} == {None}


def test_b3_store_of_the_public_hub_that_means_a_private_address_is_not_asked(
    there: Site, stores: fake_hub.FakeHub
) -> None:
    there.hub.store = stores.endpoint
    with pytest.raises(NotReadyError, match="private network"):
        there.fetch(stores=("127.0.0.1",), are_stores_public=True)
    assert stores.asked == []


def test_b3_redirect_off_the_host_is_not_followed(there: Site, stores: fake_hub.FakeHub) -> None:
    there.hub.store = stores.endpoint
    with pytest.raises(BadCheckpointError, match=r"hub\.stores"):
        there.fetch(token="hf_secret")
    assert stores.asked == []


@pytest.mark.parametrize(
    "location",
    [
        "http://evil.example/x",
        "http://127.0.0.1@evil.example/x",
        "http://0x7f000001/x",
        "http://2130706433/x",
        "http://[::ffff:127.0.0.1]/x",
        "http://169.254.169.254/latest/meta-data",
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "//evil.example/x",
        "http://127.0.0.1.evil.example/x",
        "http:\\\\evil.example",
    ],
)
def test_b3_cve_2026_25960_no_spelling_of_another_place_is_followed(
    there: Site, location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = list[str]()
    resolved = socket.getaddrinfo

    def look_up(host: str, *args: object, **kwargs: object) -> object:
        hosts.append(host)
        return resolved(host, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    there.hub.faults[MODEL] = [fake_hub.redirect(location)] * 9
    with pytest.raises((BadCheckpointError, NotReadyError, InvalidRequestError)):
        there.fetch(stores=("hub.example",))
    assert set(hosts) == {"127.0.0.1"}
    there.hub.api_fault = fake_hub.redirect(location)
    with pytest.raises((BadCheckpointError, NotReadyError, InvalidRequestError)):
        there.look()
    assert set(hosts) == {"127.0.0.1"}


def test_b3_listing_is_never_taken_from_a_store(there: Site, stores: fake_hub.FakeHub) -> None:
    there.hub.api_fault = fake_hub.redirect(f"{stores.endpoint}/api/models/{REPO}")
    with pytest.raises(BadCheckpointError, match="redirects"):
        there.look(stores=("127.0.0.1",))
    assert stores.asked == []


def test_b3_endless_redirects_end(there: Site) -> None:
    here = f"/{REPO}/resolve/main/{MODEL}"
    there.hub.faults[MODEL] = [fake_hub.redirect(here)] * 200
    with pytest.raises(NotReadyError, match="TooManyRedirects"):
        there.fetch()


@pytest.mark.parametrize(
    "address",
    [
        *("10.0.0.1", "169.254.169.254", "127.0.0.1", "224.0.0.1"),
        *("::1", "fe80::1", "fec0::1", "ff0e::1", "::10.0.0.1", "::ffff:10.0.0.1"),
        *("2002:a00:1::", "64:ff9b::a00:1", "64:ff9b:1::a00:1"),
    ],
)
def test_b3_public_hub_that_means_a_private_address_is_not_asked(
    there: Site, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rebound(_host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        public = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", port))
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return [public, (family, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", rebound)
    with pytest.raises(NotReadyError, match="private network"):
        there.look(is_public=True, endpoint="https://huggingface.co")


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800::1", "64:ff9b::5db8:d822"])
def test_b3_public_addresses_are_connected_to(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [(socket.AF_UNSPEC, socket.SOCK_STREAM, 6, "", (address, 443))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert transport.resolve("huggingface.co", 443, must_be_public=True) == [address]


@pytest.mark.parametrize("host", ["a..hf.co", f"{'a' * 64}.hf.co"])
def test_b3_redirect_to_a_name_that_is_none_is_not_ready(host: str) -> None:
    with pytest.raises(NotReadyError, match="resolved"):
        transport.resolve(host, 443, must_be_public=True)


def test_b3_connection_goes_to_the_address_that_was_checked(
    there: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(there.hub.endpoint.rpartition(":")[2])
    looked_up = list[str]()
    resolved = socket.getaddrinfo

    def name_once(host: str, *args: object, **kwargs: object) -> object:
        looked_up.append(host)
        return resolved(host if host != "hub.test" else "127.0.0.1", *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", name_once)
    there.fetch(endpoint=f"http://hub.test:{port}")
    assert {asked.headers["host"] for asked in there.hub.asked} == {f"hub.test:{port}"}
    # The name is looked up once a request; the connection is made by number.
    assert looked_up.count("hub.test") == len(there.hub.asked)
    assert set(looked_up) <= {"hub.test", "127.0.0.1"}


@pytest.fixture
def certified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A hub that shows a certificate of hub.test, whose issuer is believed."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subject = ("-subj", "/CN=hub.test", "-addext", "subjectAltName=DNS:hub.test")
    form = ("-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    subprocess.run(
        ["openssl", "req", *form, *subject, "-keyout", key, "-out", certificate, "-days", "2"],
        check=True,
        capture_output=True,
    )
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    resolved = socket.getaddrinfo

    def named(host: str, *args: Any, **kwargs: Any) -> Any:
        return resolved("127.0.0.1" if host.endswith(".test") else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", named)
    transport._trusted.cache_clear()
    with site(tmp_path) as found:
        found.hub.speak_tls(certificate, key)
        yield found
    transport._trusted.cache_clear()


def test_b3_certificate_is_the_names_though_the_address_is_connected_to(certified: Site) -> None:
    port = certified.hub.endpoint.rpartition(":")[2]
    path = certified.fetch(endpoint=f"https://hub.test:{port}")
    assert (path / MODEL).read_bytes() == WEIGHTS


@pytest.mark.parametrize("host", ["other.test", "127.0.0.1"])
def test_b3_certificate_of_another_name_is_not_believed(certified: Site, host: str) -> None:
    port = certified.hub.endpoint.rpartition(":")[2]
    with pytest.raises(NotReadyError, match="reached"):
        certified.look(endpoint=f"https://{host}:{port}", token="hf_secret")
    assert certified.hub.asked == []


def test_address_that_cannot_be_reached_leaves_the_others(
    there: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = socket.getaddrinfo

    def two(host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        found = resolved(host, port, *args, **kwargs)
        if host != "127.0.0.1":  # of a connection
            return found
        return [(*found[0][:4], ("127.0.0.2", port)), *found]  # nobody listens there

    monkeypatch.setattr(socket, "getaddrinfo", two)
    assert (there.fetch() / MODEL).read_bytes() == WEIGHTS


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL])
def test_file_that_cannot_be_copied_is_downloaded(
    there: Site, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    there.fetch()
    there.hub.add("acme/other", {**FILES, "tokenizer.json": b"{ }"})

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    assert (there.fetch(there.at_commit("acme/other")) / MODEL).read_bytes() == WEIGHTS
    assert len(there.hub.asked_for(MODEL)) == 2


def test_offline_mode_asks_nobody(there: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NotReadyError, match="HF_HUB_OFFLINE"):
        there.look()
    assert there.hub.asked == []


# --- B7 ---------------------------------------------------------------------------------------


def test_b7_disk_below_its_mark_is_said_before_anything_is_stored(there: Site) -> None:
    with pytest.raises(InsufficientCapacityError, match="bytes of disk"):
        there.look(keep_free_bytes=2**62)
    with pytest.raises(InsufficientCapacityError, match="bytes of disk"):
        there.fetch(keep_free_bytes=2**62)
    assert there.files() == set()


def test_b7_mark_holds_while_others_take_of_the_disk(
    there: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_bytes = iter([1 << 30])  # as long as the listing is checked
    usage = shutil.disk_usage(there.directory.parent)

    def left(_path: object) -> object:
        return usage._replace(free=next(free_bytes, 2000))

    monkeypatch.setattr(shutil, "disk_usage", left)
    with pytest.raises(InsufficientCapacityError, match="bytes of disk"):
        there.fetch(keep_free_bytes=1000)
    assert there.hub.asked_for(MODEL) == []
    assert there.files() == set()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_b7_disk_that_fails_in_the_middle_is_said_and_a_full_one_gets_its_room_back(
    there: Site, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, left = os.pwrite, [20_000]

    def fail(descriptor: int, data: bytes, position: int) -> int:
        if left[0] <= 0:
            raise OSError(number, os.strerror(number))
        count = write(descriptor, data[: left[0]], position)
        left[0] -= count
        return count

    monkeypatch.setattr(os, "pwrite", fail)
    expected = NotReadyError if number == errno.EIO else InsufficientCapacityError
    with pytest.raises(expected, match=os.strerror(number)):
        there.fetch()
    assert there.cache.find(there.source) is None
    assert there.part().exists() == (number == errno.EIO)
    left[0] = 1 << 30
    assert (there.fetch() / MODEL).read_bytes() == WEIGHTS


def test_b7_room_is_set_aside_before_the_bytes_come(tmp_path: Path) -> None:
    with (tmp_path / "part").open("wb") as file:
        disk.set_aside(file.fileno(), 1 << 20)
        held = os.fstat(file.fileno())
    assert held.st_size == 0
    # File systems that cannot hold room say nothing.
    assert held.st_blocks * 512 in (0, *range(1 << 20, (1 << 20) + 65536 + 1, 512))


def test_b7_disk_without_that_room_is_full_and_not_fuller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fstatvfs

    def full(descriptor: int) -> os.statvfs_result:
        return os.statvfs_result((*real(descriptor)[:4], 0, *real(descriptor)[5:]))

    with (tmp_path / "part").open("wb") as file:
        monkeypatch.setattr(os, "fstatvfs", full)
        with pytest.raises(OSError, match="No space"):
            disk.set_aside(file.fileno(), 1 << 20)
        assert os.fstat(file.fileno()).st_blocks == 0


# --- what is shared ---------------------------------------------------------------------------


def identity(path: Path) -> tuple[int, ...]:
    """What tells that a file is still the one that was checked; a link to it changes the last."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def test_commit_of_the_same_files_is_the_same_tree(there: Site) -> None:
    first = there.fetch()
    there.hub.add(REPO, FILES, seed="README")
    assert there.fetch() == first
    assert len(there.hub.asked_for(MODEL)) == 1


def test_file_of_another_download_is_copied_and_not_linked(there: Site) -> None:
    first = there.fetch()
    before = identity(first / MODEL)
    there.hub.add("acme/other", {**FILES, "tokenizer.json": b"{ }"})
    second = there.fetch(there.at_commit("acme/other"))
    assert second != first
    assert (second / MODEL).read_bytes() == WEIGHTS
    assert len(there.hub.asked_for(MODEL)) == 1
    assert identity(first / MODEL) == before


def test_damaged_file_of_another_download_is_downloaded(there: Site) -> None:
    first = there.fetch()
    (first / MODEL).write_bytes(bytes(len(WEIGHTS)))
    there.hub.add("acme/other", {**FILES, "tokenizer.json": b"{ }"})
    second = there.fetch(there.at_commit("acme/other"))
    assert (second / MODEL).read_bytes() == WEIGHTS


# --- B8 ---------------------------------------------------------------------------------------


class KilledError(BaseException):
    """The process ends here: nothing in the code under test catches this."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], AbstractContextManager[None]]:
    """Returns a context in which the n-th call that changes the disk does not happen."""
    counted = [
        (os, "pwrite"), (os, "fsync"), (os, "ftruncate"), (os, "copy_file_range"),
        (Path, "rename"), (Path, "mkdir"), (Path, "unlink"), (shutil, "rmtree"),
    ]  # fmt: skip

    @contextmanager
    def killing(number: int) -> Iterator[None]:
        left = [number]

        def counting(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    raise KilledError
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for owner, name in counted:
                patch.setattr(owner, name, counting(getattr(owner, name)))
            yield

    return killing


def test_b8_kill_at_any_step_leaves_nothing_wrong_and_nothing_behind(
    there: Site, kill_at: Callable[[int], AbstractContextManager[None]]
) -> None:
    others = {"tokenizer.json": b"{ }", "model-2.safetensors": WEIGHTS[::-1]}
    index = {"weight_map": {"a": MODEL, "b": "model-2.safetensors"}}
    files = {**FILES, **others, "model.safetensors.index.json": json.dumps(index).encode()}
    there.hub.add("acme/other", files)
    kept, other = there.source, there.at_commit("acme/other")
    there.fetch()  # of which a file is copied
    for number in range(1, 200):
        try:
            with kill_at(number):
                there.fetch(other)
        except KilledError:
            found = there.cache.find(other)
            assert found is None or {path.name for path in found.path.iterdir()} == set(files)
        else:
            assert number > 15  # steps that a download has
            break
        path = there.fetch(other)
        assert {entry.name: entry.read_bytes() for entry in path.iterdir()} == files
        assert not any(file.startswith("unfinished") for file in there.files())
        for step in range(1, 200):
            try:
                with kill_at(step):
                    there.cache.sweep([kept])
            except KilledError:
                assert there.cache.find(kept) is not None
            else:
                break
        assert there.cache.find(other) is None
        assert len(list((there.directory / "trees").iterdir())) == 1
        assert not any(file.startswith("unfinished") for file in there.files())
    else:
        pytest.fail("the download never came to its end")


# --- sweeping ---------------------------------------------------------------------------------


def test_sweep_removes_what_no_source_needs(there: Site) -> None:
    there.fetch()
    there.hub.add("acme/other", {**FILES, "tokenizer.json": b"{ }"})
    other = there.at_commit("acme/other")
    kept = there.fetch(other)
    there.cache.remember(HubSource.parse(f"hub:{REPO}"), there.source)
    there.cache.remember(HubSource.parse("hub:acme/other"), other)
    there.cache.sweep([other])
    assert there.cache.find(there.source) is None
    assert there.cache.find(other) is not None
    assert {file.split("/")[1] for file in there.files() if file.startswith("trees")} == {kept.name}
    assert there.cache.remembered(HubSource.parse(f"hub:{REPO}")) == []
    assert there.cache.remembered(HubSource.parse("hub:acme/other")) == [other]
    there.cache.sweep([])
    assert there.files() == {"revisions.json"}


def test_sweep_keeps_what_broke_off_for_a_source_that_is_needed(there: Site) -> None:
    there.cache.open_unfinished(there.source)
    there.part().write_bytes(WEIGHTS[:1000])
    there.cache.sweep([there.source])
    assert there.part().exists()
    there.cache.sweep([])
    assert there.files() == set()


def test_tree_shared_by_two_commits_stays_for_the_other(there: Site) -> None:
    first, path = there.source, there.fetch()
    there.hub.add(REPO, FILES, seed="README")
    second = there.source
    assert there.fetch() == path
    there.cache.sweep([second])
    assert there.cache.find(first) is None
    assert there.cache.find(second) is not None


@pytest.mark.parametrize("left", ["", "{", "[]", '{"tree": "x"}', '{"tree": 1, "files": {}}'])
def test_record_that_cannot_be_read_means_not_here(there: Site, left: str) -> None:
    there.fetch()
    (there.directory / "records" / f"{there.source.key}.json").write_text(left)
    assert there.cache.find(there.source) is None
    assert there.cache.find(there.source) is None
    assert (there.fetch() / MODEL).read_bytes() == WEIGHTS


def test_tree_that_lacks_a_file_means_not_here(there: Site) -> None:
    (there.fetch() / MODEL).unlink()
    assert there.cache.find(there.source) is None
    assert (there.fetch() / MODEL).read_bytes() == WEIGHTS
