"""The class that Serve's controller calls: it hands the pure policy what Serve knows.

Serve pickles this module's class by value and all that it imports by name, so the module is thin,
and weightstream has to be installed where the controller runs.

Serve wraps every policy. With nothing running its wrapper starts `ceil(upscaling_factor)` replicas
and does not ask the policy before one of them is up; and it reaches zero only by way of one. That
suits a policy that divides by the number of replicas. This one does not, so on its first call it
takes its wrapper's place, for its own deployment alone; Serve's bounds and target capacity still
hold. Where that place is not found, in another Ray, the wrapper stays and a warning says so: from
zero, one replica is then started first.

`autoscaling` refuses what cannot be before anything is deployed. Wishes that come past it, from a
configuration file, are first read here, and here nothing may raise: it would leave Ray 2.60 with
half a deployment that ends every round of its control loop, and nothing could be deployed, scaled
or deleted any more. So the deployment keeps its size, under Serve's own rules, and an error says
why.
"""

import logging
import time
from typing import TYPE_CHECKING, Any

from weightstream.errors import UsageError
from weightstream.serve_integration.registry import Deployment
from weightstream.serve_integration.scaling.measured import Starts
from weightstream.serve_integration.scaling.policy import Observed, Policy, State, decide

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

logger = logging.getLogger("ray.serve")


class ConcurrencyPolicy:
    """Decides for one deployment. Serve makes it from `policy_kwargs`: the fields of `Policy`."""

    def __init__(self, tokens_metric: str = "tokens", **wishes: Any) -> None:
        self._policy, self._wrong = _read(wishes)
        self._tokens_metric = tokens_metric
        self._state = State()
        self._starts = Starts()
        self._called = False

    def __call__(self, ctx: "AutoscalingContext") -> tuple[int, dict[str, Any]]:
        """Return how many replicas there should be; there is nothing for Serve to keep."""
        first, self._called = not self._called, True
        if self._policy is None:
            if first:
                logger.error(f"{ctx.deployment_id} does not scale: {self._wrong}")
            return ctx.target_num_replicas, {}
        if first:
            _take_place(self, ctx)
        seen = self._observed(ctx, self._policy)
        decision, self._state = decide(seen, self._policy, self._state)
        return decision.replicas, {}

    def _observed(self, ctx: "AutoscalingContext", policy: Policy) -> Observed:
        # Serve's current_time is the wall clock, which can be set back.
        now_s = time.monotonic()
        inside, queued = float(ctx.total_num_requests), float(ctx.total_queued_requests)
        deployment = Deployment(ctx.app_name or "", ctx.deployment_name)
        return Observed(
            now_s=now_s,
            running=max(0.0, inside - queued),  # each is the peak of its own window
            queued=queued,
            ready=ctx.current_num_replicas,
            ordered=ctx.target_num_replicas,
            start_s=self._starts.expected_s(deployment, now_s) if policy.trend_s else 0.0,
            tokens=self._tokens(ctx) if policy.target_tokens else None,
        )

    def _tokens(self, ctx: "AutoscalingContext") -> float | None:
        """Return what the replicas' `record_autoscaling_stats` say, None while none has spoken."""
        reported = (ctx.aggregated_metrics or {}).get(self._tokens_metric)
        return sum(reported.values()) if reported else None


def _read(wishes: dict[str, Any]) -> tuple[Policy | None, str]:
    try:
        return Policy(**wishes), ""
    except UsageError as error:
        return None, str(error)
    except TypeError as error:  # a field that is missing, unknown, or no number
        return None, f"bad scaling policy: {error}"


def _take_place(policy: ConcurrencyPolicy, ctx: "AutoscalingContext") -> None:
    """Put a policy where its deployment's state holds the wrapper around it."""
    state = getattr(getattr(ctx, "_total_num_requests_value", None), "__self__", None)
    outermost = getattr(state, "_policy", None)
    # A deployment with gangs has one more around the wrapper, which rounds to whole gangs.
    for owner, name in ((state, "_policy"), (outermost, "_base_scaling_policy")):
        if getattr(getattr(owner, name, None), "__wrapped__", None) is policy:
            setattr(owner, name, policy)
            return
    logger.warning(
        f"{ctx.deployment_id}: this Ray keeps its own rules around the scaling policy; "
        "from zero it will start one replica before any other"
    )
