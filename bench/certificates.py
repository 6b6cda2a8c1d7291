"""A throw-away certificate authority and server certificate, made with the openssl program."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from weightstream.bench.errors import BenchError


@dataclass(frozen=True, slots=True)
class Certificates:
    """Paths of the authority's certificate (for clients) and of the server's pair."""

    authority: Path
    certificate: Path
    key: Path


def make_certificates(folder: Path, addresses: tuple[str, ...]) -> Certificates:
    """Write a new authority, and a certificate for `addresses` and localhost, into `folder`."""
    program = shutil.which("openssl")
    if program is None:
        raise BenchError("openssl is missing: apt-get install openssl")
    folder.mkdir(parents=True, exist_ok=True)
    made = Certificates(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    names = ",".join(["DNS:localhost", *(f"IP:{address}" for address in addresses)])
    extensions = folder / "server.ext"
    extensions.write_text(f"subjectAltName={names}\nextendedKeyUsage=serverAuth\n")
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    _openssl(
        program, "req", "-x509", *curve, "-days", "30", "-subj", "/CN=bench throw-away CA",
        "-keyout", str(folder / "ca.key"), "-out", str(made.authority),
    )  # fmt: skip
    request = folder / "server.csr"
    _openssl(
        program, "req", *curve, "-subj", "/CN=localhost",
        "-keyout", str(made.key), "-out", str(request),
    )  # fmt: skip
    _openssl(
        program, "x509", "-req", "-in", str(request), "-days", "30", "-extfile", str(extensions),
        "-CA", str(made.authority), "-CAkey", str(folder / "ca.key"), "-CAcreateserial",
        "-out", str(made.certificate),
    )  # fmt: skip
    return made


def _openssl(program: str, *arguments: str) -> None:
    result = subprocess.run([program, *arguments], capture_output=True, text=True)
    if result.returncode != 0:
        raise BenchError(f"openssl {arguments[0]}: {result.stderr.strip()[-300:]}")
