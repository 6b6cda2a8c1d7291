"""The doctor: what it looks at, what it says of limits."""

import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tests.cli.conftest import Cli
from tests.kit.models import tiny
from tests.kit.s3 import S3Server

from weightstream.cli.doctor import machine
from weightstream.cli.doctor.disk import file_system


def rows(report: Any) -> dict[str, Any]:
    return {row["name"]: row for row in report["checks"]}


def test_every_row_that_is_not_ok_names_limit_and_remedy(cli: Cli) -> None:
    report = cli.json("doctor")
    assert report["healthy"]
    assert {"machine", "store", "mount", "software"} == {row["group"] for row in report["checks"]}
    for row in report["checks"]:
        assert row["found"]
        assert row["status"] == "ok" or (row["limits"] and row["remedy"]), row
    found = rows(report)
    for name in ("kernel", "memory", "huge pages", "open files", "fuse", "space", "python"):
        assert name in found
    assert found["directory"]["status"] == found["locks"]["status"] == "ok"


def test_probes_leave_nothing_behind(cli: Cli) -> None:
    cli.store.mkdir()
    cli("doctor")
    assert list(cli.store.iterdir()) == []


def test_store_that_cannot_be_written_fails(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    report = cli.json("doctor", "--store", tmp_path / "file" / "store", code=1)
    assert not report["healthy"]
    row = rows(report)["directory"]
    assert row["status"] == "fail"
    assert "is not a directory" in row["found"]


def test_store_in_memory_is_a_warning(cli: Cli) -> None:
    row = rows(cli.json("doctor", "--store", "/dev/shm/weightstream-doctor-test"))["file system"]
    assert (row["status"], row["found"]) == ("warn", "tmpfs")
    assert not Path("/dev/shm/weightstream-doctor-test").exists()


def test_small_budget_is_a_warning(cli: Cli) -> None:
    report = cli.json("doctor", "-o", "memory_budget=64MiB")
    assert rows(report)["memory"]["status"] == "warn"


def test_way_to_an_origin(cli: Cli, s3: S3Server) -> None:
    s3.put_files("models/doctor", tiny())
    cli.env |= s3.env
    found = rows(cli.json("doctor", "s3://models/doctor"))
    assert found["listing"]["found"].startswith("2 files")
    assert found["connections"]["found"].startswith("1 of 1 ")
    assert "plain HTTP" in found["tls"]["found"]
    assert found["first byte"]["status"] == "ok"


def test_wrong_credentials_fail_with_a_remedy(cli: Cli, s3: S3Server) -> None:
    cli.env |= s3.env | {"AWS_SECRET_ACCESS_KEY": "wrong-wrong-wrong"}
    report = cli.json("doctor", "s3://models/doctor", code=1)
    row = rows(report)["listing"]
    assert row["status"] == "fail"
    assert row["remedy"]
    assert rows(report)["connections"]["status"] == "ok"


def test_unreachable_origin_fails(cli: Cli, s3: S3Server) -> None:
    cli.env |= s3.env | {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}
    found = rows(cli.json("doctor", "s3://models/doctor", code=1))
    assert found["listing"]["status"] == found["connections"]["status"] == "fail"


@pytest.fixture
def tls_address(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Serve TLS on loopback; yield the URL of nothing much, and the authority's file."""
    key, certificate = certificate_for("127.0.0.1")
    (tmp_path / "key.pem").write_bytes(key)
    (tmp_path / "cert.pem").write_bytes(certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve_tls, args=(listener, context), name="tls")
        thread.start()
        yield f"https://127.0.0.1:{listener.getsockname()[1]}/m", tmp_path / "cert.pem"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def serve_tls(listener: socket.socket, context: ssl.SSLContext) -> None:
    while True:
        try:
            plain, _ = listener.accept()
        except OSError:
            return
        plain.settimeout(5)
        try:
            with context.wrap_socket(plain, server_side=True) as secured:
                secured.recv(4096)
                secured.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        except OSError:
            plain.close()


def certificate_for(address: str) -> tuple[bytes, bytes]:
    """Return key and self-signed certificate of an IP address, valid for thirty days."""
    import ipaddress

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    alternatives = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name)
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(30))
    signed = builder.add_extension(alternatives, critical=False).sign(key, hashes.SHA256())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    pkcs8 = serialization.PrivateFormat.PKCS8
    return key.private_bytes(pem, pkcs8, plain), signed.public_bytes(pem)


def test_tls_of_an_unknown_authority_is_a_warning(cli: Cli, tls_address: tuple[str, Path]) -> None:
    uri, authority = tls_address
    row = rows(cli.json("doctor", uri, code=1))["tls"]
    assert row["status"] == "warn"
    assert "self-signed" in row["found"]
    cli.env["SSL_CERT_FILE"] = str(authority)
    row = rows(cli.json("doctor", uri, code=1))["tls"]
    assert row["status"] == "ok"
    assert "TLSv1.3, certificate valid for" in row["found"]


def test_old_kernel_and_few_files_are_warnings() -> None:
    assert machine.kernel("6.1.0-31-amd64").status == "warn"
    assert machine.kernel("6.9.3").status == machine.kernel("7.0-rc1").status == "ok"
    assert machine.open_files(256, 4096).remedy == "ulimit -n 4096"
    assert machine.open_files(20_000, 20_000).status == "ok"


def test_huge_pages(tmp_path: Path) -> None:
    assert machine.huge_pages(tmp_path).status == "warn"
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    assert machine.huge_pages(tmp_path).found == "madvise"
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    assert machine.huge_pages(tmp_path).status == "warn"


MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:26 / /dev/shm rw,nosuid - tmpfs tmpfs rw
31 22 0:27 / /mnt/my\\040disk rw - xfs /dev/vdb rw
32 31 0:28 / /mnt/my\\040disk/remote rw - nfs4 host:/x rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/x", "ext4"),
        ("/dev/shm/x", "tmpfs"),
        ("/dev/shmx", "ext4"),
        ("/mnt/my disk/a", "xfs"),
        ("/mnt/my disk/remote/a", "nfs4"),
    ],
)
def test_file_system_is_the_innermost_mount(path: str, kind: str) -> None:
    assert file_system(Path(path), MOUNTS) == kind
