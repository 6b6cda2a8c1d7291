"""`weightstream serve ...` where there is no cluster."""

from tests.cli.conftest import Cli
from tests.kit.s3 import free_port


def test_an_address_where_nobody_listens_is_said_at_once(cli: Cli) -> None:
    address = f"127.0.0.1:{free_port()}"
    line = cli.error("serve", "status", "--address", address, code=8)  # Ray itself tries for 60 s
    assert f"no Ray cluster at {address}" in line
    assert "refused" in line
