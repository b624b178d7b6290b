"""What every checkpoint of a run records of it, whatever its step."""

from dataclasses import asdict
from typing import Any

from train.settings.command_line import as_dict
from train.startup.course import warm_up_facts
from train.startup.open_run import OpenRun
from train.startup.plan_start import StartPlan
from train.startup.position import Reading


def manifest_facts(run: OpenRun, plan: StartPlan) -> dict[str, Any]:
    """Model, tokenizer, data, configuration, and what the position and the warm-up count."""
    config, tokens = plan.config, run.request.tokens
    return {
        "model": asdict(config.model.architecture()),
        "tokenizer": tokens.tokenizer_spec,
        "data_identity": tokens.identity,
        "config": as_dict(config),
        **warm_up_facts(plan.course.course),
        **Reading.of(config, tokens.identity).facts(),
        "world_size": run.ranks.world_size,
    }
