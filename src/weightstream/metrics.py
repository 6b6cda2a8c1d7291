"""Every metric, in one place: name, unit, labels. Served by whoever has an HTTP server.

Names follow the folders: fetch, write_back, store, files, fuse, peer, agent. All are stable
unless the help says otherwise.
"""

from prometheus_client import REGISTRY, Counter, Gauge

FETCHED_BYTES = Counter(
    "weightstream_fetch_bytes_total", "Bytes that arrived for readers.", ["source"]
)
FETCHED_RANGES = Counter("weightstream_fetch_ranges_total", "Ranges completed.", ["source"])
RETRIES = Counter("weightstream_fetch_retries_total", "Attempts after the first.", ["error"])
HEDGES = Counter("weightstream_fetch_hedges_total", "Straggling ranges asked for twice.")
HEDGES_WON = Counter("weightstream_fetch_hedges_won_total", "Hedges that beat their original.")
IN_FLIGHT = Gauge("weightstream_fetch_ranges_in_flight", "Ranges in flight now.")
CONCURRENCY = Gauge("weightstream_fetch_concurrency", "Ranges that may be in flight now.")
BUDGET_USED_BYTES = Gauge("weightstream_memory_budget_used_bytes", "Charged to the memory budget.")
WRITTEN_BYTES = Counter("weightstream_write_back_bytes_total", "Bytes written to the store.")
SKIPPED_CHUNKS = Counter(
    "weightstream_write_back_skipped_chunks_total",
    "Chunks that were not kept, because keeping them would have made somebody wait or failed.",
    ["reason"],
)
QUEUED_CHUNKS = Gauge("weightstream_write_back_queued_chunks", "Chunks waiting to be written.")

PARKED_READS = Gauge("weightstream_files_parked_reads", "Reads of a mount that wait for bytes.")

FUSE_REQUESTS = Counter("weightstream_fuse_requests_total", "Questions of the kernel.", ["op"])
FUSE_ERRORS = Counter(
    "weightstream_fuse_errors_total", "Answers that were an error; EIO is logged.", ["errno"]
)
FUSE_READ_BYTES = Counter(
    "weightstream_fuse_read_bytes_total",
    "Bytes read through the server, cached or direct; passthrough files are read without it.",
    ["way"],
)
FUSE_OPENS = Counter(
    "weightstream_fuse_opens_total", "Files opened: passthrough, cached or direct.", ["way"]
)
FUSE_SWITCHES = Counter(
    "weightstream_fuse_switches_total", "Files that completed after somebody had looked at them."
)

PEER_BYTES = Counter(
    "weightstream_peer_bytes_total",
    "Bytes of chunks of the exchange: received from peers, sent to them, read from the origin.",
    ["way"],
)
PEER_FAILURES = Counter(
    "weightstream_peer_failures_total",
    "Answers of peers that did not come (broken) or were wrong; chunks that came wrong from "
    "several (mixed) or otherwise than published (unpublished); files that came wrong (refuted).",
    ["cause"],
)

AGENT_BYTES = Counter("weightstream_agent_bytes_total", "Bytes given to clients on this node.")
AGENT_RANGES = Counter("weightstream_agent_ranges_total", "Ranges that clients asked for.")
AGENT_CLIENTS = Gauge("weightstream_agent_connections", "Connections of clients.")
AGENT_FAILURES = Counter(
    "weightstream_agent_failures_total",
    "In a client: times that it gave the agent up for a while, dead, frozen or unable to read.",
)
AGENT_FALLBACK_BYTES = Counter(
    "weightstream_agent_fallback_bytes_total",
    "In a client: bytes of ranges left to the origin, because no agent gave them.",
)
AGENT_PREFETCHES = Counter(
    "weightstream_agent_prefetches_total", "Prefetches that ended, by outcome.", ["outcome"]
)


def samples() -> dict[str, float]:
    """Return the value of every metric of ours: `weightstream_fuse_requests_total{op="read"}`."""
    found = {}
    for metric in REGISTRY.collect():
        for sample in metric.samples:
            if sample.name.startswith("weightstream_") and not sample.name.endswith("_created"):
                labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
                found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found
