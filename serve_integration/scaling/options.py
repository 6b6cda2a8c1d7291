"""What a deployment is given: Serve's own configuration objects, set for the concurrency policy."""

import math
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from weightstream.errors import UsageError
from weightstream.serve_integration.scaling.policy import Policy

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingConfig

POLICY = "weightstream.serve_integration.scaling.serve_policy:ConcurrencyPolicy"


def autoscaling(
    *,
    target: float,
    max: int,
    min: int = 0,
    step: int = 1,
    headroom: int = 0,
    scale_down_after_s: float = 60.0,
    idle_after_s: float = 300.0,
    calm_s: float = 10.0,
    growth: float | None = None,
    trend_s: float = 30.0,
    target_tokens: float | None = None,
    tokens_metric: str = "tokens",
    initial: int | None = None,
    observe_s: float = 0.5,
) -> "AutoscalingConfig":
    """Return the `autoscaling_config` of a deployment that scales by the requests inside it.

    `Policy` says what each wish means. `initial` replicas start with the deployment, `min` of them
    if it is not given. `observe_s` is how often every handle and replica reports to the controller.
    Serve's own delays and factors are off. A wish that cannot be is a `UsageError`.

    Where requests wait, a larger size is ordered once two reports agree on it: the first one with a
    new replica counts its requests as running now and as queued at the last reading (Ray 2.60).
    """
    policy = Policy(
        target=target,
        min=min,
        max=max,
        step=step,
        headroom=headroom,
        scale_down_after_s=scale_down_after_s,
        idle_after_s=idle_after_s,
        confirm_s=2 * observe_s,
        calm_s=calm_s,
        growth=growth,
        trend_s=trend_s,
        target_tokens=target_tokens,
    )
    if not 0.1 <= observe_s <= 60:  # the controller decides every 0.1 s
        raise UsageError(f"bad scaling policy: observe_s is {observe_s}; it is 0.1 to 60 seconds")
    if initial is not None and not min <= initial <= max:
        raise UsageError(f"bad scaling policy: initial {initial} is not within {min} to {max}")
    return _config(policy, tokens_metric, initial, observe_s)


def _config(
    policy: Policy, tokens_metric: str, initial: int | None, observe_s: float
) -> "AutoscalingConfig":
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    with warnings.catch_warnings():
        # Ray 2.60 calls this field deprecated in favour of variables that nothing reads yet.
        warnings.filterwarnings(
            "ignore", message=".*metrics_interval_s", category=DeprecationWarning
        )
        return AutoscalingConfig(
            min_replicas=policy.min,
            max_replicas=policy.max,
            initial_replicas=initial,
            target_ongoing_requests=policy.target,
            upscale_delay_s=0,
            downscale_delay_s=0,
            downscale_to_zero_delay_s=0,
            metrics_interval_s=observe_s,
            # A mean over the window would show a burst bit by bit; its peak shows it at once.
            look_back_period_s=2 * observe_s,
            aggregation_function="max",
            policy=AutoscalingPolicy(
                policy_function=POLICY,
                policy_kwargs=asdict(policy) | {"tokens_metric": tokens_metric},
            ),
        )


def bounded_queue(
    waiting: int, *, at_once: int | None = None, retry_after_s: float = 5.0
) -> dict[str, Any]:
    """Return a deployment's options that answer 429 with Retry-After where too many wait.

    `waiting` requests may queue in each proxy and handle; the next is refused at once instead of
    running into a time-out. `at_once` is how many a replica takes at most: the policy's target or
    more.

        @serve.deployment(autoscaling_config=autoscaling(...), **bounded_queue(64, at_once=4))
    """
    from ray.serve.config import BackpressureConfig

    if waiting < 1:
        raise UsageError(f"bad queue: waiting is {waiting}; it is 1 or more")
    if at_once is not None and at_once < 1:
        raise UsageError(f"bad queue: a replica takes {at_once} requests at once; it is 1 or more")
    if not 0 <= retry_after_s < math.inf:
        raise UsageError(f"bad queue: retry_after_s is {retry_after_s}; it is 0 seconds or more")
    return {
        "max_queued_requests": waiting,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=retry_after_s),
    } | ({} if at_once is None else {"max_ongoing_requests": at_once})
