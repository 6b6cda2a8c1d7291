"""Who cannot use a process that waits, and what the command says of it."""

from weightstream.cli.serve.standby import Report, hints
from weightstream.serve_integration.standby.check import (
    Deployments,
    Fresh,
    Probe,
    sort_out,
    start_lines,
)


def serves(**options: dict[str, object]) -> dict[str, object]:
    found = {
        name: {"deployment_config": {"ray_actor_options": one}} for name, one in options.items()
    }
    return {"applications": {"app": {"deployments": found}}}


def test_a_runtime_environment_needs_a_process_of_its_own() -> None:
    env = {"pip": ["einops"], "env_vars": {"SECRET": "hidden"}}
    found = sort_out(
        serves(Plain={"num_cpus": 1}, Empty={"runtime_env": {}}, Own={"runtime_env": env})
    )
    assert found == Deployments(3, (Fresh("app", "Own", "runtime_env: env_vars, pip"),))
    assert not found.all_fresh


def test_it_is_off_only_when_no_deployment_gains() -> None:
    assert not sort_out({"applications": {}}).all_fresh
    assert sort_out(serves(Own={"runtime_env": {"working_dir": "gcs://x"}})).all_fresh


def test_the_command_says_how_to_start_ray_and_what_is_off() -> None:
    lacking = Probe("a" * 56, ("torch",), 2, 1)
    report = Report([], [lacking], Deployments(1, (Fresh("app", "Own", "runtime_env: pip"),)))
    said = "\n".join(hints(report))
    assert "app#Own starts fresh processes (runtime_env: pip)" in said
    assert "none is started" in said
    assert all(line in said for line in start_lines())
    assert "RAY_preload_python_modules=torch,ray.serve._private.replica,aiohttp,fastapi" in said


def test_the_command_says_nothing_where_all_is_well() -> None:
    assert hints(Report([], [Probe("a" * 56, (), 2, 1)], Deployments(2))) == []
