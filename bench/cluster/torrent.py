"""One end of a libtorrent transfer over the loopback device; see `pair`.

`python -m weightstream.bench.cluster.torrent seed|leech TORRENT FOLDER PORT [SEED_PORT]`. Lines on
stdin: `go`, then anything to end; on stdout: `ready`, and of a leech the seconds that it took.
Settings are the fastest of many that were tried: TCP only, large buffers, pieces of 4 MiB, and a
seed that trusts its file (with `seed_mode` it hashes every piece on its first upload).
"""

import sys
import time
from typing import Any

import libtorrent as lt

_SETTINGS: dict[str, Any] = {
    "enable_dht": False,
    "enable_lsd": False,
    "enable_upnp": False,
    "enable_natpmp": False,
    "enable_incoming_utp": False,
    "enable_outgoing_utp": False,
    "in_enc_policy": 2,
    "out_enc_policy": 2,
    "ssrf_mitigation": False,
    "allow_multiple_connections_per_ip": True,
    "max_out_request_queue": 2000,
    "max_allowed_in_request_queue": 4000,
    "send_buffer_watermark": 8 << 20,
    "unchoke_slots_limit": -1,
    "alert_mask": 0,
}


def _params(port: str) -> lt.session_params:
    params = lt.session_params()
    settings: Any = {**_SETTINGS, "listen_interfaces": f"127.0.0.1:{port}"}
    params.settings = settings
    return params


def main() -> None:
    """Seed or load a torrent."""
    role, torrent, folder, port, *seeds = sys.argv[1:]
    session = lt.session(_params(port))
    params = lt.load_torrent_file(torrent)
    params.save_path = folder
    flags = lt.torrent_flags
    params.flags &= ~flags.auto_managed & ~flags.paused
    params.flags |= flags.no_verify_files | flags.disable_dht | flags.disable_lsd
    if role == "seed" and params.ti is not None:
        params.have_pieces = params.verified_pieces = [True] * params.ti.num_pieces()
    handle = session.add_torrent(params)
    while handle.status().state in (
        lt.torrent_status.checking_files,
        lt.torrent_status.checking_resume_data,
    ):
        time.sleep(0.01)
    print("ready", flush=True)
    sys.stdin.readline()
    if role == "leech":
        began_s = time.monotonic()
        handle.connect_peer(("127.0.0.1", int(seeds[0])))
        while not handle.status().is_seeding:
            time.sleep(0.005)
        print(time.monotonic() - began_s, flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
