"""The process that compiles: a request in JSON as its argument, one JSON object a line on its output."""

import json
import sys
from typing import Any

import jax

from gvjax import config
from gvjax.plan import compiling, fitting, report, targets
from gvjax.usage import ExitCode


def main(request: dict[str, Any]) -> int:
    """Plans; returns 0, or 64 where the config or the installation is at fault (`error` says how)."""

    def say(**event: Any) -> None:
        print(json.dumps(event), flush=True)

    if not request["full"]:
        jax.config.update("jax_optimization_level", "O0")
    try:
        settings = config.load(request["config"], request["overrides"])
        if isinstance(settings, config.GapConfig):
            raise config.ConfigError(
                f"{request['config']} is a measurement of a gap; plan a config of `gvjax run` or `gvjax compare`"
            )
        target = targets.target(request["on"], request["slices"])
        devices = compiling.devices(target)
        for planned in fitting.plan(
            settings,
            target,
            devices,
            only=request["only"],
            search=request["search"],
            max_batch=request["max_batch"],
            watch=lambda name: say(compiling=name),
        ):
            say(stage=report.stage_json(planned, target))
    except (config.ConfigError, compiling.UnavailableError, ValueError) as error:
        if not isinstance(error, (config.ConfigError, compiling.UnavailableError)):
            raise
        say(error=str(error))
        return ExitCode.USER_ERROR
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
