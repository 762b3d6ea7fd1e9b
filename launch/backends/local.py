"""Here: N processes on this machine, started and restarted by `launch.runner` itself."""

from launch import spec as spec_lib
from launch.plan import Command, Group, Plan, Supervisor


def render(spec: spec_lib.JobSpec) -> Plan:
    count = spec.num_processes
    environments = []
    for index in range(count):
        environment = {**spec.env, **spec.cpu_env}
        if count > 1:
            environment |= {
                "GVJAX_COORDINATOR": "localhost:{port}",
                "GVJAX_NUM_PROCESSES": str(count),
                "GVJAX_PROCESS_ID": str(index),
            }
            if spec.hardware.kind == "gpu":
                share = spec.num_devices // count
                ids = range(index * share, (index + 1) * share)
                environment["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, ids))
        environments.append(environment)
    group = Group(
        argv=spec.command,
        environments=tuple(environments),
        secrets=spec.secrets,
        workdir=spec.workdir,
        retries=spec.retries,
        grace=spec.grace,
    )
    return Plan(title=spec.title(), steps=(group,), secrets=spec.secrets)


def status(spec: spec_lib.JobSpec) -> Plan:
    return Plan(title=spec.title("status of"), steps=(Supervisor("status"),))


def logs(spec: spec_lib.JobSpec) -> Plan:
    tail = Command(("tail", "-n", "200", "-F", "log"), "follow the log")
    return Plan(title=spec.title("logs of"), steps=(tail,))


def stop(spec: spec_lib.JobSpec) -> Plan:
    return Plan(title=spec.title("stop"), steps=(Supervisor("stop"),))
