"""Where the agent listens; apart from its client, which a process without an agent never loads."""

from pathlib import Path

from weightstream.settings import Settings

SOCKET = "agent.sock"
CONTROL_SOCKET = "agent-control.sock"


def find_agent(settings: Settings) -> Path | None:
    """Return the data socket of this user's agent, when there is one; it may be a dead agent's."""
    if settings.agent == "off":
        return None
    path = settings.run_directory / SOCKET
    return path if path.exists() else None
